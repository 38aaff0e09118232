"""integrations/bpo_sb3.py on the real Stable-Baselines3."""

import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import bpo_continuous as script

pytest.importorskip("stable_baselines3", reason="requirements-dev.txt is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integrations"))
import bpo_sb3
from bpo_sb3 import BPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

SMALL = dict(n_steps=64, batch_size=32, n_epochs=2, device="cpu", seed=1)


def test_the_equations_are_the_script_s():
    import inspect

    for name in ("target_ratio", "bpo_loss", "median_loss"):
        assert inspect.getsource(getattr(bpo_sb3, name)) == inspect.getsource(getattr(script, name))


@pytest.mark.parametrize("use_median", [True, False])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_loss_and_gradient_are_the_script_s(env_id, use_median, monkeypatch):
    """In float64. The host's value loss is (R̂−V)², the script's half of it, hence twice the coefficient there."""
    model = BPO("MlpPolicy", env_id, use_median=use_median, ent_coef=0.01, vf_coef=0.3, median_temperature=0.5, **SMALL)
    policy = model.policy.double()
    monkeypatch.setattr("stable_baselines3.common.policies.preprocess_obs", lambda obs, *_, **__: obs)  # which makes it float32
    torch.manual_seed(0)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    obs = torch.randn(40, *model.observation_space.shape, dtype=torch.float64)
    discrete = env_id == "CartPole-v1"
    actions = torch.randint(2, (40, 1)).double() if discrete else torch.randn(40, 1, dtype=torch.float64)
    logprobs, returns = -1 + torch.rand(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)

    class Agent:  # the script's names for the host's network
        evaluate = staticmethod(lambda obs: policy.evaluate_actions(obs, actions.long().flatten() if discrete else actions))
        log_prob = staticmethod(lambda obs, _: Agent.evaluate(obs)[1])
        entropy = staticmethod(lambda: Agent.evaluate(obs)[2].mean())

        def get_values(obs):
            values = Agent.evaluate(obs)[0].flatten()
            return values, policy.value_net.median_values.flatten()

    args = script.Args(use_median=use_median, ent_coef=0.01, vf_coef=0.6, median_temperature=0.5)
    expected, _ = script.total_loss(Agent, args, obs, actions, logprobs, returns)
    batch = SimpleNamespace(observations=obs, actions=actions, old_log_prob=logprobs, returns=returns)
    loss, terms = model.total_loss(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    parameters = list(policy.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert 0 < terms["clip_fraction"] <= 1 and terms["approx_kl"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_it_learns_to_balance_a_pole_and_not_with_a_wrong_sign(sign, monkeypatch):
    right = bpo_sb3.target_ratio
    monkeypatch.setattr(bpo_sb3, "target_ratio", lambda a, *band: right(sign * a, *band))
    env = VecNormalize(bpo_sb3.PPO("MlpPolicy", "CartPole-v1", device="cpu").get_env(), norm_obs=False)
    model = BPO("MlpPolicy", env, n_steps=512, batch_size=64, learning_rate=1e-3, device="cpu", seed=1).learn(20_000)
    mean, _ = evaluate_policy(model, gym.make("CartPole-v1"), n_eval_episodes=5)
    assert mean > 300 if sign > 0 else mean < 60


def test_save_load_and_go_on(tmp_path):
    model = BPO("MlpPolicy", "Pendulum-v1", epsilon=0.1, policy_kwargs={"net_arch": [16]}, **SMALL).learn(128)
    model.save(tmp_path / "model")
    loaded = BPO.load(tmp_path / "model", env=model.get_env())
    assert (loaded.epsilon, loaded.use_median) == (0.1, True)
    ours, theirs = (m.policy.state_dict() for m in (model, loaded))
    assert ours["value_net.weight"].shape[0] == 2 and all(torch.equal(ours[name], theirs[name]) for name in ours)
    moments = [m.policy.optimizer.state_dict()["state"][0]["exp_avg"] for m in (model, loaded)]
    assert torch.equal(*moments) and moments[0].abs().max() > 0
    obs = np.zeros((1, 3), np.float32)
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    before = loaded.policy.value_net.weight.detach().clone()
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded.num_timesteps == 256 and (loaded.policy.value_net.weight[1] != before[1]).any()


@pytest.mark.parametrize("options", [{"use_sde": True}, {"normalize_advantage": False}])
def test_the_host_s_options_work(options):
    model = BPO("MlpPolicy", "Pendulum-v1", **SMALL, **options).learn(128)
    assert model._n_updates == 4 and all(parameter.isfinite().all() for parameter in model.policy.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_range": 0.2}, "its band is epsilon"),
        ({"target_kl": 0.01}, "its band is epsilon"),
        ({"epsilon": 1.5}, "between 0 and 1"),
        ({"temperature": 0}, "above 0"),
        ({"median_temperature": -1}, "above 0"),
    ],
)
def test_what_can_t_be_is_told_when_the_trainer_is_made(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        BPO("MlpPolicy", "Pendulum-v1", **options)
