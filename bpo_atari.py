"""Bounded Policy Optimization (BPO) for the Arcade Learning Environment, on ale-py's own C++ vector environment.

PPO asks how far a policy may move and clips it there. BPO asks where it should go: of all policies whose ratio
ρ = π(a|s)/π₀(a|s) to the old policy stays in the band [1−ε, 1+ε], the best is known in closed form. Regress onto it.

    ρ* = 1 + ε·tanh(Ã/(2λ)),   Ã = Q(s,a) − μ(s)                      the best bounded ratio
    μ  = argmin_u E_{a∼π₀}[ λ·softplus((Q−u)/λ) − ½(Q−u) ]            the soft median of Q, which makes E_{π₀}[ρ*] = 1
    L  = E_{s,a∼π₀}[ |A|·|ρ_θ − ρ*| ],   A = Q(s,a) − V(s)            the policy loss

With Q known, the whole of π*(·|s) = ρ*(s,·)·π₀(·|s) could be computed here, action by action. What is known is one sample of Q,
the GAE(λ) return of the one action taken; ρ* is computed for that action, and E over actions and μ are left to the many states.
Source: Ao et al., Bounded Ratio Reinforcement Learning, arXiv 2604.18578.

    python bpo_atari.py --env-id ALE/Pong-v5                    trains; all goes to runs/<env>__<script>__<seed>__<time>/
    python bpo_atari.py --env-id ALE/Pong-v5 --loss ppo         the same loop with PPO's clip and the authors' PPO settings
    python bpo_atari.py --resume runs/<run>                     goes on with an interrupted run, to the same weights on a CPU
    python bpo_atari.py --evaluate runs/<run> --capture-video   plays and films what was learned

    agent = load_agent("runs/<run>")                            the trained policy in Python
    actions = agent.act(obs)                                    sampled, for stacked screens (4, 84, 84) or (N, 4, 84, 84)

Such screens are those of `AtariEnvs`, in which the policy is trained, and of gymnasium's AtariPreprocessing and
FrameStackObservation, for one game; with these, press FIRE when a life begins, as `film_game` does.
"""

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

import contextlib
import difflib
import importlib.metadata
import io
import json
import math
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
from dataclasses import asdict, dataclass, fields, replace
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
OMP_THREADS = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
gym.register_envs(ale_py)
gym.logger.min_level = gym.logger.ERROR


@dataclass
class Args:
    env_id: str = "ALE/Pong-v5"  # ALE/…-v5 (sticky actions) or …NoFrameskip-v4 (none, as in the paper)
    loss: Literal["bpo", "ppo"] = "bpo"  # the loss; each brings the authors' hyperparameters
    exp_name: str = SCRIPT  # the run folder's name has it
    seed: int = 1  # seed of network, policy noise and games
    total_timesteps: int = 10_000_000  # actions in all, each of 4 frames; the authors train for 40 million
    num_envs: int = 8  # parallel games
    num_threads: int = int(OMP_THREADS) if OMP_THREADS.isdecimal() else CPUS  # CPU threads of network and games
    device: str | None = None  # of the network; none: a GPU where there is one
    amp: bool = False  # bfloat16 in the network: much faster on CPUs with AMX, a little less exact

    num_steps: int = 128  # actions in each game per rollout
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 5  # passes over each rollout
    learning_rate: float = 2.5e-4  # step size of Adam
    anneal_lr: bool = False  # lower the learning rate linearly to 0
    gamma: float = 0.98  # discount γ
    gae_lambda: float = 0.95  # λ of GAE, the generalised advantage estimator
    epsilon: float = 0.3  # half-width ε of the band the ratio is to stay in; PPO's clip
    temperature: float = 1e-3  # λ, in (clipped) returns: advantages well above it ask for the band's edge
    use_median: bool = True  # threshold at the soft median μ(s); --no-use-median: at the mean V(s), the paper's ablation
    median_temperature: float = 1.0  # of the median loss; in theory it is λ, the authors have 1
    norm_adv: bool = False  # divide by the minibatch's standard deviation: BPO's weight |A|, PPO's centred A
    vf_coef: float = 1.0  # coefficient of the value loss ½(R̂−V)²
    median_coef: float = 0.5  # coefficient of the median loss
    ent_coef: float = 1e-3  # coefficient of the entropy bonus
    max_grad_norm: float = 1.0  # gradients are clipped to this norm, taken over all parameters

    checkpoint_every: int = 20  # iterations between checkpoints
    eval_every: int = 0  # iterations between evaluations while training, whose best policy is kept as best.pt; 0: none
    eval_episodes: int = 10  # whole games of an evaluation, played side by side
    capture_video: bool = False  # film one more game as mp4 into the run folder
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "brrl"  # wandb project
    wandb_entity: str | None = None  # wandb team
    resume: str | None = None  # run folder to go on with, as it was configured; takes --total-timesteps and --device
    evaluate: str | None = None  # run folder, or a checkpoint in it, whose policy is played; nothing is trained


