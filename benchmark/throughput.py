"""Steps per second and peak memory of the scripts against Stable-Baselines3's PPO, at the same settings, in one run.

One core, 1 environment × 2048 steps, minibatches of 64, 10 epochs, two hidden layers of 256. Every round runs all programs
once, one after the other, so that a drift of the machine's speed meets them alike; ratios are taken within a round. With
--compile, the time that compiling takes is in: all of it where torch's cache is empty, most of it saved after the first run.

    pip install stable-baselines3==2.9.2
    python benchmark/throughput.py
    python benchmark/throughput.py --scaling    steps per second of bpo_continuous.py by --num-envs, on all cores
    python benchmark/throughput.py --update     time of a BPO update as a multiple of a PPO update, without environment
    python benchmark/throughput.py --atari      bpo_atari.py against Stable-Baselines3 on Pong, all cores, the paper's row
    python benchmark/throughput.py --atari --device cuda    the same with the networks on a GPU
    python benchmark/throughput.py --memory     what takes bpo_atari.py's memory before it has learned anything

Where sbx-rl is installed, SBX joins in on MuJoCo: Stable-Baselines3's PPO in JAX, compiled.
CleanRL joins in, its hidden layers 64 wide, where a checkout of it has an environment of its own, as it needs old simulators:

    git clone https://github.com/vwxyzjn/cleanrl && python3.10 -m venv cleanrl/.venv
    cleanrl/.venv/bin/pip install torch==2.13.0 gymnasium==0.29.1 mujoco==2.3.3 "imageio<3" gym==0.23.1 envpool==0.6.6 \
        "numpy<2" tyro tensorboard
    python benchmark/throughput.py --cleanrl cleanrl --hidden-size 64
    python benchmark/throughput.py --cleanrl cleanrl --atari
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent

# Both measure training from the first environment step to the last update; imports, set-up and evaluation are left out.
OURS = """
import contextlib, io, json, resource, sys, time
sys.path.insert(0, {root!r})
import {script} as script
clock, progress_bar = [], script.tqdm
def start_clock(**options):
    clock.append(time.perf_counter())
    return progress_bar(**options)
def stop_clock(*_):
    clock.append(time.perf_counter())
    return []
script.tqdm, script.evaluate, script.finish = start_clock, stop_clock, lambda *_: None
with contextlib.redirect_stdout(io.StringIO()):
    script.train(script.Args(**{flags!r}))
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"seconds": clock[1] - clock[0], "megabytes": memory / 1024}}))
"""
UPDATE = """
import json, statistics, sys, time
sys.path.insert(0, {root!r})
import torch, bpo_continuous, ppo_baseline
torch.set_num_threads(1)
rollout = [torch.randn(2048, 17), torch.randn(2048, 6), torch.full((2048,), -9.0)]
def timer(script, *more):
    batch = [*rollout, *more]
    args = script.Args(hidden_size={hidden_size}, num_minibatches=32, update_epochs=10)
    agent = script.Agent(17, 6, args)
    weights = torch.nn.Parameter(script.parameters_to_vector(agent.parameters()).detach())
    script.vector_to_parameters(weights.data, agent.parameters())
    optimizer = torch.optim.Adam([weights], lr=1e-5, eps=1e-5, fused=True)
    def seconds():
        start = time.perf_counter()
        script.update(agent, optimizer, batch, args)
        return time.perf_counter() - start
    seconds()
    return seconds
bpo, ppo = timer(bpo_continuous, torch.randn(2048)), timer(ppo_baseline, *torch.randn(3, 2048))
ratios = sorted(bpo() / ppo() for _ in range({rounds}))
print(json.dumps([statistics.median(ratios), ratios[0], ratios[-1]]))
"""
SB3 = """
import json, resource, time, torch
from {module} import PPO
torch.set_num_threads(1)
model = PPO("MlpPolicy", {env_id!r}, n_steps=2048, batch_size=64, n_epochs=10, seed=1, device="cpu",
            policy_kwargs={{"net_arch": [{hidden_size}, {hidden_size}]}})
start = time.perf_counter()
model.learn({steps})
seconds = time.perf_counter() - start
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"seconds": seconds, "megabytes": memory / 1024}}))
"""
ATARI_SB3 = """
import json, resource, time, ale_py, gymnasium, torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack
gymnasium.register_envs(ale_py)
envs = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=8, seed=1), 4)
model = PPO("CnnPolicy", envs, n_steps=128, batch_size=256, n_epochs=5, gamma=0.98, learning_rate=2.5e-4, device={device!r})
start = time.perf_counter()
model.learn({steps})
seconds = time.perf_counter() - start
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"seconds": seconds, "megabytes": memory / 1024}}))
"""
MEMORY = """
import json, resource, sys
megabytes = {{}}
def note(name):
    megabytes[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
import torch
note("torch imported")
sys.path.insert(0, {root!r})
import bpo_atari as script
note("the script imported")
args = script.Args(device="cpu")
games = script.AtariEnvs(args.env_id, args.num_envs, args.num_threads)
games.seeded_reset(args.seed + script.np.arange(args.num_envs))
note("games started")
agent = script.Agent(int(games.single_action_space.n), args)
for parameter in agent.parameters():
    parameter.grad = torch.zeros_like(parameter)
note("network, gradients")
torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True).step()
note("Adam")
rollout = torch.ones((args.num_steps, args.num_envs, 84, 84, 4), dtype=torch.uint8)
note("screens of a rollout")
print(json.dumps(megabytes))
"""
# CleanRL's clock starts with its first environment step too; it prints steps per second after each update.
CLEANRL = """
import json, resource, subprocess, sys
command = [{python!r}, *{words!r}]
lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
speed = int([line.split()[1] for line in lines if line.startswith("SPS:")][-1])
memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({{"seconds": {steps} / speed, "megabytes": memory / 1024}}))
"""


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"  # gymnasium id of the task
    hidden_size: int = 256  # width of the two hidden layers
    steps: int = 40_960  # steps of each run
    rounds: int = 5  # runs of each program
    scaling: bool = False  # measure --num-envs 1, 4 and 16 instead, synchronous and asynchronous
    update: bool = False  # measure the updates alone instead
    atari: bool = False  # measure Pong instead
    memory: bool = False  # measure what takes memory on Pong instead
    device: str = "cpu"  # of the networks, with --atari
    cleanrl: Path | None = None  # a checkout of CleanRL with its own .venv, to be measured too


def measure(program, cores):
    """Runs a program on the first `cores` cores in an empty folder; what it prints last, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": str(cores), "PYTHONWARNINGS": "ignore"}
        available = sorted(os.sched_getaffinity(0))[:cores]
        process = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True,
                                 preexec_fn=lambda: os.sched_setaffinity(0, available))  # fmt: skip
    if process.returncode:
        sys.exit(f"throughput.py: a run failed: {process.stderr.strip().splitlines()[-1]}")
    return json.loads(process.stdout.splitlines()[-1])


