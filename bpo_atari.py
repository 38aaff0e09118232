"""Bounded Policy Optimization (BPO) for the Arcade Learning Environment, on ale-py's own C++ vector environment.

PPO asks how far a policy may move and clips it there. BPO asks where it should go: of all policies whose ratio
ρ = π(a|s)/π₀(a|s) to the old policy stays in the band [1−ε, 1+ε], the best is known in closed form. Regress onto it.

    ρ* = 1 + ε·tanh(Ã/(2λ)),   Ã = R̂ − μ(s)                         the best ratio: 1+ε for good actions, 1−ε for bad ones
    μ  = argmin_u E_{a∼π₀}[ λ·softplus((R̂−u)/λ) − ½(R̂−u) ]         the soft median of R̂, which makes E_{π₀}[ρ*] = 1
    L  = E_{s,a∼π₀}[ |A|·|ρ_θ − ρ*| ],   A = R̂ − V(s)               the policy loss: μ picks the side, V gives the weight

R̂ is the GAE return of the action taken, in place of Q(s,a), and stays as it is during an update. V, PPO's critic, learns its
mean. A and Ã are taken anew in each minibatch. In ρ* λ is so small, 0.001, that it is nearly always an edge of the band; in μ
it is the authors' 1, which moves μ towards the mean. Where A and Ã have the same sign, the gradient up to ρ* is that of PPO's
−ρA; past ρ* PPO's is zero, and BPO's points back.
Source: Ao et al., Bounded Ratio Reinforcement Learning, arXiv 2604.18578.

    python bpo_atari.py --env-id ALE/Pong-v5                    trains; all goes to runs/<env>__<exp_name>__<seed>__<time>/
    python bpo_atari.py --env-id ALE/Pong-v5 --loss ppo         the same loop with PPO's clip and the authors' PPO settings
    python bpo_atari.py --resume runs/<run>                     goes on with an interrupted run, to the same weights on a CPU
    python bpo_atari.py --evaluate runs/<run> --capture-video   plays and films what was learned

In Python, load_agent("runs/<run>").act(obs) samples actions for observations of `AtariEnvs`, (4, 84, 84) or (N, 4, 84, 84).
"""

import difflib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads sleep; spinning, they slow each other on a busy CPU

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
OMP_THREADS = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]


@dataclass
class TaskArgs:
    env_id: str = "ALE/Pong-v5"  # ALE/…-v5 (sticky actions) or …NoFrameskip-v4 (none, as in the paper)
    num_envs: int = 8  # parallel games


@dataclass
class AlgorithmArgs:
    loss: Literal["bpo", "ppo"] = "bpo"  # the loss; on the command line PPO has the authors' settings for it: see `PPO`
    num_steps: int = 128  # actions in each game per rollout
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 5  # passes over each rollout
    learning_rate: float = 2.5e-4  # step size of Adam
    anneal_lr: bool = False  # lower the learning rate linearly to 0
    gamma: float = 0.98  # discount γ
    gae_lambda: float = 0.95  # decay of GAE, the generalised advantage estimator
    epsilon: float = 0.3  # half-width ε of the band the ratio is to stay in; PPO's clip
    temperature: float = 1e-3  # λ, in units of the returns: where |R̂−μ| is far above it, ρ* is an edge of the band
    use_median: bool = True  # Ã is R̂ − μ(s); --no-use-median: R̂ − V(s), the paper's ablation
    median_temperature: float = 1.0  # λ of the median loss; in theory that of ρ*; the authors' 1 moves μ towards the mean
    norm_adv: bool = False  # divide A by its standard deviation in the minibatch; PPO centres it first
    vf_coef: float = 1.0  # coefficient of the value loss ½(R̂−V)²
    median_coef: float = 0.5  # coefficient of the median loss
    ent_coef: float = 1e-3  # coefficient of the entropy bonus
    max_grad_norm: float = 1.0  # gradients are clipped to this norm, taken over all parameters


