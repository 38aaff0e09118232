"""Bounded Policy Optimization (BPO) for continuous control: MuJoCo and any gymnasium task with Box observations and actions.

PPO asks how far a policy may move and clips it there. BPO asks where it should go: of all policies whose ratio
ρ = π(a|s)/π₀(a|s) to the old policy stays in the band [1−ε, 1+ε], the best is known in closed form. Regress onto it.

    ρ* = 1 + ε·tanh(Ã/(2λ)),   Ã = R̂ − μ(s)                         the best ratio: 1+ε for good actions, 1−ε for bad ones
    μ  = argmin_u E_{a∼π₀}[ λ·softplus((R̂−u)/λ) − ½(R̂−u) ]         the soft median of R̂, which makes E_{π₀}[ρ*] = 1
    L  = E_{s,a∼π₀}[ |A|·|ρ_θ − ρ*| ],   A = R̂ − V(s)               the policy loss: μ picks the side, V gives the weight

R̂ is the GAE return of the action taken, in place of Q(s,a), and stays as it is during an update. V, PPO's critic, learns its
mean. A and Ã are taken anew in each minibatch. λ, --temperature, is so small that ρ* is nearly always an edge of the band.
Where A and Ã have the same sign, the gradient up to ρ* is that of PPO's −ρA; past ρ* PPO's is zero, and BPO's points back.
Source: Ao et al., Bounded Ratio Reinforcement Learning, arXiv 2604.18578.

    python bpo_continuous.py --env-id Humanoid-v4                   trains; all goes to runs/<env>__<exp_name>__<seed>__<time>/
    python bpo_continuous.py --env-id Humanoid-v4 --preset paper    the same with the authors' hyperparameters for this task
    python bpo_continuous.py --resume runs/<run>                    goes on with an interrupted run, to the very same weights
    python bpo_continuous.py --evaluate runs/<run> --capture-video  plays and films what was learned

In Python, load_agent("runs/<run>").act(obs) is the trained policy's action.
"""

import importlib.metadata
import json
import math
import os
import platform
import random
import re
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
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem


@dataclass
class TaskArgs:
    env_id: str = "HalfCheetah-v4"  # gymnasium id of the task
    num_envs: int = 1  # parallel environments
    async_envs: bool = False  # a process for each environment: for simulators slower than MuJoCo's tasks
    rescale_actions: bool = False  # stretch the policy's [−1, 1] to the task's range of actions, as RescaleAction does


@dataclass
class AlgorithmArgs:
    preset: Literal["default", "paper"] = "default"  # hyperparameters: one set for all tasks, or the authors' for this task
    num_steps: int = 1024  # steps in each environment per rollout
    num_minibatches: int = 16  # minibatches per epoch
    update_epochs: int = 10  # passes over each rollout
    learning_rate: float = 6e-4  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.99  # discount γ
    gae_lambda: float = 0.95  # decay of GAE, the generalised advantage estimator
    epsilon: float = 0.3  # half-width ε of the band the ratio is to stay in
    temperature: float = 1e-3  # λ, in units of the (normalised) returns: where |R̂−μ| is far above it, ρ* is an edge of the band
    use_median: bool = True  # Ã is R̂ − μ(s); --no-use-median: R̂ − V(s), the paper's ablation
    median_head: Literal["shared", "separate"] = "shared"  # μ is the critic's second output, or an MLP on its features
    median_temperature: float | None = None  # λ of the median loss; none: --temperature, as in theory; authors: 1
    norm_adv: bool = True  # divide the weight |A| by the standard deviation of A in the minibatch; A is not centred
    vf_coef: float = 0.5  # coefficient of the value loss ½(R̂−V)²
    median_coef: float = 0.5  # coefficient of the median loss
    ent_coef: float = 3e-3  # coefficient of the entropy bonus
    max_grad_norm: float = 0.5  # gradients are clipped to this norm, taken over all parameters
    norm_obs: bool = True  # normalise observations by their running mean and variance
    norm_reward: bool = True  # divide rewards by the running standard deviation of their discounted sum
    hidden_size: int = 64  # width of the two hidden layers
    activation: Literal["tanh", "relu"] = "tanh"  # activation of the hidden layers
    log_std_init: float = -0.7  # log σ of the first policy
    actor_gain: float = 0.0  # gain of the actor's last layer at the start; 0: the first policy is N(0, σ²) in every state


@dataclass
class RunArgs:
    total_timesteps: int = 1_000_000  # environment steps in all; the authors train for 40 million, Humanoid for 50 million
    exp_name: str = SCRIPT  # part of the run folder's name
    seed: int = 1  # seed of networks, policy noise and environments
    num_threads: int = 1  # CPU threads of the networks; at these sizes one is fastest
    compile: bool = False  # compile the update: faster in long runs; needs a C++ compiler
    checkpoint_every: int = 10  # iterations between checkpoints
    eval_every: int = 0  # iterations between evaluations while training, whose best policy is kept as best.pt; 0: none
    eval_episodes: int = 10  # episodes of an evaluation, played without noise
    capture_video: bool = False  # film episodes 0, 1, 8, 27, … as mp4 into the run folder
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "brrl"  # wandb project
    wandb_entity: str | None = None  # wandb team
    resume: str | None = None  # run folder to go on with, under its own configuration; --total-timesteps may extend it
    evaluate: str | None = None  # run folder, or a checkpoint in it, whose policy is played; nothing is trained


