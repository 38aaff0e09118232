"""Bounded Policy Optimization (BPO) for thousands of simulated robots: Isaac Lab 3.0, and mjlab where there is no Isaac Lab.

PPO asks how far a policy may move and clips it there. BPO asks where it should go: of all policies whose ratio
ρ = π(a|s)/π₀(a|s) to the old policy stays in the band [1−ε, 1+ε], the best is known in closed form. Regress onto it.

    ρ* = 1 + ε·tanh(Ã/(2λ)),   Ã = R̂ − μ(s)                         the best ratio: 1+ε for good actions, 1−ε for bad ones
    μ  = argmin_u E_{a∼π₀}[ λ·softplus((R̂−u)/λ) − ½(R̂−u) ]         the soft median of R̂, which makes E_{π₀}[ρ*] = 1
    L  = E_{s,a∼π₀}[ |A|·|ρ_θ − ρ*| ],   A = R̂ − V(s)               the policy loss: μ picks the side, V gives the weight

R̂ is the GAE return of the action taken, in place of Q(s,a). V, PPO's critic, learns its mean. R̂ is taken anew before each
pass over a rollout, A and Ã in each minibatch. In ρ* λ is so small, 0.01, that it is nearly always an edge of the band; in μ it
is the authors' 1, which moves μ towards the mean. Where A and Ã have the same sign, the gradient up to ρ* is that of PPO's
−ρA; past ρ* PPO's is zero, and BPO's points back.
Source: Ao et al., Bounded Ratio Reinforcement Learning, arXiv 2604.18578.

    python bpo_isaaclab.py --task Isaac-Humanoid                        trains; all goes into a folder of runs/
    python bpo_isaaclab.py --task Mjlab-Velocity-Flat-Unitree-G1        the same on mjlab, which needs no asset server
    python bpo_isaaclab.py --task Isaac-Ant --loss ppo env.episode_length_s=5     PPO in the same loop; an override of the task
    torchrun --nproc-per-node 2 bpo_isaaclab.py --task Isaac-Humanoid   on two GPUs, each with its own environments
    python bpo_isaaclab.py --resume runs/<run>                          goes on with a run, in new episodes
    python bpo_isaaclab.py --evaluate runs/<run> --capture-video        plays what was learned, and films it (mjlab)

In Python, load_agent("runs/<run>").act(obs) is the trained policy's mean action; it needs no simulator. What no flag sets, such
as networks and steps, is as the task's rsl_rl configuration says; BPO has the changes in PAPER below. Observations are
normalised as in rsl_rl 5.5, by statistics that move after each update; mjlab's 5.4 moves them at each step.
"""

import contextlib
import copy
import difflib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
import warnings
from collections import defaultdict, deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


@dataclass
class TaskArgs:
    task: str = "Isaac-Humanoid"  # id of an Isaac Lab or mjlab task
    num_envs: int = 4096  # parallel environments of each process
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()  # of the task's configuration, given as key=value beside the flags


@dataclass
class AlgorithmArgs:
    loss: Literal["bpo", "ppo"] = "bpo"  # the loss
    num_steps: int | None = None  # steps in each environment per rollout; none, here and below: as in the task's configuration
    num_minibatches: int | None = None  # minibatches per epoch
    update_epochs: int | None = None  # passes over each rollout
    reevaluate: tyro.conf.DisallowNone[bool | None] = None  # take V and R̂ anew before each later epoch; none: BPO does, PPO not
    learning_rate: float | None = None  # step size of Adam, at the start if it is adaptive
    desired_kl: float | None = None  # the learning rate follows this KL(π₀‖π); 0: it stands still
    gamma: float | None = None  # discount γ
    gae_lambda: float | None = None  # decay of GAE, the generalised advantage estimator
    epsilon: float | None = None  # half-width ε of the band the ratio is to stay in; none: the authors'; PPO: the task's
    temperature: float = 1e-2  # λ, in units of the returns: where |R̂−μ| is far above it, ρ* is an edge of the band
    use_median: bool = True  # Ã is R̂ − μ(s); --no-use-median: R̂ − V(s), the paper's ablation
    median_temperature: float = 1.0  # λ of the median loss; in theory that of ρ*; the authors' 1 moves μ towards the mean
    online_adv: tyro.conf.DisallowNone[bool | None] = None  # weight by |R̂−V| as it is now; --no-…: by the rollout's scaled |A|
    clip_vloss: bool | None = None  # PPO: clip the change of the value by ε too
    vf_coef: float | None = None  # coefficient of the value loss (R̂−V)²
    median_coef: float = 1.0  # coefficient of the median loss
    ent_coef: float | None = None  # coefficient of the entropy bonus
    max_grad_norm: float | None = None  # longest gradient, of actor and critic each
    norm_obs: bool | None = None  # normalise actor's and critic's observations by their running mean and variance
    actor_hidden_dims: tuple[int, ...] | None = None  # widths of the actor's hidden layers
    critic_hidden_dims: tuple[int, ...] | None = None  # widths of the critic's hidden layers
    activation: str | None = None  # activation of the hidden layers: elu, relu, tanh, selu, swish, lrelu
    init_std: float | None = None  # σ of the first policy


@dataclass
class RunArgs:
    total_timesteps: int | None = None  # environment steps in all; none: as in the task's configuration
    exp_name: str = SCRIPT  # part of the run folder's name
    seed: int = 1  # seed of networks, policy noise and environments
    device: str | None = None  # of simulation and networks; none: a GPU where there is one
    checkpoint_every: int = 50  # iterations between checkpoints
    eval_every: int = 0  # iterations between evaluations while training, whose best policy is kept as best.pt; 0: none
    eval_episodes: int = 64  # episodes of --evaluate and --eval-every, without noise; a run ends with one in each environment
    capture_video: bool = False  # film the evaluation as mp4 into the run folder; mjlab only
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


