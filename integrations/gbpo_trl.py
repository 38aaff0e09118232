"""Group-relative Bounded Policy Optimization (GBPO) inside TRL: GRPOTrainer with another loss, and all else of its trainer.

For each prompt the old policy π₀ gives G completions with rewards r. GRPO clips the ratio ρ of each of their tokens; GBPO
regresses it onto the best ratio ρ* in the band [1 − ε_low, 1 + ε_high], the same for all tokens of a completion:

    ρ*_i = 1 − ε_low + (ε_low + ε_high)·σ((r_i − median(r))/((s + 1e-6)·λ))     s is the group's standard deviation
    L    = E[ |A_i|·|ρ_{i,t} − ρ*_i| ],   A_i = (r_i − mean(r))/s               TRL's advantages and mean over tokens

Source: Ao et al., Bounded Ratio Reinforcement Learning, arXiv 2604.18578. The whole algorithm in one file: gbpo_llm.py.

    from gbpo_trl import GBPOConfig, GBPOTrainer
    GBPOTrainer(model, reward_funcs=reward, args=GBPOConfig(output_dir="out"), train_dataset=prompts).train()

    pip install trl==1.16.0
"""

import math
from dataclasses import dataclass, field

import torch
from trl import GRPOConfig, GRPOTrainer


def group_target_ratios(rewards, epsilon_low, epsilon_high, temperature):
    """ρ* = 1 − ε_low + (ε_low + ε_high)·σ((r − μ)/((s + 1e-6)·λ)): rewards (P, G) → (P, G); μ is the group's median."""
    scaled = rewards.double() - rewards.double().amin(-1, keepdim=True)
    scaled = scaled / ((scaled.std(-1, keepdim=True) + 1e-6) * temperature)
    thresholds = torch.quantile(scaled, 0.5, dim=-1, keepdim=True)
    return (1 - epsilon_low + (epsilon_low + epsilon_high) * torch.sigmoid(scaled - thresholds)).to(rewards.dtype)


@dataclass
class GBPOConfig(GRPOConfig):
    """GRPOConfig's fields, and λ. `epsilon` and `epsilon_high` are the band's half-widths; ours is wider than GRPO's 0.2."""

    epsilon: float = field(default=0.3, metadata={"help": "ε_low: ratios are to stay above 1 − ε_low."})
    target_temperature: float = field(default=1e-4, metadata={"help": "λ, in standard deviations of a group's rewards."})

    def __post_init__(self):
        super().__post_init__()
        if not (0 < self.epsilon < 1 and (self.epsilon_high or 1) > 0 and self.target_temperature > 0):
            raise ValueError("GBPO needs an epsilon between 0 and 1, epsilon_high and target_temperature above 0")
        if self.loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo"):
            raise ValueError(f"GBPO has a loss of its own; loss_type only tells its mean, and {self.loss_type} is another loss")
        for name in ("use_liger_kernel", "delta", "off_policy_mask_threshold"):
            if getattr(self, name):
                raise ValueError(f"GBPO does not go with {name}, which replaces GRPO's loss or depends on it")


class GBPOTrainer(GRPOTrainer):
    """Takes what GRPOTrainer takes, with a GBPOConfig as `args`."""

    _tag_names = ("trl", "gbpo")

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if not isinstance(self.args, GBPOConfig):
            raise ValueError("GBPOTrainer needs a GBPOConfig as args")
        self.band = self.epsilon_low, self.epsilon_high
        self.epsilon_low = self.epsilon_high = math.inf  # GRPO's loss below is −ρA, without a clip
        self.loss_inputs = None

    def _calculate_rewards(self, *inputs):
        self.rewards_per_func = super()._calculate_rewards(*inputs)  # those of all processes (N, functions)
        return self.rewards_per_func

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        rewards = (self.rewards_per_func * self.reward_weights.to(self.rewards_per_func.device)).nansum(1)
        targets = group_target_ratios(rewards.view(-1, group_size), *self.band, self.args.target_temperature).flatten()
        count = len(output["advantages"])
        output["target_ratios"] = targets[self.accelerator.process_index * count :][:count]
        return output

    def _compute_loss(self, model, inputs):
        self.loss_inputs = dict(inputs)
        try:
            return super()._compute_loss(model, self.loss_inputs)
        finally:
            self.loss_inputs = None

    def _get_per_token_logps_and_entropies(self, *args, **options):
        """Puts −|A|·|ρ − ρ*|/ρ in the place of A, with its gradient, so that GRPO's −ρA is GBPO's |A|·|ρ − ρ*|."""
        logprobs, *others = super()._get_per_token_logps_and_entropies(*args, **options)
        if (inputs := self.loss_inputs) is not None:
            old_logprobs, mask = inputs.get("old_per_token_logps"), inputs["completion_mask"] * inputs.get("tool_mask", 1)
            logratio = logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs)
            if self.importance_sampling_level == "sequence":
                logratio = ((logratio * mask).sum(-1) / mask.sum(-1).clamp(min=1))[:, None]
            ratio, targets = logratio.exp(), inputs["target_ratios"][:, None]
            inputs["advantages"] = -inputs["advantages"][:, None].abs() * (ratio - targets).abs() / ratio
            low, high = self.band
            outside = ((ratio < 1 - low) | (ratio > 1 + high)) * mask
            self._metrics["train" if self.model.training else "eval"]["outside_band"].append(
                self.accelerator.gather(outside.sum() / mask.sum()).nanmean().item()
            )
        return logprobs, *others
