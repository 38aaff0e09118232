"""Runs a matrix of arms × tasks × seeds, one core a run, and leaves a small CSV file for each.

    python benchmark/run.py benchmark/mujoco.toml benchmark/paper.toml --arms bpo ppo bpo-paper --jobs 2 --time-limit 150m

Interrupt it at will, or let the time limit do so: finished runs are never repeated, and unfinished ones are resumed, or
begin anew where a script leaves no checkpoint. A cluster shares a matrix out by `--shard 1/4` … `--shard 4/4`. The matrix is a
TOML file:

    total_timesteps = 300_000
    seeds = [1, 2, 3]
    tasks = ["HalfCheetah-v4", "Hopper-v4"]
    [arms]                                  # name = "script flags"
    bpo = "bpo_continuous.py"
    bpo-mean = "bpo_continuous.py --no-use-median"

Each CSV file, benchmark/results/<matrix>/<arm>__<task>__<seed>.csv, has a comment line with command, versions, processor, GPUs
and commit, and then, for each hundredth of the run in which an episode ended, the mean return of those episodes and the means
of approx_kl, clipfrac and entropy, where the script logs them to TensorBoard; of gbpo_llm.py the evaluations too.
"""

import contextlib
import csv
import fcntl
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
BUCKETS = 100
LINE_EVERY = 60  # seconds between lines on how far a matrix is
# What a matrix may hold. Unit and changes are report.py's.
KEYS = {"total_timesteps": "int", "seeds": "list[int]", "tasks": "list[str]", "arms": "dict", "task_flag": "str"}
KEYS |= {"steps_flag": "str", "unit": "str", "changes": "dict"}
PACKAGES = ("torch", "gymnasium", "mujoco", "isaaclab", "transformers", "numpy")  # whose versions a result names
METRICS = {name: f"losses/{name}" for name in ("approx_kl", "clipfrac", "entropy")}  # of each update, over its whole rollout
# What gbpo_llm.py has on held-out questions before and after.
EVALUATIONS = {name: f"eval/{name}" for name in ("pass@1", "pass@1_error", "mean", "mean_error")}


@dataclass
class Args:
    matrices: tyro.conf.Positional[tuple[Path, ...]]  # TOML files, run one after the other
    jobs: int = os.cpu_count() or 1  # runs at a time
    time_limit: str = ""  # such as 150m or 8h: when it is over, runs save themselves and wait for the next start
    shard: str = "1/1"  # k/n: the k-th of n equal parts of the matrix
    arms: tuple[str, ...] = ()  # only these arms of the matrix


@dataclass
class Run:
    name: str
    flags: list[str]
    folder: Path  # scratch: holds runs/
    result: Path  # the CSV file
    total_timesteps: int

    def command(self):
        """The command that starts this run, or goes on with it."""
        words = [sys.executable, str(ROOT / self.flags[0]), *self.flags[1:]]
        first_flag = next(i for i, word in enumerate(words) if word.startswith("--"))
        return [*words[:first_flag], "--resume", str(started[0])] if (started := self.started()) else words

    def started(self):
        """The run folder, in a list that is empty if there is none; one without a checkpoint was killed before it began."""
        return [path.parent for kind in ("pt", "safetensors") for path in self.folder.glob(f"runs/*/checkpoint.{kind}")]


def seconds(text):
    """'150m' → 9000."""
    units = {"s": 1, "m": 60, "h": 3600}
    if not text:
        return float("inf")
    if text[-1] not in units or not text[:-1].isdigit():
        sys.exit(f"run.py: --time-limit {text} is not a number followed by s, m or h")
    return int(text[:-1]) * units[text[-1]]


def kind(value):
    """'list[int]' for [1, 2]"""
    if value in ([], {}):
        return "empty"
    return f"list[{' | '.join(sorted(set(map(kind, value))))}]" if isinstance(value, list) else type(value).__name__


def broken_line(text):
    """The first line of the first statement that is no TOML; the parser names the end of a file for an open quote."""
    lines = text.splitlines()
    for n in reversed(range(len(lines))):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            tomllib.loads("\n".join(lines[:n]))
            return lines[n].strip()