@dataclass
class RunArgs:
    total_timesteps: int = 10_000_000  # actions in all, each of 4 frames; the authors train for 40 million
    exp_name: str = SCRIPT  # part of the run folder's name
    seed: int = 1  # seed of network, policy noise and games
    num_threads: int = int(OMP_THREADS) if OMP_THREADS.isdecimal() else CPUS  # CPU threads of network and games
    device: str | None = None  # of the network; none: a GPU where there is one
    amp: bool = False  # bfloat16 in the network: much faster on CPUs with AMX, a little less exact
    checkpoint_every: int = 20  # iterations between checkpoints
    eval_every: int = 0  # iterations between evaluations while training, whose best policy is kept as best.pt; 0: none
    eval_episodes: int = 10  # whole games of an evaluation, played side by side
    capture_video: bool = False  # film one more game as mp4 into the run folder
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "brrl"  # wandb project
    wandb_entity: str | None = None  # wandb team
    resume: str | None = None  # run folder to go on with, as it was configured; takes --total-timesteps and --device
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


# Network --------------------------------------------------------------------------------------------------------------


def layer_init(layer, gain=2**0.5):
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def gumbel(*shape, generator=None):
    """Gumbel noise: argmax(log π + noise) is a sample of π."""
    return -torch.empty(shape).exponential_(generator=generator).log()


class Agent(nn.Module):
    """Categorical actor, mean critic V and median critic μ on the features of one Nature CNN (Mnih et al., 2015).

    As with the authors, BPO's actor and V have a hidden layer each, and μ is an MLP on V's. PPO has none, as SB3's CnnPolicy.
    """

    def __init__(self, num_actions, args):
        super().__init__()
        self.args = args
        convolutions = [nn.Conv2d(4, 32, 8, stride=4), nn.Conv2d(32, 64, 4, stride=2), nn.Conv2d(64, 64, 3, stride=1)]
        self.convolutions = nn.Sequential(*(layer for conv in convolutions for layer in (layer_init(conv), nn.ReLU())))
        self.convolutions.to(memory_format=torch.channels_last)  # the layout in which convolutions are fastest
        self.features = nn.Sequential(layer_init(nn.Linear(64 * 7 * 7, 512)), nn.ReLU())
        self.actor, self.critic, width = nn.Sequential(), nn.Sequential(), 512
        if args.loss == "bpo":
            self.actor, self.critic = (nn.Sequential(layer_init(nn.Linear(512, 256)), nn.ReLU()) for _ in range(2))
            width = 256
        self.actor.append(layer_init(nn.Linear(width, num_actions), 0.01))
        self.value_head = layer_init(nn.Linear(width, 1), 1.0)
        if args.loss == "bpo" and args.use_median:
            layers = layer_init(nn.Linear(256, 256), 1.0), nn.ReLU(), layer_init(nn.Linear(256, 1), 1.0)
            self.median_head = nn.Sequential(*layers)

    def forward(self, obs):
        """Observations (B, 4, 84, 84), bytes → log π(·|s) (B, A), V(s) (B,), μ(s) (B,), or V(s) without a median critic."""
        first, *others = self.convolutions
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.args.amp):
            x = F.conv2d(obs.float(), first.weight / 255, first.bias, first.stride)  # fewer weights to divide than pixels
            for layer in others:
                x = layer(x)
            features = self.features(x.permute(0, 2, 3, 1).flatten(1))
        features = features.float()  # in bfloat16 the heads would give a few dozen different values
        critic_features = self.critic(features)
        values = self.value_head(critic_features)[:, 0]
        median_values = self.median_head(critic_features)[:, 0] if hasattr(self, "median_head") else values
        return self.actor(features).log_softmax(-1), values, median_values

    @torch.no_grad()
    def sample(self, obs, noise):
        """Observations (B, 4, 84, 84), Gumbel noise (B, A) → sampled actions (B,), log π(a|s) (B,), V(s) (B,)."""
        logprobs, values, _ = self(obs)
        actions = (logprobs + noise).argmax(-1)
        return actions, logprobs.gather(-1, actions[:, None])[:, 0], values

    def act(self, obs, generator=None):
        """Arrays of bytes: observations (4, 84, 84) or (N, 4, 84, 84) → sampled action, or actions (N,)."""
        obs, weight = np.asarray(obs), self.actor[-1].weight
        stacks = torch.from_numpy(obs.reshape(-1, *obs.shape[-3:])).to(weight.device)
        noise = gumbel(len(stacks), len(weight), generator=generator).to(weight.device)
        return self.sample(stacks, noise)[0].cpu().numpy().reshape(obs.shape[:-3])[()]