PACKAGES = ("gymnasium", "ale-py")  # config.json has their versions

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

PPO = dict(update_epochs=4, epsilon=0.1, norm_adv=True, ent_coef=0.01, max_grad_norm=0.5)  # the authors' PPO row


def check_loss_args(args):
    """Exits with a line on hyperparameters the loss is not defined for."""
    if not 0 < args.epsilon < 1:
        sys.exit(f"{SCRIPT}: --epsilon {args.epsilon} must lie between 0 and 1: the band [1−ε, 1+ε] holds positive ratios")
    if not args.temperature > 0 or not args.median_temperature > 0:
        sys.exit(f"{SCRIPT}: --temperature and --median-temperature must be positive; for hard targets take a small one, 1e-6")


# Environment ----------------------------------------------------------------------------------------------------------


def check_env_id(env_id):
    """Keyword arguments of the game behind a gymnasium id; exits with a line on what is no Atari game of this script."""
    games = [name for name, spec in gym.registry.items() if spec.entry_point == "ale_py.env:AtariEnv"]
    games = [name for name in games if name.endswith("-v5") or name.endswith("NoFrameskip-v4")]
    if env_id in games:
        game = dict(gym.spec(env_id).kwargs)
        with contextlib.suppress(Exception):  # a ROM that is there but damaged raises
            if ale_py.roms.get_rom_path(game["game"]):
                return game
        sys.exit(f"{SCRIPT}: the ROM of {env_id} is missing or damaged; pip install --force-reinstall ale-py brings it back")
    if "ram" in env_id.lower().split("-"):
        sys.exit(f"{SCRIPT}: {env_id} observes the console's memory, this script takes images: leave the -ram away")
    matches = ", ".join(difflib.get_close_matches(env_id, games, cutoff=0.5)) or "ALE/Pong-v5, PongNoFrameskip-v4, …"
    if env_id in gym.registry and gym.spec(env_id).entry_point != "ale_py.env:AtariEnv":
        sys.exit(f"{SCRIPT}: {env_id} is no Atari game: bpo_continuous.py is for tasks with Box actions")
    sys.exit(f"{SCRIPT}: no game {env_id!r}. Close: {matches}")


