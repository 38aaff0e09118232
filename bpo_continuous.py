"""Bounded Policy Optimization (BPO) for continuous control: MuJoCo and any gymnasium task with Box observations and actions.

PPO asks how far a policy may move and clips it there. BPO asks where it should go: of all policies whose ratio
ρ = π(a|s)/π₀(a|s) to the old policy stays in the band [1−ε, 1+ε], the best is known in closed form. Regress onto it.

    ρ* = 1 + ε·tanh(Ã/(2λ)),   Ã = Q(s,a) − μ(s)                      the best bounded ratio
    μ  = argmin_u E_{a∼π₀}[ λ·softplus((Q−u)/λ) − ½(Q−u) ]            the soft median of Q, which makes E_{π₀}[ρ*] = 1
    L  = E_{s,a∼π₀}[ |A|·|ρ_θ − ρ*| ],   A = Q(s,a) − V(s)            the policy loss

Q is the GAE(λ) return of the one action taken: noisy, so that with a small λ nearly every target is an edge of the band.
Source: Ao et al., Bounded Ratio Reinforcement Learning, arXiv 2604.18578.

    python bpo_continuous.py --env-id Humanoid-v4                   trains; all goes to runs/<env>__<script>__<seed>__<time>/
    python bpo_continuous.py --env-id Humanoid-v4 --preset paper    the same with the authors' hyperparameters for this task
    python bpo_continuous.py --resume runs/<run>                    goes on with an interrupted run, to the very same weights
    python bpo_continuous.py --evaluate runs/<run> --capture-video  plays and films what was learned

    agent = load_agent("runs/<run>")                                the trained policy in Python
    action = agent.act(obs)                                         its mean action, for observations as the task gives them
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco,classic-control]==1.4.0",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tqdm==4.70.1",
#     "threadpoolctl==3.8.0",
#     "tensorboard==2.21.0",
#     "wandb==0.31.0",
#     "matplotlib==3.11.2",
#     "moviepy==2.2.1",
# ]
# ///

import contextlib
import difflib
import importlib.metadata
import io
import json
import math
import multiprocessing.connection
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from threadpoolctl import threadpool_limits
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import mujoco
except Exception as error:  # MUJOCO_GL names a renderer that is not installed
    sys.exit(f"{Path(__file__).stem}: mujoco can't be imported ({error}): unset the variable MUJOCO_GL, or set it to egl")

SCRIPT = Path(__file__).stem
gym.logger.min_level = gym.logger.ERROR  # the paper's tasks are v4, which gymnasium calls out of date at every start


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"  # gymnasium id of the task
    preset: Literal["default", "paper"] = "default"  # hyperparameters: one set for all tasks, or the authors' for this task
    exp_name: str = SCRIPT  # the run folder's name has it
    seed: int = 1  # seed of networks, policy noise and environments
    total_timesteps: int = 1_000_000  # environment steps in all; the authors train for 40 million, Humanoid for 50 million
    num_envs: int = 1  # parallel environments
    async_envs: bool = False  # a process for each environment: for simulators slower than MuJoCo's tasks
    num_threads: int = 1  # CPU threads of the networks; at these sizes one is fastest
    compile: bool = False  # compile losses and gradients: faster in long runs; needs a C++ compiler

    num_steps: int = 1024  # steps in each environment per rollout
    num_minibatches: int = 16  # minibatches per epoch
    update_epochs: int = 10  # passes over each rollout
    reevaluate: bool = False  # compute values, advantages and returns anew before each pass
    learning_rate: float = 6e-4  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.99  # discount γ
    gae_lambda: float = 0.95  # λ of GAE, the generalised advantage estimator
    epsilon: float = 0.3  # half-width ε of the band the ratio is to stay in
    temperature: float = 1e-3  # λ, in (normalised) returns: advantages well above it ask for the band's edge
    use_median: bool = True  # threshold at the soft median μ(s); --no-use-median: at the mean V(s), the paper's ablation
    median_head: Literal["shared", "separate"] = "shared"  # μ is the critic's second output, or an MLP on its features
    median_temperature: float | None = None  # of the median loss; none: λ, as in theory; authors: 1
    norm_adv: bool = True  # divide the weight |A| by the minibatch's standard deviation of A (it is not centred)
    vf_coef: float = 0.5  # coefficient of the value loss ½(R̂−V)²
    median_coef: float = 0.5  # coefficient of the median loss
    ent_coef: float = 3e-3  # coefficient of the entropy bonus
    mean_entropy: bool = False  # the bonus is the entropy's mean over action dimensions, not their sum
    max_grad_norm: float = 0.5  # gradients are clipped to this norm, taken over all parameters
    norm_obs: bool = True  # normalise observations by their running mean and variance
    norm_reward: bool = True  # divide rewards by the running standard deviation of their discounted sum
    hidden_size: int = 64  # width of the two hidden layers
    activation: Literal["tanh", "relu"] = "tanh"  # activation of the hidden layers
    log_std_init: float = -0.7  # log σ of the first policy
    actor_gain: float = 0.0  # of the actor's last layer at the start; 0: the first policy is N(0, σ²) everywhere; authors: 0.01
    rescale_actions: bool = False  # the policy's [−1, 1] is the task's whole range of actions, as gymnasium's RescaleAction

    checkpoint_every: int = 10  # iterations between checkpoints
    eval_every: int = 0  # iterations between evaluations while training, whose best policy is kept as best.pt; 0: none
    eval_episodes: int = 10  # episodes of an evaluation, played without noise
    capture_video: bool = False  # film episodes 0, 1, 8, 27, … as mp4 into the run folder
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "brrl"  # wandb project
    wandb_entity: str | None = None  # wandb team
    resume: str | None = None  # run folder to go on with, under its own configuration; --total-timesteps may extend it
    evaluate: str | None = None  # run folder, or a checkpoint in it, whose policy is played; nothing is trained


PACKAGES = ("gymnasium", "mujoco")  # config.json has their versions

# What stands here for the flags of CleanRL that are missing.
CLEANRL = {
    "clip_coef": "the half-width ε of BPO's band is --epsilon",
    "clip_vloss": "BPO does not clip values",
    "cuda": "networks of this size are fastest on a CPU, and run there",
    "hf_entity": "nothing is uploaded",
    "save_model": "each run saves its model; load_agent(run folder) loads it",
    "target_kl": "all --update-epochs are run; losses/approx_kl has the KL",
    "torch_deterministic": "the same seed gives the same weights on a CPU, always",
    "upload_model": "nothing is uploaded",
}

# The authors' hyperparameters. Their value loss is (R̂−V)², ours ½(R̂−V)² as CleanRL's, hence twice their vf_coef.
PAPER_ALL = dict(num_steps=2048, num_minibatches=32, hidden_size=256, activation="relu", log_std_init=0.0, norm_obs=False,
                 norm_reward=False, norm_adv=False, learning_rate=3e-4, anneal_lr=False, ent_coef=0.0, max_grad_norm=1.0,
                 vf_coef=1.0, median_head="separate", median_temperature=1.0, actor_gain=0.01)  # fmt: skip
PAPER = {
    "Ant": dict(num_minibatches=8, learning_rate=1e-4),
    "HalfCheetah": dict(num_steps=512, num_minibatches=8, learning_rate=2.0633e-5, update_epochs=20, epsilon=0.1, gamma=0.98,
                        gae_lambda=0.92, ent_coef=0.000401762, vf_coef=2 * 0.58096),
    "Hopper": dict(num_envs=4, num_steps=512, num_minibatches=64, learning_rate=9.808e-5, epsilon=0.25, temperature=10.0,
                   gamma=0.999),
    "Humanoid": dict(num_steps=512, num_minibatches=4, learning_rate=1e-4, update_epochs=5, epsilon=0.2, max_grad_norm=2.0),
    "Swimmer": dict(num_envs=4, num_steps=1024, num_minibatches=16, epsilon=0.1, temperature=0.01, gamma=0.9999,
                    gae_lambda=0.98),
}  # fmt: skip


def paper_settings(task, args):
    """The authors' hyperparameters for a task, as a dict. Their ablation of the median has another λ on Humanoid."""
    mean_on_humanoid = task == "Humanoid" and not args.use_median
    return PAPER_ALL | PAPER[task] | ({"temperature": 0.01} if mean_on_humanoid else {})


