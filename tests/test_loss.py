"""The losses against the equations of the paper, and GAE against sums written out."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

import bpo_continuous as bpo
from bpo_continuous import bpo_loss, gae, median_loss, target_ratio
from ppo_baseline import clipped_value_loss, ppo_loss

ROOT = Path(__file__).resolve().parent.parent
EPSILONS = st.floats(0.01, 0.99)
TEMPERATURES = st.floats(1e-3, 1e2)
SEEDS = st.integers(0, 2**32 - 1)


def normal(seed, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, EPSILONS, TEMPERATURES)
def test_target_is_the_sigmoid_across_the_band(seed, epsilon, temperature):
    advantages = normal(seed, 50)
    sigmoid = 1 / (1 + torch.exp(-advantages / temperature))
    torch.testing.assert_close(target_ratio(advantages, epsilon, temperature), 1 - epsilon + 2 * epsilon * sigmoid)


@given(SEEDS, EPSILONS)
def test_cold_target_is_the_edge_of_the_band(seed, epsilon):
    advantages = normal(seed, 50)
    torch.testing.assert_close(target_ratio(advantages, epsilon, 1e-12), 1 + epsilon * advantages.sign())


def soft_median(q, temperature):
    """Root of the gradient of our median_loss, found by a bracketing solver."""

    def slope(u):
        threshold = torch.tensor(u, dtype=torch.float64, requires_grad=True)
        median_loss(q, threshold.expand_as(q), temperature).backward()
        return threshold.grad.item()

    low, high = q.min().item(), q.max().item()
    return brentq(slope, low - 50 * temperature, high + 50 * temperature, xtol=1e-14, rtol=1e-14)


@given(SEEDS, EPSILONS, st.floats(0.05, 20.0))
@settings(max_examples=50)
def test_target_is_a_distribution_at_the_soft_median(seed, epsilon, temperature):
    q = normal(seed, 64).exp()  # skewed, so that the mean would be told apart
    target = target_ratio(q - soft_median(q, temperature), epsilon, temperature)
    assert abs(target.mean().item() - 1) < 1e-9
    if temperature < 0.5:
        assert abs(target_ratio(q - q.mean(), epsilon, temperature).mean().item() - 1) > 1e-3 * epsilon


@given(SEEDS)
@settings(max_examples=20)
def test_cold_median_loss_is_minimal_at_the_median(seed):
    q = normal(seed, 101).exp()
    assert abs(soft_median(q, 1e-5) - q.median().item()) < 1e-3


@given(SEEDS, st.floats(0.01, 5.0))
def test_median_loss_is_its_formula(seed, temperature):
    q, u = normal(seed, 2, 40)
    expected = (temperature * torch.log(1 + torch.exp((q - u) / temperature)) - 0.5 * (q - u)).mean()
    if expected.isfinite():
        torch.testing.assert_close(median_loss(q, u, temperature), expected, rtol=1e-7, atol=1e-8)


@given(SEEDS, EPSILONS, TEMPERATURES)
def test_bpo_loss_and_its_gradient_are_their_formulas(seed, epsilon, temperature):
    logratio, advantages, median_advantages = normal(seed, 3, 40)
    ratio = logratio.exp().requires_grad_()
    target = 1 + epsilon * np.tanh(median_advantages.numpy() / (2 * temperature))
    loss = bpo_loss(ratio, advantages, median_advantages, epsilon, temperature)
    expected = np.mean(np.abs(advantages.numpy()) * np.abs(ratio.detach().numpy() - target))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    slope = np.abs(advantages.numpy()) * np.sign(ratio.detach().numpy() - target) / 40
    np.testing.assert_allclose(ratio.grad, slope, atol=1e-15)


def test_bpo_holds_on_target_and_pulls_back_what_overshot_where_ppo_lets_go():
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0], dtype=torch.float64)
    ratio = torch.tensor([1.1, 1.3, 1.6, 0.9, 0.7, 0.4], dtype=torch.float64, requires_grad=True)
    bpo_loss(ratio, advantages, advantages, 0.3, 1e-9).backward()
    bpo_gradient, ratio.grad = ratio.grad, None
    ppo_loss(ratio, advantages, 0.3).backward()
    assert bpo_gradient.sign().tolist() == [-1, 0, 1, 1, 0, -1]
    assert ratio.grad.sign().tolist()[0] == -1 and ratio.grad.sign().tolist()[2:4] == [0, 1] and ratio.grad[5] == 0


@given(SEEDS, EPSILONS)
def test_ppo_is_the_one_sided_bpo_loss_with_the_mean_as_threshold(seed, epsilon):
    logratio, advantages = normal(seed, 2, 60)
    ratio = logratio.exp()
    target = 1 + epsilon * advantages.sign()
    hinge = advantages.abs() * (advantages.sign() * (target - ratio)).clamp(min=0) - advantages * target
    torch.testing.assert_close(ppo_loss(ratio, advantages, epsilon), hinge.mean(), rtol=1e-12, atol=1e-12)


@given(SEEDS, EPSILONS)
def test_clipped_value_loss_is_its_formula_and_without_a_clip_half_the_square(seed, epsilon):
    values, old_values, returns = normal(seed, 3, 60).numpy()
    clipped = old_values + np.clip(values - old_values, -epsilon, epsilon)
    expected = 0.5 * np.mean(np.maximum((values - returns) ** 2, (clipped - returns) ** 2))
    tensors = [torch.from_numpy(array) for array in (values, old_values, returns)]
    assert clipped_value_loss(*tensors, epsilon).item() == pytest.approx(expected, rel=1e-12)
    assert clipped_value_loss(*tensors, np.inf).item() == pytest.approx(0.5 * np.mean((values - returns) ** 2), rel=1e-12)


def brute_force_returns(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """λ-returns of one environment as the weighted mean of all n-step returns, each summed from its rewards."""
    returns = []
    for start in range(len(rewards)):
        end = next((t for t in range(start, len(rewards)) if dones[t]), len(rewards) - 1)
        n_step, discounted = [], 0.0
        for t in range(start, end + 1):
            discounted += gamma ** (t - start) * rewards[t]
            bootstrap = 0.0 if terminations[t] else gamma ** (t - start + 1) * next_values[t]
            n_step.append(discounted + bootstrap)
        weights = [(1 - gae_lambda) * gae_lambda**n for n in range(len(n_step) - 1)] + [gae_lambda ** (len(n_step) - 1)]
        returns.append(np.dot(weights, n_step))
    return np.array(returns)


@given(SEEDS, st.floats(0.5, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=50)
def test_gae_is_the_mean_of_all_n_step_returns(seed, gamma, gae_lambda):
    rewards, values, final_values, ends, kinds = normal(seed, 5, 30, 3)
    dones = (ends > 1.2).double()
    following_values = torch.cat((values[1:], final_values[:1]))
    next_values = torch.where(dones.bool(), final_values, following_values)
    terminations = dones * (kinds > 0).double()
    advantages = gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda)
    for i in range(3):
        columns = (array[:, i].numpy() for array in (rewards, values, next_values, terminations, dones))
        expected = brute_force_returns(*columns, gamma, gae_lambda) - values[:, i].numpy()
        np.testing.assert_allclose(advantages[:, i], expected, rtol=1e-9, atol=1e-9)


def test_at_the_best_action_a_reached_target_shrinks_the_variance_of_a_gaussian():
    """docs/search.md: σ² falls by the factor 1 − 0.857ε, whatever the scale of the advantages."""
    z = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    threshold = -(0.674489750196**2)  # the median of Q = −z²
    for scale in (1.0, 1e-2):
        ratio = target_ratio(scale * (-(z**2) - threshold), 0.3, 1e-6)
        assert (density * ratio).sum() == pytest.approx(1, abs=1e-4)
        assert (density * ratio * z**2).sum() == pytest.approx(1 - 0.857 * 0.3, abs=1e-3)


def test_more_action_dimensions_share_the_shrinking_of_sigma():
    """docs/search.md: 0.86ε of σ² in one dimension, 0.44ε of each in six; the nearer half of the actions is the better one."""
    for dimensions, share in ((1, 0.86), (6, 0.44)):
        z = torch.randn(400_000, dimensions, generator=torch.manual_seed(0), dtype=torch.float64)
        quality = -z.square().sum(1)
        ratio = target_ratio(quality - quality.median(), 0.3, 1e-9)
        assert 1 - (ratio * z[:, 0] ** 2).mean() == pytest.approx(share * 0.3, abs=0.006)


def test_the_readme_s_lines_are_the_script_s_and_its_patch_of_ppo_gives_the_same_loss():
    """README.md's blocks of Python: bpo_continuous.py's lines without docstrings, a minibatch's loss, and PPO's line."""
    functions, patch, clip, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = [line.split("  #")[0] for line in functions.splitlines()]
    script = [line.split("  #")[0] for line in (ROOT / "bpo_continuous.py").read_text().splitlines()]
    assert set(code) <= set(script)
    assert clip.removeprefix("policy_loss = ").strip() in (ROOT / "ppo_baseline.py").read_text()
    torch.manual_seed(0)
    obs, returns, ratio = torch.randn(64, 3), torch.randn(64), (0.2 * torch.randn(64)).exp()
    critic = torch.nn.Linear(3, 2)
    names = {"torch": torch, "F": torch.nn.functional, "critic": critic, "obs": obs, "returns": returns, "ratio": ratio}
    exec(functions, names)
    values, median_values = critic(obs).unbind(-1)
    names["value_loss"] = 0.5 * (values - returns).square().mean()
    names["entropy"] = torch.tensor(2.0)
    exec(patch, names)

    class Agent:
        log_prob = staticmethod(lambda obs, actions: ratio.log())
        get_values = staticmethod(lambda obs: (values, median_values))
        entropy = staticmethod(lambda: torch.tensor(2.0))

    loss, _ = bpo.total_loss(Agent, bpo.Args(), obs, None, torch.zeros(64), returns)
    torch.testing.assert_close(names["loss"], loss)
