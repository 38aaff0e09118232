"""brrl_tabular.py: the closed form against solvers, and the theorems on random and degenerate decision processes."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from scipy.special import entr

import brrl_tabular as tabular
from brrl_tabular import MDP, brrl_policy

SEEDS = st.integers(0, 2**32 - 1)
BANDS = st.tuples(st.floats(0, 0.99), st.floats(1.01, 10))
TEMPERATURES = st.one_of(st.none(), st.floats(1e-6, 1e6))


def random_states(seed, num_states=20, num_actions=6):
    """Policies with actions of probability zero, and Q with ties, at scales from 1e-8 to 1e8."""
    rng = np.random.default_rng(seed)
    policy = rng.dirichlet(np.ones(num_actions), num_states) * (rng.random((num_states, num_actions)) > 0.2)
    policy[:, 0] += 1e-3
    q = np.where(rng.random(policy.shape) < 0.5, rng.integers(-2, 3, policy.shape), rng.normal(size=policy.shape))
    return policy / policy.sum(1, keepdims=True), q * 10.0 ** rng.integers(-8, 9, (num_states, 1))


def random_mdp(seed, gamma=0.9, num_states=12, num_actions=4):
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.full(num_states, 0.3), num_states * num_actions)
    mdp = MDP(transitions, rng.normal(size=(num_states, num_actions)), rng.dirichlet(np.ones(num_states)), gamma)
    return mdp, rng.dirichlet(np.ones(num_actions), num_states)


@given(SEEDS, BANDS, TEMPERATURES)
def test_it_is_a_distribution_within_the_band(seed, band, temperature):
    policy, q = random_states(seed)
    best, _ = brrl_policy(policy, q, *band, temperature)
    assert abs(best.sum(1) - 1).max() < 1e-12
    assert np.all(best >= policy * band[0]) and np.all(best <= policy * band[1])


@given(SEEDS, BANDS)
def test_the_hard_policy_solves_the_linear_program(seed, band):
    policy, q = random_states(seed, num_states=4)
    best, _ = brrl_policy(policy, q, *band)
    for old, values, row in zip(policy, q, best):
        values = values / abs(values).max(initial=1e-300)
        solution = linprog(-old * values, A_eq=old[None], b_eq=[1], bounds=band)
        assert row @ values == pytest.approx(-solution.fun, abs=1e-9)


@pytest.mark.parametrize("band", [(0.7, 1.3), (0.5, 2.0), (0.0, 4.0)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_soft_policy_solves_the_regularised_problem(band, temperature):
    rng = np.random.default_rng(0)
    low, width = band[0], band[1] - band[0]
    for _ in range(40):
        old, q = rng.dirichlet(np.ones(5)), rng.normal(size=5)

        def objective(x, old=old, q=q):
            return -old @ ((low + width * x) * q + width * temperature * (entr(x) + entr(1 - x)))

        normal = {"type": "eq", "fun": lambda x, old=old: old @ (low + width * x) - 1}
        start, bounds = np.full(5, (1 - low) / width), [(1e-9, 1 - 1e-9)] * 5
        found = minimize(objective, start, bounds=bounds, constraints=normal, options={"maxiter": 500, "ftol": 1e-14})
        best, _ = brrl_policy(old[None], q[None], *band, temperature)
        x = (best[0] / old - low) / width
        assert objective(x) <= found.fun + 1e-9
        np.testing.assert_allclose(x, found.x, atol=2e-3)


@given(SEEDS, BANDS)
def test_the_soft_policy_tends_to_the_hard_one(seed, band):
    policy, q = random_states(seed)
    scale = abs(q).max(1, keepdims=True)
    hard, soft = (brrl_policy(policy, q / scale, *band, temperature)[0] for temperature in (None, 1e-9))
    assert abs(hard - soft).max() < 1e-6


def test_ties_share_what_is_missing():
    policy, q = np.array([[0.2, 0.5, 0.3]]), np.array([[1.0, 2.0, 2.0]])
    best, threshold = brrl_policy(policy, q, 0.7, 1.3)
    shared = 1 + 0.3 * 0.2 / 0.8  # 1 + ε(P(Q<μ) − P(Q>μ))/P(Q=μ)
    np.testing.assert_allclose(best / policy, [[0.7, shared, shared]], rtol=1e-12)
    assert threshold == 2.0


@given(SEEDS, st.floats(0.05, 0.95), st.sampled_from([None, 0.01, 0.1, 1.0]), st.sampled_from([0.0, 0.9, 0.999]))
def test_the_improvement_is_the_theorem_s(seed, epsilon, temperature, gamma):
    mdp, policy = random_mdp(seed, gamma)
    path = list(tabular.policy_iteration(mdp, policy, 4, epsilon, temperature))
    values = np.array([step[1] for step in path])
    improvements, predictions = np.diff(values), np.array([step[2] for step in path[:-1]])
    assert improvements.min() > -1e-12 * abs(values).max()
    clear = improvements > 1e-6 * abs(values).max()
    np.testing.assert_allclose(improvements[clear], predictions[clear], rtol=1e-8)


@given(SEEDS, st.floats(0.05, 0.95), st.sampled_from([None, 0.01, 0.3]))
def test_trust_region_bounds(seed, epsilon, temperature):
    policy, q = random_states(seed)
    best, _ = brrl_policy(policy, q, 1 - epsilon, 1 + epsilon, temperature)
    assert 0.5 * abs(best - policy).sum(1).max() <= epsilon / 2 + 1e-12
    bound = 0.5 * ((1 + epsilon) * np.log1p(epsilon) + (1 - epsilon) * np.log1p(-epsilon))
    assert tabular.rel_entr(best, policy).sum(1).max() <= bound + 1e-12


@given(SEEDS)
@settings(max_examples=20)
@pytest.mark.slow
def test_hard_policy_iteration_reaches_the_optimum(seed):
    mdp, policy = random_mdp(seed)
    *_, (_, value, _) = tabular.policy_iteration(mdp, policy, 200, 0.8)
    assert value == pytest.approx(mdp.optimum(), rel=1e-8)


@given(SEEDS, st.floats(1e-4, 1.0))
@settings(max_examples=30)
def test_the_trust_region_step_spends_its_radius_and_is_better_than_random_ones(seed, radius):
    mdp, policy = random_mdp(seed)
    q, _, _ = mdp.evaluate(policy)
    states = mdp.occupancy(policy)
    step = tabular.trpo_policy(policy, q, states, radius)
    spent = states @ tabular.rel_entr(step, policy).sum(1)
    assert spent <= radius * (1 + 1e-6)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        other = policy * rng.lognormal(0, 0.3, policy.shape)
        other /= other.sum(1, keepdims=True)
        if states @ tabular.rel_entr(other, policy).sum(1) <= spent:
            assert states @ (other * q).sum(1) <= states @ (step * q).sum(1) + 1e-9


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_degenerate_cases(temperature):
    equal = np.full((3, 4), 7.0)
    policy = np.full((3, 4), 0.25)
    np.testing.assert_allclose(brrl_policy(policy, equal, 0.7, 1.3, temperature)[0], policy, atol=1e-15)  # nothing to choose
    one_action = np.ones((3, 1))
    np.testing.assert_allclose(brrl_policy(one_action, equal[:, :1], 0.7, 1.3, temperature)[0], one_action, atol=1e-15)
    deterministic = np.eye(4)
    q = np.random.default_rng(0).normal(size=(4, 4))
    np.testing.assert_allclose(brrl_policy(deterministic, q, 0.7, 1.3, temperature)[0], deterministic, atol=1e-15)


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalking-v1", "Taxi-v4"])
def test_gymnasium_tables_are_read_right(env_id):
    """The exact value of the uniform policy against played episodes."""
    mdp = tabular.make_mdp(tabular.Args(env_id=env_id, gamma=0.9))
    policy = np.full(mdp.shape, 1 / mdp.shape[1])
    env = tabular.gym.make(env_id).unwrapped
    env.reset(seed=0)
    rng, returns = np.random.default_rng(0), []
    for _ in range(2000):
        env.reset()
        discount, total, terminated = 1.0, 0.0, False
        while not terminated and discount > 1e-3:
            _, reward, terminated, _, _ = env.step(rng.integers(mdp.shape[1]))
            total += discount * reward
            discount *= 0.9
        returns.append(total)
    error = np.std(returns) / len(returns) ** 0.5
    assert abs(np.mean(returns) - mdp.evaluate(policy)[2]) < 4 * error + 0.02


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epsilon", "1"], "ε = 1.0 must be between 0 and 1"),
        (["--temperature", "0"], "λ = 0.0 positive"),
        (["--gamma", "1"], "discount"),
        (["--env-id", "CartPole-v1"], "no table P"),
        (["--env-id", "Nowhere-v1"], "no table P"),
        (["--env-id", "nowhere:Nowhere-v1"], "no table P"),
        (["--gamma", "0"], "discount"),
        (["--env-id", "Random", "--num-actions", "1"], "--num-actions"),
        (["--iterations", "1"], "--iterations"),
    ],
)
def test_bad_input_is_answered_in_one_line(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["brrl_tabular.py", *flags])
    with pytest.raises(SystemExit) as stop:
        tabular.main()
    assert words in stop.value.code and "\n" not in stop.value.code and not list(tmp_path.iterdir())


def test_what_is_no_distribution_is_refused():
    with pytest.raises(ValueError, match="transitions must be distributions"):
        MDP(np.full((4, 2), 0.6), np.zeros((2, 2)), [0.5, 0.5], 0.9)
    with pytest.raises(ValueError, match="policy's rows"):
        brrl_policy(np.full((2, 2), 0.6), np.zeros((2, 2)), 0.7, 1.3)
    with pytest.raises(ValueError, match="band"):
        brrl_policy(np.full((2, 2), 0.5), np.zeros((2, 2)), 1.0, 1.3)


def test_every_claim_holds_and_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["brrl_tabular.py", "--env-id", "FrozenLake-v1", "--iterations", "20"])
    tabular.main()
    lines = capsys.readouterr().out.splitlines()[:-1]
    figures = {line[:24].strip() + "|" + line[25:93].strip(): float(line[93:]) for line in lines}

    def figure(words):
        (value,) = [value for name, value in figures.items() if words in name]
        return value

    assert figure("linear program") < 1e-9 and figure("E[ρ*]") < 1e-12
    assert figure("Improvement, λ = 0.01") < 1e-8 and figure("Improvement, λ = 0|") < 1e-8
    assert figure("one-sided") < 1e-12 and figure("elite") < 1e-12
    assert figure("PPO, converged") > 0.1 and figure("BPO, converged") == 0 and figure("|ρ − ρ*|") < 1e-3
    assert figure("TV(π*") == pytest.approx(1, abs=1e-6) and figure("KL(π*") == pytest.approx(1, abs=1e-6)
    assert figure("never negative") >= 0
    pictures = {path.name for path in (tmp_path / "runs" / "brrl_tabular").iterdir()}
    assert pictures == {f"{name}.png" for name in ("solution", "improvement", "ppo", "neighbours", "bound", "cem")}


@pytest.mark.parametrize("flag", ["--gamma", "--epsilon", "--temperature"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_no_number_may_be_nan_or_infinite(flag, value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["brrl_tabular.py", flag, value])
    with pytest.raises(SystemExit, match=r"brrl_tabular: .* must be"):
        tabular.main()
    assert not list(tmp_path.iterdir())