class AtariEnvs(AtariVectorEnv):
    """Games as in Mnih et al. (2015): 4 frames an action, maximum of the last two, 84×84 grey, 4 stacked, up to 30 no-ops.

    A lost life terminates, though the game goes on, in some games even when the counter has come to 0. The stack then begins
    anew, as after a reset, and where a game has FIRE, that is its next action. A finished game is replaced in the same step, so
    no transition crosses a reset. Rewards are those of the game, not clipped. ALE can't save a vector of games, but a game is a
    function of its seed and its actions: both are kept, and `replay` plays them again. So that there is never much of it, a
    game that ends more than `reseed_after` actions after its seed is followed by one with a new seed.
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
        self.seeds, self.actions = seeds, [bytearray() for _ in seeds]
        self.life_lost, self.screens = np.zeros(self.num_envs, bool), np.full(self.num_envs, 4)  # screens seen of this life
        return self.restart(seeds, np.ones(self.num_envs, bool))

    def restart(self, seeds, mask):
        """Starts the games of `mask` (N,) from as many seeds; returns the observations of all."""
        obs, infos = self.reset(seed=seeds, options={"reset_mask": mask})
        self.frames, self.lives = infos["episode_frame_number"], infos["lives"]
        self.life_lost &= ~mask
        return self.forget_lost_life(obs)

    def forget_lost_life(self, obs):
        """Blanks what the observations (N, 4, 84, 84) still show of the life before."""
        for stack, screens in zip(obs, self.screens):
            stack[:-screens] = 0
        return obs

    def play(self, actions):
        """A step of all games, with an account of games and lives that it ended."""
        obs, rewards, terminations, truncations, infos = super().step(actions)
        infos["game_over"] = infos["episode_frame_number"] <= self.frames
        self.life_lost = (infos["lives"] < self.lives) & ~infos["game_over"]
        self.frames, self.lives = infos["episode_frame_number"], infos["lives"]
        self.screens = np.where(self.life_lost, 1, self.screens + 1)
        if "final_obs" in infos:
            self.forget_lost_life(infos["final_obs"])
        terminations |= self.life_lost  # ALE leaves out a life that takes the counter to 0
        return self.forget_lost_life(obs), rewards, terminations, truncations, infos

    def step(self, actions):
        """As gymnasium's; infos["game_over"] (N,) tells the end of a game, by time limit too, from that of a life.

        infos["forced"] (N,) tells where FIRE was pressed in place of the action given, which nothing is to be learned from.
        """
        forced = self.life_lost & (self.fire is not None)
        actions = np.where(forced, self.fire or 0, actions)
        for played, action in zip(self.actions, actions.tolist()):
            played.append(action)
        obs, rewards, terminations, truncations, infos = self.play(actions)
        infos["forced"] = forced
        old = infos["game_over"] & (np.array([len(played) for played in self.actions]) > self.reseed_after)
        if old.any():
            self.seeds[old] += 1000  # far from those of runs with other seeds
            for i in np.flatnonzero(old):
                self.actions[i].clear()
            obs = self.restart(self.seeds[old], old)
        return obs, rewards, terminations, truncations, infos

    def replay(self, seeds, actions):
        """Plays each game again from its seed, all ending together; returns the observations they end with."""
        longest = max(map(len, actions))
        self.seeded_reset(seeds + self.num_envs)  # those with less to play pass the time with a game of no meaning
        for step in range(longest + 1):
            started = np.array([len(played) >= longest - step for played in actions])
            if (starting := np.array([len(played) == longest - step for played in actions])).any():
                obs = self.restart(seeds[starting], starting)
            if step < longest:
                now = [int(played[step - longest]) if on else 0 for played, on in zip(actions, started)]
                obs, *_ = self.play(np.array(now))
        self.seeds, self.actions = seeds, [bytearray(played) for played in actions]
        return obs


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


def try_env(args):
    """Exits with a line, before there is a run folder, on a game that memory can't hold, or that can't be played or filmed."""
    check_env_id(args.env_id)
    games, batch_size = args.eval_episodes, 0
    if not args.evaluate:
        games, batch_size = games + args.num_envs, args.num_envs * args.num_steps
    screens = 2 * 84 * 84 * 4 * batch_size  # as they came, and shuffled
    needed = 1.6e6 * games + screens + 2e5 * batch_size / args.num_minibatches  # a game and a step's gradients, as measured
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if torch.device(args.device).type == "cuda":
        memory = torch.cuda.get_device_properties(args.device).total_memory
    if needed > memory:
        sys.exit(f"{SCRIPT}: --num-envs {args.num_envs} × --num-steps {args.num_steps} and --eval-episodes "
                 f"{args.eval_episodes} take {needed / 1e9:.0f} GB of memory, there are {memory / 1e9:.0f}")  # fmt: skip
    if args.capture_video:
        with tempfile.TemporaryDirectory() as folder:
            try:
                env = make_filmed_env(args.env_id, folder)
                env.reset()
                env.close()  # which writes what was filmed
            except Exception as error:  # a missing encoder fails in several ways
                sys.exit(f"{SCRIPT}: {args.env_id} can't be filmed: {one_line(error)}")


# Networks -------------------------------------------------------------------------------------------------------------


def layer_init(layer, gain=2**0.5):
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def gumbel(*shape, generator=None):
    """Noise whose sum with log-probabilities is largest at a sample of them."""
    return -torch.empty(shape).exponential_(generator=generator).log()


def to_screens(obs, device):
    """Observations (B, 4, 84, 84), an array → (B, 84, 84, 4), a tensor of the device."""
    return torch.from_numpy(np.ascontiguousarray(obs.transpose(0, 2, 3, 1))).to(device)


class Agent(nn.Module):
    """Categorical actor, mean critic V and median critic μ on the features of one Nature CNN (Mnih et al., 2015).

    As with the authors, BPO's actor and V have a hidden layer each, and μ sits on V's. PPO has none, as SB3's CnnPolicy.
    """

    def __init__(self, num_actions, args):
        super().__init__()
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
        self.amp = args.amp

    def forward(self, obs):
        """Screens (B, 84, 84, 4), bytes → logits (B, A), V(s) (B,), μ(s) (B,), which is V(s) where there is no median critic"""
        first, *others = self.convolutions
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.amp):
            x = obs.permute(0, 3, 1, 2).float()
            x = F.conv2d(x, first.weight / 255, first.bias, first.stride)  # there are fewer weights to divide than screens
            for layer in others:
                x = layer(x)
            features = self.features(x.permute(0, 2, 3, 1).flatten(1)).float()
        critic_features = self.critic(features)  # in bfloat16 the heads would give a few dozen different values
        values = self.value_head(critic_features)[:, 0]
        median_values = self.median_head(critic_features)[:, 0] if hasattr(self, "median_head") else values
        return self.actor(features), values, median_values

    def act(self, obs, generator=None):
        """Stacked screens (4, 84, 84) or (N, 4, 84, 84), bytes, as `AtariEnvs` has them → sampled action, or actions (N,)"""
        obs, weight = np.asarray(obs), self.actor[-1].weight
        screens = to_screens(obs.reshape(-1, *obs.shape[-3:]), weight.device)
        actions, _, _ = self.sample(screens, gumbel(len(screens), len(weight), generator=generator).to(weight.device))
        return actions.cpu().numpy().reshape(obs.shape[:-3])[()]

    @torch.no_grad()
    def sample(self, obs, noise):
        """Screens (B, 84, 84, 4), Gumbel noise (B, A) → sampled actions (B,), log π(a|s) (B,), V(s) (B,)"""
        logits, values, _ = self(obs)
        logprobs = logits.log_softmax(-1)
        actions = (logprobs + noise).argmax(-1)
        return actions, logprobs.gather(-1, actions[:, None])[:, 0], values

    def evaluate_actions(self, obs, actions):
        """log π(a|s) (B,), mean entropy (), V(s) (B,) and μ(s) (B,) of screens (B, 84, 84, 4) and actions (B,)"""
        logits, values, median_values = self(obs)
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
        return logprobs.gather(-1, actions[:, None])[:, 0], entropy, values, median_values


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


def ppo_loss(ratio, advantages, clip_coef):
    """Clipped surrogate −E[min(ρA, clip(ρ, 1−ε, 1+ε)A)] (Schulman et al., 2017): (B,), (B,) → a scalar."""
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)  # clip(ρ, 1−ε, 1+ε)
    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()  # −E[min(ρA, clip(ρ)A)]


def loss_coefficients(args):
    """Weights of the terms that `minibatch_losses` returns, in its order."""
    median_coef = args.median_coef * args.use_median * (args.loss == "bpo")
    return {"policy_loss": 1.0, "value_loss": args.vf_coef, "median_loss": median_coef, "entropy": -args.ent_coef}


def minibatch_losses(agent, batch, args):
    """Policy, value and median loss and the entropy on a minibatch of `update`'s batch: four scalars.

    BPO's A and Ã are taken against the critics as they are now, PPO's A is as it was when the rollout ended.
    """
    logprobs, entropy, values, median_values = agent.evaluate_actions(batch["obs"], batch["actions"])
    ratio = torch.exp(logprobs - batch["logprobs"])
    if args.loss == "ppo":
        advantages = batch["advantages"]
        if args.norm_adv:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        policy_loss = ppo_loss(ratio, advantages, args.epsilon)
    else:
        advantages = (batch["returns"] - values).detach()
        median_advantages = (batch["returns"] - median_values).detach()
        if args.norm_adv:
            advantages = advantages / (advantages.std() + 1e-8)
        policy_loss = bpo_loss(ratio, advantages, median_advantages, args.epsilon, args.temperature)
    value_loss = 0.5 * F.mse_loss(values, batch["returns"])
    return policy_loss, value_loss, median_loss(batch["returns"], median_values, args.median_temperature), entropy


@torch.no_grad()
def ratio_metrics(agent, batch, args):
    """What an update did to the ratios of its rollout: estimates of KL(π₀‖π), share outside the band, BPO's mean |ρ−ρ*|."""
    minibatches = zip(batch["obs"].tensor_split(args.num_minibatches), batch["actions"].tensor_split(args.num_minibatches))
    logprobs, _, _, median_values = zip(*(agent.evaluate_actions(*minibatch) for minibatch in minibatches))
    logratio = torch.cat(logprobs) - batch["logprobs"]
    ratio = logratio.exp()
    metrics = {
        "old_approx_kl": -logratio.mean(),
        "approx_kl": (ratio - 1 - logratio).mean(),
        "clipfrac": ((ratio - 1).abs() > args.epsilon).float().mean(),
    }
    if args.loss == "bpo":
        target = target_ratio(batch["returns"] - torch.cat(median_values), args.epsilon, args.temperature)
        metrics["ratio_error"] = (ratio - target).abs().mean()
    return metrics