# Environment ----------------------------------------------------------------------------------------------------------


class AtariEnvs(AtariVectorEnv):
    """Games as in Mnih et al. (2015): 4 frames an action, maximum of the last two, 84×84 grey, 4 stacked, up to 30 no-ops.

    A lost life is a termination, but the game goes on, in some games even when the counter has come to 0. The stack then begins
    anew, as after a reset, and where a game has FIRE, that is its next action. A finished game is replaced in the same step, so
    no transition crosses a reset. Rewards are those of the game, not clipped. ALE can't save a vector of games, but a game is a
    function of its seed and its actions: both are kept, and `replay` plays them again. To keep that short, a game that
    ends more than `reseed_after` actions after its seed is followed by one with a new seed.
    """

    reseed_after = 10_000

    def __init__(self, env_id, num_envs, num_threads=0):
        game = check_env_id(env_id)
        super().__init__(game["game"], num_envs, repeat_action_probability=game["repeat_action_probability"],
                         max_num_frames_per_episode=game["max_num_frames_per_episode"], reward_clipping=False,
                         life_loss_info=True, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
                         num_threads=num_threads)  # fmt: skip
        actions = self.ale.get_action_set()
        self.fire = actions.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in actions else None

    def seeded_reset(self, seeds):
        """Starts all games from these seeds (N,); returns their first observations."""
        self.seeds, self.actions = np.array(seeds), [bytearray() for _ in seeds]
        self.life_lost, self.screens = np.zeros(self.num_envs, bool), np.full(self.num_envs, 4)  # screens seen of this life
        return self.restart(self.seeds, np.ones(self.num_envs, bool))

    def restart(self, seeds, mask):
        """Starts the games of `mask` (N,) from as many seeds; returns the observations of all."""
        self.seeds[mask] = seeds
        for i in np.flatnonzero(mask):
            self.actions[i].clear()
        obs, infos = self.reset(seed=seeds, options={"reset_mask": mask})
        self.frames, self.lives = infos["episode_frame_number"], infos["lives"]
        self.life_lost &= ~mask
        return self.forget_lost_life(obs)

    def forget_lost_life(self, obs):
        """Blanks what the observations (N, 4, 84, 84) still show of the life before."""
        for stack, screens in zip(obs, self.screens):
            stack[:-screens] = 0
        return obs

    def step(self, actions):
        """As gymnasium's; infos["game_over"] (N,) is true where a whole game ended, by time limit too, and not just a life.

        infos["forced"] (N,) tells where FIRE was pressed in place of the action given, which nothing is to be learned from.
        """
        forced = self.life_lost & (self.fire is not None)
        actions = np.where(forced, self.fire or 0, actions)
        for played, action in zip(self.actions, actions.tolist()):
            played.append(action)
        obs, rewards, terminations, truncations, infos = super().step(actions)
        game_over = infos["episode_frame_number"] <= self.frames
        self.life_lost = (infos["lives"] < self.lives) & ~game_over
        self.frames, self.lives = infos["episode_frame_number"], infos["lives"]
        self.screens = np.where(self.life_lost, 1, self.screens + 1)
        obs = self.forget_lost_life(obs)
        if "final_obs" in infos:
            self.forget_lost_life(infos["final_obs"])
        terminations |= self.life_lost  # ALE leaves out a life that takes the counter to 0
        old = game_over & (np.array([len(played) for played in self.actions]) > self.reseed_after)
        if old.any():
            obs = self.restart(self.seeds[old] + 1000, old)  # far from the seeds of other runs
        return obs, rewards, terminations, truncations, infos | {"game_over": game_over, "forced": forced}

    def replay(self, seeds, actions):
        """Plays each game again from its seed, all ending together; returns the observations they end with."""
        lengths = np.array([len(played) for played in actions])
        obs = self.seeded_reset(seeds)  # those with less to play pass the time with a game of no meaning
        for left in range(lengths.max(), -1, -1):
            if (lengths == left).any():
                obs = self.restart(seeds[lengths == left], lengths == left)
            if left:
                obs, *_ = self.step(np.array([played[-left] if len(played) >= left else 0 for played in actions], int))
        return obs