@dataclass
class Args(RunArgs, AlgorithmArgs, TaskArgs):
    """All flags; `--help` shows them in these groups."""


# The equations --------------------------------------------------------------------------------------------------------


def target_ratio(median_advantages, epsilon, temperature):
    """ρ* = 1 + ε·tanh(Ã/(2λ)), the best ratio in the band [1−ε, 1+ε]; any shape."""
    return 1 + epsilon * torch.tanh(median_advantages / (2 * temperature))


def bpo_loss(ratio, advantages, median_advantages, epsilon, temperature):
    """E[|A|·|ρ − ρ*|], a scalar. `ratio` (B,) has the gradient; A = R̂ − V(s) and Ã = R̂ − μ(s), (B,), must be detached."""
    return (advantages.abs() * (ratio - target_ratio(median_advantages, epsilon, temperature)).abs()).mean()


def median_loss(returns, median_values, temperature):
    """E[λ·softplus((R̂−u)/λ) − ½(R̂−u)], (B,), (B,) → a scalar: convex in u, least where u is the soft median of the returns."""
    errors = returns - median_values
    return (F.softplus(errors, beta=1 / temperature) - 0.5 * errors).mean()  # torch's softplus(x, β) is softplus(βx)/β


def gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """A_t = δ_t + γλ·(1 − done_t)·A_{t+1} with δ_t = r_t + γ·V(s_{t+1}) − V(s_t), all (T, N) (Schulman et al., 2016).

    `next_values` are V of the states that the actions led to, before any reset; after a termination 0 is taken in their place.
    `dones` are terminations and time limits: both end the sum.
    """
    deltas = rewards + gamma * torch.where(terminations > 0, 0.0, next_values) - values
    advantages, last = [], torch.zeros_like(deltas[0])
    for delta, decay in zip(deltas.flip(0), (gamma * gae_lambda * (1 - dones)).flip(0)):
        last = delta + decay * last
        advantages.append(last)
    return torch.stack(advantages).flip(0)


# Network --------------------------------------------------------------------------------------------------------------


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
        self.args, self.action_bounds = args, (np.full(action_dim, -np.inf), np.full(action_dim, np.inf))  # `train` sets them
        output = layer_init(nn.Linear(args.hidden_size, action_dim), args.actor_gain)
        self.actor_mean = hidden_layers(obs_dim, args).append(output)
        self.actor_logstd = nn.Parameter(torch.full((action_dim,), args.log_std_init))
        self.critic = hidden_layers(obs_dim, args)
        self.value_head = layer_init(nn.Linear(args.hidden_size, 2), 1.0)  # V and μ
        if args.median_head == "separate":
            output = layer_init(nn.Linear(args.hidden_size, 1), 1.0)
            self.median_head = hidden_layers(args.hidden_size, args, gain=1.0).append(output)
        self.obs_rms, self.return_rms = RunningMeanStd(obs_dim), RunningMeanStd()

    def log_prob(self, obs, actions):
        """log π(a|s): normalised observations (..., D), actions (..., A) → (...)"""
        z = (actions - self.actor_mean(obs)) * torch.exp(-self.actor_logstd)
        return -0.5 * (z * z).sum(-1) - self.actor_logstd.sum() - 0.5 * math.log(2 * math.pi) * z.shape[-1]

    def entropy(self):
        """Entropy of the policy, the same in every state: a scalar."""
        return (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def get_values(self, obs):
        """V(s) and μ(s): normalised observations (..., D) → (...), (...)"""
        features = self.critic(obs)
        values, median_values = self.value_head(features).unbind(-1)
        if self.args.median_head == "separate":
            median_values = self.median_head(features).squeeze(-1)
        return values, median_values

    def normalize(self, obs):
        """Raw observations (..., D) → the networks' inputs, a float32 array; in standard deviations with --norm-obs."""
        if self.args.norm_obs:
            obs = ((obs - self.obs_rms.mean.numpy()) * self.obs_rms.scale.numpy()).clip(-10, 10)
        return obs.astype(np.float32)

    def bound(self, actions):
        """The policy's actions (..., A) → those the task takes (..., *its shape), within its bounds: arrays both."""
        low, high = self.action_bounds
        actions = actions.reshape(actions.shape[:-1] + low.shape)
        return low + (actions.clip(-1, 1) + 1) / 2 * (high - low) if self.args.rescale_actions else actions.clip(low, high)

    def act(self, obs):
        """The mean action for raw, flat observations (D,), or the actions for (N, D), as the task takes them: an array."""
        return self.bound(in_numpy(self.actor_mean)(self.normalize(np.asarray(obs))))


class RunningMeanStd(nn.Module):
    """Mean and variance of all batches seen so far (Chan et al., 1979); saved with the weights, but not trained."""

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(shape, dtype=torch.float64))  # one over the standard deviation
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, batch):
        """Takes in an array (B, *shape)."""
        batch = torch.from_numpy(batch).double()
        total, delta = self.count + len(batch), batch.mean(0) - self.mean
        squares = self.var * self.count + batch.var(0, correction=0) * len(batch)
        self.var.copy_((squares + delta**2 * self.count * len(batch) / total) / total)
        self.mean.add_(delta * len(batch) / total)
        constant = self.var <= (1e-12 * self.mean).square()  # but for rounding; its scale stays 1
        self.scale.copy_(torch.where(constant, 1.0, self.var.rsqrt()))
        self.count.copy_(total)