def backpropagate(agent, gradient, coefs, batch, args):
    """Writes the gradient of coefs·losses on a minibatch, clipped, into the vector `gradient`; returns the losses (K,)."""
    losses = torch.stack(minibatch_losses(agent, batch, args))
    gradient.zero_()
    (coefs @ losses).backward()
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
    """The agent of a run folder, or of a checkpoint in it such as best.pt, on the CPU: `load_agent(run_dir).act(obs)`."""
    checkpoint = load_checkpoint(run_dir)
    agent = Agent(checkpoint["num_actions"], checkpoint["args"])
    agent.load_state_dict(checkpoint["agent"])
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


def play(agent, args):
    """Yields the scores of `eval_episodes` whole games, played side by side with sampled actions, as they end."""
    envs = AtariEnvs(args.env_id, args.eval_episodes, args.num_threads)
    generator = torch.Generator().manual_seed(args.seed)
    obs = envs.seeded_reset(args.seed + 50_500 + 100_000 * np.arange(args.eval_episodes))  # no training seeds
    returns, over = np.zeros(args.eval_episodes), np.zeros(args.eval_episodes, bool)
    while not over.all():
        obs, rewards, _, _, infos = envs.step(agent.act(obs, generator))
        returns += rewards
        yield from returns[infos["game_over"] & ~over].tolist()
        over |= infos["game_over"]
    envs.close()


