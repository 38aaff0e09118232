"""The theory of Bounded Ratio RL, executed exactly on finite Markov decision processes.

Q, V and A = Q − V are those of a policy π₀, computed exactly. Of all policies π = ρ·π₀ whose ratio stays in [1−ε, 1+ε], which
is the best? With the entropy of ρ's position in the band as a bonus of temperature λ, the answer in each state is

    ρ* = 1 + ε·tanh(Ã/(2λ)),   Ã = Q − μ,   the soft median μ(s) solving E_{a∼π₀}[σ((Q−μ)/λ)] = ½           (solution)
    J(π*) − J(π₀) = 1/(1−γ)·E_{s∼d_π*}[g(s)],   g(s) = ε·E_{a∼π₀}[Ã·tanh(Ã/(2λ))] ≥ 0                       (improvement)
    J(π) ≥ J(π₀) + 1/(1−γ)·( E_{d_π₀}[g] − L(π) − 2γ/(1−γ)·max_s|E_π[A]|·E_{d_π₀}[TV(π,π₀)] )              (lower bound)

with the BPO loss L(π) = E_{s∼d_π₀, a∼π₀}[|A|·|ρ − ρ*|]. Every claim is measured and drawn. Source: Ao et al., Bounded Ratio
Reinforcement Learning, arXiv 2604.18578.

    python brrl_tabular.py                     every claim on FrozenLake 8×8: a table, and figures in runs/brrl_tabular
    python brrl_tabular.py --env-id Taxi-v4    … on another table of gymnasium, or on Random
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import scipy.sparse as sparse
import torch
import tyro
from matplotlib.figure import Figure
from scipy.optimize import brentq, linprog
from scipy.special import expit, logit, rel_entr, softmax


@dataclass
class Args:
    env_id: str = "FrozenLake8x8-v1"  # a gymnasium task with a table `P` (FrozenLake, CliffWalking, Taxi), or Random
    num_states: int = 50  # of Random
    num_actions: int = 6  # of Random
    seed: int = 1  # of Random and of the random checks
    gamma: float = 0.99  # discount γ
    epsilon: float = 0.3  # half-width ε of the band
    temperature: float = 0.01  # λ, in units of Q
    iterations: int = 60  # of policy iteration
    output_dir: Path = Path("runs/brrl_tabular")  # where the figures go


# The decision process -------------------------------------------------------------------------------------------------


class MDP:
    """transitions (S·A, S) sparse, rewards (S, A), start (S,), γ. ValueError unless the rows are distributions."""

    def __init__(self, transitions, rewards, start, gamma):
        self.transitions, self.rewards, self.start = sparse.csr_array(transitions), np.array(rewards, float), np.array(start)
        self.gamma, self.shape = gamma, self.rewards.shape
        for name, rows in (("transitions", self.transitions), ("start", sparse.csr_array(self.start[None]))):
            if rows.data.min(initial=0) < 0 or abs(rows.sum(axis=1) - 1).max() > 1e-9:
                raise ValueError(f"the rows of {name} must be distributions: not negative, and with the sum 1")
        if not 0 <= gamma < 1:
            raise ValueError(f"the discount must be in [0, 1), not {gamma}")

    def under(self, policy):
        """1 − γP_π (S, S) and the rewards (S,) under a policy (S, A)."""
        choice = sparse.csr_array((policy.ravel(), np.arange(policy.size), np.arange(len(policy) + 1) * policy.shape[1]))
        return sparse.eye_array(len(policy)) - self.gamma * (choice @ self.transitions), (policy * self.rewards).sum(1)

    def evaluate(self, policy):
        """Q (S, A), V (S,) and the return J of a policy, by one linear solve of the Bellman equation."""
        matrix, rewards = self.under(policy)
        v = sparse.linalg.spsolve(matrix.tocsc(), rewards)
        return self.backup(v), v, self.start @ v

    def backup(self, v):
        return self.rewards + self.gamma * (self.transitions @ v).reshape(self.shape)

    def occupancy(self, policy):
        """The normalised discounted state distribution d_π (S,)."""
        return (1 - self.gamma) * sparse.linalg.spsolve(self.under(policy)[0].T.tocsc(), self.start)

    def optimum(self):
        """The best possible return, by value iteration to machine precision."""
        v = np.zeros(self.shape[0])
        while True:
            v, old = self.backup(v).max(1), v
            if abs(v - old).max() <= 1e-15 * (1 + abs(v).max()):
                return self.start @ self.evaluate(np.eye(self.shape[1])[self.backup(v).argmax(1)])[1]


def make_mdp(args):
    """The table of a gymnasium task, its ends led to one more state without reward, or a random one."""
    if args.env_id == "Random":
        rng = np.random.default_rng(args.seed)
        transitions = rng.dirichlet(np.full(args.num_states, 0.1), args.num_states * args.num_actions)
        rewards, start = rng.normal(size=(args.num_states, args.num_actions)), rng.dirichlet(np.ones(args.num_states))
        return MDP(transitions, rewards, start, args.gamma)
    try:
        env = gym.make(args.env_id).unwrapped
        table, start = env.P, np.append(env.initial_state_distrib, 0.0)
    except (gym.error.Error, AttributeError, ImportError) as error:
        raise ValueError(f"{args.env_id} has no table P: try FrozenLake-v1, CliffWalking-v1, Taxi-v4, Random") from error
    end, num_actions = len(table), len(table[0])
    transitions, rewards = sparse.lil_array(((end + 1) * num_actions, end + 1)), np.zeros((end + 1, num_actions))
    transitions[end * num_actions :, end] = 1.0
    for state, actions in table.items():
        for action, outcomes in actions.items():
            for probability, following, reward, terminated in outcomes:
                transitions[state * num_actions + action, end if terminated else int(following)] += probability
                rewards[state, action] += probability * reward
    return MDP(transitions, rewards, start, args.gamma)


# The bounded-ratio policy ---------------------------------------------------------------------------------------------


def brrl_policy(policy, q, low, high, temperature=None):
    """The best policy among all whose ratio to `policy` stays in [low, high]; `policy` and Q (S, A) → ρ·π₀ (S, A), μ (S,).

    ρ* = low + (high−low)·x with x = σ((Q−μ)/λ) and E_{π₀}[x] = p = (1−low)/(high−low), so that E_{π₀}[ρ*] = 1: μ is the soft
    (1−p)-quantile of Q, the soft median if the band is symmetric. Without a temperature, the limit λ → 0: x is 1 above the
    quantile, 0 below, and one value for all actions tied with it.
    """
    if not 0 <= low < 1 < high:
        raise ValueError(f"the band [{low}, {high}] must contain 1 inside and nothing negative (0 < ε < 1)")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"the temperature must be positive, not {temperature}; None is the hard limit")
    if np.any(policy < 0) or abs(policy.sum(1) - 1).max() > 1e-9:
        raise ValueError("the policy's rows must be distributions")
    p, order = (1 - low) / (high - low), np.argsort(-q, axis=1)
    mass = np.take_along_axis(policy, order, 1).cumsum(1)  # of the best action, the two best, …
    quantile = (mass < p * (1 - 1e-12)).sum(1, keepdims=True).clip(max=q.shape[1] - 1)
    threshold = np.take_along_axis(np.take_along_axis(q, order, 1), quantile, 1)
    if temperature is None:
        tied = q == threshold
        missing = p - (policy * (q > threshold)).sum(1, keepdims=True)  # what the tied actions have to supply
        x = np.where(tied, missing / (policy * tied).sum(1, keepdims=True), q > threshold)
    else:  # counted from the hard quantile, in units of λ, the root is well-conditioned for any scale of Q
        z = np.clip(q - threshold, -1000 * temperature, 1000 * temperature) / temperature
        margin, root = abs(logit(p)) + 1, np.empty((len(q), 1))
        for i, ends in enumerate(zip(z.min(1) - margin, z.max(1) + margin)):
            root[i] = brentq(lambda u, i: policy[i] @ expit(z[i] - u) - p, *ends, args=(i,), xtol=1e-15)
        x, threshold = expit(z - root), threshold + temperature * root
    return policy * np.clip(low + (high - low) * x, low, high), threshold[:, 0]


def gain(policy, q, threshold, epsilon, temperature=None):
    """g(s) = ε·E_{π₀}[Ã·tanh(Ã/(2λ))] (S,), ε·E_{π₀}|Ã| in the hard limit: what ρ* adds to E_{π₀}[ρQ] in each state."""
    advantages = q - threshold[:, None]
    slopes = np.sign(advantages) if temperature is None else np.tanh(advantages / (2 * temperature))
    return epsilon * (policy * advantages * slopes).sum(1)


def policy_iteration(mdp, policy, iterations, epsilon, temperature=None):
    """Yields (π, J, improvement that the theorem predicts for the next step) from `policy` on."""
    for _ in range(iterations):
        q, _, value = mdp.evaluate(policy)
        following, threshold = brrl_policy(policy, q, 1 - epsilon, 1 + epsilon, temperature)
        yield policy, value, mdp.occupancy(following) @ gain(policy, q, threshold, epsilon, temperature) / (1 - mdp.gamma)
        policy = following


def trpo_policy(policy, q, states, radius):
    """The exact trust-region step: argmax_π E_{d,π}[Q] with E_d[KL(π‖π₀)] ≤ radius is π ∝ π₀·exp(Q/η)."""

    def tilt(log_eta):  # π, and how far outside the trust region it is
        with np.errstate(divide="ignore"):
            tilted = softmax(np.log(policy) + (q - q.max(1, keepdims=True)) / np.exp(log_eta), axis=1)
        return tilted, states @ rel_entr(tilted, policy).sum(1) - radius

    low, high = np.log(np.ptp(q) + 1e-300) + np.array((-40, 40))
    return tilt(brentq(lambda log_eta: tilt(log_eta)[1], low, high, xtol=1e-13) if tilt(low)[1] > 0 else low)[0]


def fit_softmax(policy, states, loss, steps=400):
    """Adam on the logits of a softmax policy from π₀ on, loss(ratio) (S, A) being weighted by d_π₀·π₀. Yields policies."""
    policy, weights = torch.from_numpy(policy), torch.from_numpy(policy * states[:, None] / states.max())
    start = torch.log(policy.clamp(min=1e-300))
    optimizer = torch.optim.Adam([logits := start.clone().requires_grad_()], lr=0.02)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        ratio = torch.exp(torch.log_softmax(logits, 1) - torch.log_softmax(start, 1))
        optimizer.zero_grad()
        (weights * loss(ratio)).sum().backward()
        yield (policy * ratio).detach().numpy()
        optimizer.step()


def ppo_loss(advantages, epsilon):
    a = torch.as_tensor(advantages)
    return lambda ratio: -torch.min(ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon) * a)


def bpo_loss(advantages, target):
    return lambda ratio: torch.as_tensor(advantages).abs() * (ratio - torch.as_tensor(target)).abs()


# The claims: each draws a figure and returns rows (claim, what was measured, the figure) ------------------------------


def claim_solution(mdp, policy, args, axes):
    """ρ* solves the linear program, is a distribution, and tends to the edges of the band as λ falls."""
    rng, gaps, sums = np.random.default_rng(args.seed), [], []
    for _ in range(300):
        n = rng.integers(2, 12)
        old, q, low, high = rng.dirichlet(np.ones(n)), rng.integers(0, 6, n) / 3, rng.uniform(0, 0.95), rng.uniform(1.05, 3)
        hard, soft = (brrl_policy(old[None], q[None], low, high, t)[0][0] for t in (None, args.temperature))
        gaps.append(abs(-linprog(-old * q, A_eq=old[None], b_eq=[1], bounds=(low, high)).fun - hard @ q))
        sums += [abs(hard.sum() - 1), abs(soft.sum() - 1)]
    q = np.linspace(-1, 1, 201)[None]
    for axis, low, high in ((axes[0], 1 - args.epsilon, 1 + args.epsilon), (axes[1], 1 - args.epsilon, 1 + 2 * args.epsilon)):
        for temperature in (None, 0.05, 0.2, 1.0):
            ratio = brrl_policy(np.full_like(q, 1 / q.size), q, low, high, temperature)[0] * q.size
            axis.plot(q[0], ratio[0], label=f"λ = {temperature or 0:g}")
        axis.set(xlabel="Q of 201 equally likely actions", ylabel="best ratio ρ*", title=f"Band [{low:g}, {high:g}]")
    return [("Analytic solution", "|value − linear program's|, asymmetric bands, ties: largest of 300", max(gaps)),
            ("… is a distribution", "|E[ρ*] − 1|, hard and soft: largest of 600", max(sums))]  # fmt: skip


def claim_improvement(mdp, policy, args, axes):
    """Each step of policy iteration improves by what the theorem says, and the limit is the optimum."""
    rows, optimum = [], mdp.optimum()
    for temperature in (args.temperature, None):
        _, values, predicted = zip(*policy_iteration(mdp, policy, args.iterations, args.epsilon, temperature))
        measured, predicted, scale = np.diff(values), np.array(predicted[:-1]), np.abs(values).max()
        errors = (abs(measured - predicted) / measured)[measured > 1e-5 * scale]  # below, rounding of J rules
        axes[0].semilogy(measured.clip(1e-15), "o", markersize=4, label=f"measured, λ = {temperature or 0:g}")
        axes[0].semilogy(predicted.clip(1e-15), "-", linewidth=1, label=f"theorem, λ = {temperature or 0:g}")
        kept = f"{len(errors)} of {len(measured)} steps (gain > 1e-5·max|J|)"
        rows.append((f"Improvement, λ = {temperature or 0:g}", f"relative error, {kept}: largest", errors.max(initial=0)))
        rows.append(("… is monotonic", "(J(π₊) − J(π)) / max|J|: smallest", measured.min() / scale))
    *_, (_, value, _) = policy_iteration(mdp, policy, 6 * args.iterations, args.epsilon)
    rows.append(("… converges", f"(J* − J) / |J*| after {6 * args.iterations} hard steps", (optimum - value) / abs(optimum)))
    axes[0].set(xlabel="policy iteration", ylabel="J(π*) − J(π₀)", title="Improvement in a step")
    epsilons, target = (0.1, 0.3, 0.5, 0.8), 0.1 * mdp.evaluate(policy)[2] + 0.9 * optimum
    for temperature in (None, args.temperature, 10 * args.temperature):
        paths = [policy_iteration(mdp, policy, 2 * args.iterations, epsilon, temperature) for epsilon in epsilons]
        counts = [next((i for i, step in enumerate(path) if step[1] >= target), np.nan) for path in paths]
        axes[1].semilogy(epsilons, counts, "o-", label=f"λ = {temperature or 0:g}")
    axes[1].set(xlabel="ε", ylabel="iterations to 90 % of the gain", title="Iterations by ε and λ")
    return rows


def claim_ppo(mdp, policy, args, axes):
    """PPO's loss is the one-sided BPO loss. Optimised to the end, BPO is on target while PPO has left the band."""
    ratios, errors = torch.linspace(0.4, 1.6, 200, dtype=torch.float64), []
    for a, color in ((1.0, "tab:blue"), (-1.0, "tab:orange")):
        edge = 1 + args.epsilon * a
        shifted = ppo_loss(a, args.epsilon)(ratios) + a * edge
        errors.append((shifted - (a * (edge - ratios)).clamp(min=0)).abs().max())
        axes[0].plot(ratios, bpo_loss(a, edge)(ratios), color=color, label=f"BPO, A = {a:+.0f}")
        axes[0].plot(ratios, shifted, "--", color=color, label=f"PPO, A = {a:+.0f}")
    rows = [("PPO lens", "|PPO loss − (one-sided BPO loss − Aρ*)|: largest of 400", max(errors))]
    axes[0].set(xlabel="ratio ρ", ylabel="loss (PPO: + Aρ*)", title="BPO pulls back, PPO lets go")
    q, v, _ = mdp.evaluate(policy)
    advantages, states = q - v[:, None], mdp.occupancy(policy)
    best, _ = brrl_policy(policy, q, 1 - args.epsilon, 1 + args.epsilon)
    matters = (states > 1e-3 * states.max())[:, None] & (abs(advantages) > 1e-9)
    if not matters.any():
        sys.exit(f"brrl_tabular: with γ = {args.gamma} no action of {args.env_id} matters: take a larger one")
    for name, loss in (("PPO", ppo_loss(advantages, args.epsilon)), ("BPO", bpo_loss(advantages, best / policy))):
        *_, last = fit_softmax(policy, states, loss, 2000)
        outside = abs(last / policy - 1)[matters] - args.epsilon
        axes[1].hist((last / policy)[matters], np.linspace(0, 2.5, 51), alpha=0.6, label=name)
        rows.append((f"{name}, converged", "share of ratios more than 0.01 outside the band", (outside > 0.01).mean()))
        rows.append(("…", "distance of the farthest from the band", max(outside.max(), 0.0)))
    rows.append(("…", "BPO's |ρ − ρ*|: largest", abs((last - best) / policy)[matters].max()))
    axes[1].set(xlabel="ratio ρ", ylabel="state-action pairs", title="Ratios after 2000 optimiser steps")
    return rows