def in_numpy(network):
    """The same function of float32 arrays, on the same weights: for one row torch takes several times as long."""

    def in_torch(layer):
        return lambda x: layer(torch.from_numpy(x)).detach().numpy()

    def linear(layer):
        weight, bias = layer.weight.detach().numpy().T, layer.bias.detach().numpy()
        return lambda x: x @ weight + bias

    known = {nn.Linear: linear, nn.Tanh: lambda _: np.tanh, nn.ReLU: lambda _: partial(np.maximum, np.float32(0))}
    functions = [known.get(type(layer), in_torch)(layer) for layer in network]

    def actor(x):
        for function in functions:
            x = function(x)
        return x

    return actor


# Environment ----------------------------------------------------------------------------------------------------------


def make_env(env_id, video_folder=None, name_prefix="train"):
    """One environment with flat observations, filmed if there is a `video_folder`. Exits with a line on a wrong task."""
    if env_id.startswith("ALE/") or "NoFrameskip" in env_id:
        sys.exit(f"{SCRIPT}: {env_id} is an Atari game: use bpo_atari.py, for PPO with --loss ppo")
    if video_folder:
        import torch._dynamo  # noqa: F401  Adam needs it, and Triton in it crashes if a renderer's LLVM was loaded before

        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    try:
        import mujoco

        mujoco.set_mju_user_warning(show_warning)
        env = gym.make(env_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if video_folder else {}))
    except Exception as error:  # whatever a task's own code raises
        sys.exit(f"{SCRIPT}: {env_id} can't be made: {one_line(error)}")
    space, actions = env.observation_space, env.action_space
    if not isinstance(actions, gym.spaces.Box) or not np.issubdtype(actions.dtype, np.floating):
        sys.exit(f"{SCRIPT}: {env_id}'s actions are {actions}: this script is for continuous actions, a Box of reals")
    dimensions = len(space.shape) if isinstance(space, gym.spaces.Box) else 1
    if dimensions > 2 or (dimensions == 2 and space.dtype == np.uint8) or not space.is_np_flattenable:
        sys.exit(f"{SCRIPT}: {env_id} observes {space}: this script takes vectors, and no images")
    if video_folder:
        length = 0 if env.spec.max_episode_steps else 1000  # steps, kept in memory; 0: whole episodes
        env = gym.wrappers.RecordVideo(env, str(video_folder), video_length=length, name_prefix=name_prefix)
    return Task(gym.wrappers.FlattenObservation(env))


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


class Task(gym.Wrapper):
    """A task without its infos, which cost a vector environment time, and with episodes that can be saved and played again."""

    seed, number = 0, 0

    def reset(self, *, seed=None, options=None):
        """Each episode has a seed of its own, which follows from that of the first."""
        self.seed, self.number = (self.seed, self.number + 1) if seed is None else (seed, 0)
        later_seed = int(np.random.SeedSequence((self.seed, self.number)).generate_state(1)[0])
        self.obs, _ = self.env.reset(seed=later_seed if self.number else self.seed, options=options)
        self.actions = []
        return self.obs, {}

    def step(self, action):
        if len(self.actions) < 100_000:  # a longer episode can't be saved
            self.actions.append(np.array(action))
        self.obs, reward, terminated, truncated, _ = self.env.step(action)
        return self.obs, np.asarray(reward).item(), terminated, truncated, {}  # a reward of shape (1,) is a number too

    @property
    def episode(self):
        """What the running episode follows from."""
        return {"seed": self.seed, "number": self.number, "actions": torch.from_numpy(np.array(self.actions))}

    @episode.setter
    def episode(self, episode):
        """Plays it again; `score` is its return so far."""
        self.seed, self.number = episode["seed"], episode["number"] - 1
        self.reset()
        self.score = 0.0
        for action in episode["actions"].numpy():
            self.score += self.step(action)[1]