# Training -------------------------------------------------------------------------------------------------------------


def total_loss(agent, args, obs, actions, logprobs, advantages, returns):
    """The loss of a minibatch and its terms. BPO takes A and Ã anew with the critics as they are now, PPO A as it was."""
    new_logprobs, values, median_values = agent(obs)
    ratio = torch.exp(new_logprobs.gather(-1, actions[:, None])[:, 0] - logprobs)
    if args.loss == "ppo":
        if args.norm_adv:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        policy_loss = ppo_loss(ratio, advantages, args.epsilon)
    else:
        advantages, median_advantages = (returns - values).detach(), (returns - median_values).detach()
        if args.norm_adv:
            advantages = advantages / (advantages.std() + 1e-8)
        policy_loss = bpo_loss(ratio, advantages, median_advantages, args.epsilon, args.temperature)

    value_loss = 0.5 * F.mse_loss(values, returns)
    has_median = hasattr(agent, "median_head")
    mu_loss = median_loss(returns, median_values, args.median_temperature) if has_median else torch.zeros_like(value_loss)
    entropy = -(new_logprobs.exp() * new_logprobs).sum(-1).mean()
    loss = policy_loss + args.vf_coef * value_loss + args.median_coef * mu_loss - args.ent_coef * entropy
    return loss, {"policy_loss": policy_loss, "value_loss": value_loss, "median_loss": mu_loss, "entropy": entropy}


def update(agent, optimizer, batch, args):
    """Fits policy and critics to a rollout, tensors (B, …) in the order of `total_loss`; returns the mean of each term."""
    history = []
    for _ in range(args.update_epochs):
        for indices in torch.randperm(len(batch[0])).tensor_split(args.num_minibatches):
            loss, terms = total_loss(agent, args, *(tensor[indices] for tensor in batch))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            history.append(torch.stack(list(terms.values())).detach())
    return dict(zip(terms, torch.stack(history).mean(0)))