def check_loss_args(args):
    """Exits with a line on hyperparameters the loss is not defined for."""
    if not 0 < args.epsilon < 1:
        sys.exit(f"{SCRIPT}: --epsilon {args.epsilon} must lie between 0 and 1: the band [1−ε, 1+ε] holds positive ratios")
    if not args.temperature > 0 or (args.median_temperature is not None and not args.median_temperature > 0):
        sys.exit(f"{SCRIPT}: --temperature and --median-temperature must be positive; for hard targets take a small one, 1e-6")


# Environment ----------------------------------------------------------------------------------------------------------


# The wrappers within which a simulator can be saved: later steps depend on no state of theirs, or on one that is saved with it.
STATELESS = (gym.wrappers.FlattenObservation, gym.wrappers.RecordVideo, gym.wrappers.TimeLimit, gym.wrappers.OrderEnforcing)


class Task(gym.Wrapper):
    """A task without its infos, which cost a vector environment time, and with a simulator that can be saved."""

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return obs, np.asarray(reward).item(), terminated, truncated, {}  # a reward of shape (1,) is a number too

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0], {}

    @property
    def simulator_state(self):
        """All that later steps depend on, as a dict of arrays and plain data; None where the simulator can't be saved."""
        env = self.env
        while type(env) in STATELESS:
            env = env.env
        if not type(env).__module__.startswith(("gymnasium.envs.mujoco", "gymnasium.envs.classic_control")):
            return None
        state = {f"env.{k}": v for k, v in vars(env).items() if isinstance(v, np.ndarray | np.generic | float | int)}
        if hasattr(env, "data"):
            state["physics"] = np.empty(mujoco.mj_stateSize(env.model, mujoco.mjtState.mjSTATE_INTEGRATION))
            mujoco.mj_getState(env.model, env.data, state["physics"], mujoco.mjtState.mjSTATE_INTEGRATION)
            # Rewards also read derived arrays, such as body positions, which MuJoCo leaves one substep behind its state.
            new = mujoco.MjData(env.model)  # those whose size depends on the contacts are empty in it
            names = [name for name in dir(new) if isinstance(getattr(new, name), np.ndarray) and getattr(new, name).size]
            state |= {f"data.{name}": getattr(env.data, name) for name in names}
        elapsed = self.get_wrapper_attr("_elapsed_steps") if self.has_wrapper_attr("_elapsed_steps") else None
        return state | {"elapsed_steps": elapsed, "rng": env.np_random.bit_generator.state}

    @simulator_state.setter
    def simulator_state(self, state):
        env = self.unwrapped
        env.np_random.bit_generator.state = state["rng"]
        if state["elapsed_steps"] is not None:
            self.set_wrapper_attr("_elapsed_steps", state["elapsed_steps"])
        if "physics" in state:
            mujoco.mj_setState(env.model, env.data, state["physics"], mujoco.mjtState.mjSTATE_INTEGRATION)
        for key, value in state.items():
            if key.startswith("env."):
                setattr(env, key.removeprefix("env."), value[()] if isinstance(value, np.ndarray) else value)
            elif key.startswith("data."):
                getattr(env.data, key.removeprefix("data."))[...] = value


class SyncEnvs(gym.vector.SyncVectorEnv):
    """gymnasium's SyncVectorEnv with the step cut down to same-step autoreset, at a fraction of its overhead."""

    def step(self, actions):
        infos = {}
        for i, env in enumerate(self.envs):
            obs, self._rewards[i], self._terminations[i], self._truncations[i], _ = env.step(actions[i])
            if self._terminations[i] or self._truncations[i]:
                infos.setdefault("final_obs", {})[i] = obs
                obs, _ = env.reset()
            self._observations[i] = obs
        return self._observations, self._rewards, self._terminations, self._truncations, infos


class AsyncEnvs(gym.vector.AsyncVectorEnv):
    """gymnasium's AsyncVectorEnv, which waits for ever if a process fails or ends while another is at work."""

    def step_wait(self, timeout=None):
        waiting, results = dict(zip(self.parent_pipes, range(self.num_envs))), [None] * self.num_envs
        try:
            while waiting:
                for pipe in multiprocessing.connection.wait(list(waiting)):
                    result, success = pipe.recv()
                    if not success:
                        raise RuntimeError(f"an environment failed: {self.error_queue.get(timeout=5)[3].strip()}")
                    results[waiting.pop(pipe)] = result
        except BaseException as error:
            for process in self.processes:
                process.kill()
            self.closed = True
            if isinstance(error, EOFError):
                raise RuntimeError("the process of an environment ended") from None
            raise
        self._state = gym.vector.async_vector_env.AsyncState.DEFAULT
        _, rewards, terminations, truncations, infos = zip(*results)
        final_obs = {i: info["final_obs"] for i, info in enumerate(infos) if info}
        return self.observations, np.array(rewards), np.array(terminations), np.array(truncations), {"final_obs": final_obs}