def make_envs(args, run_dir):
    """`num_envs` environments that reset themselves in the step that ends an episode, so no transition crosses a reset."""
    folders = [run_dir / "videos" if args.capture_video and i == 0 else None for i in range(args.num_envs)]
    env_fns = [partial(make_env, args.env_id, folder, f"train-{int(time.time())}") for folder in folders]
    vectorise = gym.vector.AsyncVectorEnv if args.async_envs else SyncEnvs
    return vectorise(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


# Training -------------------------------------------------------------------------------------------------------------


def total_loss(agent, args, obs, actions, logprobs, returns):
    """The loss of a minibatch; its terms (4,). Unlike PPO's, A and Ã are taken anew, with the critics as they are now."""
    ratio = torch.exp(agent.log_prob(obs, actions) - logprobs)
    values, median_values = agent.get_values(obs)
    advantages = (returns - values).detach()
    median_advantages = (returns - median_values).detach() if args.use_median else advantages
    if args.norm_adv:
        advantages = advantages / (advantages.std() + 1e-8)  # a weight; Ã, which gives the target, keeps its unit

    policy_loss = bpo_loss(ratio, advantages, median_advantages, args.epsilon, args.temperature)
    value_loss = 0.5 * F.mse_loss(values, returns)
    mu_loss = args.use_median * median_loss(returns, median_values, args.median_temperature or args.temperature)
    entropy = agent.entropy()
    loss = policy_loss + args.vf_coef * value_loss + args.median_coef * mu_loss - args.ent_coef * entropy
    return loss, torch.stack([policy_loss, value_loss, mu_loss, entropy])


def gradient(agent, args, *minibatch):
    """The clipped gradient of the total loss, one vector (P,) over all parameters, and the terms of the loss."""
    loss, terms = total_loss(agent, args, *minibatch)
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))])
    grad = grad * (args.max_grad_norm / (grad.norm() + 1e-6)).clamp(max=1.0)
    return grad, terms.detach()


def step(agent, optimizer, args, *minibatch):
    """One step of Adam on a minibatch; returns the terms of the loss. `--compile` puts a faster one in its place."""
    (weights,) = optimizer.param_groups[0]["params"]  # the one vector that all layers are views of: see `train`
    weights.grad, terms = gradient(agent, args, *minibatch)
    optimizer.step()
    return terms


def update(agent, optimizer, batch, args, step=step):
    """Fits policy and critics to a rollout, tensors (B, …) in the order of `total_loss`; returns the mean of each term."""
    history = []
    for _ in range(args.update_epochs):
        shuffle = torch.randperm(len(batch[0]))
        for minibatch in zip(*(tensor[shuffle].tensor_split(args.num_minibatches) for tensor in batch)):
            history.append(step(agent, optimizer, args, *minibatch))
    return torch.stack(history).mean(0)


