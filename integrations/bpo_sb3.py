"""Bounded Policy Optimization (BPO) inside Stable-Baselines3: PPO with another loss, and all else of its trainer.

BPO regresses the policy's ratio ρ = π(a|s)/π₀(a|s) onto the best ratio ρ* in the band [1−ε, 1+ε], where PPO clips it:

    ρ* = 1 + ε·tanh(Ã/(2λ)),   Ã = Q(s,a) − μ(s),   μ the soft median of Q, a second output of the critic
    L  = E[ |A|·|ρ − ρ*| ],    A = Q(s,a) − V(s)    both taken anew in each minibatch; Q is the GAE return

Source: Ao et al., Bounded Ratio Reinforcement Learning, arXiv 2604.18578. The whole algorithm in one file: bpo_continuous.py.

    from bpo_sb3 import BPO
    model = BPO("MlpPolicy", "Hopper-v5", verbose=1).learn(1_000_000)

    pip install stable-baselines3==2.9.2
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.utils import explained_variance


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
    """V(s), (B, 1), as Stable-Baselines3 asks for it; μ(s), (B,), stays in `median_values`."""

    def forward(self, features):
        values, self.median_values = super().forward(features).split(1, -1)
        return values


class BPO(PPO):
    """Takes PPO's options but for clips and target_kl, and these, whose defaults are those of bpo_continuous.py.

    epsilon: half-width ε of the band, between 0 and 1.
    temperature: λ, in returns. Normalise rewards (VecNormalize), or give it in the units of yours.
    use_median: threshold at the soft median μ(s); False: at the mean V(s), the paper's ablation.
    median_coef, median_temperature: coefficient and λ of the median loss; None: that of the target, as in theory.
    normalize_advantage: divides the weight |A| by the minibatch's standard deviation of A; it is not centred.
    """

    def __init__(self, policy, env, *args, epsilon=0.3, temperature=1e-3, use_median=True, median_coef=0.5,
                 median_temperature=None, **options):  # fmt: skip
        if args or options.keys() & {"clip_range", "clip_range_vf", "target_kl"}:
            raise TypeError("BPO takes its options by name, and no clips or target_kl: its band is epsilon")
        if not (0 < epsilon < 1 and temperature > 0 and (median_temperature or 1) > 0):
            raise ValueError("BPO needs an epsilon between 0 and 1, and temperatures above 0")
        self.epsilon, self.temperature, self.use_median = epsilon, temperature, use_median
        self.median_coef, self.median_temperature = median_coef, median_temperature
        super().__init__(policy, env, **options)

    def _setup_model(self):
        super()._setup_model()
        policy, head = self.policy, self.policy.value_net
        if type(head) is not nn.Linear or hasattr(policy, "lstm_actor"):
            raise ValueError(
                f"BPO needs a policy that is not recurrent, with one linear value_net; {type(policy).__name__} is not"
            )
        policy.value_net = ValueHead(head.in_features, 2).to(self.device)
        nn.init.orthogonal_(policy.value_net.weight)
        nn.init.zeros_(policy.value_net.bias)
        policy.optimizer = policy.optimizer_class(policy.parameters(), lr=self.lr_schedule(1), **policy.optimizer_kwargs)

    def total_loss(self, batch):
        """The loss of a minibatch of the rollout buffer, and what is logged of it, scalars by name."""
        actions = batch.actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else batch.actions
        values, logprobs, entropy = self.policy.evaluate_actions(batch.observations, actions)
        values, median_values = values.flatten(), self.policy.value_net.median_values.flatten()
        ratio = torch.exp(logprobs - batch.old_log_prob)
        advantages = (batch.returns - values).detach()
        median_advantages = (batch.returns - median_values).detach() if self.use_median else advantages
        if self.normalize_advantage:
            advantages = advantages / (advantages.std() + 1e-8)

        policy_loss = bpo_loss(ratio, advantages, median_advantages, self.epsilon, self.temperature)
        value_loss = F.mse_loss(values, batch.returns)
        mu_loss = self.use_median * median_loss(batch.returns, median_values, self.median_temperature or self.temperature)
        entropy = -logprobs.mean() if entropy is None else entropy.mean()
        loss = policy_loss + self.vf_coef * value_loss + self.median_coef * mu_loss - self.ent_coef * entropy
        terms = {"policy_loss": policy_loss, "value_loss": value_loss, "median_loss": mu_loss, "entropy": entropy}
        terms["approx_kl"] = (ratio - 1 - ratio.log()).mean()
        terms["clip_fraction"] = ((ratio - 1).abs() > self.epsilon).float().mean()
        return loss, {name: term.item() for name, term in terms.items()}

    def train(self):
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        history = []
        for _ in range(self.n_epochs):
            for batch in self.rollout_buffer.get(self.batch_size):
                loss, terms = self.total_loss(batch)
                history.append(terms)
                self.policy.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                self.policy.optimizer.step()
            self._n_updates += 1
        metrics = {name: np.mean([terms[name] for terms in history]) for name in history[0]}
        values, returns = self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten()
        metrics["explained_variance"] = explained_variance(values, returns)
        for name, value in metrics.items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