def train(args, run=None):
    """Trains, evaluates and draws the learning curve; returns the run folder. `run` is what `begin(args)` gives."""
    run_dir, args, checkpoint = run or begin(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size

    envs = AtariEnvs(args.env_id, args.num_envs, args.num_threads)
    num_actions = int(envs.single_action_space.n)
    agent = Agent(num_actions, args).to(args.device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    iteration, start_time, best = 0, time.time(), -math.inf
    if checkpoint:
        iteration, start_time, best = checkpoint["iteration"], time.time() - checkpoint["seconds"], checkpoint["best"]
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["torch_rng"])
        episode_return, episode_length = (sums.numpy() for sums in checkpoint["episodes"])
        next_obs = envs.replay(checkpoint["seeds"].numpy(), [played.numpy() for played in checkpoint["games"]])
    else:
        episode_return, episode_length = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
        next_obs = envs.seeded_reset(args.seed + 100_000 * np.arange(args.num_envs))

    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros((*shape, 4, 84, 84), dtype=torch.uint8, device=args.device)  # 29 MB at the defaults
    actions = torch.zeros(shape, dtype=torch.int64, device=args.device)
    logprobs, values = torch.zeros((2, *shape), device=args.device)
    rewards = np.zeros(shape)
    terminations, truncations, forced = np.zeros((3, *shape), bool)
    log, start = Log(args, run_dir, start_time, iteration * batch_size), iteration

    while True:
        if iteration % args.checkpoint_every == 0 or iteration in (start, num_iterations):
            save_checkpoint(run_dir / "checkpoint.pt", agent, args, iteration=iteration, seconds=time.time() - start_time,
                            best=best, optimizer=optimizer.state_dict(), torch_rng=torch.get_rng_state(),
                            seeds=torch.from_numpy(envs.seeds), games=[torch.tensor(list(played)) for played in envs.actions],
                            episodes=[torch.from_numpy(sums) for sums in (episode_return, episode_length)])  # fmt: skip
        if iteration == num_iterations:
            break
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)

        # Rollout.
        noise, cut_off = gumbel(*shape, num_actions).to(args.device), []
        for t in range(args.num_steps):
            obs[t] = torch.from_numpy(next_obs)
            actions[t], logprobs[t], values[t] = agent.sample(obs[t], noise[t])
            next_obs, rewards[t], terminations[t], truncations[t], infos = envs.step(actions[t].cpu().numpy())
            forced[t] = infos["forced"]
            cut_off += [(t, i, infos["final_obs"][i]) for i in np.flatnonzero(truncations[t])]
            episode_return += rewards[t]
            episode_length += 1
            for i in np.flatnonzero(infos["game_over"]):
                log.episode(iteration * batch_size + (t + 1) * args.num_envs, episode_return[i], episode_length[i])
                episode_return[i] = episode_length[i] = 0
        iteration += 1

        # Advantages and returns, of rewards clipped to their sign. Where a game ended the next step's value is another game's:
        # `gae` takes 0 in its place, and at a time limit it is replaced here.
        with torch.no_grad():
            next_values = torch.cat((values[1:], agent(torch.from_numpy(next_obs).to(args.device))[1][None]))
            for t, i, last_obs in cut_off:
                next_values[t, i] = agent(torch.from_numpy(last_obs[None]).to(args.device))[1]
        arrays = np.sign(rewards), terminations, terminations | truncations
        signs, terminated, dones = (torch.from_numpy(array).float().to(args.device) for array in arrays)
        advantages = gae(signs, values, next_values, terminated, dones, args.gamma, args.gae_lambda)
        returns = advantages + values  # R̂
        chosen = torch.from_numpy(~forced).to(args.device)  # a forced action's ratio means nothing
        batch = [tensor[chosen] for tensor in (obs, actions, logprobs, advantages, returns)]

        # Update.
        metrics = update(agent, optimizer, batch, args) | ratio_metrics(agent, args, *batch)
        weights = torch.cat([parameter.flatten() for parameter in agent.parameters()])
        for name, value in {**metrics, "a weight": weights}.items():
            if not value.isfinite().all():
                envs.close()
                sys.exit(f"{SCRIPT}: stopped at step {iteration * batch_size}: {name} is not finite. "
                         f"{run_dir} keeps the last good checkpoint")  # fmt: skip
        metrics["explained_variance"] = 1 - advantages.var() / returns.var()
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
def ratio_metrics(agent, args, obs, actions, logprobs, _, returns):
    """What an update did to the ratios of its rollout: estimates of KL(π₀‖π), share outside the band, BPO's mean |ρ−ρ*|."""
    outputs = [agent(minibatch) for minibatch in obs.tensor_split(args.num_minibatches)]
    new_logprobs, _, median_values = (torch.cat(parts) for parts in zip(*outputs))
    logratio = new_logprobs.gather(-1, actions[:, None])[:, 0] - logprobs
    ratio = logratio.exp()
    metrics = {
        "old_approx_kl": -logratio.mean(),
        "approx_kl": (ratio - 1 - logratio).mean(),
        "clipfrac": ((ratio - 1).abs() > args.epsilon).float().mean(),
    }
    if args.loss == "bpo":
        metrics["ratio_error"] = (ratio - target_ratio(returns - median_values, args.epsilon, args.temperature)).abs().mean()
    return metrics


