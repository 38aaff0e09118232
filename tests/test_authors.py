"""One update of bpo_continuous.py against the authors' code: same weights, rollout and order of minibatches, in float64.

data/authors_update.npz holds three updates that their code made, of networks of width 8 on 32 steps of 2 environments.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import bpo_continuous as bpo

FILE = np.load(Path(__file__).parent / "data/authors_update.npz")
# Their value loss is (R̂−V)², ours ½(R̂−V)²: twice their coefficient.
HYPERPARAMETERS = {
    "hopper": dict(num_minibatches=4, learning_rate=9.808e-5, epsilon=0.25, temperature=10.0, gamma=0.999),
    "swimmer": dict(num_minibatches=2, learning_rate=3e-4, epsilon=0.1, temperature=0.01, gamma=0.9999, gae_lambda=0.98),
    "halfcheetah": dict(num_minibatches=4, learning_rate=2.0633e-5, update_epochs=20, epsilon=0.1, temperature=1e-3, gamma=0.98,
                        gae_lambda=0.92, ent_coef=0.000401762, vf_coef=2 * 0.58096),
}  # fmt: skip


@pytest.fixture(autouse=True)
def float64():
    """|ρ−ρ*| has a kink: in float32 rounding alone would move the weights by about as much as the update."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def read(task):
    """The rollout and the order of the minibatches of one of the file's updates."""
    names = "obs", "actions", "logprobs", "rewards", "terminations", "last_obs", "values", "advantages", "returns", "order"
    tensors = {name: torch.from_numpy(FILE[f"{task}/{name}"]) for name in names}
    return tensors | {"terminations": tensors["terminations"].double()}


def layers(agent):
    """Our layers by the authors' names; of our value head the first row, as the second is unused beside a median head."""
    heads = {"value_head": [agent.value_head], "median_head": agent.median_head}
    stacks = {"actor": agent.actor_mean, "critic": agent.critic} | heads
    linear = {name: [layer for layer in stack if isinstance(layer, torch.nn.Linear)] for name, stack in stacks.items()}
    return {f"{name}.{i}": layer for name, stack in linear.items() for i, layer in enumerate(stack)}


def flat(agent):
    """All weights in one vector, as in `train`."""
    weights = torch.nn.Parameter(torch.nn.utils.parameters_to_vector(agent.parameters()).detach())
    torch.nn.utils.vector_to_parameters(weights.data, agent.parameters())
    return weights


def update(agent, batch, args):
    """Our update, in place; `batch` holds the rollout's steps in a row, (T·N, …)."""
    optimizer = torch.optim.Adam([flat(agent)], lr=args.learning_rate, eps=1e-5, fused=True)
    bpo.update(agent, optimizer, [batch[name] for name in ("obs", "actions", "logprobs", "returns")], args)


def paired(agent, task, when):
    """Our weights and theirs, before or after the update."""
    yield agent.actor_logstd, FILE[f"{task}/{when}/log_std"]
    for name, layer in layers(agent).items():
        for part in ("weight", "bias"):
            theirs = FILE[f"{task}/{when}/{name}.{part}"]
            yield getattr(layer, part)[: len(theirs)], theirs


def new_agent(task, args):
    """An agent with the authors' weights from before the update."""
    agent = bpo.Agent(FILE[f"{task}/obs"].shape[-1], FILE[f"{task}/actions"].shape[-1], args)
    for ours, theirs in paired(agent, task, "before"):
        ours.data.copy_(torch.from_numpy(theirs))
    return agent


def paper_args(task, **changes):
    return bpo.Args(**{**bpo.PAPER_ALL, **HYPERPARAMETERS[task], "hidden_size": 8, **changes})


def evaluated(task, args):
    """Our values, log-probabilities, advantages and returns of the file's rollout, (T, N) each."""
    agent, rollout = new_agent(task, args), read(task)
    with torch.no_grad():
        values, last_value = agent.get_values(rollout["obs"])[0], agent.get_values(rollout["last_obs"])[0]
        logprobs = agent.log_prob(rollout["obs"], rollout["actions"])
    next_values, ends = torch.cat((values[1:], last_value[None])), rollout["terminations"]
    advantages = bpo.gae(rollout["rewards"], values, next_values, ends, ends, args.gamma, args.gae_lambda)
    return {"values": values, "logprobs": logprobs, "advantages": advantages, "returns": advantages + values}


def difference(task, monkeypatch, **changes):
    """The largest one between a weight after our update and after theirs."""
    args, rollout = paper_args(task, **changes), read(task)
    agent = new_agent(task, args)
    batch = {name: rollout[name].flatten(0, 1) for name in ("obs", "actions")}
    batch |= {name: tensor.flatten() for name, tensor in evaluated(task, args).items()}
    orders = iter(rollout["order"])
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: next(orders))
    update(agent, batch, args)
    assert next(orders, None) is None
    return max(np.abs(ours.detach().numpy() - theirs).max() for ours, theirs in paired(agent, task, "after"))


@pytest.mark.parametrize("task", HYPERPARAMETERS)
def test_values_and_advantages_are_the_authors(task):
    rollout = read(task)
    for name, ours in evaluated(task, paper_args(task)).items():
        torch.testing.assert_close(ours, rollout[name], rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("task", HYPERPARAMETERS)
def test_an_update_ends_where_the_authors_does(task, monkeypatch):
    assert difference(task, monkeypatch) < 1e-8


@pytest.mark.parametrize("task", HYPERPARAMETERS)
def test_a_wrong_target_ends_elsewhere(task, monkeypatch):
    args = paper_args(task)
    assert difference(task, monkeypatch, epsilon=args.temperature, temperature=args.epsilon) > 1e-6
    target_ratio = bpo.target_ratio
    monkeypatch.setattr(bpo, "target_ratio", lambda advantages, *args: target_ratio(-advantages, *args))
    assert difference(task, monkeypatch) > 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        dict(epsilon=0.3),
        dict(temperature=20.0),
        dict(gae_lambda=0.9),
        dict(vf_coef=0.5),
        dict(median_coef=1.0),
        dict(median_temperature=10.0),
        dict(max_grad_norm=0.5),
        dict(ent_coef=1e-3),
        dict(norm_adv=True),
        dict(use_median=False),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_wrong_hyperparameter_ends_elsewhere(changes, monkeypatch):
    assert difference("hopper", monkeypatch, **changes) > 1e-6