def read_matrix(path):
    """What a matrix file says; exits with a line if it can't be read or has a wrong part."""
    try:
        text = path.read_text()
        matrix = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        sys.exit(f"run.py: {path}: {error}: {broken_line(text)}")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"run.py: can't read {path}: {error}")
    parts = {f"{key}.{name}": value for key in ("arms", "changes") if isinstance(matrix.get(key), dict)
             for name, value in matrix[key].items()}  # fmt: skip
    for key, value in (parts | matrix).items():
        if key not in KEYS | parts:
            sys.exit(f"run.py: {path}: unknown key {key}: there are {', '.join(KEYS)}")
        if kind(value) != (expected := KEYS.get(key, "str")):
            sys.exit(f"run.py: {path}: {key} must be {expected}, but is {kind(value)}")
    if missing := {"total_timesteps", "seeds", "tasks", "arms"} - set(matrix):
        sys.exit(f"run.py: {path} lacks {', '.join(sorted(missing))}")
    for arm, flags in matrix["arms"].items():
        try:
            shlex.split(flags)
        except ValueError as error:
            sys.exit(f"run.py: {path}: arms.{arm}: {error}")
    return matrix


def load_matrix(path, shard, arms=()):
    """The runs of a matrix file that fall into a shard, seeds slowest, so that an early stop leaves whole seeds."""
    k, n = (int(number) if number.isdigit() else 0 for number in shard.split("/")) if shard.count("/") == 1 else (0, 0)
    if not 1 <= k <= n:
        sys.exit(f"run.py: --shard {shard} is not k/n, with k from 1 to n")
    matrix, runs = read_matrix(path), []
    arms = [arm for arm in matrix["arms"] if arm in arms or not arms]
    combinations = [(seed, task, arm) for seed in matrix["seeds"] for task in matrix["tasks"] for arm in arms]
    for seed, task, arm in combinations[k - 1 :: n]:
        name = f"{arm}__{task.replace('/', '-')}__{seed}"
        flags = [*shlex.split(matrix["arms"][arm]), matrix.get("task_flag", "--env-id"), task, "--seed", str(seed)]
        flags += [matrix.get("steps_flag", "--total-timesteps"), str(matrix["total_timesteps"])]
        folder = ROOT / "benchmark" / "scratch" / path.stem / name
        runs.append(Run(name, flags, folder, ROOT / "benchmark" / "results" / path.stem / f"{name}.csv",
                        matrix["total_timesteps"]))  # fmt: skip
    return runs


