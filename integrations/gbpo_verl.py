"""Group-relative Bounded Policy Optimization (GBPO) inside verl: an advantage estimator and a policy loss, and all else verl's.

For each prompt the old policy π₀ gives G completions with rewards r. GRPO clips the ratio ρ of each of their tokens; GBPO
regresses it onto the best ratio ρ* in the band [1 − ε_low, 1 + ε_high], the same for all tokens of a completion:

    ρ*_i = 1 − ε_low + (ε_low + ε_high)·σ((r_i − median(r))/((s + 1e-6)·λ))     s is the group's standard deviation
    L    = E[ |A_i|·|ρ_{i,t} − ρ*_i| ],   A_i = (r_i − mean(r))/(s + 1e-6)      verl's advantages and mean over tokens

Source: Ao et al., Bounded Ratio Reinforcement Learning, arXiv 2604.18578. The whole algorithm in one file: gbpo_llm.py.

    export VERL_USE_EXTERNAL_MODULES=gbpo_verl PYTHONPATH=<the folder of this file>      on each node
    python -m verl.trainer.main_ppo algorithm.adv_estimator=gbpo actor_rollout_ref.actor.policy_loss.loss_mode=gbpo \\
        actor_rollout_ref.actor.clip_ratio_low=0.3 actor_rollout_ref.actor.clip_ratio_high=0.3 …

verl passes one number of each token from the estimator to the loss, the advantage. So σ(…), of which the loss makes ρ*, travels
in the advantage's last eight bits; 15 of the 23 bits of its fraction are left to it.
"""

import torch
from verl.trainer.ppo.core_algos import agg_loss, compute_grpo_outcome_advantage, register_adv_est, register_policy_loss

TARGET_TEMPERATURE = 1e-4  # λ, in standard deviations of a group's rewards; verl has no option for it
LEVELS = 254  # of σ between 0 and 1, so that ½, a tie with the median, is one of them


def group_sigmoids(rewards, temperature):
    """σ((r − μ)/((s + 1e-6)·λ)): rewards (G,) of a group → (G,); μ is their median, the mean of the middle two if G is even."""
    if len(rewards) < 2:  # verl takes the mean of one reward for 0; its ratio is to stay where it is
        return torch.full_like(rewards, 0.5)
    scaled = rewards.double() - rewards.double().min()
    scaled = scaled / ((scaled.std() + 1e-6) * temperature)
    return torch.sigmoid(scaled - torch.quantile(scaled, 0.5)).to(rewards.dtype)


def pack(advantages, sigmoids):
    """Advantages with σ in their last eight bits, float32: (B,), (B,) → (B,)."""
    bits = advantages.float().contiguous().view(torch.int32)
    return ((bits & ~255) | (sigmoids * LEVELS).round().int()).view(torch.float32)


def unpack(packed):
    """Advantages and σ, from what `pack` made: any shape → that shape, twice."""
    if packed.dtype != torch.float32:
        raise TypeError(f"GBPO's advantages must reach its loss as float32, not as {packed.dtype}: keep verl's data in float32")
    bits = packed.contiguous().view(torch.int32)
    return (bits & ~255).view(torch.float32), (bits & 255).float() / LEVELS


@register_adv_est("gbpo")
def gbpo_advantages(token_level_rewards, response_mask, index, config, **_):
    """verl's GRPO advantages with σ in their last bits: rewards, mask (B, T), index (B,) of the group → (B, T), twice."""
    rewards = token_level_rewards.sum(-1)
    advantages, _ = compute_grpo_outcome_advantage(token_level_rewards, torch.ones_like(token_level_rewards), index,
                                                   norm_adv_by_std_in_grpo=config.norm_adv_by_std_in_grpo)  # fmt: skip
    sigmoids = torch.empty_like(rewards)
    for group in set(index):
        members = torch.tensor([i for i, other in enumerate(index) if other == group], device=rewards.device)
        sigmoids[members] = group_sigmoids(rewards[members], TARGET_TEMPERATURE)
    packed = pack(advantages[:, 0], sigmoids)[:, None].expand(response_mask.shape)
    packed = torch.where(response_mask.bool(), packed, 0.0)
    return packed, packed


@register_policy_loss("gbpo")
def gbpo_policy_loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
                     rollout_is_weights=None):  # fmt: skip
    """GBPO's loss: log-probabilities, advantages and mask (B, T), and verl's actor configuration → a scalar and metrics."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    advantages, sigmoids = unpack(advantages)
    targets = 1 - low + (low + high) * sigmoids  # ρ*
    logratio = torch.where(response_mask.bool(), log_prob - old_log_prob, 0.0).clamp(-20, 20)
    ratio = logratio.exp()
    losses = advantages.abs() * (ratio - targets).abs()  # |A|·|ρ − ρ*|
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    loss = agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info)
    tokens = response_mask.sum().clamp(min=1)
    outside = ((ratio < 1 - low) | (ratio > 1 + high)) & response_mask.bool()
    kl = (ratio - 1 - logratio).sum() / tokens  # zero where the mask is
    return loss, {"actor/pg_clipfrac": (outside.sum() / tokens).item(), "actor/ppo_kl": kl.item()}
