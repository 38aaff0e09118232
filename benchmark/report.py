"""Draws the learning curves of a matrix and prints its table, from the CSV files that run.py left.

    python benchmark/report.py benchmark/first_look.toml --output docs/first_look.png

Lines are means over seeds, bands and brackets 95 % bootstrap intervals of the mean (10,000 resamples of the seeds).
"""

import csv
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = ["tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown"]
SMOOTHING = 5  # hundredths of the run in the running mean of each curve, and in the final return


@dataclass
class Args:
    matrix: tyro.conf.Positional[Path]  # TOML file of run.py
    output: Path | None = None  # PNG file of the curves


def read_curve(path, total_timesteps):
    """Mean return after each hundredth of a run, (100,); a hundredth without a finished episode keeps the one before."""
    with open(path) as file:
        rows = [(int(row["step"]), float(row["return"])) for row in csv.DictReader(line for line in file if line[0] != "#")]
    steps, returns = np.array(rows).T
    grid = np.arange(1, 101) * total_timesteps // 100
    curve = returns[np.maximum(np.searchsorted(steps, grid, side="right") - 1, 0)]
    kernel = np.ones(SMOOTHING)
    return np.convolve(curve, kernel)[:100] / np.convolve(np.ones(100), kernel)[:100]


def mean_and_interval(curves):
    """Seeds × points → mean (points,), 95 % bootstrap interval (2, points)."""
    resamples = np.random.default_rng(0).integers(0, len(curves), (10_000, len(curves)))
    return curves.mean(0), np.percentile(curves[resamples].mean(1), (2.5, 97.5), axis=0)


def main():
    args = tyro.cli(Args)
    try:
        matrix = tomllib.loads(args.matrix.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        sys.exit(f"report.py: can't read {args.matrix}: {error}")
    results = Path(__file__).resolve().parent / "results" / args.matrix.stem
    total_timesteps, tasks = matrix["total_timesteps"], matrix["tasks"]
    steps = np.arange(1, 101) * total_timesteps / 100
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    print(f"| {args.matrix.stem}, return at {total_timesteps:,} steps | " + " | ".join(matrix["arms"]) + " |")
    print("|---|" + "---|" * len(matrix["arms"]))
    for axis, task in zip(axes.flat, tasks):
        cells = []
        for color, arm in zip(COLORS, matrix["arms"]):
            files = sorted(results.glob(f"{arm}__{task.replace('/', '-')}__*.csv"))
            if not files:
                cells.append("–")
                continue
            mean, (low, high) = mean_and_interval(np.array([read_curve(path, total_timesteps) for path in files]))
            axis.plot(steps, mean, color=color, label=arm)
            axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
            cells.append(f"{mean[-1]:.0f} [{low[-1]:.0f}, {high[-1]:.0f}], {len(files)} seeds")
        axis.set(title=task, xlabel="environment steps", ylabel="episodic return")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(3, 3))
        axis.grid(alpha=0.3)
        print(f"| {task} | " + " | ".join(cells) + " |")
    axes.flat[0].legend()
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main()