def train(args, run=None):
    """Trains, evaluates and draws the learning curve; returns the run folder.

    `run` is what `begin(args)` makes: run folder, arguments, and the checkpoint of a run that goes on, or None.
    """
    run_dir, args, checkpoint = run or begin(args)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    threadpool_limits(args.num_threads)  # numpy's
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size

    envs = make_envs(args, run_dir)
    next_obs, _ = envs.reset(seed=[args.seed + 100_000 * i for i in range(args.num_envs)])
    obs_dim, action_dim = next_obs.shape[1], math.prod(envs.single_action_space.shape)
    agent = Agent(obs_dim, action_dim, args)
    agent.action_bounds = envs.single_action_space.low, envs.single_action_space.high
    weights = nn.Parameter(parameters_to_vector(agent.parameters()).detach())  # one vector is faster to clip and to step
    vector_to_parameters(weights.data, agent.parameters())  # the layers are views of it from here on
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)
    actor, update_step = in_numpy(agent.actor_mean), compiled_step(agent, args) if args.compile else step

    iteration, start_time, best = 0, time.time(), -math.inf
    episode_return, episode_length, discounted = np.zeros(args.num_envs), np.zeros(args.num_envs, int), np.zeros(args.num_envs)
    if checkpoint:
        iteration, start_time, best = checkpoint["iteration"], time.time() - checkpoint["seconds"], checkpoint["best"]
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["torch_rng"])
        envs.set_attr("episode", checkpoint["episodes"])
        lengths = [len(actions) for actions in envs.get_attr("actions")]
        replayed = np.stack(envs.get_attr("obs")).astype(next_obs.dtype), envs.get_attr("score"), lengths
        saved = [tensor.numpy() for tensor in checkpoint["rollout"]]
        if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(replayed, saved)):
            next_obs, episode_return, episode_length, discounted = saved
        else:
            next_obs, _ = envs.reset(seed=args.seed + iteration)
            print(f"{args.env_id}: the same seed and actions led to another state: new episodes begin")

    shape = (args.num_steps, args.num_envs)
    obs, successors = np.zeros((2, *shape, obs_dim), np.result_type(next_obs, np.float32))  # before and after each action
    actions = np.zeros((*shape, action_dim), np.float32)
    rewards, discounted_returns = np.zeros(shape), np.zeros(shape)
    terminations, truncations = np.zeros(shape, bool), np.zeros(shape, bool)
    log, start = Log(args, run_dir, start_time, iteration * batch_size), iteration

    while True:
        if iteration % args.checkpoint_every == 0 or iteration in (start, num_iterations):
            rollout = [torch.from_numpy(x) for x in (next_obs, episode_return, episode_length, discounted)]
            save_checkpoint(run_dir / "checkpoint.pt", agent, args, iteration=iteration, seconds=time.time() - start_time,
                            best=best, optimizer=optimizer.state_dict(), torch_rng=torch.get_rng_state(),
                            episodes=envs.get_attr("episode"), rollout=rollout)  # fmt: skip
        if iteration == num_iterations:
            break
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)

        # Rollout. Only the actor runs here; values and log-probabilities of the whole rollout are one pass afterwards.
        noise = (torch.randn(*shape, action_dim) * agent.actor_logstd.detach().exp()).numpy()
        for t in range(args.num_steps):
            obs[t] = next_obs
            actions[t] = action = actor(agent.normalize(next_obs)) + noise[t]
            next_obs, rewards[t], terminations[t], truncations[t], infos = envs.step(agent.bound(action))
            successors[t] = next_obs
            discounted_returns[t] = discounted = args.gamma * discounted + rewards[t]
            episode_return += rewards[t]
            episode_length += 1
            for i in np.flatnonzero(terminations[t] | truncations[t]):
                successors[t, i] = infos["final_obs"][i]  # next_obs is a new episode's
                log.episode(iteration * batch_size + (t + 1) * args.num_envs, episode_return[i], episode_length[i])
                episode_return[i] = episode_length[i] = discounted[i] = 0
        iteration += 1

        # Advantages and returns. The statistics of the observations move after the update, so that π₀ is one policy; those of
        # the first rollout come before it, if its policy was blind: with --actor-gain 0 it ignored its input.
        blind = iteration == 1 and args.actor_gain == 0
        if blind:
            agent.obs_rms.update(obs.reshape(batch_size, -1))
        agent.return_rms.update(discounted_returns.flatten())
        scaled_rewards = torch.from_numpy(rewards)
        if args.norm_reward:
            scaled_rewards = (scaled_rewards * agent.return_rms.scale).clamp(-10, 10)
        b_obs, b_actions = torch.from_numpy(agent.normalize(obs)), torch.from_numpy(actions)
        with torch.no_grad():
            b_logprobs = agent.log_prob(b_obs, b_actions)
            values, _ = agent.get_values(b_obs)
            next_values, _ = agent.get_values(torch.from_numpy(agent.normalize(successors)))
        ends = torch.from_numpy(terminations).float(), torch.from_numpy(terminations | truncations).float()
        advantages = gae(scaled_rewards.float(), values, next_values, *ends, args.gamma, args.gae_lambda)
        b_returns = advantages + values

        # Update.
        batch = [tensor.flatten(0, 1) for tensor in (b_obs, b_actions, b_logprobs, b_returns)]
        terms = update(agent, optimizer, batch, args, update_step)
        if not blind:
            agent.obs_rms.update(obs.reshape(batch_size, -1))

        metrics = dict(zip(("policy_loss", "value_loss", "median_loss", "entropy"), terms)) | ratio_metrics(agent, args, *batch)
        for name, value in {**metrics, "a weight": weights, "an observation": agent.obs_rms.var}.items():
            if not value.isfinite().all():
                envs.close()
                sys.exit(f"{SCRIPT}: stopped at step {iteration * batch_size}: {name} is not finite. "
                         f"{run_dir} keeps the last good checkpoint")  # fmt: skip
        metrics["explained_variance"] = 1 - advantages.var() / b_returns.var()
        log.iteration(iteration * batch_size, metrics, optimizer.param_groups[0]["lr"])
        if args.eval_every and iteration % args.eval_every == 0:
            score = float(np.mean(evaluate(agent, args)))
            log.writer.add_scalar("eval/mean_return", score, iteration * batch_size)
            if score > best:
                best = score
                save_checkpoint(run_dir / "best.pt", agent, args, step=iteration * batch_size, score=score)

    envs.close()
    log.progress.close()
    for episode, score in enumerate(evaluate(agent, args, run_dir)):
        log.writer.add_scalar("eval/episodic_return", score, episode)
    log.close()
    finish(args, run_dir)
    return run_dir


# What surrounds a run -------------------------------------------------------------------------------------------------


@torch.no_grad()
def ratio_metrics(agent, args, obs, actions, logprobs, returns):
    """What an update did to the ratios of its rollout: estimates of KL(π₀‖π), share outside the band, mean |ρ−ρ*|."""
    logratio = agent.log_prob(obs, actions) - logprobs
    ratio = logratio.exp()
    thresholds = agent.get_values(obs)[args.use_median]
    target = target_ratio(returns - thresholds, args.epsilon, args.temperature)
    return {
        "old_approx_kl": -logratio.mean(),
        "approx_kl": (ratio - 1 - logratio).mean(),
        "clipfrac": ((ratio - 1).abs() > args.epsilon).float().mean(),
        "ratio_error": (ratio - target).abs().mean(),
    }