def gpus():
    """Names of the machine's GPUs, each after a comma."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return "".join(f", {name}" for name in names)


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def commit():
    """The checkout's commit, as the last part of a result's first line; nothing where there is none."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return f" | commit {subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_result(run):
    """Reduces a finished run's episodes.csv to its CSV file, written in one step."""
    (run_dir,) = run.started() or [path.parent for path in run.folder.glob("runs/*/episodes.csv")]
    with open(run_dir / "episodes.csv") as file:
        columns = {"return": [(int(row["step"]), float(row["return"])) for row in csv.DictReader(file)]}
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    for name, tag in (METRICS | EVALUATIONS).items():
        if (logged := tag in events.Tags()["scalars"]) or name in METRICS:
            columns[name] = [(event.step, event.value) for event in events.Scalars(tag)] if logged else []
    buckets = {name: [[] for _ in range(BUCKETS)] for name in columns}
    for name, values in columns.items():
        for step, value in values:
            buckets[name][min(step * BUCKETS // run.total_timesteps, BUCKETS - 1)].append(value)
    began = (run.folder / "commit.txt").read_text()
    packages = " ".join(f"{name}=={version(name)}" for name in PACKAGES if find_spec(name))
    lines = [
        f"# python {shlex.join(run.flags)} | python=={platform.python_version()} {packages} | {processor()}{gpus()}{began}",
        "step,return,episodes," + ",".join(list(columns)[1:]),
    ]
    digits = 4 if len(columns) > 1 + len(METRICS) else 2  # rewards of language models lie between 0 and 1
    for i, returns in enumerate(buckets["return"]):
        means = [f"{sum(values) / len(values):.5f}" if (values := buckets[name][i]) else "" for name in list(columns)[1:]]
        if returns or any(means[len(METRICS) :]):
            mean_return = f"{sum(returns) / len(returns):.{digits}f}" if returns else ""
            lines.append(",".join((str((i + 1) * run.total_timesteps // BUCKETS), mean_return, str(len(returns)), *means)))
    run.result.parent.mkdir(parents=True, exist_ok=True)
    temporary = run.result.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(run.result)


def lock(path):
    """The file, opened and locked until all processes that have it are done with it; None if another one has it locked."""
    file = open(path, "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()


def start(run):
    """Starts a run on a core of its own while there are such; returns its process and the locks of run and core.

    None if another run.py has the run at work, or has finished it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    if not (log := lock(run.folder / "log.txt")):
        return None
    if run.result.exists():
        log.close()
        return None
    (run.folder / "flags.txt").write_text(shlex.join(run.flags))
    (run.folder / "commit.txt").write_text(commit())
    environment, locks = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}, [log]
    pin = None
    for core in sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else ():
        if core_lock := lock(Path(tempfile.gettempdir()) / f"run-py-{os.getuid()}-core{core}.lock"):
            locks.append(core_lock)
            pin = partial(os.sched_setaffinity, 0, {core})
            break
    process = subprocess.Popen(run.command(), cwd=run.folder, env=environment, stdout=log, stderr=log, start_new_session=True,
                               preexec_fn=pin, pass_fds=[file.fileno() for file in locks])  # fmt: skip
    return process, locks


def main():
    args = tyro.cli(Args)
    if not args.matrices:
        sys.exit("run.py: which matrix? Such as benchmark/mujoco.toml")
    if args.jobs < 1:
        sys.exit("run.py: --jobs must be at least 1")
    known = {arm: None for path in args.matrices for arm in read_matrix(path)["arms"]}
    if wrong := [arm for arm in args.arms if arm not in known]:
        sys.exit(f"run.py: no arm {wrong[0]!r}: there are {', '.join(known)}")
    deadline = time.monotonic() + seconds(args.time_limit)
    runs = [run for path in args.matrices for run in load_matrix(path, args.shard, args.arms)]
    if not runs:
        sys.exit(f"run.py: nothing to run: there are fewer runs than the parts of --shard {args.shard}")
    waiting = [run for run in runs if not run.result.exists()]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before", flush=True)
    for run in waiting:
        begun = run.folder / "flags.txt"
        if run.started() and begun.exists() and begun.read_text() != shlex.join(run.flags):
            sys.exit(f"run.py: {run.name} was begun with other flags ({begun}): put them back, or delete {run.folder}")
    running, failed, said = {}, [], time.monotonic()

    def interrupt(signum, frame):
        nonlocal deadline
        deadline = 0

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    while running or (waiting and time.monotonic() < deadline):
        while waiting and len(running) < args.jobs and time.monotonic() < deadline:
            run = waiting.pop(0)
            if started := start(run):
                running[started[0]] = run, started[1]
            elif not run.result.exists():
                print(f"{time.strftime('%H:%M')} {run.name} is at work elsewhere", flush=True)
        if time.monotonic() >= deadline:
            for process in running:
                process.send_signal(signal.SIGTERM)
            deadline = float("inf")
            waiting = []
        for process in [process for process in running if process.poll() is not None]:
            run, locks = running.pop(process)
            if process.returncode == 0:
                write_result(run)
                print(f"{time.strftime('%H:%M')} finished {run.name}", flush=True)
            elif process.returncode not in (128 + signal.SIGTERM, -signal.SIGTERM):
                failed.append(run.name)
                print(f"{time.strftime('%H:%M')} FAILED {run.name}: see {run.folder / 'log.txt'}", flush=True)
            for file in locks:
                file.close()
        if running and time.monotonic() - said >= LINE_EVERY:
            said, finished = time.monotonic(), sum(run.result.exists() for run in runs)
            names = ", ".join(run.name for run, _ in running.values())
            print(f"{time.strftime('%H:%M')} {finished} of {len(runs)} runs finished, at work: {names}", flush=True)
        time.sleep(0.2)
    missing = sum(not run.result.exists() for run in runs)
    print(f"{len(runs) - missing} of {len(runs)} runs finished" + (f"; {len(failed)} failed" if failed else ""))
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