def ppo_loss(ratio, advantages, clip_coef):
    """Clipped surrogate −E[min(ρA, clip(ρ, 1−ε, 1+ε)A)] (Schulman et al., 2017): (B,), (B,) → a scalar."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def clipped_value_loss(values, old_values, returns, clip_coef):
    """½E[max((V−R̂)², (V₀ + clip(V−V₀, −ε, ε) − R̂)²)], V₀ the values before the update: (B,), (B,), (B,) → a scalar."""
    clipped_values = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((values - returns).square(), (clipped_values - returns).square()).mean()


def log_prob(actions, means, logstd):
    """log N(actions; means, exp(logstd)): (..., A), (..., A), (A,) → (...)"""
    z = (actions - means) * torch.exp(-logstd)
    return -0.5 * (z * z).sum(-1) - logstd.sum() - 0.5 * math.log(2 * math.pi) * z.shape[-1]


def gaussian_kl(old_means, old_logstd, means, logstd):
    """KL(N₀‖N) = Σ_a log(σ/σ₀) + (σ₀² + (m₀−m)²)/(2σ²) − ½: (B, A), (A,), (B, A), (A,) → (B,)"""
    variances = (2 * old_logstd).exp() + (old_means - means) ** 2
    return (logstd - old_logstd + 0.5 * (variances / (2 * logstd).exp() - 1)).sum(-1)  # exactly 0 where they are the same


# Network --------------------------------------------------------------------------------------------------------------


def average(tensor):
    """The mean of a tensor over all processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
        tensor /= WORLD_SIZE
    return tensor


class RunningMeanStd(nn.Module):
    """Mean and variance of all batches of all processes so far, as rsl_rl has them; saved with the weights, but not trained."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, batch):
        """Takes in a batch (B, size)."""
        mean = average(batch.mean(0))
        var = average((batch - mean).square().mean(0))
        self.count += len(batch) * WORLD_SIZE
        share, delta = len(batch) * WORLD_SIZE / self.count, mean - self.mean
        self.mean += share * delta
        self.var += share * (var - self.var + delta * (mean - self.mean))

    def forward(self, x):
        """x (..., size) in standard deviations."""
        return (x - self.mean) / (self.var.sqrt() + 0.01)


ACTIVATIONS = {"elu": nn.ELU, "relu": nn.ReLU, "tanh": nn.Tanh, "selu": nn.SELU, "swish": nn.SiLU, "lrelu": nn.LeakyReLU}


def mlp(inputs, hidden, outputs, activation):
    sizes = [inputs, *hidden]
    layers = [layer for pair in zip(sizes, hidden) for layer in (nn.Linear(*pair), ACTIVATIONS[activation]())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class Actor(nn.Module):
    """Observations (..., D) → mean actions (..., A); what is exported for deployment."""

    def __init__(self, obs_dim, num_actions, args):
        super().__init__()
        self.normalize = RunningMeanStd(obs_dim) if args.norm_obs else nn.Identity()
        self.mean = mlp(obs_dim, args.actor_hidden_dims, num_actions, args.activation)
        nn.init.zeros_(self.mean[-1].weight)  # so the first policy is N(0, σ²), whatever the observations
        nn.init.zeros_(self.mean[-1].bias)

    def forward(self, obs):
        return self.mean(self.normalize(obs))


class Agent(nn.Module):
    """Gaussian actor, and a critic whose two outputs are the mean V and the median μ."""

    def __init__(self, obs_dim, critic_obs_dim, num_actions, args):
        super().__init__()
        self.actor = Actor(obs_dim, num_actions, args)
        self.actor_logstd = nn.Parameter(torch.full((num_actions,), math.log(args.init_std)))
        self.critic_normalize = RunningMeanStd(critic_obs_dim) if args.norm_obs else nn.Identity()
        self.critic = mlp(critic_obs_dim, args.critic_hidden_dims, 2, args.activation)

    def parameter_groups(self):
        """The actor's parameters and the critic's, whose gradients are clipped apart."""
        return [*self.actor.parameters(), self.actor_logstd], list(self.critic.parameters())

    @torch.no_grad()
    def act(self, obs):
        """The mean actions for the actor's raw observations (D,) or (N, D), a tensor or an array; so are the actions."""
        actions = self.actor(torch.as_tensor(obs, dtype=torch.float32, device=self.actor_logstd.device))
        return actions.to(obs.device) if isinstance(obs, torch.Tensor) else actions.cpu().numpy()

    def get_values(self, obs):
        """V(s) and μ(s): critic's observations (..., D) → (...), (...)"""
        return self.critic(self.critic_normalize(obs)).unbind(-1)


# Environment ----------------------------------------------------------------------------------------------------------


class Envs:
    """N simulated robots of either stack, on one device: what actor and critic see, and where episodes ended."""

    def __init__(self, env, rl_cfg):
        self.env, self.groups = env, rl_cfg.obs_groups if isinstance(rl_cfg.obs_groups, dict) else {}
        self.num_envs, self.max_episode_length = env.unwrapped.num_envs, env.unwrapped.max_episode_length
        self.num_actions = env.unwrapped.single_action_space.shape[0]
        self.action_limit = rl_cfg.clip_actions if isinstance(rl_cfg.clip_actions, float | int) else math.inf
        self.random_start = getattr(rl_cfg, "init_at_random_ep_len", True)
        self.is_finite_horizon = env.unwrapped.cfg.is_finite_horizon  # the time limit belongs to the task, and is no cut

    def split(self, obs):
        """Observation groups by name → actor's (N, D), critic's (N, D′), which are privileged where the task has such."""
        groups = {"actor": ["actor"] if "actor" in obs else ["policy"]}
        groups["critic"] = ["critic"] if "critic" in obs else groups["actor"]
        groups |= self.groups
        for name in (*groups["actor"], *groups["critic"]):
            if name not in obs:
                sys.exit(f"{SCRIPT}: the task's agent takes observations {name!r}, its environment has {', '.join(obs)}")
            if not isinstance(obs[name], torch.Tensor) or obs[name].ndim != 2:
                sys.exit(f"{SCRIPT}: the observations {name!r} are no vectors, but images or a dict; this script takes vectors")
        return tuple(torch.cat([obs[name] for name in groups[key]], -1) for key in ("actor", "critic"))

    def reset(self, random_start=False):
        """Starts all episodes, with `random_start` at different distances from their time limit; returns observations."""
        obs, _ = self.env.reset()
        lengths = self.env.unwrapped.episode_length_buf  # some tasks draw it at random themselves
        high = int(self.max_episode_length) if random_start else 1
        self.env.unwrapped.episode_length_buf = torch.randint_like(lengths, high=high)
        actor_obs, self.critic_obs = self.split(obs)
        return actor_obs, self.critic_obs

    def step(self, actions):
        """Actions (N, A) → actor's and critic's observations, what the critic saw where actions led, rewards, ends, metrics.

        mjlab doesn't give the last observation of an episode; as in rsl_rl the one before stands for it.
        """
        obs, *results, extras = self.env.step(actions.clamp(-self.action_limit, self.action_limit))
        rewards, terminations, truncations = (tensor.reshape(self.num_envs) for tensor in results)  # from (N,) or (N, 1)
        actor_obs, critic_obs = self.split(obs)
        last_obs = self.split(extras["final_obs"])[1] if "final_obs" in extras else self.critic_obs
        if self.is_finite_horizon:
            terminations = terminations | truncations
        # What comes after a termination is worth 0; where a simulation failed, the last observation may be infinite.
        final_obs = torch.where((truncations & ~terminations)[:, None], last_obs, critic_obs)
        self.critic_obs = critic_obs
        return actor_obs, critic_obs, final_obs, rewards, terminations, truncations, extras.get("log", {})