def compiled_step(agent, args):
    """`step` with loss, gradient and Adam compiled into one function of the flat weights, once for each size of minibatch.

    It skips torch.compile, whose checks before each call would take as long as the arithmetic.
    """
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shapes = {f"agent.{name}": parameter.shape for name, parameter in agent.named_parameters()}
    compiled = {}

    class Gradient(nn.Module):
        def __init__(self):
            super().__init__()
            self.agent = agent

        def forward(self, *minibatch):
            return gradient(agent, args, *minibatch)

    def adam(weights, m, v, rate, root, *minibatch):
        """Adam (Kingma and Ba, 2015) in place, with rate = α/(1−β₁ᵗ) and root = √(1−β₂ᵗ); returns the terms of the loss."""
        parts = weights.split([shape.numel() for shape in shapes.values()])
        parameters = {name: part.view(shapes[name]).detach().requires_grad_() for name, part in zip(shapes, parts)}
        g, terms = torch.func.functional_call(Gradient(), parameters, minibatch)
        m.lerp_(g, 0.1)  # m ← β₁m + (1−β₁)g, β₁ = 0.9
        v.lerp_(g * g, 0.001)  # v ← β₂v + (1−β₂)g², β₂ = 0.999
        weights.sub_(rate * m / (v.sqrt() / root + 1e-5))
        return terms

    def fast_step(agent, optimizer, args, *minibatch):
        (weights,) = optimizer.param_groups[0]["params"]
        state, size = optimizer.state[weights], len(minibatch[0])
        if not state:  # Adam makes it in its first step
            return step(agent, optimizer, args, *minibatch)
        t = state["step"].add_(1).item()
        rate, root = optimizer.param_groups[0]["lr"] / (1 - 0.9**t), (1 - 0.999**t) ** 0.5
        inputs = [weights.data, state["exp_avg"], state["exp_avg_sq"], torch.tensor(rate), torch.tensor(root), *minibatch]
        if size not in compiled:
            graph = make_fx(adam)(*[tensor.clone() for tensor in inputs])
            for node in graph.graph.nodes:
                node.meta.clear()  # the compiler makes its own
            fake_mode = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True))  # or nothing is cached for later runs
            try:
                with torch._guards.tracing(torch._guards.TracingContext(fake_mode)):
                    compiled[size] = torch._inductor.compile(graph, inputs, options={"cpp_wrapper": True})
            except Exception as error:  # such as no C++ compiler
                if adam not in compiled.values():
                    print(f"--compile fails, training goes on without it: {one_line(error)[:200]}")
                compiled[size] = adam
        return compiled[size](*inputs)

    return fast_step


def show_warning(text):
    """MuJoCo's warnings on the screen, not in a file; that the tasks' own models are of an older style helps nobody."""
    if "settotalmass" not in text:
        print(f"MuJoCo: {text}", file=sys.stderr)


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


def check_args(args):
    """Exits with a line on arguments that can't be."""

    def check(names, fine, rule):
        for name in names.split():
            if (value := getattr(args, name)) is not None and not (math.isfinite(value) and fine(value)):
                sys.exit(f"{SCRIPT}: --{name.replace('_', '-')} {value} must be {rule}")

    batch_size = args.num_envs * args.num_steps
    counts = "num_envs num_steps update_epochs hidden_size checkpoint_every eval_episodes"
    check(counts, lambda x: 1 <= x <= 10**8, "at least 1, and at most 100,000,000")
    check("num_threads", lambda x: 1 <= x <= 1024, "at least 1, and at most 1024")
    check("seed eval_every", lambda x: 0 <= x <= 10**9, "between 0 and 1,000,000,000")
    check("learning_rate max_grad_norm temperature median_temperature", lambda x: x > 0, "a positive number")
    check("gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1")
    check("epsilon", lambda x: 0 < x < 1, "between 0 and 1, so that the band [1−ε, 1+ε] holds positive ratios")
    check("vf_coef median_coef ent_coef log_std_init actor_gain", lambda x: True, "a finite number")
    check("num_minibatches", lambda x: 1 <= x <= batch_size / 2, f"at most half of --num-envs × --num-steps = {batch_size}")
    check("total_timesteps", lambda x: x >= batch_size, f"at least one batch, --num-envs × --num-steps = {batch_size}")