def show_warning(text):
    """MuJoCo's warnings on the screen, not in a file; that the tasks' own models are of an older style helps nobody."""
    if "settotalmass" not in text:
        print(f"MuJoCo: {text}", file=sys.stderr)


def make_env(env_id, video_folder=None, name_prefix="train"):
    """One environment with flat observations, filmed if there is a `video_folder`. Exits with a line on a wrong task."""
    mujoco.set_mju_user_warning(show_warning)
    if env_id.startswith("ALE/") or "NoFrameskip" in env_id:
        sys.exit(f"{SCRIPT}: {env_id} is an Atari game: use bpo_atari.py, for PPO with --loss ppo")
    if video_folder:
        import torch._dynamo  # noqa: F401  Adam needs it, and Triton in it crashes if a renderer's LLVM was loaded before

        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("MUJOCO_GL")):
            os.environ["MUJOCO_GL"] = "egl"  # renders without a screen
    try:
        env = gym.make(env_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if video_folder else {}))
    except gym.error.UnregisteredEnv as error:
        matches = difflib.get_close_matches(env_id, gym.registry, cutoff=0.5)
        sys.exit(f"{SCRIPT}: no task {env_id!r}. " + (f"Close: {', '.join(matches)}" if matches else str(error)))
    except Exception as error:  # whatever a task's own code raises
        sys.exit(f"{SCRIPT}: {env_id} can't be made: {one_line(error)}")
    space = env.observation_space
    if not isinstance(env.action_space, gym.spaces.Box) or not np.issubdtype(env.action_space.dtype, np.floating):
        sys.exit(f"{SCRIPT}: {env_id}'s actions are {env.action_space}: this script is for continuous actions, a Box of reals")
    if isinstance(space, gym.spaces.Box) and (len(space.shape) > 2 or (len(space.shape) == 2 and space.dtype == np.uint8)):
        sys.exit(f"{SCRIPT}: {env_id} observes images {space.shape}, this script takes vectors")
    if not space.is_np_flattenable:
        sys.exit(f"{SCRIPT}: {env_id} has observations that can't be made a vector: {space}")
    if video_folder:
        length = 0 if env.spec.max_episode_steps else 1000  # steps, kept in memory; 0: whole episodes
        env = gym.wrappers.RecordVideo(env, str(video_folder), video_length=length, name_prefix=name_prefix)
    return Task(gym.wrappers.FlattenObservation(env))


def try_env(args):
    """Exits with a line, before there is a run folder, on a task that can't be played, or be filmed with --capture-video."""
    with tempfile.TemporaryDirectory() as folder:
        env = make_env(args.env_id, folder if args.capture_video else None)
        numbers = 2 * env.observation_space.shape[0] + math.prod(env.action_space.shape) + 4  # of a step
        needed = 8 * numbers * args.num_envs * args.num_steps + 64 * args.hidden_size**2
        needed += args.num_envs * 2**20  # a simulator takes about a megabyte
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
        if needed > memory:
            sys.exit(f"{SCRIPT}: --num-envs {args.num_envs} × --num-steps {args.num_steps}, --hidden-size {args.hidden_size} "
                     f"take {needed / 1e9:.0f} GB of memory, this machine has {memory / 1e9:.0f}")  # fmt: skip
        if args.rescale_actions and not env.action_space.is_bounded():
            sys.exit(f"{SCRIPT}: --rescale-actions: the actions of {args.env_id} have no bounds: {env.action_space}")
        try:
            env.reset(seed=args.seed)
            env.close()  # which writes what was filmed
        except Exception as error:  # each renderer fails in its own way
            verb, hint = ("filmed", "; MUJOCO_GL=egl renders without a screen") if args.capture_video else ("played", "")
            sys.exit(f"{SCRIPT}: {args.env_id} can't be {verb}: {one_line(error)}{hint}")


def make_envs(args, run_dir):
    """`num_envs` environments that reset themselves in the step that ends an episode, so no transition crosses a reset."""
    folders = [run_dir / "videos" if args.capture_video and i == 0 else None for i in range(args.num_envs)]
    env_fns = [partial(make_env, args.env_id, folder, f"train-{int(time.time())}") for folder in folders]
    vectorise = AsyncEnvs if args.async_envs else SyncEnvs
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # processes inherit it: Ctrl-C is the main one's to handle
    envs = vectorise(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    signal.signal(signal.SIGINT, handler)
    return envs


# Networks -------------------------------------------------------------------------------------------------------------


class RunningMeanStd(nn.Module):
    """Mean and variance of all batches seen so far (Chan et al., 1979); saved with the weights, but not trained."""

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(shape, dtype=torch.float64))  # one over the standard deviation
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, batch):
        """Takes in a batch (B, *shape)."""
        batch = batch.double()
        total, delta = self.count + len(batch), batch.mean(0) - self.mean
        squares = self.var * self.count + batch.var(0, correction=0) * len(batch)
        self.var.copy_((squares + delta**2 * self.count * len(batch) / total) / total)
        self.mean.add_(delta * len(batch) / total)
        constant = self.var <= (1e-12 * self.mean).square()  # but for rounding; its scale stays 1
        self.scale.copy_(torch.where(constant, 1.0, self.var.rsqrt()))
        self.count.copy_(total)


def layer_init(layer, gain=2**0.5):
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def hidden_layers(inputs, args, gain=2**0.5):
    activation = {"tanh": nn.Tanh, "relu": nn.ReLU}[args.activation]
    first, second = nn.Linear(inputs, args.hidden_size), nn.Linear(args.hidden_size, args.hidden_size)
    return nn.Sequential(layer_init(first, gain), activation(), layer_init(second, gain), activation())


