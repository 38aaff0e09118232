"""Ideas that were tried on BPO and not adopted, and the ablations of its loss, each as the lines it changes.

    python benchmark/variants.py one_sided,anneal_epsilon --env-id Hopper-v4 --seed 1

The first argument names variants, separated by commas; all others are bpo_continuous.py's. Where the first of the names is
`ppo`, the others change ppo_baseline.py instead: `ppo,reevaluate`.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import bpo_continuous as bpo
import ppo_baseline

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
    total_loss = bpo.total_loss

    def scaled_loss(agent, args, *minibatch):
        return total_loss(agent, replace(args, epsilon=args.epsilon * len(agent.actor_logstd) ** 0.5), *minibatch)

    bpo.total_loss = scaled_loss


@variant
def anneal_epsilon():
    """ε falls linearly to 0, as the learning rate does."""
    update, total_loss, remaining = bpo.update, bpo.total_loss, 1.0

    def annealed_update(agent, optimizer, batch, args, *step):
        nonlocal remaining
        if args.compile:
            sys.exit("variants.py: anneal_epsilon does not go with --compile, which keeps the first ε")
        remaining = optimizer.param_groups[0]["lr"] / args.learning_rate
        return update(agent, optimizer, batch, args, *step)

    def annealed_loss(agent, args, *minibatch):
        return total_loss(agent, replace(args, epsilon=args.epsilon * remaining), *minibatch)

    bpo.update, bpo.total_loss = annealed_update, annealed_loss


@variant
def centred_minibatch():
    """A and Ã less their mean and median over the minibatch: else a critic's bias asks all ratios up, or down, at once."""
    bpo_loss = bpo.bpo_loss

    def centred_loss(ratio, advantages, median_advantages, *band):
        return bpo_loss(ratio, advantages - advantages.mean(), median_advantages - median_advantages.median(), *band)

    bpo.bpo_loss = centred_loss


def fix_advantages(centre):
    """Lets A and Ã stand still during an update: what `centre` makes of the rollout's, both (B,)."""
    update, total_loss = bpo.update, bpo.total_loss

    def fixed_update(agent, optimizer, batch, args, *step):
        obs, returns = batch[0], batch[3]
        with torch.no_grad():
            values, median_values = agent.get_values(obs)
        fixed = centre(returns - values, returns - (median_values if args.use_median else values))
        return update(agent, optimizer, [*batch, *fixed], args, *step)

    def fixed_loss(agent, args, obs, actions, logprobs, returns, advantages, median_advantages):
        if args.norm_adv:
            advantages = advantages / (advantages.std() + 1e-8)
        bpo_loss = bpo.bpo_loss
        bpo.bpo_loss = lambda ratio, _, __, *band: bpo_loss(ratio, advantages, median_advantages, *band)
        try:
            return total_loss(agent, args, obs, actions, logprobs, returns)
        finally:
            bpo.bpo_loss = bpo_loss

    bpo.update, bpo.total_loss = fixed_update, fixed_loss


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


@variant
def mean_entropy():
    """The entropy is the mean over the action dimensions, not their sum."""
    entropy = bpo.Agent.entropy
    bpo.Agent.entropy = lambda agent: entropy(agent) / len(agent.actor_logstd)


@variant
def reevaluate():
    """Before each epoch but the first, advantages and returns are made anew from the critic as it is then."""
    update, gae, name = bpo.update, bpo.gae, "get_value" if bpo is ppo_baseline else "get_values"
    get_values, states, rest = getattr(bpo.Agent, name), [], []

    def seen_values(agent, obs):
        if obs.dim() == 3:  # those of a rollout (T, N, D): the states before its actions, then those after
            states.append(obs)
            del states[:-2]
        return get_values(agent, obs)

    def seen_gae(rewards, values, next_values, *others):
        rest[:] = rewards, others
        return gae(rewards, values, next_values, *others)

    def reevaluated_update(agent, optimizer, batch, args, *step):
        history = []
        for epoch in range(args.update_epochs):
            if epoch:
                with torch.no_grad():
                    found = [get_values(agent, obs) for obs in states]
                values, next_values = found if bpo is ppo_baseline else (pair[0] for pair in found)
                advantages = gae(rest[0], values, next_values, *rest[1])
                new = (values, advantages, advantages + values) if bpo is ppo_baseline else (advantages + values,)
                batch = [*batch[:3], *(tensor.flatten() for tensor in new)]
            history.append(update(agent, optimizer, batch, replace(args, update_epochs=1), *step))
        return torch.stack(history).mean(0)

    setattr(bpo.Agent, name, seen_values)
    bpo.gae, bpo.update = seen_gae, reevaluated_update


def main():
    global bpo
    names = sys.argv.pop(1).split(",") if len(sys.argv) > 1 else []
    given = ",".join(names)
    if names[:1] == ["ppo"]:
        bpo, names = ppo_baseline, names[1:]
    if not names or any(name not in VARIANTS for name in names):
        sys.exit(f"variants.py: the first argument names variants, separated by commas: {', '.join(VARIANTS)}")
    for name in sorted(names, key=lambda name: name == "reevaluate"):  # it calls the other variants' update anew
        VARIANTS[name]()
    bpo.SCRIPT = "variants-" + given.replace(",", "-")  # so that bpo_continuous.py does not go on with it
    print(f"to go on with an interrupted run: python benchmark/variants.py {given} --resume runs/<run>", flush=True)
    bpo.main()


if __name__ == "__main__":
    main()