def begin(args, total_timesteps=None):
    """What `train` starts from: the run folder, its arguments, its checkpoint or None. Exits with a line on bad input.

    With `args.resume` the run goes on under its own configuration, to its end or to `total_timesteps`.
    """
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    if checkpoint:
        run_dir, args = Path(args.resume), checkpoint["args"]
        if total_timesteps is not None:
            args = replace(args, total_timesteps=total_timesteps)
    check_args(args)
    batch_size, done = args.num_envs * args.num_steps, checkpoint["iteration"] if checkpoint else 0
    if done * batch_size > args.total_timesteps:
        sys.exit(f"{SCRIPT}: {run_dir} is at step {done * batch_size} already, beyond --total-timesteps {args.total_timesteps}")
    try_env(args)
    if checkpoint and total_timesteps is not None and args.anneal_lr:
        rate = args.learning_rate * (1 - done / (total_timesteps // batch_size))
        print(f"the learning rate now falls to 0 at step {total_timesteps:,}; here it is {rate:.3g}")
    if checkpoint:  # later episodes will be played again
        rows = (run_dir / "episodes.csv").read_text().splitlines(keepends=True)
        whole = [row for row in rows[1:] if row.endswith("\n") and int(row.split(",")[0]) <= done * batch_size]
        (run_dir / "episodes.csv").write_text("".join(rows[:1] + whole))
    else:
        stamp, name = int(time.time()), re.sub("[/:]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__")
        while (run_dir := Path(f"runs/{name}{stamp}")).exists():
            stamp += 1
        run_dir.mkdir(parents=True)
        (run_dir / "episodes.csv").write_text("step,return,length,wall_time\n")
    print(f"run folder: {run_dir}", flush=True)

    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
    config = asdict(args) | {"versions": {"python": platform.python_version()} | versions, "commit": commit}
    (run_dir / "config.json").write_text(json.dumps(config, indent=2))
    if args.track:
        import wandb

        name, script = run_dir.resolve().name, Path(__file__).resolve()
        try:
            wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, config=asdict(args), name=name, id=name,
                       resume="allow", dir=run_dir, sync_tensorboard=True)  # fmt: skip
            wandb.save(str(script), base_path=str(script.parent), policy="now")
        except wandb.errors.Error as error:
            sys.exit(f"{SCRIPT}: --track: {one_line(error)}")
    return run_dir, args, checkpoint


def try_env(args):
    """Exits with a line, before there is a run folder, on a task that can't be played, or be filmed with --capture-video."""
    with tempfile.TemporaryDirectory() as folder:
        env = make_env(args.env_id, folder if args.capture_video else None)
        size = env.observation_space.shape[0]
        low, high = env.action_space.low.astype(float), env.action_space.high.astype(float)
        needed = 8 * args.num_envs * args.num_steps * (2 * size + low.size + 4)  # bytes of a rollout
        np.empty(needed + 64 * args.hidden_size**2 + 2**20 * args.num_envs, np.uint8)  # a MemoryError comes here, not later
        if args.rescale_actions and not env.action_space.is_bounded():
            sys.exit(f"{SCRIPT}: --rescale-actions: the actions of {args.env_id} have no bounds: {env.action_space}")
        try:
            env.reset(seed=args.seed)
            env.close()  # which writes what was filmed
        except Exception as error:  # each renderer fails in its own way
            verb, hint = ("filmed", "; MUJOCO_GL=egl renders without a screen") if args.capture_video else ("played", "")
            sys.exit(f"{SCRIPT}: {args.env_id} can't be {verb}: {one_line(error)}{hint}")
    sigma = math.exp(args.log_std_init)
    covered, width = np.minimum(high, sigma) - np.maximum(low, -sigma), high - low  # within ±σ, and in all
    narrow, wide = np.isfinite(width) & (covered < 0.1 * width), (width > 0) & (2 * sigma > 10 * width)
    if not args.rescale_actions and (narrow | wide).any():
        share = "less than a tenth of" if narrow.any() else "more than ten times"
        print(f"the first policy, N(0, {sigma:.2g}²), covers {share} the range of the actions of {args.env_id}: see "
              "--rescale-actions and --log-std-init")  # fmt: skip


class Log:
    """episodes.csv, TensorBoard and the progress bar, which is drawn once a minute where there is no terminal."""

    def __init__(self, args, run_dir, start_time, start):
        self.args, self.start_time, self.recent = args, start_time, deque(maxlen=20)
        self.csv = open(run_dir / "episodes.csv", "a")  # noqa: SIM115  closed in `close`
        self.writer = SummaryWriter(run_dir, purge_step=start + 1)
        flags = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        self.writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{flags}")
        batch_size = args.num_envs * args.num_steps
        total = args.total_timesteps // batch_size * batch_size
        pause = 0.1 if sys.stderr.isatty() else 60  # seconds
        self.progress = tqdm(total=total, initial=start, unit=" steps", mininterval=pause, maxinterval=pause)

    def episode(self, step, episodic_return, length):
        self.csv.write(f"{step},{float(episodic_return)},{length},{time.time() - self.start_time:.1f}\n")
        self.writer.add_scalar("charts/episodic_return", episodic_return, step)
        self.writer.add_scalar("charts/episodic_length", length, step)
        self.recent.append(episodic_return)

    def iteration(self, step, metrics, learning_rate):
        speed = step / (time.time() - self.start_time)
        for name, value in metrics.items():
            self.writer.add_scalar(f"losses/{name}", value, step)
        self.writer.add_scalar("charts/learning_rate", learning_rate, step)
        self.writer.add_scalar("charts/SPS", int(speed), step)
        self.writer.flush()
        self.csv.flush()
        recent = f"{np.mean(self.recent):.1f}" if self.recent else "-"
        self.progress.set_postfix({"return": recent}, refresh=False)
        self.progress.update(self.args.num_envs * self.args.num_steps)

    def close(self):
        self.progress.close()
        self.csv.close()
        self.writer.close()


def save_checkpoint(path, agent, args, **state):
    """Writes tensors and plain data to a temporary file and renames it: at any instant there is a whole one."""
    bounds = [torch.from_numpy(bound) for bound in agent.action_bounds]
    state |= {"script": SCRIPT, "args": asdict(args), "agent": agent.state_dict(), "action_bounds": bounds}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


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


def evaluate(agent, args, run_dir=None):
    """The returns of `eval_episodes` episodes of mean actions; with a run folder they are printed, and may be filmed."""
    env, returns = make_env(args.env_id, run_dir / "videos" if run_dir and args.capture_video else None, "eval"), []
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=args.seed + 1_050_000 + episode)  # no training seeds
        returns.append(0.0)
        for _ in range(env.spec.max_episode_steps or 100_000):  # a good policy might never end an episode
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
            returns[-1] += reward
            if terminated or truncated:
                break
        if run_dir:
            print(f"evaluation, episode {episode + 1} of {args.eval_episodes}: return {returns[-1]:.1f}", flush=True)
    env.close()
    if run_dir:
        mean, std = np.mean(returns), np.std(returns)
        print(f"evaluation: {mean:.1f} ± {std:.1f} (mean ± std of {len(returns)} episodes, mean actions)")
    return returns