def check_env_id(env_id):
    """Keyword arguments of the game behind a gymnasium id; exits with a line on what is no Atari game of this script."""
    atari = [name for name, spec in gym.registry.items() if spec.entry_point == "ale_py.env:AtariEnv"]
    games = [name for name in atari if name.endswith(("-v5", "NoFrameskip-v4")) and "-ram" not in name]
    if env_id not in games:
        other = "; bpo_continuous.py is for tasks with Box actions" if env_id in gym.registry.keys() - atari else ""
        close = ", ".join(difflib.get_close_matches(env_id, games, cutoff=0.5)) or "ALE/Pong-v5, PongNoFrameskip-v4, …"
        sys.exit(f"{SCRIPT}: {env_id} is no Atari game observed as images. Close: {close}{other}")
    game = dict(gym.spec(env_id).kwargs)
    try:
        found = ale_py.roms.get_rom_path(game["game"])
    except Exception:  # a ROM that is there but damaged
        found = None
    if not found:
        sys.exit(f"{SCRIPT}: the ROM of {env_id} is missing or damaged; pip install --force-reinstall ale-py brings it back")
    return game


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


def check_args(args):
    """Exits with a line on arguments that can't be."""

    def check(names, fine, rule):
        for name in names.split():
            if not (math.isfinite(value := getattr(args, name)) and fine(value)):
                sys.exit(f"{SCRIPT}: --{name.replace('_', '-')} {value} must be {rule}")

    batch_size = args.num_envs * args.num_steps
    check("num_envs num_steps update_epochs checkpoint_every eval_episodes", lambda x: 1 <= x <= 10**8, "from 1 to 100,000,000")
    check("num_threads", lambda x: 1 <= x <= 1024, "from 1 to 1024")
    check("seed eval_every", lambda x: 0 <= x <= 10**9, "from 0 to 1,000,000,000")
    check("learning_rate max_grad_norm temperature median_temperature", lambda x: x > 0, "a positive number")
    check("gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1")
    check("epsilon", lambda x: 0 < x < 1, "between 0 and 1, so that the band [1−ε, 1+ε] holds positive ratios")
    check("vf_coef median_coef ent_coef", lambda x: True, "a finite number")
    check("num_minibatches", lambda x: 1 <= x <= batch_size / 2, f"at most half of --num-envs × --num-steps = {batch_size}")
    check("total_timesteps", lambda x: x >= batch_size, f"at least one batch, --num-envs × --num-steps = {batch_size}")


def begin(args, total_timesteps=None):
    """What `train` starts from: the run folder, its arguments, its checkpoint or None. Exits with a line on bad input.

    With `args.resume` the run goes on under its own configuration, on its device or `args.device`, to its end or to
    `total_timesteps`.
    """
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    if checkpoint:
        run_dir, device, args = Path(args.resume), args.device, checkpoint["args"]
        args = replace(args, device=device or args.device)
        if total_timesteps is not None:
            args = replace(args, total_timesteps=total_timesteps)
        batch_size = args.num_envs * args.num_steps
        done = checkpoint["iteration"] * batch_size
        if done > args.total_timesteps:
            sys.exit(f"{SCRIPT}: {run_dir} is at step {done} already, beyond --total-timesteps {args.total_timesteps}")
    args = replace(args, device=args.device or best_device())
    check_args(args)
    try_env(args)
    if checkpoint:
        if total_timesteps is not None and args.anneal_lr:
            rate = args.learning_rate * (1 - done // batch_size / (total_timesteps // batch_size))
            print(f"the learning rate now falls to 0 at step {total_timesteps:,}; here it is {rate:.3g}")
        header, *rows = (run_dir / "episodes.csv").read_text().splitlines(keepends=True)
        rows = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= done]  # later games are played again
        (run_dir / "episodes.csv").write_text("".join([header, *rows]))
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
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "gymnasium", "ale-py")}
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


