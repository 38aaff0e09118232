"""Ideas that were tried on BPO and not adopted, and the ablations of its loss, each as the lines it changes.

    python benchmark/variants.py one_sided,anneal_epsilon --env-id Hopper-v4 --seed 1

The first argument names variants, separated by commas; all others are bpo_continuous.py's.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import bpo_continuous as bpo

VARIANTS = {}


def variant(function):
    VARIANTS[function.__name__] = function
    return function


@variant
def one_sided():
    """PPO's hinge: a ratio that overshot its target is let go, not pulled back."""

    def bpo_loss(ratio, advantages, median_advantages, epsilon, temperature):
        target = bpo.target_ratio(median_advantages, epsilon, temperature)
        return (advantages.abs() * ((target - ratio) * median_advantages.sign()).clamp(min=0)).mean()

    bpo.bpo_loss = bpo_loss


@variant
def dead_zone():
    """No gradient within a tenth of ε around the target, against jitter."""

    def bpo_loss(ratio, advantages, median_advantages, epsilon, temperature):
        errors = (ratio - bpo.target_ratio(median_advantages, epsilon, temperature)).abs()
        return (advantages.abs() * (errors - 0.1 * epsilon).clamp(min=0)).mean()

    bpo.bpo_loss = bpo_loss


@variant
def relative_temperature():
    """λ is a share of the minibatch's standard deviation of Ã, so --temperature 0.25 means the same on all tasks."""
    target_ratio = bpo.target_ratio
    bpo.target_ratio = lambda a, epsilon, temperature: target_ratio(a, epsilon, temperature * a.std())


@variant
def epsilon_per_dimension():
    """ε is --epsilon times the root of the number of action dimensions: the same KL for each, as a band allows about ε²/2."""
    update = bpo.update

    def scaled_update(agent, optimizer, batch, args, *rest):
        epsilon = args.epsilon * len(agent.actor_logstd) ** 0.5
        return update(agent, optimizer, batch, replace(args, epsilon=epsilon), *rest)

    bpo.update = scaled_update


@variant
def anneal_epsilon():
    """ε falls linearly to 0, as the learning rate does."""
    update = bpo.update

    def annealed_update(agent, optimizer, batch, args, *rest):
        remaining = optimizer.param_groups[0]["lr"] / args.learning_rate
        return update(agent, optimizer, batch, replace(args, epsilon=args.epsilon * remaining), *rest)

    bpo.update = annealed_update


@variant
def centred_minibatch():
    """A and Ã less their mean and median over the minibatch: else a critic's bias asks all ratios up, or down, at once."""
    bpo_loss = bpo.bpo_loss

    def centred_loss(ratio, advantages, median_advantages, *band):
        return bpo_loss(ratio, advantages - advantages.mean(), median_advantages - median_advantages.median(), *band)

    bpo.bpo_loss = centred_loss


def fix_advantages(centre):
    """Lets A and Ã stand still during an update: what `centre` makes of the rollout's, both (B,)."""
    update, minibatch_losses = bpo.update, bpo.minibatch_losses

    def fixed_update(agent, optimizer, batch, args, reevaluate=None, *rest):
        def with_median(batch):
            with torch.no_grad():
                median_advantages = batch["returns"] - agent.get_values(rollout["obs"])[args.use_median]
            advantages, median_advantages = centre(batch["advantages"], median_advantages)
            return batch | {"advantages": advantages, "median_advantages": median_advantages}

        rollout = batch
        return update(agent, optimizer, with_median(batch), args, reevaluate and (lambda: with_median(reevaluate())), *rest)

    def fixed_losses(agent, batch, args):
        ratio = torch.exp(agent.log_prob(batch["obs"], batch["actions"]) - batch["logprobs"])
        advantages, median_advantages = batch["advantages"], batch["median_advantages"]
        if args.norm_adv:
            advantages = advantages / (advantages.std() + 1e-8)
        policy_loss = bpo.bpo_loss(ratio, advantages, median_advantages, args.epsilon, args.temperature)
        return policy_loss, *minibatch_losses(agent, batch, args)[1:]

    bpo.update, bpo.minibatch_losses = fixed_update, fixed_losses


@variant
def rollout_advantages():
    """A and Ã are those of the rollout and stand still during an update, as in PPO."""
    fix_advantages(lambda advantages, median_advantages: (advantages, median_advantages))


@variant
def centred_advantages():
    """As `rollout_advantages`, less their mean and median over the rollout, where the mean of ρ* is then 1."""
    fix_advantages(
        lambda advantages, median_advantages: (advantages - advantages.mean(), median_advantages - median_advantages.median())
    )


@variant
def ppo_advantages():
    """PPO's: those of the rollout, less their mean, for weight and target alike."""
    fix_advantages(lambda advantages, _: (advantages - advantages.mean(), advantages - advantages.mean()))


if __name__ == "__main__":
    names = sys.argv.pop(1).split(",") if len(sys.argv) > 1 else []
    if not names or any(name not in VARIANTS for name in names):
        sys.exit(f"variants.py: the first argument names variants, separated by commas: {', '.join(VARIANTS)}")
    for name in names:
        VARIANTS[name]()
    bpo.SCRIPT = "variants-" + "-".join(names)  # so that bpo_continuous.py does not go on with it
    print(f"to go on with an interrupted run: python benchmark/variants.py {','.join(names)} --resume runs/<run>", flush=True)
    bpo.main()