class Agent(nn.Module):
    """Gaussian actor, mean critic V and median critic μ, and the running statistics of observations and returns."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        output = layer_init(nn.Linear(args.hidden_size, action_dim), args.actor_gain)
        self.actor_mean = hidden_layers(obs_dim, args).append(output)
        self.actor_logstd = nn.Parameter(torch.full((action_dim,), args.log_std_init))
        self.critic = hidden_layers(obs_dim, args)
        self.value_head = layer_init(nn.Linear(args.hidden_size, 2), 1.0)  # V and μ
        if args.median_head == "separate":
            output = layer_init(nn.Linear(args.hidden_size, 1), 1.0)
            self.median_head = hidden_layers(args.hidden_size, args, gain=1.0).append(output)
        self.obs_rms, self.return_rms = RunningMeanStd(obs_dim), RunningMeanStd()
        self.norm_obs, self.activation, self.mean_entropy = args.norm_obs, args.activation, args.mean_entropy
        self.rescale_actions = args.rescale_actions
        self.action_bounds = np.full(action_dim, -np.inf), np.full(action_dim, np.inf)  # in the task's shape

    def normalize(self, obs):
        """Raw observations (..., D) → float32 inputs (..., D), in standard deviations clipped to ±10 with --norm-obs."""
        if self.norm_obs:
            obs = ((obs - self.obs_rms.mean) * self.obs_rms.scale).clamp(-10, 10)
        return obs.float()

    def numpy_policy(self):
        """Raw observations (N, D) → mean actions (N, A), arrays both: the actor in numpy, on the memory of the torch weights.

        While stepping a few environments, torch's overhead would cost more than all the arithmetic.
        """
        activation = {"tanh": np.tanh, "relu": partial(np.maximum, 0)}[self.activation]
        layers = [layer for layer in self.actor_mean if isinstance(layer, nn.Linear)]
        *hidden, output = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in layers]
        mean, scale = self.obs_rms.mean.numpy(), self.obs_rms.scale.numpy()

        def policy(obs):
            x = (((obs - mean) * scale).clip(-10, 10) if self.norm_obs else obs).astype(np.float32)
            for weight, bias in hidden:
                x = activation(x @ weight + bias)
            return x @ output[0] + output[1]

        return policy

    def bound(self, actions):
        """The policy's actions (..., A) → those the task takes (..., *its shape): within its bounds, arrays both."""
        low, high = self.action_bounds
        actions = actions.reshape(actions.shape[:-1] + low.shape)
        return low + (actions.clip(-1, 1) + 1) / 2 * (high - low) if self.rescale_actions else actions.clip(low, high)

    def act(self, obs):
        """The mean action for raw, flat observations (D,), or the actions for (N, D), as the task takes them: an array."""
        return self.bound(self.numpy_policy()(np.asarray(obs)))

    def log_prob(self, obs, actions):
        """log π(a|s): normalised observations (..., D), actions (..., A) → (...)"""
        z = (actions - self.actor_mean(obs)) * torch.exp(-self.actor_logstd)
        return -0.5 * (z * z).sum(-1) - self.actor_logstd.sum() - 0.5 * math.log(2 * math.pi) * z.shape[-1]

    def entropy(self):
        """Entropy of the policy, the same in every state, with --mean-entropy per action dimension: a scalar."""
        entropy = (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return entropy / len(self.actor_logstd) if self.mean_entropy else entropy

    def get_value(self, obs):
        """V(s): normalised observations (..., D) → (...)"""
        return self.value_head(self.critic(obs))[..., 0]

    def get_values(self, obs):
        """V(s) and μ(s): normalised observations (..., D) → (...), (...)"""
        features = self.critic(obs)
        values, median_values = self.value_head(features).unbind(-1)
        if hasattr(self, "median_head"):
            median_values = self.median_head(features).squeeze(-1)
        return values, median_values


def flatten_parameters(module):
    """Moves all weights into one vector, all gradients into another: to clip and to step is then one operation each."""
    parameters = list(module.parameters())
    vector = nn.Parameter(torch.cat([p.detach().as_strided((p.numel(),), (1,)) for p in parameters]))  # as they lie in memory
    vector.grad = torch.zeros_like(vector)
    sizes = [p.numel() for p in parameters]
    for p, data, grad in zip(parameters, vector.data.split(sizes), vector.grad.split(sizes)):
        p.data, p.grad = data.as_strided(p.size(), p.stride()), grad.as_strided(p.size(), p.stride())
    return vector


# Loss -----------------------------------------------------------------------------------------------------------------


def gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Generalised advantage estimates (Schulman et al., 2016), all arguments and the result (T, N).

    `next_values` are V of the observations the actions led to, before any reset. A termination ends the bootstrap; every
    end of an episode, by time limit too, ends the trace.

        δ_t = r_t + γ·(1 − terminated_t)·V(s_{t+1}) − V(s_t),   A_t = δ_t + γλ·(1 − done_t)·A_{t+1}
    """
    next_values = torch.where(terminations > 0, 0.0, next_values)  # what follows a termination may be anything, NaN too
    advantages = rewards + gamma * next_values - values  # δ_t, the first term of the sum A_t
    decays = gamma * gae_lambda * (1 - dones)
    span = 1
    while span < len(advantages):  # each round doubles the terms summed, far fewer operations than a loop over the steps
        advantages = advantages + decays * nn.functional.pad(advantages[span:], (0, 0, 0, span))
        decays = decays * nn.functional.pad(decays[span:], (0, 0, 0, span))
        span *= 2
    return advantages


@torch.no_grad()
def estimate_returns(agent, rollout, args):
    """V(s), GAE(λ) advantages and returns R̂ = A + V of a rollout's steps, with the critic as it is: a dict of (T·N,).

    `rollout` holds obs and next_obs (T, N, D) as the critic takes them, and `gae`'s rewards, terminations and dones (T, N).
    """
    values, next_values = agent.get_value(rollout["obs"]), agent.get_value(rollout["next_obs"])
    ends = rollout["terminations"], rollout["dones"]
    advantages = gae(rollout["rewards"], values, next_values, *ends, args.gamma, args.gae_lambda)
    return {"values": values.flatten(), "advantages": advantages.flatten(), "returns": (advantages + values).flatten()}


def target_ratio(median_advantages, epsilon, temperature):
    """ρ* = 1 + ε·tanh(Ã/(2λ)), the optimal ratio in the band [1−ε, 1+ε]; any shape (Ao et al., 2026)."""
    return 1 + epsilon * torch.tanh(median_advantages / (2 * temperature))


def bpo_loss(ratio, advantages, median_advantages, epsilon, temperature):
    """Policy loss E[|A|·|ρ − ρ*|] (Ao et al., 2026): a scalar.

    `ratio` ρ = π_θ/π₀ (B,) carries the gradient; `advantages` A = R̂ − V(s) (B,), whose scale is free, and
    `median_advantages` Ã = R̂ − μ(s) (B,), in the units of `temperature`, must be detached.
    """
    errors = (ratio - target_ratio(median_advantages, epsilon, temperature)).abs()  # |ρ − ρ*|
    return (advantages.abs() * errors).mean()  # E[|A|·|ρ − ρ*|]


def median_loss(returns, median_values, temperature):
    """Convex loss whose minimiser is the soft median of the returns (Ao et al., 2026): (B,), (B,) → a scalar."""
    errors = returns - median_values  # Q − u
    return (F.softplus(errors, beta=1 / temperature) - 0.5 * errors).mean()  # E[λ·softplus((Q−u)/λ) − ½(Q−u)]


def loss_coefficients(args):
    """Weights of the terms that `minibatch_losses` returns, in its order."""
    median_coef = args.median_coef * args.use_median
    return {"policy_loss": 1.0, "value_loss": args.vf_coef, "median_loss": median_coef, "entropy": -args.ent_coef}


def minibatch_losses(agent, batch, args):
    """Policy, value and median loss and the entropy on a minibatch of `update`'s batch: four scalars.

    A and Ã are taken against the critics as they are now, not as they were when the rollout ended.
    """
    ratio = torch.exp(agent.log_prob(batch["obs"], batch["actions"]) - batch["logprobs"])
    values, median_values = agent.get_values(batch["obs"])
    advantages = (batch["returns"] - values).detach()
    median_advantages = (batch["returns"] - median_values).detach() if args.use_median else advantages
    if args.norm_adv:
        advantages = advantages / (advantages.std() + 1e-8)
    policy_loss = bpo_loss(ratio, advantages, median_advantages, args.epsilon, args.temperature)
    value_loss = 0.5 * F.mse_loss(values, batch["returns"])
    threshold_loss = median_loss(batch["returns"], median_values, args.median_temperature or args.temperature)
    return policy_loss, value_loss, threshold_loss, agent.entropy()


@torch.no_grad()
def ratio_metrics(agent, batch, args):
    """What an update did to the ratios of its rollout: estimates of KL(π₀‖π), share outside the band, mean |ρ−ρ*|."""
    logratio = agent.log_prob(batch["obs"], batch["actions"]) - batch["logprobs"]
    ratio = logratio.exp()
    thresholds = agent.get_values(batch["obs"])[args.use_median]
    target = target_ratio(batch["returns"] - thresholds, args.epsilon, args.temperature)
    return {
        "old_approx_kl": -logratio.mean(),
        "approx_kl": (ratio - 1 - logratio).mean(),
        "clipfrac": ((ratio - 1).abs() > args.epsilon).float().mean(),
        "ratio_error": (ratio - target).abs().mean(),
    }


def backpropagate(agent, gradient, coefs, batch, args):
    """Writes the gradient of coefs·losses on a minibatch, clipped, into the vector `gradient`; returns the losses (K,)."""
    losses = torch.stack(minibatch_losses(agent, batch, args))
    gradients = torch.autograd.grad(coefs @ losses, list(agent.parameters()))
    torch.cat([g.flatten() for g in gradients], out=gradient)
    gradient.mul_((args.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1.0))
    return losses.detach()


def update(agent, optimizer, batch, args, reevaluate=None, gradient_function=backpropagate):
    """Fits policy and critics to one rollout; returns the metrics, scalars.

    `batch` holds obs (B, …), actions (B, …), logprobs, values, advantages and returns (B,); before each epoch but the first
    `reevaluate()`, if there is one, gives the last three anew. `gradient_function` is `backpropagate`, or what compiled it.
    FloatingPointError names the first term that is not finite.
    """
    weights = optimizer.param_groups[0]["params"][0]  # all in one vector, see flatten_parameters
    gradient = weights.grad
    names, coefs = zip(*loss_coefficients(args).items())
    coefs, history = torch.tensor(coefs, device=gradient.device), []
    explained_variance = 1 - (batch["returns"] - batch["values"]).var() / batch["returns"].var()
    for epoch in range(args.update_epochs):
        if epoch and reevaluate:
            batch = batch | reevaluate()
        shuffle = torch.randperm(len(batch["obs"]))
        shuffled = [tensor[shuffle].tensor_split(args.num_minibatches) for tensor in batch.values()]
        for minibatch in zip(*shuffled):
            history.append(gradient_function(agent, gradient, coefs, dict(zip(batch, minibatch)), args))
            optimizer.step()
    history = torch.stack(history)
    for _, term in (~history.isfinite()).nonzero()[:1].tolist():
        raise FloatingPointError(f"{names[term]} is not finite")
    metrics = dict(zip(names, history.mean(0))) | ratio_metrics(agent, batch, args)
    if not (metrics["approx_kl"].isfinite() and weights.isfinite().all()):
        raise FloatingPointError("the ratio, or a weight, is not finite")
    return metrics | {"explained_variance": explained_variance}


# Run folder -----------------------------------------------------------------------------------------------------------


def new_run_dir(args):
    """Makes runs/<env>__<exp_name>__<seed>__<time>, the time moved on where a run of the same second has taken it."""
    stamp = int(time.time())
    Path("runs").mkdir(exist_ok=True)
    while True:
        run_dir = Path("runs") / re.sub("[/:]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{stamp}")
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir()
            return run_dir
        stamp += 1


def write_config(run_dir, args):
    """Writes config.json: the arguments, and the versions and the commit that they ran with."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", *PACKAGES)}
    config = asdict(args) | {"versions": {"python": platform.python_version()} | versions, "commit": commit}
    (run_dir / "config.json").write_text(json.dumps(config, indent=2))