def best_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def try_env(args):
    """Exits with a line, before there is a run folder, on what can't be had here: device, game, memory, a film."""
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        sys.exit(f"{SCRIPT}: --device {args.device} is not to be had here: take --device cpu")
    check_env_id(args.env_id)
    games, batch_size = args.num_envs + args.eval_episodes, args.num_envs * args.num_steps
    screens, gradients = 2 * 84 * 84 * 4 * batch_size, 200_000 * batch_size // args.num_minibatches  # bytes, as measured
    np.empty(1_600_000 * games + screens + gradients, np.uint8)  # a MemoryError comes here, not later
    if args.capture_video:
        with tempfile.TemporaryDirectory() as folder:
            try:
                env = make_filmed_env(args.env_id, folder)
                env.reset()
                env.close()  # which writes what was filmed
            except Exception as error:  # a missing encoder fails in several ways
                sys.exit(f"{SCRIPT}: {args.env_id} can't be filmed: {one_line(error)}")


class Log:
    """episodes.csv, TensorBoard and the progress bar, which is drawn once a minute where there is no terminal."""

    def __init__(self, args, run_dir, start_time, start):
        self.args, self.start_time, self.recent = args, start_time, deque(maxlen=20)
        self.csv = open(run_dir / "episodes.csv", "a")  # noqa: SIM115  open as long as the run
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
    state |= {"script": SCRIPT, "args": asdict(args), "agent": agent.state_dict(), "num_actions": len(agent.actor[-1].bias)}
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
    """The agent of a run folder, or of a checkpoint in it such as best.pt, on the CPU: `load_agent(run_dir).act(obs)`."""
    checkpoint = load_checkpoint(run_dir)
    agent = Agent(checkpoint["num_actions"], checkpoint["args"])
    agent.load_state_dict(checkpoint["agent"])
    return agent


def evaluate(agent, args, run_dir=None):
    """The scores of `eval_episodes` whole games side by side, of sampled actions; with a run folder printed, perhaps filmed."""
    envs, scores = AtariEnvs(args.env_id, args.eval_episodes, args.num_threads), []
    generator = torch.Generator().manual_seed(args.seed)
    obs = envs.seeded_reset(args.seed + 50_500 + 100_000 * np.arange(args.eval_episodes))  # no training seeds
    returns, over = np.zeros(args.eval_episodes), np.zeros(args.eval_episodes, bool)
    while not over.all():
        obs, rewards, _, _, infos = envs.step(agent.act(obs, generator))
        returns += rewards
        for score in returns[infos["game_over"] & ~over].tolist():
            scores.append(score)
            if run_dir:
                print(f"evaluation, game {len(scores)} of {args.eval_episodes}: return {score:.0f}", flush=True)
        over |= infos["game_over"]
    envs.close()
    if run_dir:
        mean, std = np.mean(scores), np.std(scores)
        print(f"evaluation: {mean:.1f} ± {std:.1f} (mean ± std of {len(scores)} games, sampled actions)")
    if run_dir and args.capture_video:
        film_game(agent, args, run_dir)
    return scores


def make_filmed_env(env_id, video_folder):
    """One game in gymnasium's own Atari wrappers, which can be filmed."""
    env = gym.make(env_id, frameskip=1, render_mode="rgb_array")
    noop_max = 30 if env.unwrapped.get_action_meanings()[0] == "NOOP" else 0
    # Frames are kept in memory, 100 kB each; a game that is never lost has 108,000.
    env = gym.wrappers.RecordVideo(env, str(video_folder), video_length=10_000, name_prefix="eval", fps=60)
    return gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(env, noop_max), 4, padding_type="zero")


