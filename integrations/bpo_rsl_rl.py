"""Bounded Policy Optimization (BPO) inside rsl_rl 5, the trainer of Isaac Lab and mjlab: PPO with another loss.

BPO regresses the policy's ratio ρ = π(a|s)/π₀(a|s) onto the best ratio ρ* in the band [1−ε, 1+ε], where PPO clips it:

    ρ* = 1 + ε·tanh(Ã/(2λ)),   Ã = Q(s,a) − μ(s),   μ the soft median of Q, a second output of the critic
    L  = E[ |A|·|ρ − ρ*| ],    A = Q(s,a) − V(s)    both taken anew in each minibatch; Q is the GAE return

Source: Ao et al., Bounded Ratio Reinforcement Learning, arXiv 2604.18578. The whole algorithm in one file: bpo_isaaclab.py.
Where Python finds this file (PYTHONPATH), a task's own command line takes it:

    isaaclab train --rl_library rsl_rl --task Isaac-Cartpole-Direct agent.algorithm.class_name=bpo_rsl_rl:BPO
"""

from importlib.metadata import version

import torch
import torch.nn as nn
import torch.nn.functional as F
from rsl_rl.algorithms import PPO

NORMALIZES_AFTER_UPDATE = tuple(map(int, version("rsl-rl-lib").split(".")[:2])) >= (5, 5)  # before, at each step


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


class ValueHead(nn.Linear):
    """V(s), (B, 1), as rsl_rl asks for it; μ(s), (B, 1), stays in `median_values`."""

    def forward(self, features):
        values, self.median_values = super().forward(features).split(1, -1)
        return values


class BPO(PPO):
    """Takes PPO's options, its clips without effect, and these, with bpo_isaaclab.py's defaults: ε; λ in returns; threshold at
    μ(s) or V(s); coefficient and λ of the median loss; values, advantages and returns anew before each epoch or not."""

    def __init__(self, actor, critic, storage, *args, epsilon=0.3, temperature=1e-2, use_median=True, median_coef=1.0,
                 median_temperature=1.0, reevaluate=True, **options):  # fmt: skip
        without = [name for name in ("rnd_cfg", "symmetry_cfg", "use_mixed_precision") if options.get(name)]
        if actor.is_recurrent or critic.is_recurrent or without:
            raise ValueError(f"BPO works without {' and '.join(without) or 'recurrent policies'}")
        if not (0 < epsilon < 1 and temperature > 0 and median_temperature > 0):
            raise ValueError("BPO needs an epsilon between 0 and 1, and temperatures above 0")
        last = critic.mlp[-1]
        critic.mlp[-1] = ValueHead(last.in_features, 2).to(last.weight.device)
        super().__init__(actor, critic, storage, *args, **options)
        self.epsilon, self.temperature, self.use_median = epsilon, temperature, use_median
        self.median_coef, self.median_temperature, self.reevaluate = median_coef, median_temperature, reevaluate

    def total_loss(self, batch):
        """The loss of a minibatch of rsl_rl's storage, and its terms by name."""
        self.actor(batch.observations, stochastic_output=True)
        ratio = torch.exp(self.actor.get_output_log_prob(batch.actions) - batch.old_actions_log_prob.flatten())
        values, returns = self.critic(batch.observations).flatten(), batch.returns.flatten()
        median_values = self._raw_critic.mlp[-1].median_values.flatten()
        advantages = (returns - values).detach()
        median_advantages = (returns - median_values).detach() if self.use_median else advantages

        policy_loss = bpo_loss(ratio, advantages, median_advantages, self.epsilon, self.temperature)
        value_loss = F.mse_loss(values, returns)
        mu_loss = self.use_median * median_loss(returns, median_values, self.median_temperature)
        entropy = self.actor.output_entropy.mean()
        loss = policy_loss + self.value_loss_coef * value_loss + self.median_coef * mu_loss - self.entropy_coef * entropy
        return loss, {"surrogate": policy_loss, "value": value_loss, "median": mu_loss, "entropy": entropy}

    def follow_kl(self, batch):
        """rsl_rl's adaptive learning rate: a KL(π₀‖π) above twice the desired one lowers it, one below half of it raises it."""
        kl = self.actor.get_kl_divergence(batch.old_distribution_params, self.actor.output_distribution_params).mean().detach()
        if self.is_multi_gpu:
            torch.distributed.all_reduce(kl)
            kl = kl / self.gpu_world_size
        factor = 1 / 1.5 if kl > 2 * self.desired_kl else 1.5 if 0 < kl < self.desired_kl / 2 else 1.0
        self.learning_rate = min(1e-2, max(1e-5, self.learning_rate * factor))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

    def compute_returns(self, obs):
        self.last_obs = obs
        super().compute_returns(obs)

    def update(self):
        history, observations = [], self.storage.observations.flatten(0, 1)
        for epoch in range(self.num_learning_epochs):
            if epoch and self.reevaluate:
                with torch.no_grad():
                    self.storage.values[:] = self.critic(observations).view_as(self.storage.values)
                    self.compute_returns(self.last_obs)
            for batch in self.storage.mini_batch_generator(self.num_mini_batches, 1):
                loss, terms = self.total_loss(batch)
                if self.desired_kl is not None and self.schedule == "adaptive":
                    self.follow_kl(batch)
                self.optimizer.zero_grad()
                loss.backward()
                if self.is_multi_gpu:
                    self.reduce_parameters()
                nn.utils.clip_grad_norm_(self.actor.parameters(), self.max_grad_norm)
                nn.utils.clip_grad_norm_(self.critic.parameters(), self.max_grad_norm)
                self.optimizer.step()
                history.append(torch.stack(list(terms.values())).detach())
        if NORMALIZES_AFTER_UPDATE:
            self.actor.update_normalization(observations)
            self.critic.update_normalization(observations)
        self.storage.clear()
        return dict(zip(terms, torch.stack(history).mean(0).tolist()))