def start_wandb(args, run_dir):
    """Weights & Biases as in CleanRL: what TensorBoard gets, the code, the configuration; videos follow at the end."""
    import wandb

    name, script = run_dir.resolve().name, Path(__file__).resolve()
    try:
        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, config=asdict(args), name=name, id=name,
                   resume="allow", dir=run_dir, sync_tensorboard=True)  # fmt: skip
        wandb.save(str(script), base_path=str(script.parent), policy="now")
    except wandb.errors.Error as error:
        sys.exit(f"{SCRIPT}: --track: {one_line(error)}")


def finish(args, run_dir, writer, title):
    """Draws the learning curve, names the videos, and hands them to wandb."""
    with contextlib.suppress(OSError):
        writer.close()
    plot_learning_curve(run_dir, title)
    print(f"learning curve: {run_dir / 'learning_curve.png'}")
    videos = sorted(run_dir.glob("videos/*.mp4"))
    for video in videos:
        print(f"video: {video}")
    if args.track:
        import wandb

        wandb.log({f"videos/{video.stem}": wandb.Video(str(video)) for video in videos})
        wandb.finish()


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


def convert(tree, types, function):
    """Applies `function` to the leaves of these types in nested dicts, lists and tuples."""
    if isinstance(tree, dict):
        return {key: convert(value, types, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(convert(value, types, function) for value in tree)
    return function(tree) if isinstance(tree, types) else tree


def save_checkpoint(run_dir, checkpoint, name="checkpoint.pt"):
    """Replaces a run's checkpoint, made of tensors and plain data, in one step: at any instant a whole one is there."""
    buffer, temporary = io.BytesIO(), run_dir / "checkpoint.tmp"
    torch.save(convert(checkpoint, np.ndarray | np.generic, lambda array: torch.from_numpy(np.array(array))), buffer)
    try:
        with open(run_dir / "episodes.csv", "r+b") as file:
            os.fsync(file.fileno())  # the checkpoint tells how much of it to keep
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, run_dir / name)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(run_dir):
    """The checkpoint of a run folder of this script, or that file itself; exits with a line if there is none."""
    path = Path(run_dir) if Path(run_dir).is_file() else Path(run_dir) / "checkpoint.pt"
    if not path.is_file():
        sys.exit(f"{SCRIPT}: {run_dir} is not a run folder: it has no checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] == SCRIPT:
            return checkpoint | {"args": Args(**checkpoint["args"])}
    except Exception as error:  # damage shows in many ways
        sys.exit(f"{SCRIPT}: {path} is damaged, or no checkpoint of this version ({type(error).__name__})")
    sys.exit(f"{SCRIPT}: {run_dir} is a run of {checkpoint['script']}.py")


def load_agent(run_dir):
    """The agent of a run folder, or of a checkpoint in it such as best.pt: `load_agent(run_dir).act(obs)`."""
    checkpoint = load_checkpoint(run_dir)
    weights = checkpoint["agent"]
    agent = Agent(len(weights["obs_rms.mean"]), len(weights["actor_logstd"]), checkpoint["args"])
    agent.load_state_dict(weights)
    agent.action_bounds = tuple(bound.numpy() for bound in checkpoint["action_bounds"])
    return agent


def append_episodes(path, size, rows):
    """Appends to the first `size` bytes of episodes.csv, cutting what an interrupted run left there; returns the new size."""
    text = "".join(f"{step},{float(score)},{length},{seconds:.1f}\n" for step, score, length, seconds in rows)
    with open(path, "r+b") as file:
        file.truncate(size)
        file.seek(size)
        file.write(text.encode())
    return size + len(text)


def plot_learning_curve(run_dir, title, unit="episode"):
    """Draws learning_curve.png: the return in each row of episodes.csv, which is a `unit`'s, and the mean of the last 20."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = (run_dir / "episodes.csv").read_text().splitlines()[1:]
    rows = [row for row in rows if row.count(",") == 3]  # a full disk may have cut one
    steps, returns = np.array([row.split(",")[:2] for row in rows], float).reshape(-1, 2).T
    means = [returns[max(0, i - 20) : i].mean() for i in range(1, len(returns) + 1)]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, returns, ".", alpha=0.25, label=unit)
    axes.plot(steps, means, color="tab:blue", label=f"mean of the last 20 {unit}s")
    axes.set(xlabel="environment steps", ylabel="return (undiscounted)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run_dir / "learning_curve.png", dpi=120)
    plt.close(figure)


def play(env, agent, args):
    """Yields the returns of `eval_episodes` episodes played with the policy's mean actions."""
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=args.seed + 1_050_000 + episode)  # no training seeds
        policy, score = agent.numpy_policy(), 0.0
        for _ in range(env.spec.max_episode_steps or 100_000):  # a good policy might never end an episode
            obs, reward, terminated, truncated, _ = env.step(agent.bound(policy(obs)))
            score += float(reward)
            if terminated or truncated:
                break
        yield score


def evaluate(agent, args, run_dir):
    """Plays episodes with the policy's mean actions, filmed with --capture-video; prints and returns their returns."""
    env = make_env(args.env_id, run_dir / "videos" if args.capture_video else None, "eval")
    returns = []
    for score in play(env, agent, args):
        returns.append(score)
        print(f"evaluation, episode {len(returns)} of {args.eval_episodes}: return {score:.1f}", flush=True)
    env.close()
    print(f"evaluation: {np.mean(returns):.1f} ± {np.std(returns):.1f} (mean ± std of {len(returns)} episodes, mean actions)")
    return returns


# Training -------------------------------------------------------------------------------------------------------------


def check_args(args):
    """Exits with a line on arguments that can't be."""
    for name, value in asdict(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            sys.exit(f"{SCRIPT}: --{name.replace('_', '-')} {value} must be a finite number")
    counts = ("num_envs", "num_steps", "num_minibatches", "update_epochs", "hidden_size", "num_threads", "checkpoint_every")
    for name in (*counts, "eval_episodes"):
        if getattr(args, name) < 1:
            sys.exit(f"{SCRIPT}: --{name.replace('_', '-')} must be at least 1")
    if args.num_threads > 1024:
        sys.exit(f"{SCRIPT}: --num-threads must be at most 1024")
    if args.eval_every < 0:
        sys.exit(f"{SCRIPT}: --eval-every must not be negative")
    if not 0 <= args.seed <= 10**9:
        sys.exit(f"{SCRIPT}: --seed must lie between 0 and 1,000,000,000")
    for name in ("learning_rate", "max_grad_norm"):
        if not getattr(args, name) > 0:
            sys.exit(f"{SCRIPT}: --{name.replace('_', '-')} must be positive")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            sys.exit(f"{SCRIPT}: --{name.replace('_', '-')} must lie between 0 and 1")
    batch_size = args.num_envs * args.num_steps
    if 2 * args.num_minibatches > batch_size:
        sys.exit(f"{SCRIPT}: a batch of {batch_size} steps (--num-envs × --num-steps) can't be cut into "
                 f"{args.num_minibatches} minibatches of at least 2: lower --num-minibatches")  # fmt: skip
    if args.total_timesteps < batch_size:
        sys.exit(f"{SCRIPT}: --total-timesteps {args.total_timesteps} is less than one batch of {batch_size} steps "
                 "(--num-envs × --num-steps)")  # fmt: skip
    check_loss_args(args)


def warn_of_range(agent, args):
    """Says so where the first policy, N(0, σ²), is far too narrow or too wide for the task's actions, or beside them."""
    low, high = (bound.astype(float) for bound in agent.action_bounds)
    sigma = math.exp(args.log_std_init)
    covered, width = np.minimum(high, sigma) - np.maximum(low, -sigma), high - low  # within ±σ, and in all
    narrow, wide = np.isfinite(width) & (covered < 0.1 * width), (width > 0) & (2 * sigma > 10 * width)
    if not args.rescale_actions and (narrow | wide).any():
        share = "less than a tenth of" if narrow.any() else "more than ten times"
        print(f"the first policy, N(0, {sigma:.2g}²), covers {share} the range of the actions of {args.env_id}: see "
              "--rescale-actions and --log-std-init")  # fmt: skip


def train(args, total_timesteps=None):
    """Trains, evaluates and draws the learning curve; returns the run folder.

    With `args.resume` the run goes on under its own configuration, to its end or to `total_timesteps`.
    """
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    if checkpoint:
        run_dir, args = Path(args.resume), checkpoint["args"]
        if total_timesteps is not None:
            args = replace(args, total_timesteps=total_timesteps)
        done = int(checkpoint["state"]["iteration"]) * args.num_envs * args.num_steps
        if done > args.total_timesteps:
            sys.exit(f"{SCRIPT}: {run_dir} is at step {done} already, beyond --total-timesteps {args.total_timesteps}")
    check_args(args)
    try_env(args)
    if not checkpoint:
        run_dir = new_run_dir(args)
        (run_dir / "episodes.csv").write_text("step,return,length,wall_time\n")
    write_config(run_dir, args)
    print(f"run folder: {run_dir}", flush=True)
    if args.track:
        start_wandb(args, run_dir)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    threadpool_limits(args.num_threads)  # numpy's
    stopped_by, envs = [], make_envs(args, run_dir)

    def stop(signum, frame):
        stopped_by.append(signum)  # the iteration ends and is saved
        signal.signal(signum, signal.SIG_DFL)  # unless the signal comes again

    handlers = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    next_obs, _ = envs.reset(seed=[args.seed + 100_000 * i for i in range(args.num_envs)])
    obs_dim, action_dim = next_obs.shape[1], math.prod(envs.single_action_space.shape)
    agent = Agent(obs_dim, action_dim, args)
    agent.action_bounds = envs.single_action_space.low, envs.single_action_space.high
    warn_of_range(agent, args)
    optimizer = torch.optim.Adam([flatten_parameters(agent)], lr=args.learning_rate, eps=1e-5, fused=True)
    gradient_function = backpropagate
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # one graph, gradients included
        gradient_function = torch.compile(backpropagate, dynamic=False, fullgraph=True)
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size

    iteration, start_time, csv_size, best = 0, time.time(), (run_dir / "episodes.csv").stat().st_size, -math.inf
    episode_return, episode_length, discounted = np.zeros(args.num_envs), np.zeros(args.num_envs, int), np.zeros(args.num_envs)
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["torch_rng"])
        state = convert(checkpoint["state"], torch.Tensor, torch.Tensor.numpy)
        iteration, start_time, csv_size = state["iteration"], time.time() - state["seconds"], state["csv_size"]
        best = state["best"]
        if total_timesteps is not None and args.anneal_lr:
            rate = args.learning_rate * (1 - iteration / num_iterations)
            print(f"the learning rate now falls to 0 at step {args.total_timesteps:,}; here it is {rate:.3g}")
        if all(state["simulators"]):
            envs.set_attr("simulator_state", state["simulators"])
            next_obs, episode_return, episode_length, discounted = state["episodes"]
        else:
            next_obs, _ = envs.reset(seed=args.seed + iteration)
            print(f"the simulator of {args.env_id} can't be saved: new episodes begin")

    def policy_state():
        state = {"script": SCRIPT, "args": asdict(args), "agent": agent.state_dict()}
        return state | {"action_bounds": agent.action_bounds}

    def save():
        state = {"iteration": iteration, "seconds": time.time() - start_time, "csv_size": csv_size, "best": best,
                 "simulators": envs.get_attr("simulator_state"),
                 "episodes": (next_obs, episode_return, episode_length, discounted)}  # fmt: skip
        save_checkpoint(run_dir, policy_state() | {"state": state, "optimizer": optimizer.state_dict(),
                                                   "torch_rng": torch.get_rng_state()})  # fmt: skip

    if not checkpoint:
        save()
    policy = agent.numpy_policy()
    shape = (args.num_steps, args.num_envs)
    obs = np.zeros((*shape, obs_dim), np.result_type(next_obs, np.float32))
    final_obs = np.zeros_like(obs)  # what each action led to, before any reset
    actions = np.zeros((*shape, action_dim), np.float32)
    rewards, discounted_returns = np.zeros(shape), np.zeros(shape)
    terminations, truncations = np.zeros(shape, bool), np.zeros(shape, bool)
    writer = SummaryWriter(run_dir, purge_step=iteration * batch_size + 1)
    writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items()))
    eval_env = make_env(args.env_id) if args.eval_every else None
    unsaved, recent_returns, last = [], deque(maxlen=20), iteration == num_iterations
    progress = tqdm(total=num_iterations * batch_size, initial=iteration * batch_size, unit=" steps", disable=None)
    next_line = time.time() + 60

    while not last:
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)

        # Rollout. Only the actor runs here; values and log-probabilities of the whole rollout are one pass afterwards.
        noise, rows = (torch.randn(*shape, action_dim) * agent.actor_logstd.detach().exp()).numpy(), []
        for step in range(args.num_steps):
            obs[step] = next_obs
            actions[step] = action = policy(next_obs) + noise[step]
            next_obs, rewards[step], terminations[step], truncations[step], infos = envs.step(agent.bound(action))
            final_obs[step] = next_obs
            discounted_returns[step] = discounted = args.gamma * discounted + rewards[step]
            episode_return += rewards[step]
            episode_length += 1
            for i in np.flatnonzero(terminations[step] | truncations[step]):
                final_obs[step, i] = infos["final_obs"][i]
                global_step = iteration * batch_size + (step + 1) * args.num_envs
                rows.append((global_step, episode_return[i], episode_length[i], time.time() - start_time))
                episode_return[i] = episode_length[i] = discounted[i] = 0
        iteration += 1
        global_step = iteration * batch_size

        # Advantages and returns. The statistics of the observations stand still while a rollout is collected and learned
        # from, so that π₀ is one policy; only the first rollout sets them beforehand, if its policy ignored its input.
        first = iteration == 1 and args.actor_gain == 0
        if first:
            agent.obs_rms.update(torch.from_numpy(obs).flatten(0, 1))
        agent.return_rms.update(torch.from_numpy(discounted_returns).flatten())
        scaled_rewards = torch.from_numpy(rewards)
        if args.norm_reward:
            scaled_rewards = (scaled_rewards * agent.return_rms.scale).clamp(-10, 10)
        rollout = {"obs": agent.normalize(torch.from_numpy(obs)), "next_obs": agent.normalize(torch.from_numpy(final_obs))}
        rollout |= {"rewards": scaled_rewards.float(), "terminations": torch.from_numpy(terminations).float()}
        rollout["dones"] = torch.from_numpy(terminations | truncations).float()
        batch = {"obs": rollout["obs"], "actions": torch.from_numpy(actions)}
        with torch.no_grad():
            batch["logprobs"] = agent.log_prob(batch["obs"], batch["actions"])
        estimate = partial(estimate_returns, agent, rollout, args)
        batch = {key: tensor.flatten(0, 1) for key, tensor in batch.items()} | estimate()

        try:
            metrics = update(agent, optimizer, batch, args, estimate if args.reevaluate else None, gradient_function)
            if not first:
                agent.obs_rms.update(torch.from_numpy(obs).flatten(0, 1))
            if not agent.obs_rms.var.isfinite().all():
                raise FloatingPointError("an observation is not finite")
        except torch._dynamo.exc.TorchDynamoException as error:
            envs.close()
            reason = " ".join(str(error).split("\n\n")[0].split())
            sys.exit(f"{SCRIPT}: --compile failed, train without it: {reason}. {run_dir} keeps the last checkpoint")
        except FloatingPointError as error:
            envs.close()
            sys.exit(f"{SCRIPT}: stopped at step {global_step}: {error}. {run_dir} keeps the last good checkpoint")

        steps_per_second = global_step / (time.time() - start_time)
        evaluated = args.eval_every > 0 and iteration % args.eval_every == 0
        score = float(np.mean(list(play(eval_env, agent, args)))) if evaluated else -math.inf

        # Log and save. A full disk costs records, never the training.
        last = iteration == num_iterations or bool(stopped_by)
        recent_returns.extend(score for _, score, _, _ in rows)
        unsaved += rows
        try:
            for step, episodic_return, length, _ in rows:
                writer.add_scalar("charts/episodic_return", episodic_return, step)
                writer.add_scalar("charts/episodic_length", length, step)
            for name, value in metrics.items():
                writer.add_scalar(f"losses/{name}", value, global_step)
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
            writer.add_scalar("charts/SPS", int(steps_per_second), global_step)
            if evaluated:
                writer.add_scalar("eval/mean_return", score, global_step)
            writer.flush()
        except OSError:  # its thread has ended with it
            with contextlib.suppress(OSError):
                writer = SummaryWriter(run_dir)
        try:
            csv_size = append_episodes(run_dir / "episodes.csv", csv_size, unsaved)
            unsaved.clear()
            if score > best:
                save_checkpoint(run_dir, policy_state() | {"step": global_step, "return": score}, "best.pt")
                best = score
            if last or iteration % args.checkpoint_every == 0:
                save()
        except OSError as error:
            tqdm.write(f"{SCRIPT}: not saved at step {global_step}: {error}", file=sys.stderr)
        recent = f"{np.mean(recent_returns):.1f}" if recent_returns else "-"
        progress.set_postfix({"return": recent}, refresh=False)
        progress.update(batch_size)
        if progress.disable and time.time() > next_line:
            next_line = time.time() + 60
            left = progress.format_interval((num_iterations * batch_size - global_step) / steps_per_second)
            print(f"step {global_step:,}: return {recent}, {steps_per_second:.0f} steps/s, {left} left", flush=True)

    progress.close()
    envs.close()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    title = f"{args.env_id}, {SCRIPT}, seed {args.seed}"
    if stopped_by:
        finish(args, run_dir, writer, title)
        print(f"stopped at step {iteration * batch_size}; to go on: python {SCRIPT}.py --resume {run_dir}")
        sys.exit(128 + stopped_by[0])
    scores = evaluate(agent, args, run_dir)
    with contextlib.suppress(OSError):
        for episode, score in enumerate(scores):
            writer.add_scalar("eval/episodic_return", score, episode)
    finish(args, run_dir, writer, title)
    return run_dir