def film_game(agent, args, run_dir):
    """Plays and films one game; writes runs/<run>/videos/*.mp4."""
    print("filming one more game", flush=True)
    env = make_filmed_env(args.env_id, run_dir / "videos")
    meanings = env.unwrapped.get_action_meanings()
    generator = torch.Generator().manual_seed(args.seed)
    obs, _ = env.reset(seed=args.seed)
    done, life_lost, lives, screens = False, True, 0, 4  # FIRE starts the game too
    while not done:
        action = agent.act(obs, generator)
        fire = life_lost and "FIRE" in meanings
        obs, _, terminated, truncated, info = env.step(meanings.index("FIRE") if fire else action)
        done, life_lost, lives = terminated or truncated, info["lives"] < lives, info["lives"]
        screens = 1 if life_lost else screens + 1
        obs[:-screens] = 0  # as in AtariEnvs
    env.close()


def finish(args, run_dir):
    """Draws the learning curve: the return of every episode, and the mean of the last 20. Names the videos."""
    rows = [row.split(",") for row in (run_dir / "episodes.csv").read_text().splitlines()[1:]]
    steps, returns = np.array([row[:2] for row in rows if len(row) == 4], float).reshape(-1, 2).T  # a killed run may cut one
    means = [returns[max(0, i - 20) : i].mean() for i in range(1, len(returns) + 1)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, returns, ".", alpha=0.25, label="episode")
    axes.plot(steps, means, color="tab:blue", label="mean of the last 20 episodes")
    title = f"{args.env_id}, {SCRIPT} --loss {args.loss}, seed {args.seed}"
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


PPO = dict(update_epochs=4, epsilon=0.1, norm_adv=True, ent_coef=0.01, max_grad_norm=0.5)  # the authors' PPO row

# What stands here for the flags of CleanRL that are missing.
CLEANRL = {
    "clip_coef": "the half-width ε of BPO's band and of PPO's clip is --epsilon",
    "clip_vloss": "neither loss clips values",
    "cuda": "--device cpu or --device cuda says where the network runs",
    "hf_entity": "nothing is uploaded",
    "save_model": "each run saves its model; load_agent(run folder) loads it",
    "target_kl": "all --update-epochs are run; losses/approx_kl has the KL",
    "torch_deterministic": "the same seed and --num-threads give the same weights on a CPU, always",
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
    gym.logger.min_level = gym.logger.ERROR  # gymnasium calls the paper's games, v4, out of date at every start
    args, given = command_line()
    if args.loss == "ppo":
        args = replace(args, **{name: PPO[name] for name in PPO.keys() - given})  # flags given beside the loss win
    if args.resume and given - {"resume", "total_timesteps", "device"}:
        sys.exit(f"{SCRIPT}: --resume goes by the run's own configuration, and takes only --total-timesteps and --device")
    if args.resume and Path(args.resume).is_file():
        sys.exit(f"{SCRIPT}: --resume takes a run folder, not {args.resume}")
    if args.evaluate and given - {"evaluate", "eval_episodes", "capture_video", "device"}:
        sys.exit(f"{SCRIPT}: --evaluate goes by the run's own configuration, and takes only --eval-episodes, --capture-video "
                 "and --device")  # fmt: skip
    try:
        if args.evaluate:
            path, agent = Path(args.evaluate), load_agent(args.evaluate)
            run_dir = path.parent if path.is_file() else path
            args = replace(args, env_id=agent.args.env_id, seed=agent.args.seed, device=args.device or best_device())
            check_args(args)
            try_env(args)
            evaluate(agent.to(args.device), args, run_dir)
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
    except (MemoryError, torch.OutOfMemoryError):
        sys.exit(f"{SCRIPT}: out of memory: lower --num-envs, --num-steps or --eval-episodes")
    except (OSError, RuntimeError, gym.error.Error) as error:
        sys.exit(f"{SCRIPT}: {one_line(error)} (runs are written to {Path('runs').absolute()})")


if __name__ == "__main__":
    main()

# What `uv run` installs.

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco,classic-control]==1.4.0",
#     "ale-py==0.12.1",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tqdm==4.70.1",
#     "tensorboard==2.21.0",
#     "wandb==0.31.0",
#     "matplotlib==3.11.2",
#     "moviepy==2.2.1",
#     "opencv-python-headless==5.0.0.93",
# ]
# ///