def compare(programs, steps, rounds, cores):
    """Prints a table of the programs, {name: source}, the last one being the reference."""
    results = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            results[name].append(measure(program, cores))
    reference = [result["seconds"] for result in results[name]]
    print(f"| program | steps/s, median | × {name}, median (min–max) | peak memory, MB |\n|---|---|---|---|")
    for program, runs in results.items():
        ratios = sorted(theirs / ours["seconds"] for ours, theirs in zip(runs, reference))
        speed = statistics.median(steps / run["seconds"] for run in runs)
        memory = max(run["megabytes"] for run in runs)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
        print(f"| {program} | {speed:.0f} | {spread} | {memory:.0f} |", flush=True)


def main():
    args = tyro.cli(Args)
    flags = {"env_id": args.env_id, "hidden_size": args.hidden_size, "total_timesteps": args.steps}
    flags |= {"num_steps": 2048, "num_minibatches": 32, "update_epochs": 10}

    def ours(script, **changes):
        return OURS.format(root=str(ROOT), script=script, flags=flags | changes)

    def cleanrl(script, *words):
        if not args.cleanrl:
            return {}
        python, path = args.cleanrl.absolute() / ".venv/bin/python", args.cleanrl.absolute() / "cleanrl" / script
        if not (python.exists() and path.exists()):
            sys.exit(f"throughput.py: --cleanrl {args.cleanrl} needs {python} and {path}: see the top of this file")
        device = [] if args.atari and args.device != "cpu" else ["--no-cuda"]
        words = [str(path), *words, *device, "--total-timesteps", str(args.steps)]
        return {f"CleanRL {script}": CLEANRL.format(python=str(python), words=words, steps=args.steps)}

    if not (args.update or args.scaling or args.memory or find_spec("stable_baselines3")):
        sys.exit("throughput.py: what the scripts are measured against is missing: pip install stable-baselines3==2.9.2")
    if args.update:
        median, low, high = measure(UPDATE.format(root=str(ROOT), hidden_size=args.hidden_size, rounds=args.rounds), 1)
        print(f"a BPO update takes {median:.2f} times a PPO update (median of {args.rounds} pairs, {low:.2f}–{high:.2f})")
    elif args.memory:
        for name, megabytes in measure(MEMORY.format(root=str(ROOT)), len(os.sched_getaffinity(0))).items():
            print(f"{megabytes:4.0f} MB  {name}")
    elif args.atari:
        flags = {"env_id": "PongNoFrameskip-v4", "total_timesteps": args.steps, "update_epochs": 5, "device": args.device}
        programs = {f"bpo_atari.py --loss {loss}": ours("bpo_atari", loss=loss) for loss in ("bpo", "ppo")}
        programs["bpo_atari.py --amp"] = ours("bpo_atari", amp=True)
        programs |= cleanrl("ppo_atari_envpool.py", "--env-id", "Pong-v5", "--update-epochs", "5")
        sb3 = ATARI_SB3.format(steps=args.steps, device=args.device)
        compare(programs | {"Stable-Baselines3 PPO": sb3}, args.steps, args.rounds, len(os.sched_getaffinity(0)))
    elif args.scaling:
        programs = {}
        for num_envs in (16, 4, 1):
            for async_envs in (True, False):
                name = f"{num_envs} environments, {'asynchronous' if async_envs else 'synchronous'}"
                programs[name] = ours("bpo_continuous", num_envs=num_envs, num_steps=2048 // num_envs, async_envs=async_envs)
        compare(programs, args.steps, args.rounds, os.cpu_count())
    else:
        if args.cleanrl and args.hidden_size != 64:
            sys.exit("throughput.py: CleanRL's hidden layers are 64 wide: add --hidden-size 64")
        sb3 = {"env_id": args.env_id, "hidden_size": args.hidden_size, "steps": args.steps}
        programs = {}
        for script in ("bpo_continuous", "ppo_baseline"):
            for flag, on in ((" --compile", True), ("", False)):
                programs[f"{script}.py{flag}"] = ours(script, compile=on)
        programs |= cleanrl("ppo_continuous_action.py", "--env-id", args.env_id)
        programs |= {"SBX PPO": SB3.format(module="sbx", **sb3)} if find_spec("sbx") else {}
        programs["Stable-Baselines3 PPO"] = SB3.format(module="stable_baselines3", **sb3)
        compare(programs, args.steps, args.rounds, 1)


if __name__ == "__main__":
    main()