def claim_neighbours(mdp, start, args, axes):
    """Return by iteration of BRRL, the exact TRPO step of the same KL, PPO and BPO; π*'s distance from π₀."""
    bound = 0.5 * ((1 + args.epsilon) * np.log1p(args.epsilon) + (1 - args.epsilon) * np.log1p(-args.epsilon))
    distances = []
    for name in ("BRRL", "TRPO", "PPO", "BPO"):
        policy, values = start, []
        for _ in range(args.iterations // 2):
            q, v, value = mdp.evaluate(policy)
            values.append(value)
            states, a = mdp.occupancy(policy), q - v[:, None]
            best, _ = brrl_policy(policy, q, 1 - args.epsilon, 1 + args.epsilon)
            distances.append((abs(best - policy).sum(1).max() / args.epsilon, rel_entr(best, policy).sum(1).max() / bound))
            if name == "TRPO":
                best = trpo_policy(policy, q, states, states @ rel_entr(best, policy).sum(1))
            elif name in ("PPO", "BPO"):
                target = np.divide(best, policy, out=np.ones_like(best), where=policy > 0)
                *_, best = fit_softmax(policy, states, ppo_loss(a, args.epsilon) if name == "PPO" else bpo_loss(a, target), 100)
            policy = best
        axes[0].plot(values, "--" if name == "BPO" else "-", label=name)
        axes[1].semilogy(mdp.optimum() - np.array(values), "--" if name == "BPO" else "-", label=name)
    axes[0].set(xlabel="iteration", ylabel="return J", title=f"{args.env_id}: four ways to improve")
    axes[1].set(xlabel="iteration", ylabel="J* − J", title="Distance from the optimum")
    names = "TV(π*, π₀) / (ε/2): largest", "KL(π*‖π₀) / its bound: largest"
    return [("Trust region", name, distance) for name, distance in zip(names, np.max(distances, axis=0))]


def claim_bound(mdp, policy, args, axes):
    """The lower bound stays below the return all along the path of an optimiser."""
    q, v, first = mdp.evaluate(policy)
    advantages, states = q - v[:, None], mdp.occupancy(policy)
    best, threshold = brrl_policy(policy, q, 1 - args.epsilon, 1 + args.epsilon, args.temperature)
    promise = states @ gain(policy, q, threshold, args.epsilon, args.temperature)
    returns, bounds, losses = [], [], []
    for step in fit_softmax(policy, states, bpo_loss(advantages, best / policy)):
        losses.append(states @ (abs(advantages) * abs(step - best)).sum(1))
        penalty = abs((step * advantages).sum(1)).max() * (states @ abs(step - policy).sum(1)) * mdp.gamma / (1 - mdp.gamma)
        bounds.append(first + (promise - losses[-1] - penalty) / (1 - mdp.gamma))
        returns.append(mdp.evaluate(step)[2])
    axes[0].plot(returns, label="J(π_θ)")
    axes[0].plot(bounds, label="lower bound")
    axes[0].set(xlabel="optimiser step", ylabel="return", title="Along a BPO optimisation")
    axes[1].semilogy(losses, label="BPO loss L(θ)")
    axes[1].set(xlabel="optimiser step", ylabel="loss", title="On the same path")
    gaps = np.array(returns) - bounds
    return [("Lower bound", "J(π_θ) − bound, never negative: smallest of 400 steps", gaps.min()),
            ("… is loose", "(J(π_θ) − bound) / (J(π_θ) − J(π₀)) at the end", gaps[-1] / (returns[-1] - first))]  # fmt: skip


def claim_cem(mdp, policy, args, axes):
    """In the band [0, 1/p] with λ → 0, π* is the elite distribution of the Cross-Entropy Method."""
    x = np.linspace(-3, 3, 241)
    old, q, p = np.exp(-0.5 * x**2) / np.exp(-0.5 * x**2).sum(), np.sin(2.5 * x) + 0.3 * x, 0.2
    elite, order = np.zeros_like(old), np.argsort(-q)
    elite[order] = np.diff(np.minimum(old[order].cumsum(), p), prepend=0) / p  # π₀'s best actions, until their mass is p
    soft, hard = (brrl_policy(old[None], q[None], 0.0, 1 / p, temperature)[0][0] for temperature in (0.3, None))
    for values, style, label in ((old, "-", "π₀"), (elite, "-", "elite"), (hard, "--", "λ = 0"), (soft, "-", "λ = 0.3")):
        axes[0].plot(x, values, style, label=label)
        axes[1].plot(x, values / old, style, label=label)
    axes[0].set(xlabel="action", ylabel="probability", title=f"The Cross-Entropy Method is the band [0, {1 / p:g}]")
    axes[1].set(xlabel="action", ylabel="ratio ρ", title="The same as ratios")
    return [("CEM", "|π* − elite distribution|: largest of 241 actions", abs(hard - elite).max())]


def main():
    args = tyro.cli(Args)
    try:
        if not (0 < args.epsilon < 1 and 0 < args.temperature < np.inf):
            raise ValueError(f"ε = {args.epsilon} must be between 0 and 1, λ = {args.temperature} positive")
        if not (0 < args.gamma < 1 and args.iterations > 1 and args.num_states > 1 and args.num_actions > 1 and args.seed >= 0):
            raise ValueError("the discount must be between 0 and 1, --iterations, --num-states, --num-actions at least 2, "
                             "--seed not negative")  # fmt: skip
        mdp = make_mdp(args)
    except ValueError as error:
        sys.exit(f"brrl_tabular: {error}")
    policy = np.full(mdp.shape, 1 / mdp.shape[1])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for claim in (claim_solution, claim_improvement, claim_ppo, claim_neighbours, claim_bound, claim_cem):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        axes = figure.subplots(1, 2)
        for row in claim(mdp, policy, args, axes):
            print("{:24} {:68} {:10.2g}".format(*row), flush=True)
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        figure.savefig(args.output_dir / f"{claim.__name__.removeprefix('claim_')}.png", dpi=110)
    print(f"{args.env_id}, γ = {args.gamma}, ε = {args.epsilon}, λ = {args.temperature}; figures in {args.output_dir}")


if __name__ == "__main__":
    main()

# What `uv run` installs.

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco,classic-control]==1.4.0",
#     "numpy==2.4.6",
#     "scipy==1.17.1",
#     "tyro==1.0.17",
#     "matplotlib==3.11.2",
# ]
# ///
