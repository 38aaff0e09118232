"""The peer on Isaac Lab: rsl_rl's PPO, in the same environment, at the task's own settings.

    python benchmark/peer_rsl_rl.py --task Isaac-Ant --seed 1     trains as `isaaclab train` does; leaves an episodes.csv
    python benchmark/peer_rsl_rl.py --speed                       learning time and overhead of collection, ours against theirs

Needs the environment of requirements-isaaclab.txt. For the speed both train in turn in one process and one simulation, the
overhead being what collection takes beside the simulation's own `step`.
"""

import contextlib
import csv
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bpo_isaaclab as bpo


@dataclass
class Args:
    task: str = "Isaac-Cartpole-Direct"  # id of an Isaac Lab task
    seed: int = 1  # seed of networks, policy noise and environments
    num_envs: int = 256  # parallel environments
    total_timesteps: int = 409_600  # environment steps in all
    device: str = "cpu"  # of simulation and networks
    overrides: tuple[str, ...] = ()  # of the task's configuration
    speed: bool = False  # compare the speed instead
    rounds: int = 5  # of the comparison
    iterations: int = 10  # of each in a round


def make_runner(env, rl_cfg, device):
    """rsl_rl's runner on an environment of `bpo_isaaclab.load_isaaclab`."""
    from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper
    from rsl_rl.runners import OnPolicyRunner

    rl_cfg.device = device
    wrapped = RslRlVecEnvWrapper(env, clip_actions=rl_cfg.clip_actions)
    return OnPolicyRunner(wrapped, rl_cfg.to_dict(), log_dir=None, device=device)


def now():
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def on_step(env, function):
    """Has `function` called with the result of every step of an environment and the seconds it took."""
    step = env.step

    def timed_step(actions):
        start = now()
        result = step(actions)
        function(result, now() - start)
        return result

    env.step = timed_step


def train_peer(args, env, rl_cfg):
    """Trains rsl_rl's PPO; a row of episodes.csv is the mean of the episodes that ended in an iteration."""
    folder = Path("runs/rsl_rl")
    folder.mkdir(parents=True, exist_ok=True)
    lengths, returns = torch.zeros(2, args.num_envs, device=args.device)
    ended, rows, steps = [], [], 0

    def record(result, _):
        nonlocal steps
        _, rewards, terminations, truncations, _ = result
        returns.add_(rewards)
        lengths.add_(1)
        done = terminations | truncations
        ended.extend(zip(returns[done].tolist(), lengths[done].tolist()))
        returns.mul_(~done)
        lengths.mul_(~done)
        steps += args.num_envs
        if steps % (args.num_envs * rl_cfg.num_steps_per_env) == 0 and ended:
            rows.append((steps, *(sum(column) / len(ended) for column in zip(*ended))))
            ended.clear()

    runner = make_runner(env, rl_cfg, args.device)
    on_step(env, record)
    runner.learn(args.total_timesteps // (args.num_envs * rl_cfg.num_steps_per_env), init_at_random_ep_len=True)
    with open(folder / "episodes.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "return", "length"), *rows])


def compare_speed(args, env, rl_cfg):
    """Prints the ratios of learning time and of collection's overhead, ours to theirs, over paired rounds."""
    seconds, learning = {"step": 0.0, "learn": 0.0}, []

    def timed(function):
        """Adds what a call takes to the learning, once where one is within another."""

        def wrapper(*arguments, **options):
            start = now()
            learning.append(function)
            result = function(*arguments, **options)
            learning.pop()
            if not learning:
                seconds["learn"] += now() - start
            return result

        return wrapper

    def add_step(_, duration):
        seconds["step"] += duration

    on_step(env, add_step)
    bpo.update, bpo.estimate_returns = timed(bpo.update), timed(bpo.estimate_returns)
    bpo.evaluate = bpo.export_policy = bpo.finish = bpo.write_config = lambda *_: None
    bpo.load_task = lambda *_: (rl_cfg, lambda: env)
    steps = args.num_envs * rl_cfg.num_steps_per_env * args.iterations
    runner = make_runner(env, rl_cfg, args.device)
    runner.alg.update = timed(runner.alg.update)
    runner.alg.compute_returns = timed(runner.alg.compute_returns)

    def measure(train):
        seconds.update(step=0.0, learn=0.0)
        start = now()
        with contextlib.redirect_stdout(None):
            train()
        return seconds["learn"], now() - start - seconds["learn"] - seconds["step"]

    def ours(loss):
        settings = bpo.Args(task=args.task, loss=loss, reevaluate=loss == "bpo", num_envs=args.num_envs, device=args.device)
        return bpo.train(bpo.replace(settings, total_timesteps=steps))

    results = {"bpo": [], "ppo": [], "rsl_rl": []}
    for _ in range(args.rounds + 1):  # the first warms up
        results["bpo"].append(measure(lambda: ours("bpo")))
        results["ppo"].append(measure(lambda: ours("ppo")))
        results["rsl_rl"].append(measure(lambda: runner.learn(args.iterations)))
    print(f"| {args.task}, {args.num_envs} environments | learning / rsl_rl's | overhead of collection / rsl_rl's | both |")
    print("|---|---|---|---|")
    for loss in ("bpo", "ppo"):
        pairs = list(zip(results[loss], results["rsl_rl"]))[1:]
        ratios = [[ours[i] / theirs[i] for ours, theirs in pairs] for i in range(2)]
        ratios.append([sum(ours) / sum(theirs) for ours, theirs in pairs])
        cells = (f"{statistics.median(r):.2f} ({min(r):.2f}–{max(r):.2f})" for r in ratios)
        print(f"| bpo_isaaclab.py --loss {loss} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    args = tyro.cli(Args)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True  # as in Isaac Lab's training script
    with contextlib.ExitStack() as launched:
        rl_cfg, make_env = bpo.load_isaaclab(args, launched)
        (compare_speed if args.speed else train_peer)(args, make_env(), rl_cfg)