# Training -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def estimate_returns(agent, rollout, args):
    """V(s), GAE(λ) advantages and returns R̂ = A + V of a rollout's steps, with the critic as it is: a dict of (T·N,).

    `rollout` holds critic_obs and next_obs (T, N, D), and `gae`'s rewards, terminations and dones (T, N).
    Where an episode goes on, next_obs are the next step's and need no second look.
    """
    values, _ = agent.get_values(rollout["critic_obs"])
    next_values = torch.cat((values[1:], agent.get_values(rollout["next_obs"][-1:])[0]))
    cut_off = rollout["dones"] > rollout["terminations"]  # by a time limit: the next step's obs are of another episode
    next_values[cut_off] = agent.get_values(rollout["next_obs"][cut_off])[0]
    ends = rollout["terminations"], rollout["dones"]
    advantages = gae(rollout["rewards"], values, next_values, *ends, args.gamma, args.gae_lambda)
    return {"values": values.flatten(), "advantages": advantages.flatten(), "returns": (advantages + values).flatten()}


def total_loss(agent, args, batch, old_logstd):
    """The loss of a minibatch, its terms, and KL(π₀‖π). BPO takes A and Ã anew, with the critics as they are now."""
    means, logstd = agent.actor(batch["obs"]), agent.actor_logstd
    ratio = torch.exp(log_prob(batch["actions"], means, logstd) - batch["logprobs"])
    values, median_values = agent.get_values(batch["critic_obs"])
    if args.loss == "ppo":
        policy_loss = ppo_loss(ratio, batch["normalized_advantages"], args.epsilon)
        value_clip, mu_loss = args.epsilon if args.clip_vloss else math.inf, torch.zeros_like(policy_loss)
    else:
        advantages = (batch["returns"] - values).detach()
        median_advantages = (batch["returns"] - median_values).detach() if args.use_median else advantages
        weight = advantages if args.online_adv else batch["normalized_advantages"]
        policy_loss = bpo_loss(ratio, weight, median_advantages, args.epsilon, args.temperature)
        value_clip, mu_loss = math.inf, median_loss(batch["returns"], median_values, args.median_temperature) * args.use_median
    value_loss = clipped_value_loss(values, batch["values"], batch["returns"], value_clip)
    entropy = (logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()
    # rsl_rl's value loss has no ½, hence the 2.
    loss = policy_loss + 2 * args.vf_coef * value_loss + args.median_coef * mu_loss - args.ent_coef * entropy
    kl = gaussian_kl(batch["means"], old_logstd, means.detach(), logstd.detach()).mean()
    terms = {"policy_loss": policy_loss, "value_loss": value_loss, "median_loss": mu_loss, "entropy": entropy, "kl": kl}
    return loss, terms


def update(agent, optimizer, batch, args, reevaluate=None):
    """Fits policy and critics to one rollout; returns the means of the loss's terms, scalars.

    `batch` holds obs, critic_obs (B, D), actions, means (B, A), logprobs, values, advantages and returns (B,); before each
    epoch but the first `reevaluate()`, if there is one, gives the last three anew.
    """
    vectors, learning_rate = optimizer.param_groups[0]["params"], optimizer.param_groups[0]["lr"]
    actor, critic = agent.parameter_groups()
    history, old_logstd = [], agent.actor_logstd.detach().clone()
    for epoch in range(args.update_epochs):
        if epoch and reevaluate:
            batch = batch | reevaluate()
        if epoch == 0 or args.loss == "ppo":  # the weights of --no-online-adv stay the rollout's
            advantages = batch["advantages"]
            batch["normalized_advantages"] = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for indices in torch.randperm(len(batch["obs"]), device=learning_rate.device).tensor_split(args.num_minibatches):
            minibatch = {name: tensor[indices] for name, tensor in batch.items()}
            loss, terms = total_loss(agent, args, minibatch, old_logstd)
            grads = torch.autograd.grad(loss, actor + critic)
            for vector, parts in zip(vectors, (grads[: len(actor)], grads[len(actor) :])):
                grad = average(parameters_to_vector(parts))
                vector.grad = grad * (args.max_grad_norm / (grad.norm() + 1e-6)).clamp(max=1.0)
            history.append(average(torch.stack(list(terms.values())).detach()))
            if args.desired_kl:  # as in rsl_rl: a KL of 0, a rollout's first, tells nothing
                kl = history[-1][-1]
                slower, faster = kl > 2 * args.desired_kl, (kl > 0) & (kl < args.desired_kl / 2)
                learning_rate.mul_(torch.where(slower, 1 / 1.5, torch.where(faster, 1.5, 1.0))).clamp_(1e-5, 1e-2)
            optimizer.step()
    return dict(zip(terms, torch.stack(history).mean(0)))


def train(args):
    """Trains, evaluates, exports and draws the learning curve; returns the run folder."""
    with contextlib.ExitStack() as launched:
        run_dir, args, checkpoint, envs = begin(args, launched)
        state = {"step": 0, "seconds": 0.0, "curriculum": 0, "best": -math.inf} | (checkpoint["state"] if checkpoint else {})
        batch_size = args.num_envs * args.num_steps * WORLD_SIZE
        iteration, num_iterations, best = state["step"] // batch_size, args.total_timesteps // batch_size, state["best"]
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(args.seed + 1_000 * iteration + RANK)

        obs, critic_obs = envs.reset(envs.random_start)
        envs.env.unwrapped.common_step_counter = state["curriculum"]  # curricula go by it; the reset above drew levels at 0
        agent = Agent(obs.shape[1], critic_obs.shape[1], envs.num_actions, args).to(args.device)
        if checkpoint:
            agent.load_state_dict(checkpoint["agent"])
        vectors = []  # all weights of the actor, and of the critic: to average, clip and step is one operation each
        for parameters in agent.parameter_groups():
            vectors.append(nn.Parameter(parameters_to_vector(parameters).detach()))
            if WORLD_SIZE > 1:
                dist.broadcast(vectors[-1].data, 0)
            vector_to_parameters(vectors[-1].data, parameters)  # the layers are views of it from here on
        learning_rate = torch.tensor(args.learning_rate, device=args.device)
        optimizer = torch.optim.Adam(vectors, lr=learning_rate, eps=1e-8, fused=True)
        if checkpoint:
            optimizer.load_state_dict(checkpoint["optimizer"])
            optimizer.param_groups[0]["lr"] = learning_rate.copy_(optimizer.param_groups[0]["lr"])
        start_time = time.time() - state["seconds"]

        def save(name="checkpoint.pt"):
            state = {"step": iteration * batch_size, "seconds": time.time() - start_time, "best": best}
            state |= {"curriculum": int(envs.env.unwrapped.common_step_counter), "world_size": WORLD_SIZE}
            save_checkpoint(run_dir / name, agent, args, state=state, optimizer=optimizer.state_dict())

        zeros = lambda *size: torch.zeros((args.num_steps, args.num_envs, *size), device=args.device)  # noqa: E731
        steps = {"obs": zeros(obs.shape[1]), "actions": zeros(envs.num_actions), "means": zeros(envs.num_actions)}
        rollout = {"critic_obs": zeros(critic_obs.shape[1]), "next_obs": zeros(critic_obs.shape[1])}
        rollout |= {name: zeros() for name in ("rewards", "terminations", "dones")}
        episode_return, episode_length = torch.zeros((2, args.num_envs), device=args.device)
        log, start = Log(args, run_dir, start_time, iteration * batch_size) if RANK == 0 else None, iteration

        while True:
            if RANK == 0 and (iteration % args.checkpoint_every == 0 or iteration in (start, num_iterations)):
                save()
            if iteration == num_iterations:
                break

            # Rollout. All stays on the device; what the episodes that end have come to is summed there.
            ended, task_metrics = torch.zeros(3, device=args.device), defaultdict(list)
            with torch.no_grad():
                std = agent.actor_logstd.exp()
                for t in range(args.num_steps):
                    steps["obs"][t], rollout["critic_obs"][t] = obs, critic_obs
                    steps["means"][t] = means = agent.actor(obs)
                    steps["actions"][t] = actions = means + torch.randn_like(means) * std
                    obs, critic_obs, rollout["next_obs"][t], rewards, terminations, truncations, extras = envs.step(actions)
                    dones = terminations | truncations
                    rollout["rewards"][t], rollout["terminations"][t], rollout["dones"][t] = rewards, terminations, dones
                    episode_return += rewards
                    episode_length += 1
                    ended += torch.stack((episode_return * dones, episode_length * dones, dones.float())).sum(1)
                    episode_return *= ~dones
                    episode_length *= ~dones
                    for name, value in extras.items():
                        task_metrics[name].append(value)
            iteration += 1

            # Advantages and returns, with the critic as it is; BPO takes them anew before each later epoch.
            estimate = lambda: estimate_returns(agent, rollout, args)  # noqa: E731
            batch = {name: tensor.flatten(0, 1) for name, tensor in steps.items()} | estimate()
            batch["critic_obs"] = rollout["critic_obs"].flatten(0, 1)
            batch["logprobs"] = log_prob(batch["actions"], batch["means"], agent.actor_logstd.detach())

            # Update. The statistics of the observations move after it, so that π₀ is one policy in the whole rollout.
            losses = update(agent, optimizer, dict(batch), args, estimate if args.reevaluate else None)
            changes = update_metrics(agent, args, batch)
            if args.norm_obs:
                agent.actor.normalize.update(batch["obs"])
                agent.critic_normalize.update(batch["critic_obs"])
            seen = average(batch["obs"].sum() + batch["critic_obs"].sum())
            for name, value in {"an observation": seen, **losses, "a ratio": changes["approx_kl"], "a weight": vectors}.items():
                if not all(tensor.isfinite().all() for tensor in (value if name == "a weight" else [value])):
                    message = f"stopped at step {iteration * batch_size}: {name} is not finite"
                    sys.exit(f"{SCRIPT}: {message}. {run_dir} keeps the last good checkpoint" if RANK == 0 else 1)

            ended = (average(ended) * WORLD_SIZE).tolist()
            if RANK == 0:
                log.iteration(iteration * batch_size, losses | changes, learning_rate, task_metrics, *ended)
            if RANK == 0 and args.eval_every and iteration % args.eval_every == 0:
                save("candidate.pt")
                score = evaluate_apart(args, run_dir / "candidate.pt")
                (run_dir / "candidate.pt").unlink()
                log.writer.add_scalar("eval/mean_return", score, iteration * batch_size)
                if score > best:
                    best = score
                    save("best.pt")

        if RANK == 0:
            log.close()
            evaluate(agent, envs, args, run_dir)
            export_policy(agent, run_dir)
            finish(args, run_dir)
    return run_dir


# What surrounds a run -------------------------------------------------------------------------------------------------


@torch.no_grad()
def update_metrics(agent, args, batch):
    """What an update did to the ratios of its rollout: estimates of KL(π₀‖π), share outside the band; what V explained."""
    logratio = log_prob(batch["actions"], agent.actor(batch["obs"]), agent.actor_logstd) - batch["logprobs"]
    ratio = logratio.exp()
    metrics = {
        "old_approx_kl": -logratio.mean(),
        "approx_kl": (ratio - 1 - logratio).mean(),
        "clipfrac": ((ratio - 1).abs() > args.epsilon).float().mean(),
        "explained_variance": 1 - (batch["returns"] - batch["values"]).var() / batch["returns"].var(),
    }
    return {name: average(value) for name, value in metrics.items()}


class Log:
    """episodes.csv, TensorBoard and the progress bar, which is drawn once a minute where there is no terminal."""

    def __init__(self, args, run_dir, start_time, start):
        self.start_time, self.recent = start_time, deque(maxlen=20)
        self.csv = open(run_dir / "episodes.csv", "a")  # noqa: SIM115
        self.writer = SummaryWriter(run_dir, purge_step=start + 1)
        flags = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        self.writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{flags}")
        batch_size = args.num_envs * args.num_steps * WORLD_SIZE
        total = args.total_timesteps // batch_size * batch_size
        pause = 0.1 if sys.stderr.isatty() else 60  # seconds
        self.progress = tqdm(total=total, initial=start, unit=" steps", mininterval=pause, maxinterval=pause)

    def iteration(self, step, losses, learning_rate, task_metrics, total_return, total_length, episodes):
        seconds = time.time() - self.start_time
        charts = {"charts/learning_rate": learning_rate, "charts/SPS": int(step / seconds)}
        charts |= {f"losses/{name}": value for name, value in losses.items()}
        charts |= {f"task/{name}": sum(values) / len(values) for name, values in task_metrics.items()}
        if episodes:
            self.recent.append(total_return / episodes)
            charts |= {"charts/episodic_return": self.recent[-1], "charts/episodic_length": total_length / episodes}
            self.csv.write(f"{step},{self.recent[-1]},{round(total_length / episodes)},{seconds:.1f}\n")
        for name, value in charts.items():
            self.writer.add_scalar(name, float(value), step)
        self.writer.flush()
        self.csv.flush()
        recent = f"{np.mean(self.recent):.2f}" if self.recent else "-"
        self.progress.set_postfix({"return": recent}, refresh=False)
        self.progress.update(step - self.progress.n)

    def close(self):
        self.progress.close()
        self.csv.close()
        self.writer.close()


def begin(args, launched):
    """What `train` starts from: run folder (None but on the first process), arguments, checkpoint or None, environments.

    Exits with a line on bad input. `launched` closes simulator and process group in the end.
    """
    torch.backends.cuda.matmul.allow_tf32 = True  # as in the training scripts of Isaac Lab and mjlab
    run_dir, checkpoint = None, load_checkpoint(args.resume) if args.resume else None
    done = checkpoint["state"]["step"] if checkpoint else 0
    if checkpoint:
        run_dir, settings = Path(args.resume), checkpoint["args"]
        if run_dir.is_file():
            sys.exit(f"{SCRIPT}: --resume {run_dir}: a run goes on from its folder, and the checkpoint.pt in it")
        total_timesteps = settings.total_timesteps if args.total_timesteps is None else args.total_timesteps
        if done > total_timesteps:
            sys.exit(f"{SCRIPT}: {run_dir} is at step {done} already, beyond --total-timesteps {total_timesteps}")
        args = replace(settings, total_timesteps=total_timesteps, device=args.device or settings.device)
    args = replace(args, device=args.device or best_device())
    if WORLD_SIZE > 1:
        cuda = args.device.startswith("cuda")
        args = replace(args, device=f"cuda:{os.environ['LOCAL_RANK']}" if cuda else args.device)
        dist.init_process_group("nccl" if cuda else "gloo")
        launched.callback(dist.destroy_process_group)
    rl_cfg, make_env = load_task(args, launched)
    args = stock_settings(rl_cfg, args)
    check_args(args)
    envs = make_envs(args, rl_cfg, make_env)

    @launched.push
    def stopped(_, error, __):  # here, since Isaac Lab prints the trace of all that leaves it
        if isinstance(error, KeyboardInterrupt):
            if RANK == 0 and run_dir:
                finish(args, run_dir)
                program = f"torchrun --nproc-per-node {WORLD_SIZE}" if WORLD_SIZE > 1 else "python"
                print(f"stopped; to go on from the last checkpoint: {program} {SCRIPT}.py --resume {run_dir}", flush=True)
            sys.exit(130)
        if isinstance(error, OSError):
            sys.exit(f"{SCRIPT}: {one_line(error)} (runs are written to {Path('runs').absolute()})")

    if RANK != 0:
        return None, args, checkpoint, envs
    if checkpoint:
        rows = (run_dir / "episodes.csv").read_text().splitlines(keepends=True)
        rows = [row for row in rows if row.startswith("step") or int(row.split(",")[0] or 0) <= done]  # the others come again
        (run_dir / "episodes.csv").write_text("".join(rows))
        print("a simulation can't be saved: new episodes begin")
        if (before := checkpoint["state"]["world_size"]) != WORLD_SIZE:
            print(f"before there were {before} processes, now {WORLD_SIZE}: batches change with them")
    else:
        stamp, name = int(time.time()), re.sub("[/:]", "-", f"{args.task}__{args.exp_name}__{args.seed}__")
        while (run_dir := Path(f"runs/{name}{stamp}")).exists():
            stamp += 1
        run_dir.mkdir(parents=True)
        (run_dir / "episodes.csv").write_text("step,return,length,wall_time\n")
    print(f"run folder: {run_dir}", flush=True)
    write_config(run_dir, args)
    if args.track:
        start_wandb(args, run_dir)
    return run_dir, args, checkpoint, envs


def write_config(run_dir, args):
    """Writes config.json: the arguments, and the versions and the commit that they ran with."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions, packages = {"python": platform.python_version()}, "torch numpy isaaclab newton mjlab mujoco mujoco-warp warp-lang"
    for name in [*packages.split(), "rsl-rl-lib"]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    config = asdict(args) | {"versions": versions, "commit": commit}
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


def finish(args, run_dir):
    """Draws the learning curve: the return of every iteration, and the mean of the last 20. Names the videos."""
    rows = [row.split(",") for row in (run_dir / "episodes.csv").read_text().splitlines()[1:]]
    steps, returns = np.array([row[:2] for row in rows if len(row) == 4], float).reshape(-1, 2).T  # a killed run may cut one
    means = [returns[max(0, i - 20) : i].mean() for i in range(1, len(returns) + 1)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, returns, ".", alpha=0.25, label="iteration")
    axes.plot(steps, means, color="tab:blue", label="mean of the last 20 iterations")
    title = f"{args.task}, {SCRIPT} --loss {args.loss}, seed {args.seed}"
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


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


def save_checkpoint(path, agent, args, **state):
    """Writes tensors and plain data to a temporary file and renames it: at any instant there is a whole one."""
    state |= {"script": SCRIPT, "args": asdict(args), "agent": agent.state_dict()}
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
    sizes = weights["actor.mean.0.weight"].shape[1], weights["critic.0.weight"].shape[1], len(weights["actor_logstd"])
    agent = Agent(*sizes, checkpoint["args"])
    agent.load_state_dict(weights)
    return agent


def export_policy(agent, run_dir):
    """Writes exported/policy.pt (TorchScript) and policy.onnx: raw observations (B, D) → mean actions (B, A)."""
    policy, folder = copy.deepcopy(agent.actor).cpu().float().eval(), run_dir / "exported"
    example, batch = torch.zeros(1, policy.mean[0].in_features), {0: "batch"}
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both formats are called old, and are what Isaac Lab's tools load
        torch.jit.trace(policy, example).save(str(folder / "policy.pt"))
        torch.onnx.export(policy, (example,), str(folder / "policy.onnx"), input_names=["obs"], output_names=["actions"],
                          dynamic_axes={"obs": batch, "actions": batch}, dynamo=False)  # fmt: skip


@torch.no_grad()
def evaluate(agent, envs, args, run_dir):
    """Plays the first episode of every environment with mean actions; prints their mean return and length."""
    obs, _ = envs.reset()
    returns, over = torch.zeros(envs.num_envs, device=obs.device), torch.zeros(envs.num_envs, dtype=bool, device=obs.device)
    lengths, frames, step = torch.zeros_like(returns), [], 0
    while not over.all():
        step += 1
        obs, _, _, rewards, terminations, truncations, _ = envs.step(agent.actor(obs))
        returns += rewards * ~over
        lengths += ~over
        over |= terminations | truncations
        if args.capture_video and len(frames) < 1000:
            frames.append(envs.env.render())
        if step % 100 == 0:
            print(f"evaluation, step {step} of {envs.max_episode_length}: {over.sum()} of {envs.num_envs} episodes are over",
                  flush=True)  # fmt: skip
    print(f"evaluation: {returns.mean():.5g} ± {returns.std(correction=0):.3g} (mean ± std of {envs.num_envs} episodes, "
          f"mean actions), {lengths.mean():.0f} of {envs.max_episode_length} steps long")  # fmt: skip
    if frames:
        import imageio

        (run_dir / "videos").mkdir(exist_ok=True)
        imageio.mimwrite(run_dir / "videos" / "eval.mp4", frames, fps=round(1 / envs.env.step_dt), macro_block_size=1)


def evaluate_apart(args, checkpoint):
    """The mean return of a checkpoint's policy, played by a process of its own, since Isaac Lab has one simulator in each."""
    command = [sys.executable, __file__, "--evaluate", checkpoint, "--eval-episodes", str(args.eval_episodes)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    played = subprocess.run([*command, "--device", args.device], capture_output=True, text=True, env=environment)
    if score := re.search(r"^evaluation: (\S+)", played.stdout, re.MULTILINE):
        return float(score[1])
    tqdm.write(f"{SCRIPT}: the evaluation failed: {(played.stderr.splitlines() or ['no output'])[-1]}", file=sys.stderr)
    return math.nan


def check_args(args):
    """Exits with a line on arguments that can't be."""

    def check(names, fine, rule):
        for name in names.split():
            if not (math.isfinite(value := getattr(args, name)) and fine(value)):
                sys.exit(f"{SCRIPT}: --{name.replace('_', '-')} {value} must be {rule}")

    batch_size = args.num_envs * args.num_steps
    check("num_envs num_steps update_epochs checkpoint_every eval_episodes", lambda x: x >= 1, "at least 1")
    check("seed eval_every", lambda x: 0 <= x <= 10**9, "between 0 and 1,000,000,000")
    check("learning_rate max_grad_norm init_std temperature median_temperature", lambda x: x > 0, "a positive number")
    check("gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1")
    check("desired_kl vf_coef median_coef", lambda x: x >= 0, "a number that is not negative")
    check("ent_coef", lambda x: True, "a finite number")
    check("epsilon", lambda x: 0 < x < 1, "between 0 and 1, so that the band [1−ε, 1+ε] holds positive ratios")
    check("num_minibatches", lambda x: 1 <= x <= batch_size / 2, f"at most half of --num-envs × --num-steps = {batch_size}")
    batch_size *= WORLD_SIZE
    check("total_timesteps", lambda x: x >= batch_size, f"at least one batch, num_envs × num_steps × processes = {batch_size}")
    if min(args.actor_hidden_dims + args.critic_hidden_dims, default=1) < 1:
        sys.exit(f"{SCRIPT}: --actor-hidden-dims and --critic-hidden-dims must be at least 1")
    if args.activation not in ACTIVATIONS:
        sys.exit(f"{SCRIPT}: --activation {args.activation} is none of {', '.join(ACTIVATIONS)}")


# What BPO has in place of the tasks' own settings, by a word of the task's name: the authors' changes, and ε 0.3 where they
# tell none. PPO has the tasks' own.
PAPER = {
    "": dict(epsilon=0.3, ent_coef=0.0, vf_coef=1.0, online_adv=True),
    "AnymalC": dict(epsilon=0.25),
    "G1": dict(update_epochs=10, epsilon=0.2),
    "Go1": dict(update_epochs=10, epsilon=0.3, ent_coef=1e-3, online_adv=False),
    "H1": dict(epsilon=0.2, online_adv=False),
}

# Fields of Args that a task's rsl_rl configuration sets, and their names there, the same in Isaac Lab and mjlab.
STOCK = dict(
    num_steps="num_steps_per_env", num_minibatches="algorithm.num_mini_batches", update_epochs="algorithm.num_learning_epochs",
    learning_rate="algorithm.learning_rate", desired_kl="algorithm.desired_kl", gamma="algorithm.gamma",
    gae_lambda="algorithm.lam", epsilon="algorithm.clip_param", clip_vloss="algorithm.use_clipped_value_loss",
    vf_coef="algorithm.value_loss_coef", ent_coef="algorithm.entropy_coef", max_grad_norm="algorithm.max_grad_norm",
    norm_obs="actor.obs_normalization", actor_hidden_dims="actor.hidden_dims", critic_hidden_dims="critic.hidden_dims",
    activation="actor.activation", init_std="actor.distribution_cfg.init_std",
)  # fmt: skip
# What the script has where a task may have something else: of other kinds it runs no agent, of the rest it prints a line.
KINDS = {"actor.class_name": "MLPModel", "critic.class_name": "MLPModel"}
KINDS["actor.distribution_cfg.class_name"] = "GaussianDistribution"
OURS = KINDS | {"algorithm.class_name": "PPO", "algorithm.optimizer": "adam", "actor.distribution_cfg.learn_std": True,
                "actor.distribution_cfg.std_type": "log", "actor.distribution_cfg.std_range": (1e-6, 1e6)}  # fmt: skip


def flatten(config, prefix=""):
    """{"algorithm.gamma": 0.99, …} of an rsl_rl configuration, which is made of objects or dicts."""
    flat = {}
    for name, value in (config if isinstance(config, dict) else vars(config)).items():
        if name in ("algorithm", "actor", "critic", "distribution_cfg") and value is not None:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = tuple(value) if isinstance(value, list) else value
    return flat


def stock_settings(rl_cfg, args):
    """The fields of Args that are None, from a task's rsl_rl configuration; prints what else this has that we don't follow."""
    task = flatten(rl_cfg)
    for kind in (task.get(name) for name in KINDS):
        if kind not in KINDS.values():
            sys.exit(f"{SCRIPT}: the agent of {args.task} has a {kind}: this script has an MLP and one σ for all states")
    ours = OURS | {name.replace("actor.", "critic."): value for name, value in task.items() if name.startswith("actor.")}
    unread = [name for name in task if "." in name and name not in (*STOCK.values(), "algorithm.schedule")]
    dropped = [f"{name} {task[name]} (here {ours[name]})" for name in unread if name in ours and task[name] != ours[name]]
    dropped += [f"{name} {task[name]}" for name in unread if name not in ours and task[name] and "rnn" not in name]
    if dropped and RANK == 0:
        print(f"{SCRIPT}: {args.task}'s rsl_rl configuration is not followed in {', '.join(dropped)}")
    stock = {field: task[name] for field, name in STOCK.items()}
    stock["reevaluate"] = args.loss == "bpo"
    stock["total_timesteps"] = rl_cfg.max_iterations * rl_cfg.num_steps_per_env * args.num_envs * WORLD_SIZE
    if task["algorithm.schedule"] != "adaptive" or stock["desired_kl"] is None:
        stock["desired_kl"] = 0.0
    if args.loss == "bpo":
        for word, row in PAPER.items():
            stock |= row if word in args.task else {}
    return replace(args, **{name: value for name, value in stock.items() if getattr(args, name) is None})


def best_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_task_name(task, tasks):
    if task not in tasks:
        matches = difflib.get_close_matches(task, tasks, cutoff=0.4)
        sys.exit(f"{SCRIPT}: no task {task!r}. Close: {', '.join(matches) or ', '.join(sorted(tasks)[:5])}")


# Settings that flags, or BPO's own in PAPER, would undo.
FLAGS = {"env.scene.num_envs": "--num-envs", "env.seed": "--seed", "env.sim.device": "--device", "agent.seed": "--seed"}
FLAGS |= {f"agent.{STOCK[name]}": f"--{name.replace('_', '-')}" for name in ("epsilon", "ent_coef", "vf_coef", "update_epochs")}


def find_setting(task, config, override):
    """The object whose field an override a.b.c=value sets, its name and value; exits with a line if there is none."""
    if flag := FLAGS.get(override.split("=")[0]):
        sys.exit(f"{SCRIPT}: {override}: the flag {flag} sets this")
    path, value = override.split("=")[0].split("."), config
    try:
        for name in path:
            config, value = value, value[name] if isinstance(value, dict) else getattr(value, name)
    except (AttributeError, KeyError, TypeError):
        sys.exit(f"{SCRIPT}: {override} is no setting of {task}")
    return config, path[-1], value


def check_type(override, old, new):
    """Exits with a line where an override puts something else in the place of a number."""
    if isinstance(old, bool | int | float) and not isinstance(new, bool | int | float):
        sys.exit(f"{SCRIPT}: {override}: no value for a setting that is {old} now")


def load_isaaclab(args, launched):
    """As `load_task`, of Isaac Lab."""
    import gymnasium as gym
    from isaaclab.app import launch_simulation  # before isaaclab_tasks

    importlib.import_module("isaaclab_tasks")  # registers the tasks
    from isaaclab.envs import DirectMARLEnvCfg
    from isaaclab_rl.rsl_rl import handle_deprecated_rsl_rl_cfg
    from isaaclab_tasks.utils import resolve_task_config

    tasks = {name for name in gym.registry if "rsl_rl_cfg_entry_point" in gym.spec(name).kwargs}
    if args.task.endswith("-v0") and args.task not in tasks:
        sys.exit(f"{SCRIPT}: Isaac Lab 3.0 has no versions in its ids: --task {args.task.removesuffix('-v0')}")
    check_task_name(args.task, tasks)
    presets = [override for override in args.overrides if override.startswith(("presets=", "physics=", "renderer="))]
    try:
        env_cfg, rl_cfg = resolve_task_config(args.task, "rsl_rl_cfg_entry_point", overrides=presets)
        # Isaac Lab would take an override of no setting, or text for a number, without a word.
        others = [override for override in args.overrides if override not in presets]
        old = [find_setting(args.task, {"env": env_cfg, "agent": rl_cfg}, override)[-1] for override in others]
        env_cfg, rl_cfg = resolve_task_config(args.task, "rsl_rl_cfg_entry_point", overrides=list(args.overrides))
        for override, value in zip(others, old):
            check_type(override, value, find_setting(args.task, {"env": env_cfg, "agent": rl_cfg}, override)[-1])
    except (ValueError, TypeError, KeyError) as error:
        sys.exit(f"{SCRIPT}: {args.task} can't take {' '.join(args.overrides)}: {str(error).splitlines()[0]}")
    if isinstance(env_cfg, DirectMARLEnvCfg):
        sys.exit(f"{SCRIPT}: {args.task} has several agents, this script trains one")
    rl_cfg = handle_deprecated_rsl_rl_cfg(rl_cfg, importlib.metadata.version("rsl-rl-lib"))
    env_cfg.sim.device, env_cfg.scene.num_envs = args.device, args.num_envs
    env_cfg.seed, env_cfg.compute_final_obs = args.seed + RANK, True

    def make_env():
        try:
            launched.enter_context(launch_simulation(env_cfg, {"visualizer": []}))
            env = gym.make(args.task, cfg=env_cfg)
        except FileNotFoundError as error:
            sys.exit(f"{SCRIPT}: the task's assets can't be read ({error}): without the asset server, set ISAACSIM_ASSET_ROOT "
                     "to a folder that holds them")  # fmt: skip
        launched.callback(env.close)
        return env

    return rl_cfg, make_env


def load_mjlab(args, launched):
    """As `load_task`, of mjlab."""
    if args.capture_video:
        import torch._dynamo  # noqa: F401  Adam needs it, and Triton in it crashes if a renderer's LLVM was loaded before

        if not (os.environ.get("DISPLAY") or os.environ.get("MUJOCO_GL")):
            os.environ["MUJOCO_GL"] = "egl"  # renders without a screen
    try:
        importlib.import_module("mjlab.tasks")  # registers the tasks
    except Exception as error:  # MUJOCO_GL names a renderer that is not installed
        sys.exit(f"{SCRIPT}: mjlab can't be imported: {one_line(error)}")
    from mjlab.envs import ManagerBasedRlEnv
    from mjlab.tasks.registry import list_tasks, load_env_cfg, load_rl_cfg

    check_task_name(args.task, list_tasks())
    env_cfg = load_env_cfg(args.task)
    env_cfg.scene.num_envs, env_cfg.seed = args.num_envs, args.seed + RANK
    for override in args.overrides:
        target, name, old = find_setting(args.task, {"env": env_cfg}, override)
        value = override.split("=", 1)[1]
        try:
            value = value if isinstance(old, str) else json.loads({"True": "true", "False": "false"}.get(value, value))
            value = tuple(value) if isinstance(old, tuple) else value
        except (TypeError, ValueError):
            sys.exit(f"{SCRIPT}: {override}: no value for a setting that is {old} now")
        check_type(override, old, value)
        target.update({name: value}) if isinstance(target, dict) else setattr(target, name, value)

    def make_env():
        render_mode = "rgb_array" if args.capture_video else None
        try:
            env = ManagerBasedRlEnv(cfg=env_cfg, device=args.device, render_mode=render_mode)
        except FileNotFoundError as error:
            sys.exit(f"{SCRIPT}: {args.task} needs a file ({error}); the tracking tasks' is given as "
                     "env.commands.motion.motion_file=FILE")  # fmt: skip
        launched.callback(env.close)
        return env

    return load_rl_cfg(args.task), make_env


def load_task(args, launched):
    """A task's rsl_rl configuration, and what makes the environment, which `launched` closes in the end."""
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        sys.exit(f"{SCRIPT}: --device {args.device} is not to be had here: take --device cpu")
    package = "mjlab" if args.task.startswith("Mjlab-") else "isaaclab"
    if args.capture_video and package == "isaaclab":
        sys.exit(f"{SCRIPT}: Isaac Lab can't film without Isaac Sim: leave --capture-video away, or take an Mjlab- task")
    if importlib.util.find_spec(package) is None:
        sys.exit(f"{SCRIPT}: {package} is not installed: pip install -r requirements-{package}.txt")
    return (load_mjlab if package == "mjlab" else load_isaaclab)(args, launched)


def make_envs(args, rl_cfg, make_env):
    """The environments; exits with a line where they can't be made, or memory can't hold what the arguments ask for."""
    layers = [pair for sizes in (args.actor_hidden_dims, args.critic_hidden_dims) for pair in zip((8, *sizes), sizes)]
    needed = 16 * sum(a * b for a, b in layers)  # weights, gradients and Adam's moments
    needed += args.num_envs * (10_000 + 200 * args.num_steps)  # a robot, and a step of it, take more than that
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if args.device.startswith("cuda"):
        memory = torch.cuda.mem_get_info(args.device)[1]
    if needed > memory:
        sys.exit(f"{SCRIPT}: --num-envs (or --eval-episodes), --num-steps, --actor-hidden-dims and --critic-hidden-dims need "
                 f"at least {needed / 1e9:.0f} GB of memory, {args.device} has {memory / 1e9:.0f}")  # fmt: skip
    try:
        return Envs(make_env(), rl_cfg)
    except Exception as error:  # whatever a task's own code, or a renderer, raises
        overridden = f" with {' '.join(args.overrides)}" if args.overrides else ""
        sys.exit(f"{SCRIPT}: {args.task} can't be made{overridden}: {one_line(error)}")


# What stands here for the flags of CleanRL that are missing.
CLEANRL = {
    "anneal_lr": "the learning rate follows the KL, see --desired-kl",
    "clip_coef": "--epsilon is the half-width of BPO's band, and PPO's clip",
    "cuda": "--device says where it runs",
    "env_id": "the task is --task",
    "hf_entity": "nothing is uploaded",
    "norm_adv": "PPO's advantages are normalised; with --no-online-adv BPO's weights are too",
    "save_model": "each run saves its model; load_agent(run folder) loads it",
    "target_kl": "all --update-epochs are run; the learning rate follows --desired-kl",
    "torch_deterministic": "the networks go by --seed; a simulator on a GPU may round differently each time",
    "upload_model": "nothing is uploaded",
}


@dataclass
class Groups:
    task: TaskArgs
    algorithm: AlgorithmArgs
    run: RunArgs


def command_line():
    """The arguments, and the names of the flags that were given. A whole number may be written as 1e6.

    Words without dashes, such as env.episode_length_s=5, are overrides of the task.
    """
    whole = lambda match: match[1] + (str(int(float(match[2]))) if float(match[2]).is_integer() else match[2])  # noqa: E731
    words = [re.sub(r"^(--[\w-]+=|)(\d*\.?\d+e\+?\d+)$", whole, word, flags=re.IGNORECASE) for word in sys.argv[1:]]
    name = lambda word: word.split("=")[0].strip("-").replace("-", "_").removeprefix("no_")  # noqa: E731
    given = {name(word) for word in words if word.startswith("--")}
    groups, overrides = tyro.cli(tyro.conf.OmitArgPrefixes[Groups], args=words, return_unknown_args=True)
    for word in overrides:
        if word.startswith("-") or "=" not in word:
            no_flag = "no flag of --help, nor an override of the task such as env.episode_length_s=5"
            sys.exit(f"{SCRIPT}: {word}: {CLEANRL.get(name(word), no_flag)}")
    args = Args(**vars(groups.task), **vars(groups.algorithm), **vars(groups.run))
    return replace(args, overrides=tuple(overrides)), given


def main():
    args, given = command_line()
    if args.resume and (given - {"resume", "total_timesteps", "device"} or args.overrides):
        sys.exit(f"{SCRIPT}: --resume goes on with the run's own configuration; only --total-timesteps and --device can be "
                 "given beside it")  # fmt: skip
    if args.evaluate and (given - {"evaluate", "eval_episodes", "capture_video", "device"} or args.overrides):
        sys.exit(f"{SCRIPT}: --evaluate goes by the run's own configuration, and takes --eval-episodes, --capture-video and "
                 "--device")  # fmt: skip
    if not args.evaluate:
        train(args)
        return
    if args.eval_episodes < 1:
        sys.exit(f"{SCRIPT}: --eval-episodes must be at least 1")
    path, checkpoint = Path(args.evaluate), load_checkpoint(args.evaluate)
    settings = replace(checkpoint["args"], num_envs=args.eval_episodes, capture_video=args.capture_video,
                       device=args.device or best_device())  # fmt: skip
    with contextlib.ExitStack() as launched:
        rl_cfg, make_env = load_task(settings, launched)
        envs = make_envs(settings, rl_cfg, make_env)
        envs.reset()
        envs.env.unwrapped.common_step_counter = checkpoint["state"]["curriculum"]
        run_dir = path.parent if path.is_file() else path
        evaluate(load_agent(path).to(settings.device), envs, settings, run_dir)
        if args.capture_video:
            print(f"video: {run_dir / 'videos' / 'eval.mp4'}")


if __name__ == "__main__":
    main()

# What `uv run` installs, for Isaac Lab; mjlab has requirements-mjlab.txt and an environment of its own.

# /// script
# requires-python = ">=3.12,<3.13"
# dependencies = [
#     "isaaclab==3.0.0",
#     "tyro==1.0.17",
#     "tqdm==4.70.1",
#     "tensorboard==2.21.0",
#     "wandb==0.31.0",
#     "matplotlib==3.11.2",
# ]
# ///