def finish(args, run_dir):
    """Draws the learning curve: the return of every episode, and the mean of the last 20. Names the videos."""
    rows = [row.split(",") for row in (run_dir / "episodes.csv").read_text().splitlines()[1:]]
    steps, returns = np.array([row[:2] for row in rows if len(row) == 4], float).reshape(-1, 2).T  # a killed run may cut one
    means = [returns[max(0, i - 20) : i].mean() for i in range(1, len(returns) + 1)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, returns, ".", alpha=0.25, label="episode")
    axes.plot(steps, means, color="tab:blue", label="mean of the last 20 episodes")
    title = f"{args.env_id}, {SCRIPT}, seed {args.seed}"
    axes.set(xlabel="environment steps", ylabel="return (undiscounted)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run_dir / "learning_curve.png", dpi=120)
    print(f"learning curve: {run_dir / 'learning_curve.png'}")
    videos = sorted(run_dir.glob("videos/*.mp4"))
    for video in videos:
        print(f"video: {video}")
    if args.track:
        import wandb

        wandb.log({f"videos/{video.stem}": wandb.Video(str(video)) for video in videos})
        wandb.finish()


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


@dataclass
class Groups:
    task: TaskArgs
    algorithm: AlgorithmArgs
    run: RunArgs


def command_line():
    """The arguments, and the names of the flags that were given. A whole number may be written as 1e6."""
    whole = lambda match: match[1] + (str(int(float(match[2]))) if float(match[2]).is_integer() else match[2])  # noqa: E731
    words = [re.sub(r"^(--[\w-]+=|)(\d*\.?\d+e\+?\d+)$", whole, word, flags=re.IGNORECASE) for word in sys.argv[1:]]
    given = {word.split("=")[0].strip("-").replace("-", "_").removeprefix("no_") for word in words if word.startswith("--")}
    try:
        groups = tyro.cli(tyro.conf.OmitArgPrefixes[Groups], args=words)
        return Args(**vars(groups.task), **vars(groups.algorithm), **vars(groups.run)), given
    except SystemExit:
        for name in sorted(given & CLEANRL.keys()):
            print(f"{SCRIPT}: --{name.replace('_', '-')}: {CLEANRL[name]}", file=sys.stderr)
        raise


def main():
    gym.logger.min_level = gym.logger.ERROR  # the paper's tasks are v4, which gymnasium calls out of date at every start
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
            path, agent = Path(args.evaluate), load_agent(args.evaluate)
            args = replace(agent.args, eval_episodes=args.eval_episodes, capture_video=args.capture_video)
            check_args(args)
            try_env(args)
            run_dir = path.parent if path.is_file() else path
            evaluate(agent, args, run_dir)
            for video in sorted(run_dir.glob("videos/eval-*.mp4")) if args.capture_video else ():
                print(f"video: {video}")
            return
        run_dir, args, checkpoint = begin(args, args.total_timesteps if "total_timesteps" in given else None)
        try:
            train(args, (run_dir, args, checkpoint))
        except KeyboardInterrupt:
            finish(args, run_dir)
            print(f"stopped; to go on from the last checkpoint: python {SCRIPT}.py --resume {run_dir}")
            sys.exit(130)
    except MemoryError:
        sys.exit(f"{SCRIPT}: out of memory: lower --num-steps, --num-envs or --hidden-size")
    except EOFError:
        sys.exit(f"{SCRIPT}: the process of an environment ended")
    except (OSError, RuntimeError, gym.error.Error) as error:  # such as a full disk, or an environment that failed
        sys.exit(f"{SCRIPT}: {one_line(error)} (runs are written to {Path('runs').absolute()})")


if __name__ == "__main__":
    main()

# What `uv run` installs.

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
