"""benchmark/run.py and report.py on a matrix of two short runs, the matrices' flags, the variants, throughput.py."""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from rliable import library as rliable_library
from rliable import metrics as rliable_metrics

import bpo_continuous
import ppo_baseline

ROOT = Path(__file__).resolve().parent.parent
MATRIX = """
total_timesteps = 4096
seeds = [1]
tasks = ["Pendulum-v1"]
[arms]
small = "bpo_continuous.py --num-steps 512 --num-minibatches 8 --checkpoint-every 1 --eval-episodes 1"
mean = "bpo_continuous.py --num-steps 512 --num-minibatches 8 --checkpoint-every 1 --eval-episodes 1 --no-use-median"
"""


@pytest.fixture
def repository(tmp_path):
    """A copy of the scripts, so that results land beside it."""
    (tmp_path / "benchmark").mkdir()
    for name in ("bpo_continuous.py", "benchmark/run.py", "benchmark/report.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "short.toml").write_text(MATRIX)
    return tmp_path


def run(repository, *command):
    return subprocess.run([sys.executable, *command], cwd=repository, capture_output=True, text=True)


@pytest.mark.slow
def test_a_matrix_is_resumed_after_its_time_limit_and_reported(repository):
    killed = repository / "benchmark/scratch/short/small__Pendulum-v1__1/runs/killed_before_its_first_checkpoint"
    killed.mkdir(parents=True)
    (killed / "episodes.csv").write_text("step,return,length,wall_time\n")
    stopped = run(repository, "benchmark/run.py", "short.toml", "--time-limit", "8s", "--shard", "1/2")
    if stopped.returncode:  # the time was too short for the run, as it should be on most machines
        assert "0 of 1 runs finished" in stopped.stdout
    assert run(repository, "benchmark/run.py", "short.toml").returncode == 0
    results = sorted(path.name for path in (repository / "benchmark/results/short").iterdir())
    assert results == ["mean__Pendulum-v1__1.csv", "small__Pendulum-v1__1.csv"]
    assert len(list(killed.parent.glob("*/checkpoint.pt"))) == 1  # resumed, not repeated
    lines = (repository / "benchmark/results/short/small__Pendulum-v1__1.csv").read_text().splitlines()
    shares = [float(share) for line in lines[2:] if (share := line.split(",")[4])]
    assert shares and all(0 <= share <= 1 for share in shares)
    assert lines[0].startswith("# python bpo_continuous.py --num-steps 512") and "torch==" in lines[0]
    assert lines[1] == "step,return,episodes,approx_kl,clipfrac,entropy"
    assert sum(int(line.split(",")[2]) for line in lines[2:]) == 20
    again = run(repository, "benchmark/run.py", "short.toml")
    assert "2 runs, 2 finished before" in again.stdout

    report = run(repository, "benchmark/report.py", "short.toml", "--output", "short.png")
    assert "| Pendulum-v1 | -" in report.stdout and (repository / "short.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_result_names_the_commit_at_which_its_run_began(repository):
    def git(*command):
        command = ["git", "-c", "user.name=a", "-c", "user.email=b", *command]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "before")
    before = git("rev-parse", "--short", "HEAD")
    process = subprocess.Popen([sys.executable, "benchmark/run.py", "short.toml", "--arms", "small"], cwd=repository)
    while not list(repository.glob("benchmark/scratch/short/small*/runs/*/episodes.csv")):
        assert process.poll() is None
        time.sleep(0.1)
    git("commit", "-q", "--allow-empty", "-m", "after")
    assert process.wait() == 0
    result = repository / "benchmark/results/short/small__Pendulum-v1__1.csv"
    assert result.read_text().splitlines()[0].endswith(f"| commit {before}")


@pytest.mark.slow
def test_a_run_at_work_elsewhere_is_left_alone(repository):
    first = subprocess.Popen([sys.executable, "benchmark/run.py", "short.toml", "--arms", "small"], cwd=repository, text=True,
                             stdout=subprocess.PIPE)  # fmt: skip
    while not list(repository.glob("benchmark/scratch/short/*/runs/*/checkpoint.pt")):
        assert first.poll() is None
    second = run(repository, "benchmark/run.py", "short.toml", "--arms", "small")
    assert second.returncode == 1 and "small__Pendulum-v1__1 is at work elsewhere" in second.stdout
    assert "1 of 1 runs finished" in first.communicate()[0]


STUB = """
import os, sys, time
from pathlib import Path
folder = Path("runs") / f"begun{len(list(Path('.').glob('runs/*')))}"
folder.mkdir(parents=True)
time.sleep(4 if "--seed 2" in " ".join(sys.argv) else 1)  # its process then comes to runs that the other has finished
(folder / "episodes.csv").write_text("step,return,length,wall_time\\n10,1.0,1,1\\n")
(folder / "cores").write_text(str(os.sched_getaffinity(0)))
"""
STUB_MATRIX = """
total_timesteps = 10
seeds = [1, 2, 3]
tasks = ["Pendulum-v1"]
[arms]
stub = "stub.py"
"""


def test_two_at_once_share_a_matrix_and_the_cores(repository):
    (repository / "stub.py").write_text(STUB)
    (repository / "stub.toml").write_text(STUB_MATRIX)
    command = [sys.executable, "benchmark/run.py", "stub.toml", "--jobs", "1"]
    options = dict(cwd=repository, text=True, stdout=subprocess.PIPE)
    options["env"] = os.environ | {"TMPDIR": str(repository)}  # locks of cores of its own: a matrix may be at work beside it
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert sum(output.count("finished stub") for output in outputs) == 3
    folders = list((repository / "benchmark/scratch/stub").glob("*/runs/*"))
    assert len(folders) == 3 and len(list((repository / "benchmark/results/stub").iterdir())) == 3  # none was run twice
    if len(os.sched_getaffinity(0)) > 1:
        first, second = (next(folder for folder in folders if f"__{seed}/" in str(folder)) for seed in (1, 2))
        assert (first / "cores").read_text() != (second / "cores").read_text()


def test_a_run_begun_with_other_flags_is_not_gone_on_with(repository):
    (repository / "short.toml").write_text(MATRIX.replace("4096", "400_000"))
    first = subprocess.Popen([sys.executable, "benchmark/run.py", "short.toml", "--arms", "small"], cwd=repository)
    while not list(repository.glob("benchmark/scratch/short/*/runs/*/checkpoint.pt")):
        assert first.poll() is None
    first.terminate()
    first.wait()
    (repository / "short.toml").write_text(MATRIX.replace("4096", "800_000"))
    second = run(repository, "benchmark/run.py", "short.toml", "--arms", "small")
    assert second.returncode == 1 and "small__Pendulum-v1__1 was begun with other flags" in second.stderr
    assert not (repository / "benchmark/results").exists()


@pytest.mark.slow
def test_language_models_leave_their_evaluations_too(repository):
    pytest.importorskip("transformers", reason="requirements-llm.txt is not installed")
    (repository / "gbpo_llm.py").write_text((ROOT / "gbpo_llm.py").read_text())
    matrix = (
        'total_timesteps = 3\nsteps_flag = "--total-batches"\nseeds = [1, 2]\ntasks = ["largest_digit"]\ntask_flag = "--task"\n'
    )
    (repository / "words.toml").write_text(matrix + '[arms]\ngbpo = "gbpo_llm.py --num-prompts 2 --eval-prompts 20"\n')
    assert run(repository, "benchmark/run.py", "words.toml").returncode == 0
    lines = (repository / "benchmark/results/words/gbpo__largest_digit__1.csv").read_text().splitlines()
    assert lines[1] == "step,return,episodes,approx_kl,clipfrac,entropy,pass@1,pass@1_error,mean,mean_error"
    rows = [line.split(",") for line in lines[2:]]
    assert [(row[0], row[1] != "", row[6] != "") for row in rows] == [("0", 0, 1), ("1", 1, 0), ("2", 1, 0), ("3", 1, 1)]
    code = "from pathlib import Path; import report; print(report.evaluations_table(Path('words.toml')))"
    table = subprocess.run([sys.executable, "-c", code], cwd=repository, env=os.environ | {"PYTHONPATH": "benchmark"},
                           capture_output=True, text=True).stdout  # fmt: skip
    rewards = [float(line.split(",")[1]) for path in sorted((repository / "benchmark/results/words").iterdir())
               for line in path.read_text().splitlines()[5:6]]  # fmt: skip
    assert f"| gbpo | {sum(rewards) / 2:.3f} | 0" in table and table.strip().endswith("| 2 |")


@pytest.mark.slow
def test_the_committed_pages_are_what_the_committed_results_give(tmp_path):
    for folder in ("benchmark", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("scratch"))
    shutil.copy(ROOT / "README.md", tmp_path)
    report = run(tmp_path, "benchmark/report.py")
    assert report.returncode == 0, report.stderr
    assert report.stderr.startswith("report.py: reading arm 1 of ")
    for page in ("README.md", "docs/results.md", "docs/search.md"):
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()


def test_the_map_s_measures_are_those_that_its_matrix_tells(tmp_path, monkeypatch):
    """By hand; a failed run counts as the worst setting, an unfinished block not at all."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    report = importlib.import_module("report")
    monkeypatch.setattr(report, "BENCHMARK", tmp_path)
    matrix = tmp_path / "stability.toml"
    text = (ROOT / "benchmark/stability.toml").read_text()
    matrix.write_text(text.replace("300_000", "100"))
    arms = tomllib.loads(text)["arms"]
    (tmp_path / "results/stability").mkdir(parents=True)
    assert report.read_map(matrix)[0] == {}

    def write(arm, task, seed, score):
        (tmp_path / f"results/stability/{arm}__{task}__{seed}.csv").write_text(f"step,return,episodes\n100,{score},1\n")

    for i, arm in enumerate(arms):
        loss, settings, *_, epochs = arm.split("-")
        score = {"bpo": 100, "ppo": 90 if int(epochs) < 20 else 0}[loss] * (1 if settings == "b" else 0.5)
        if arm != "ppo-b-1e-4-5":  # failed
            write(arm, "HalfCheetah-v4", 71, score)
        if i < 30:
            write(arm, "Hopper-v4", 71, 1.0)
    returns, axes = report.read_map(matrix)
    assert set(returns) == {"HalfCheetah-v4"} and returns["HalfCheetah-v4"].shape == (2, 2, 5, 4, 1)
    share, worst, many_epochs, sensitivity = report.map_measures(report.map_scores(returns))
    assert share.tolist() == [[1.0, 0.0], [0.45, 0.0]]
    assert worst.tolist() == [[1.0, 0.5], [0.0, 0.0]] and many_epochs.tolist() == [[1.0, 0.5], [0.0, 0.0]]
    assert not sensitivity.any()
    rows = report.map_table(returns, axes).splitlines()
    assert rows[2] == "| share of points at 0.8 or more | settings of bpo_continuous.py | 1.00 | 0.45 | 0.55 |"
    # On two tasks whose best points are different ones a single point can't have both.
    other = {"HalfCheetah-v4": returns["HalfCheetah-v4"].copy(), "Hopper-v4": returns["HalfCheetah-v4"].copy()}
    other["HalfCheetah-v4"][0, 0], other["Hopper-v4"][0, 0] = 50, 50
    other["HalfCheetah-v4"][0, 0, 0, 0], other["Hopper-v4"][0, 0, 1, 1] = 100, 100
    assert report.map_measures(report.map_scores(other))[3, 0, 0] == pytest.approx(1 - 0.75, abs=0.01)


def test_long_runs_are_told_by_the_rule_of_their_matrix(tmp_path, monkeypatch):
    """By hand: who is ahead at 1, 3 and 10 million steps, σ from the entropy, and a run below half of its best return."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    report = importlib.import_module("report")
    monkeypatch.setattr(report, "BENCHMARK", tmp_path)
    matrix = tmp_path / "long.toml"
    matrix.write_text((ROOT / "benchmark/long.toml").read_text())
    (tmp_path / "results/long").mkdir(parents=True)
    assert report.collapses(report.read_results(matrix)) == "Of 0 runs none collapsed."

    def write(arm, seed, *returns):
        """Three returns: until 1 million steps, until 3, and then; σ is 0.5 until 3 million, then 0.25."""
        rows = []
        for step in range(1, 101):
            part = (step > 10) + (step > 30)
            entropy = 3 * np.log(0.5 if part < 2 else 0.25) + 1.5 * np.log(2 * np.pi * np.e)
            rows.append(f"{step}00000,{returns[part]},1,0.1,0.1,{entropy:.5f}")
        text = "step,return,episodes,approx_kl,clipfrac,entropy\n" + "\n".join(rows) + "\n"
        (tmp_path / f"results/long/{arm}__Hopper-v4__{seed}.csv").write_text(text)

    for seed in (81, 82, 83):
        write("bpo", seed, 1000 + seed, 2000 + seed, 3000 + seed)
    write("ppo", 81, 1500, 2000, 990)  # collapsed
    write("ppo", 82, 1500, 2200, 1100)
    results = report.read_results(matrix).only()
    row = "| Hopper-v4 | 1,000,000 | 1082 [1081, 1083], n=3 | 1500, n=2 | – | 0.50 | 0.50 |"
    assert report.long_table(results).splitlines()[2:][0] == row  # no verdict of two seeds
    write("ppo", 83, 1500, 2100, 1050)
    results = report.read_results(matrix).only()
    rows = [row.split(" | ") for row in report.long_table(results).splitlines()[2:]]
    assert [row[4] for row in rows] == ["ppo", "neither", "bpo"] and [row[5] for row in rows] == ["0.50", "0.50", "0.25"]
    assert report.collapses(results) == "Of 6 runs 1 collapsed: ppo on Hopper-v4."


def test_a_result_without_an_episode_is_passed_over(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    report = importlib.import_module("report")
    monkeypatch.setattr(report, "BENCHMARK", tmp_path)
    header = "step,return,episodes,approx_kl,clipfrac,pass@1,pass@1_error,mean,mean_error\n"
    rows = "0,,0,,,0.1,0.01,0.1,0.01\n10,1.0,1,0.1,0.1,,,,\n10,2.0,1,0.1,0.1,0.3,0.01,0.2,0.01\n"
    empty = {"none-1": "", "none-2": header, "none-3": f"# python\n{header}", "some-2": f"# python\n{header}"}
    (tmp_path / "results/words").mkdir(parents=True)
    for name, text in (empty | {"some-1": f"# python\n{header}{rows}", "some-3": header + rows}).items():
        arm, seed = name.split("-")
        (tmp_path / f"results/words/{arm}__digit__{seed}.csv").write_text(text)
    matrix = tmp_path / "words.toml"
    matrix.write_text('total_timesteps = 10\nseeds = [1, 2, 3]\ntasks = ["digit"]\n[arms]\nnone = "a.py"\nsome = "a.py"\n')
    results = report.read_results(matrix)
    assert report.returns_table(results).splitlines()[2] == "| digit | 1.2, n=2 |"  # of 1, 1, 1, 1, 2, as curves are smoothed
    row = "| some | 2.000 | 0.100 → 0.300 | +0.200 | 0.100 → 0.200 | +0.100 | 2 |"
    assert report.evaluations_table(matrix).splitlines()[2:] == [row]
    report.draw_curves(results, tmp_path / "curves.png")
    lines = [line for line in capsys.readouterr().err.splitlines() if "no episode" in line]
    assert len(lines) == 4  # once each, though two tables need them
    assert all(any(f"{name.replace('-', '__digit__')}.csv" in line for line in lines) for name in empty)


def test_a_line_a_minute_says_how_far_the_report_is(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    report = importlib.import_module("report")
    monkeypatch.setattr(report, "said", float("-inf"))
    for now in range(0, 150, 20):
        monkeypatch.setattr(report.time, "monotonic", lambda now=now: now)
        report.say(f"at {now}")
    assert capsys.readouterr().err.splitlines() == ["report.py: at 0", "report.py: at 60", "report.py: at 120"]


def test_the_report_s_measures_are_rliable_s(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    report, generator = importlib.import_module("report"), np.random.default_rng(0)
    for seeds, others, tasks in ((3, 3, 1), (10, 5, 11), (4, 10, 6), (1, 2, 3)):
        for ours, theirs in (
            (generator.normal(size=(seeds, tasks)), generator.normal(size=(others, tasks))),
            (generator.integers(0, 3, (seeds, tasks)) / 2, generator.integers(0, 3, (others, tasks)) / 2),  # with ties
        ):
            thresholds = np.linspace(-1, 2, 31)
            assert report.interquartile_mean(ours)[0] == rliable_metrics.aggregate_iqm(ours)
            assert report.probability_of_improvement(ours, theirs)[0] == rliable_metrics.probability_of_improvement(
                ours, theirs
            )
            expected = rliable_library.score_distributions(ours, thresholds)
            assert (report.shares_above(ours, thresholds) == expected).all()


def test_a_line_a_minute_says_which_runs_are_at_work(repository):
    script = repository / "benchmark/run.py"
    script.write_text(script.read_text().replace("LINE_EVERY = 60", "LINE_EVERY = 0.3"))
    (repository / "stub.py").write_text(STUB)
    (repository / "stub.toml").write_text(STUB_MATRIX.replace("[1, 2, 3]", "[1]"))
    lines = run(repository, "benchmark/run.py", "stub.toml").stdout.splitlines()
    assert any(line.endswith("0 of 1 runs finished, at work: stub__Pendulum-v1__1") for line in lines)


@pytest.mark.parametrize(
    "flags",
    [
        ["nowhere.toml"],
        [],
        ["short.toml", "--arms", "none"],
        ["short.toml", "--time-limit", "soon"],
        ["short.toml", "--shard", "a"],
        ["short.toml", "--shard", "0/2"],
        ["short.toml", "--shard", "3/2"],
        ["short.toml", "--shard", "3/3"],
        ["short.toml", "--jobs", "0"],
        ["short.toml", "--arms", "small", "mena"],
        ["lacking.toml"],
    ],
)
def test_bad_input_is_answered_in_one_line(repository, flags):
    (repository / "lacking.toml").write_text("seeds = [1]")
    result = run(repository, "benchmark/run.py", *flags)
    assert result.returncode == 1 and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seeds =", "seed =", "unknown key seed:"),
        ("[arms]", 'step_flag = "--steps"\n[arms]', "unknown key step_flag:"),
        ("4096", '"4096"', "total_timesteps must be int, but is str"),
        ("4096", "4e3", "total_timesteps must be int, but is float"),
        ("[1]", "1", "seeds must be list[int], but is int"),
        ("[1]", '[1, "2"]', "seeds must be list[int], but is list[int | str]"),
        ("[1]", "[]", "seeds must be list[int], but is empty"),
        ('["Pendulum-v1"]', '"Pendulum-v1"', "tasks must be list[str], but is str"),
        ('["Pendulum-v1"]', "[]", "tasks must be list[str], but is empty"),
        ("[arms]", "[arms]\nlarge = 3", "arms.large must be str, but is int"),
        ("[arms]", "[arms]\nlarge = ['bpo_continuous.py']", "arms.large must be str, but is list[str]"),
        ("[arms]", "task_flag = 1\n[arms]", "task_flag must be str, but is int"),
        ("[arms]", "arms = {}\n[changes]", "arms must be dict, but is empty"),
        ("[arms]", "arms = ['bpo']\n[changes]", "arms must be dict, but is list[str]"),
        ("--num-steps 512", "--num-steps '512", "arms.small: No closing quotation"),
        ('v1"]', 'v1]', 'tasks = ["Pendulum-v1]'),
        ('v1"]', 'v1"', 'tasks = ["Pendulum-v1"'),
        ("[1]", "[1 2]", "seeds = [1 2]"),
        ("4096", "'4096", "total_timesteps = '4096"),
        ("4096", "4,096", "total_timesteps = 4,096"),
        ('checkpoint-every 1 --eval-episodes 1"\n', "checkpoint-every 1\n", 'small = "bpo_continuous.py'),
        ("seeds = [1]", "seeds = [1]\nseeds = [2]", "seeds = [2]"),
        ("4096", "40\0", "total_timesteps = 40"),
    ],
)  # fmt: skip
def test_a_wrong_matrix_is_answered_with_its_file_and_key(old, new, named, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    path = tmp_path / "short.toml"
    path.write_text(MATRIX.replace(old, new, 1))
    with pytest.raises(SystemExit) as exit:
        importlib.import_module("run").read_matrix(path)
    line = str(exit.value)
    assert line.startswith(f"run.py: {path}: ") and named in line and "\n" not in line


@pytest.mark.parametrize("path", sorted((ROOT / "benchmark").glob("*.toml")), ids=lambda path: path.stem)
def test_every_arm_of_a_matrix_has_flags_its_script_knows(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    variants = importlib.import_module("variants")
    scripts = {"bpo_continuous.py": bpo_continuous, "ppo_baseline.py": ppo_baseline, "benchmark/variants.py": bpo_continuous}
    for arm in tomllib.loads(path.read_text())["arms"].values():
        script, *flags = shlex.split(arm)
        assert (ROOT / script).is_file()
        if script in scripts:
            if script == "benchmark/variants.py":
                names = flags.pop(0).split(",")
                script = "ppo_baseline.py" if names[0] == "ppo" else script
                assert set(names) <= {"ppo", *variants.VARIANTS}
            tyro.cli(scripts[script].Args, args=flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        "one_sided,dead_zone,relative_temperature,epsilon_per_dimension,mean_entropy,reevaluate,rollout_advantages",
        "ppo,reevaluate",
    ],
)
def test_variants_train_compiled_and_together(names, tmp_path):
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", "512", "--num-steps", "256", "--num-minibatches", "4"]
    flags += ["--update-epochs", "2", "--compile", "--eval-episodes", "1"]
    trained = run(tmp_path, str(ROOT / "benchmark/variants.py"), names, *flags)
    assert trained.returncode == 0 and "learning curve" in trained.stdout and "fails" not in trained.stdout, trained.stderr
    assert run(tmp_path, str(ROOT / "benchmark/variants.py"), "nonsense").returncode == 1
    (run_dir,) = (tmp_path / "runs").iterdir()
    resumed = run(tmp_path, str(ROOT / "bpo_continuous.py"), "--resume", str(run_dir))
    assert resumed.returncode == 1 and f"is a run of variants-{names.replace(',', '-')}" in resumed.stderr


@pytest.fixture
def variants(monkeypatch):
    """The variants' functions; the scripts are themselves again afterwards."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    for script in (bpo_continuous, ppo_baseline):
        for name in ("update", "total_loss", "bpo_loss", "target_ratio", "gae"):
            if hasattr(script, name):
                monkeypatch.setattr(script, name, getattr(script, name))
        for name in ("entropy", "get_value", "get_values"):
            if hasattr(script.Agent, name):
                monkeypatch.setattr(script.Agent, name, getattr(script.Agent, name))
    module = importlib.import_module("variants")
    monkeypatch.setattr(module, "bpo", bpo_continuous)
    return module.VARIANTS


def seen_in_an_update(action_dim, **changes):
    """What the first minibatch of an update, which is the whole rollout, saw: the arguments of bpo_loss, its value and A."""
    torch.manual_seed(0)
    args = bpo_continuous.Args(num_minibatches=1, update_epochs=1, temperature=1e-6, **changes)
    agent, seen, bpo_loss = bpo_continuous.Agent(3, action_dim, args), [], bpo_continuous.bpo_loss
    obs, actions = torch.randn(64, 3), torch.randn(64, action_dim)
    with torch.no_grad():
        logprobs = agent.log_prob(obs, actions) + 0.3 * torch.randn(64)
        advantages = 1 + torch.randn(64)
        returns = agent.get_values(obs)[0] + advantages

    def look(*inputs):
        seen.append((*inputs, bpo_loss(*inputs).detach()))
        return seen[-1][-1]

    bpo_continuous.bpo_loss = look
    step = lambda agent, _, args, *minibatch: bpo_continuous.total_loss(agent, args, *minibatch)[1]  # noqa: E731
    bpo_continuous.update(agent, None, [obs, actions, logprobs, returns], args, step)
    bpo_continuous.bpo_loss = bpo_loss
    return *(tensor.detach() if torch.is_tensor(tensor) else tensor for tensor in seen[0]), advantages


def test_one_sided_with_ppo_s_advantages_is_ppo(variants):
    variants["one_sided"]()
    variants["ppo_advantages"]()
    ratio, advantages, _, epsilon, _, loss, rollout = seen_in_an_update(2)
    rollout = (rollout - rollout.mean()) / rollout.std()
    torch.testing.assert_close(advantages.sort().values, rollout.sort().values, rtol=1e-4, atol=1e-5)
    assert (advantages * (ratio - 1) > epsilon * advantages.abs()).any()
    constant = (advantages * (1 + epsilon * advantages.sign())).mean()  # E[Aρ*]
    torch.testing.assert_close(loss, ppo_baseline.ppo_loss(ratio, advantages, epsilon) + constant)


def test_centred_advantages_have_targets_of_mean_one(variants):
    variants["centred_advantages"]()
    _, advantages, median_advantages, *_ = seen_in_an_update(2)
    assert abs(advantages.mean()) < 1e-6
    assert abs(median_advantages.sign().mean()) <= 2 / 64  # the median is one of the 64


def test_advantages_centred_over_the_minibatch_have_targets_of_mean_one(variants):
    seen, bpo_loss = [], bpo_continuous.bpo_loss
    bpo_continuous.bpo_loss = lambda *args: seen.append(args) or bpo_loss(*args)
    variants["centred_minibatch"]()
    seen_in_an_update(2)
    _, advantages, median_advantages, epsilon, temperature = seen[0]
    assert abs(advantages.mean()) < 1e-6
    ratios = bpo_continuous.target_ratio(median_advantages, epsilon, temperature)
    assert abs(ratios.mean() - 1) <= 2 * epsilon / 64  # the median is one of the 64


def test_the_mean_entropy_is_that_of_one_dimension(variants):
    entropy = bpo_continuous.Agent(3, 6, bpo_continuous.Args()).entropy()
    variants["mean_entropy"]()
    torch.testing.assert_close(bpo_continuous.Agent(3, 6, bpo_continuous.Args()).entropy(), entropy / 6)


@pytest.mark.parametrize("script", [bpo_continuous, ppo_baseline])
def test_estimates_are_made_anew_before_each_epoch_but_the_first(script, variants, monkeypatch):
    monkeypatch.setattr(sys.modules["variants"], "bpo", script)
    seen, total_loss, states, rollouts = [], script.total_loss, [], []

    def spy(agent, args, *minibatch):
        seen.append(minibatch)
        return total_loss(agent, args, *minibatch)

    script.total_loss = spy
    variants["reevaluate"]()
    torch.manual_seed(0)
    args = script.Args(num_minibatches=2, update_epochs=3)
    agent, value = script.Agent(4, 2, args), script.Agent.get_value if script is ppo_baseline else script.Agent.get_values
    states, ends = torch.randn(2, 8, 4, 4), torch.zeros(2, 8, 4)

    def returns():
        values, next_values = (found if script is ppo_baseline else found[0] for found in (value(agent, obs) for obs in states))
        advantages = script.gae(rollouts[0], values, next_values, *ends, args.gamma, args.gae_lambda)
        return [values.flatten(), advantages.flatten(), (advantages + values).flatten()]

    rollouts.append(torch.randn(8, 4))
    weights = torch.nn.Parameter(script.parameters_to_vector(agent.parameters()).detach())
    script.vector_to_parameters(weights.data, agent.parameters())
    optimizer, expected = torch.optim.Adam([weights], lr=1e-2, eps=1e-5, fused=True), []

    def step(agent, optimizer, args, *minibatch):
        if len(seen) % 2 == 0:
            with torch.no_grad():
                expected.append(returns())
        return script.step(agent, optimizer, args, *minibatch)

    with torch.no_grad():
        first = returns()
    batch = [
        states[0].flatten(0, 1),
        torch.randn(32, 2),
        torch.full((32,), -3.0),
        *(first if script is ppo_baseline else first[2:]),
    ]
    script.update(agent, optimizer, batch, args, step)
    assert len(seen) == 6 and len(expected) == 3
    for epoch, tensors in enumerate(expected):
        for i, tensor in enumerate(tensors if script is ppo_baseline else tensors[2:]):
            trained_on = torch.cat([minibatch[3 + i] for minibatch in seen[2 * epoch : 2 * epoch + 2]])
            assert torch.equal(trained_on.sort().values, tensor.sort().values)
    assert not torch.equal(expected[0][2], expected[1][2])


def test_epsilon_anneals_with_the_learning_rate_and_not_compiled(variants):
    seen, bpo_loss = [], bpo_continuous.bpo_loss
    bpo_continuous.bpo_loss = lambda *inputs: seen.append(inputs[3]) or bpo_loss(*inputs)
    variants["anneal_epsilon"]()
    args = bpo_continuous.Args(num_minibatches=1, update_epochs=1)
    agent, batch = bpo_continuous.Agent(3, 2, args), [torch.randn(8, 3), torch.randn(8, 2), torch.randn(8), torch.randn(8)]
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=args.learning_rate / 4)
    step = lambda agent, _, args, *minibatch: bpo_continuous.total_loss(agent, args, *minibatch)[1]  # noqa: E731
    bpo_continuous.update(agent, optimizer, batch, args, step)
    assert seen == pytest.approx([args.epsilon / 4])
    with pytest.raises(SystemExit, match="does not go with --compile"):
        bpo_continuous.update(agent, optimizer, batch, bpo_continuous.Args(compile=True), step)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_there_is_no_interval_of_fewer_than_three_seeds(seeds, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    report = importlib.import_module("report")
    generator = np.random.default_rng(0)
    runs = {"ours": generator.random((5, 4)), "theirs": generator.random((seeds, 4))}
    mean = report.estimates(runs, lambda x: np.array([x.mean()]))
    wins = report.estimates({"theirs": tuple(runs.values())}, lambda x, y: np.array([(x[:, None] > y).mean()]))
    assert mean["ours"][2] > mean["ours"][1]
    for point, low, high in (mean["theirs"], wins["theirs"]):
        assert (low < point < high) if seeds == 3 else (np.isnan(low) and np.isnan(high) and 0 < point < 1)


@pytest.mark.parametrize(("seeds", "coverage"), [(3, 0.75), (5, 0.84), (10, 0.91)])
def test_how_often_an_interval_holds_the_mean_is_what_the_results_page_says(seeds, coverage, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    interval, generator, held = importlib.import_module("report").mean_and_interval, np.random.default_rng(1), []
    for _ in range(20):
        _, (low, high) = interval(generator.standard_normal((seeds, 100)))
        held += [(low < 0) & (high > 0)]
    assert np.mean(held) == pytest.approx(coverage, abs=0.025)


@pytest.mark.parametrize("action_dim", [1, 6])
def test_the_band_grows_with_the_root_of_the_dimensions(variants, action_dim):
    variants["epsilon_per_dimension"]()
    assert seen_in_an_update(action_dim, epsilon=0.1225)[3] == pytest.approx({1: 0.1225, 6: 0.3}[action_dim], abs=1e-3)


@pytest.mark.slow
def test_throughput_measures_training_alone_and_says_what_is_missing(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmark"))
    import throughput

    flags = {"env_id": "Pendulum-v1", "total_timesteps": 1024, "num_steps": 512}
    start = time.perf_counter()
    measured = throughput.measure(throughput.OURS.format(root=str(ROOT), script="bpo_continuous", flags=flags), 1)
    assert 0 < measured["seconds"] < time.perf_counter() - start and 50 < measured["megabytes"] < 4000
    updates = run(tmp_path, str(ROOT / "benchmark/throughput.py"), "--update", "--rounds", "1", "--hidden-size", "8")
    assert updates.stdout.startswith("a BPO update takes ")
    program = "import runpy, sys; sys.modules['stable_baselines3'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    missing = run(tmp_path, "-c", program, str(ROOT / "benchmark/throughput.py"))
    assert missing.returncode == 1 and "pip install stable-baselines3" in missing.stderr and missing.stderr.count("\n") == 1