def command_line():
    """The arguments, and the names of the flags that were given. A whole number may be written as 1e6."""
    whole = lambda match: match[1] + (str(int(float(match[2]))) if float(match[2]).is_integer() else match[2])  # noqa: E731
    words = [re.sub(r"^(--[\w-]+=|)(\d*\.?\d+e\+?\d+)$", whole, word, flags=re.IGNORECASE) for word in sys.argv[1:]]
    given = {word.split("=")[0].strip("-").replace("-", "_").removeprefix("no_") for word in words if word.startswith("--")}
    try:
        return tyro.cli(Args, args=words), given
    except SystemExit:
        for name in sorted(given & CLEANRL.keys()):
            print(f"{SCRIPT}: --{name.replace('_', '-')}: {CLEANRL[name]}", file=sys.stderr)
        raise


def main():
    args, given = command_line()
    if args.preset == "paper":
        task = args.env_id.split("-v")[0]
        if task not in PAPER:
            sys.exit(f"{SCRIPT}: --preset paper knows {', '.join(PAPER)}, not {args.env_id}")
        settings = paper_settings(task, args)
        args = replace(args, **{name: settings[name] for name in settings.keys() - given})  # flags given beside the preset win
    if args.resume and given - {"resume", "total_timesteps"}:
        sys.exit(f"{SCRIPT}: --resume goes on with the run's own configuration; only --total-timesteps can be given beside it")
    if args.resume and Path(args.resume).is_file():
        sys.exit(f"{SCRIPT}: --resume takes a run folder, not {args.resume}")
    if args.evaluate and given - {"evaluate", "eval_episodes", "capture_video"}:
        sys.exit(f"{SCRIPT}: --evaluate goes by the run's own configuration, and takes --eval-episodes and --capture-video")
    try:
        if args.evaluate:
            path = Path(args.evaluate)
            played = dict(eval_episodes=args.eval_episodes, capture_video=args.capture_video)
            settings = replace(load_checkpoint(path)["args"], **played)
            check_args(settings)
            try_env(settings)
            run_dir = path.parent if path.is_file() else path
            evaluate(load_agent(path), settings, run_dir)
            for video in sorted(run_dir.glob("videos/eval-*.mp4")) if args.capture_video else ():
                print(f"video: {video}")
        else:
            train(args, **({"total_timesteps": args.total_timesteps} if args.resume and "total_timesteps" in given else {}))
    except gym.error.Error as error:  # such as a renderer that is not installed
        sys.exit(f"{SCRIPT}: {type(error).__name__}: {error}")
    except MemoryError:
        sys.exit(f"{SCRIPT}: out of memory: lower --num-steps, --num-envs or --hidden-size")
    except OSError as error:
        sys.exit(f"{SCRIPT}: {type(error).__name__}: {error} (runs are written to {Path('runs').absolute()})")


if __name__ == "__main__":
    main()