def evaluate(agent, args, run_dir):
    """Plays whole games, actions sampled from the policy, and films one more with --capture-video; returns their scores."""
    returns = []
    for score in play(agent, args):
        returns.append(score)
        print(f"evaluation, game {len(returns)} of {args.eval_episodes}: return {score:.0f}", flush=True)
    print(f"evaluation: {np.mean(returns):.1f} ± {np.std(returns):.1f} (mean ± std of {len(returns)} games, sampled actions)")
    if args.capture_video:
        film_game(agent, args, run_dir)
    return returns


# Training -------------------------------------------------------------------------------------------------------------


def best_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_args(args):
    """Exits with a line on arguments that can't be."""
    for field in fields(args):
        flag, value = f"--{field.name.replace('_', '-')}", getattr(args, field.name)
        least = 0 if field.name == "eval_every" else 1
        if field.type is int and field.name != "seed" and value < least:
            sys.exit(f"{SCRIPT}: {flag} must be at least {least}")
        if field.type is float and not math.isfinite(value):
            sys.exit(f"{SCRIPT}: {flag} must be a finite number, not {value}")
    if args.num_threads > 1024:  # a run may go on where there are fewer cores
        sys.exit(f"{SCRIPT}: --num-threads {args.num_threads} must be at most 1024")
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
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        sys.exit(f"{SCRIPT}: --device {args.device} is not to be had here: take --device cpu")
    check_loss_args(args)


def train(args, total_timesteps=None):
    """Trains, evaluates and draws the learning curve; returns the run folder.

    With `args.resume` the run goes on under its own configuration, on its device or `args.device`, to its end or to
    `total_timesteps`.
    """
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    if checkpoint:
        run_dir, device, args = Path(args.resume), args.device, checkpoint["args"]
        args = replace(args, device=device or args.device)
        if total_timesteps is not None:
            args = replace(args, total_timesteps=total_timesteps)
        done = int(checkpoint["state"]["iteration"]) * args.num_envs * args.num_steps
        if done > args.total_timesteps:
            sys.exit(f"{SCRIPT}: {run_dir} is at step {done} already, beyond --total-timesteps {args.total_timesteps}")
    args = replace(args, device=args.device or best_device())
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
    stopped_by = []

    def stop(signum, frame):
        stopped_by.append(signum)  # the iteration ends and is saved
        signal.signal(signum, signal.SIG_DFL)  # unless the signal comes again

    handlers = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    envs = AtariEnvs(args.env_id, args.num_envs, args.num_threads)
    num_actions = int(envs.single_action_space.n)
    agent = Agent(num_actions, args).to(args.device)
    optimizer = torch.optim.Adam([flatten_parameters(agent)], lr=args.learning_rate, eps=1e-5, fused=True)
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size

    iteration, start_time, csv_size, best = 0, time.time(), (run_dir / "episodes.csv").stat().st_size, -math.inf
    episode_return, episode_length = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["torch_rng"])
        state = convert(checkpoint["state"], torch.Tensor, torch.Tensor.numpy)
        iteration, start_time, csv_size = state["iteration"], time.time() - state["seconds"], state["csv_size"]
        (episode_return, episode_length), best = state["episodes"], state["best"]
        if total_timesteps and args.anneal_lr:
            rate = args.learning_rate * (1 - iteration / num_iterations)
            print(f"the learning rate now falls to 0 at step {args.total_timesteps:,}; here it is {rate:.3g}")
        next_obs = envs.replay(*state["games"])
    else:
        next_obs = envs.seeded_reset(args.seed + 100_000 * np.arange(args.num_envs))

    def policy_state():
        state = {"script": SCRIPT, "args": asdict(args), "agent": agent.state_dict()}
        return state | {"num_actions": num_actions}

    def save():
        actions = [np.frombuffer(played, np.uint8) for played in envs.actions]
        state = {"iteration": iteration, "seconds": time.time() - start_time, "csv_size": csv_size, "best": best,
                 "games": (envs.seeds, actions), "episodes": (episode_return, episode_length)}  # fmt: skip
        save_checkpoint(run_dir, policy_state() | {"state": state, "optimizer": optimizer.state_dict(),
                                                   "torch_rng": torch.get_rng_state()})  # fmt: skip

    if not checkpoint:
        save()
    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros((*shape, 84, 84, 4), dtype=torch.uint8, device=args.device)  # 29 MB at the defaults
    screens = torch.zeros((args.num_envs, 84, 84, 4), dtype=torch.uint8, pin_memory=obs.is_cuda)  # on their way there
    actions = torch.zeros(shape, dtype=torch.int64, device=args.device)
    logprobs, values = torch.zeros((2, *shape), device=args.device)
    rewards = np.zeros(shape)
    terminations, truncations, forced = (np.zeros(shape, bool) for _ in range(3))
    writer = SummaryWriter(run_dir, purge_step=iteration * batch_size + 1)
    writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items()))
    unsaved, recent_returns, last = [], deque(maxlen=20), iteration == num_iterations
    progress = tqdm(total=num_iterations * batch_size, initial=iteration * batch_size, unit=" steps", disable=None)
    next_line = time.time() + 60

    while not last:
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)

        # Rollout.
        noise, cut_off, rows = gumbel(*shape, num_actions).to(args.device), [], []
        for step in range(args.num_steps):
            screens.numpy()[:] = next_obs.transpose(0, 2, 3, 1)
            obs[step].copy_(screens, non_blocking=True)
            actions[step], logprobs[step], values[step] = agent.sample(obs[step], noise[step])
            next_obs, rewards[step], terminations[step], truncations[step], infos = envs.step(actions[step].cpu().numpy())
            forced[step] = infos["forced"]
            cut_off += [(step, i, infos["final_obs"][i]) for i in np.flatnonzero(truncations[step])]
            episode_return += rewards[step]
            episode_length += 1
            for i in np.flatnonzero(infos["game_over"]):
                global_step = iteration * batch_size + (step + 1) * args.num_envs
                rows.append((global_step, episode_return[i], episode_length[i], time.time() - start_time))
                episode_return[i] = episode_length[i] = 0
        iteration += 1
        global_step = iteration * batch_size

        # Advantages and returns, of rewards clipped to their sign.
        with torch.no_grad():
            next_values = torch.cat((values[1:], agent(to_screens(next_obs, args.device))[1][None]))
            for step, i, last_obs in cut_off:
                next_values[step, i] = agent(to_screens(last_obs[None], args.device))[1]
        clipped_rewards = torch.from_numpy(np.sign(rewards)).float().to(args.device)
        dones = torch.from_numpy(terminations | truncations).float().to(args.device)
        terminated = torch.from_numpy(terminations).float().to(args.device)
        advantages = gae(clipped_rewards, values, next_values, terminated, dones, args.gamma, args.gae_lambda)
        batch = {"obs": obs, "actions": actions, "logprobs": logprobs, "values": values, "advantages": advantages}
        batch["returns"] = advantages + values
        batch = {key: tensor.flatten(0, 1) for key, tensor in batch.items()}
        if forced.any():  # the policy didn't choose this FIRE, its ratio means nothing
            chosen = torch.from_numpy(~forced.flatten()).to(args.device)
            batch = {key: tensor[chosen] for key, tensor in batch.items()}

        try:
            metrics = update(agent, optimizer, batch, args)
        except FloatingPointError as error:
            envs.close()
            sys.exit(f"{SCRIPT}: stopped at step {global_step}: {error}. {run_dir} keeps the last good checkpoint")

        steps_per_second = global_step / (time.time() - start_time)
        evaluated = args.eval_every > 0 and iteration % args.eval_every == 0
        score = float(np.mean(list(play(agent, args)))) if evaluated else -math.inf

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
    title = f"{args.env_id}, {SCRIPT} --loss {args.loss}, seed {args.seed}"
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
    if args.loss == "ppo":
        args = replace(args, **{name: PPO[name] for name in PPO.keys() - given})  # flags given beside the loss win
    if args.resume and given - {"resume", "total_timesteps", "device"}:
        sys.exit(f"{SCRIPT}: --resume goes on with the run's own configuration; only --total-timesteps and --device can be "
                 "given beside it")  # fmt: skip
    if args.resume and Path(args.resume).is_file():
        sys.exit(f"{SCRIPT}: --resume takes a run folder, not {args.resume}")
    if args.evaluate and given - {"evaluate", "eval_episodes", "capture_video", "device"}:
        sys.exit(f"{SCRIPT}: --evaluate goes by the run's own configuration, and takes --eval-episodes, --capture-video "
                 "and --device")  # fmt: skip
    try:
        if args.evaluate:
            path, device = Path(args.evaluate), args.device or best_device()
            played = dict(evaluate=args.evaluate, eval_episodes=args.eval_episodes, capture_video=args.capture_video)
            settings = replace(load_checkpoint(path)["args"], device=device, **played)
            check_args(settings)
            try_env(settings)
            run_dir = path.parent if path.is_file() else path
            evaluate(load_agent(path).to(device), settings, run_dir)
            for video in sorted(run_dir.glob("videos/eval-*.mp4")) if args.capture_video else ():
                print(f"video: {video}")
        else:
            train(args, **({"total_timesteps": args.total_timesteps} if args.resume and "total_timesteps" in given else {}))
    except gym.error.Error as error:
        sys.exit(f"{SCRIPT}: {type(error).__name__}: {error}")
    except (MemoryError, torch.OutOfMemoryError):
        sys.exit(f"{SCRIPT}: out of memory: lower --num-envs, --num-steps or --eval-episodes")
    except OSError as error:
        sys.exit(f"{SCRIPT}: {type(error).__name__}: {error} (runs are written to {Path('runs').absolute()})")


if __name__ == "__main__":
    main()
