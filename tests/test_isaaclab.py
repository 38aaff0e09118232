"""bpo_isaaclab.py: its pieces and its loop on a small stand-in, then the real Isaac Lab and mjlab where they are installed."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bpo_isaaclab as bpo

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"num_envs": 32, "num_steps": 8, "update_epochs": 2, "actor_hidden_dims": (16,), "critic_hidden_dims": (16,)}


def checkpoint(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


class PointMass:
    """N points on a line that are paid for being near 0. Episodes are cut after 10 steps, or end where a point is far away."""

    max_episode_length = 10
    cfg = SimpleNamespace(is_finite_horizon=False)

    def __init__(self, num_envs, final_obs=True):
        self.num_envs, self.unwrapped, self.has_final_obs = num_envs, self, final_obs
        self.single_action_space = SimpleNamespace(shape=(1,))
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.int64)
        self.generator = torch.Generator().manual_seed(bpo.RANK)
        self.rewards = torch.zeros(num_envs)  # a buffer that is used again, as Isaac Lab's are

    def observe(self):
        return {"policy": self.x.clone()[:, None], "critic": torch.stack((self.x, self.episode_length_buf / 10), 1)}

    def reset(self):
        self.x = torch.rand(self.num_envs, generator=self.generator) * 2 - 1
        self.episode_length_buf.zero_()
        return self.observe(), {}

    def step(self, actions):
        self.x = self.x + 0.3 * actions[:, 0].clamp(-1, 1)
        self.episode_length_buf += 1
        self.rewards[:] = -self.x.abs()
        terminated, truncated = self.x.abs() > 2, self.episode_length_buf >= 10
        extras = {"log": {"distance": self.x.abs().mean()}} | ({"final_obs": self.observe()} if self.has_final_obs else {})
        done = terminated | truncated
        self.x = torch.where(done, torch.rand(self.num_envs, generator=self.generator) * 2 - 1, self.x)
        self.episode_length_buf *= ~done
        return self.observe(), self.rewards, terminated, truncated, extras

    def close(self):
        pass


def rl_cfg():
    noise = SimpleNamespace(class_name="GaussianDistribution", init_std=0.8)
    algorithm = SimpleNamespace(num_learning_epochs=4, num_mini_batches=4, learning_rate=1e-3, schedule="adaptive", gamma=0.97,
                                lam=0.9, entropy_coef=0.005, desired_kl=0.01, max_grad_norm=1.0, value_loss_coef=2.0,
                                use_clipped_value_loss=True, clip_param=0.2)  # fmt: skip
    actor = SimpleNamespace(class_name="MLPModel", hidden_dims=[64, 32], activation="elu", obs_normalization=True,
                            distribution_cfg=noise)  # fmt: skip
    return SimpleNamespace(
        algorithm=algorithm,
        actor=actor,
        critic=actor,
        num_steps_per_env=16,
        max_iterations=10,
        obs_groups=None,
        clip_actions=None,
    )


def load_point_mass(args, launched):
    return rl_cfg(), lambda: PointMass(args.num_envs)


@pytest.fixture
def point_mass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo, "load_task", load_point_mass)


def test_stock_settings_are_the_task_s_the_paper_s_rows_replace_them_and_flags_win():
    ppo = bpo.stock_settings(rl_cfg(), bpo.Args(loss="ppo", num_envs=8))
    assert (ppo.num_steps, ppo.update_epochs, ppo.gamma, ppo.gae_lambda, ppo.init_std) == (16, 4, 0.97, 0.9, 0.8)
    assert (ppo.ent_coef, ppo.vf_coef, ppo.epsilon, ppo.desired_kl, ppo.total_timesteps) == (0.005, 2.0, 0.2, 0.01, 16 * 8 * 10)
    g1 = bpo.stock_settings(rl_cfg(), bpo.Args(task="Isaac-Velocity-Flat-G1"))
    assert (g1.update_epochs, g1.epsilon, g1.ent_coef, g1.vf_coef, g1.gamma) == (10, 0.2, 0.0, 1.0, 0.97)
    go1 = bpo.stock_settings(rl_cfg(), bpo.Args(task="Mjlab-Velocity-Flat-Unitree-Go1", epsilon=0.1))
    assert (go1.update_epochs, go1.epsilon, go1.ent_coef) == (10, 0.1, 1e-3)
    assert bpo.stock_settings(rl_cfg(), bpo.Args(task="Isaac-Ant")).epsilon == 0.3
    online = {task: bpo.stock_settings(rl_cfg(), bpo.Args(task=task)).online_adv for task in ("Isaac-Ant", "G1", "Go1", "H1")}
    assert online == {"Isaac-Ant": True, "G1": True, "Go1": False, "H1": False}
    assert bpo.stock_settings(rl_cfg(), bpo.Args(task="H1", online_adv=True)).online_adv


def test_what_a_task_s_configuration_has_that_the_script_has_not_is_one_line(capsys):
    def line(section="algorithm", **settings):
        configuration = rl_cfg()
        configuration.critic = SimpleNamespace(**vars(configuration.actor))
        configuration.critic.distribution_cfg = None
        part = configuration.actor.distribution_cfg if section == "noise" else getattr(configuration, section)
        vars(part).update(settings)
        bpo.stock_settings(configuration, bpo.Args(task="Isaac-Ant"))
        output = capsys.readouterr().out
        assert output.count("\n") <= 1 and (not output or "Isaac-Ant" in output)
        return output

    same = {"optimizer": "adam", "rnd_cfg": None, "symmetry_cfg": None, "share_cnn_encoders": False, "class_name": "PPO"}
    assert line() == line(**same) == line("noise", std_type="log", std_range=[1e-6, 1e6], learn_std=True) == ""
    assert line("actor", rnn_type=None, rnn_hidden_dim=256) == ""  # mjlab's networks have these fields too
    assert "algorithm.optimizer adamw (here adam)" in line(optimizer="adamw")
    several = line(symmetry_cfg={"use_mirror_loss": True}, rnd_cfg=object(), normalize_advantage_per_mini_batch=True)
    assert all(name in several for name in ("symmetry_cfg", "rnd_cfg", "normalize_advantage_per_mini_batch True"))
    assert "what_comes_next 3" in line(what_comes_next=3)
    assert "SharedEncoderPPO" in line(class_name="SharedEncoderPPO")
    assert "std_type scalar (here log)" in line("noise", std_type="scalar")
    assert "learn_std False" in line("noise", learn_std=False)
    assert "std_range (0.1, 1)" in line("noise", std_range=[0.1, 1])
    assert "critic.activation relu (here elu)" in line("critic", activation="relu")
    assert "critic.obs_normalization False (here True)" in line("critic", obs_normalization=False)


def test_the_learning_rate_stands_still_where_the_task_has_no_kl():
    for settings in ({"schedule": "fixed"}, {"desired_kl": None}):
        configuration = rl_cfg()
        vars(configuration.algorithm).update(settings)
        assert bpo.stock_settings(configuration, bpo.Args()).desired_kl == 0


@pytest.mark.parametrize(
    ("flags", "passes"), [("", 3), ("--no-reevaluate", 0), ("--loss ppo", 0), ("--loss ppo --reevaluate", 3)]
)
def test_bpo_evaluates_anew_before_each_pass_and_ppo_does_not(flags, passes, point_mass, monkeypatch):
    estimate_returns, calls = bpo.estimate_returns, []
    monkeypatch.setattr(bpo, "estimate_returns", lambda *args: calls.append(args) or estimate_returns(*args))
    sizes = "--num-envs 8 --num-steps 32 --total-timesteps 256 --device cpu"
    monkeypatch.setattr(sys, "argv", ["bpo_isaaclab.py", *sizes.split(), *flags.split()])
    bpo.main()
    assert len(calls) == 1 + passes  # the settings have 4 epochs


@pytest.mark.parametrize(("flags", "online"), [([], False), (["--no-online-adv"], False), (["--online-adv"], True)])
def test_a_flag_chooses_the_weights_over_the_authors_row(flags, online, point_mass, monkeypatch):
    sizes = "--task Go1 --num-envs 8 --num-steps 8 --total-timesteps 64 --update-epochs 1 --device cpu"
    monkeypatch.setattr(sys, "argv", ["bpo_isaaclab.py", *sizes.split(), *flags])
    bpo.main()
    (run_dir,) = Path("runs").iterdir()
    assert json.loads((run_dir / "config.json").read_text())["online_adv"] is online


def adam(agent, rate=1e-3):
    vectors = [torch.nn.Parameter(bpo.parameters_to_vector(group).detach()) for group in agent.parameter_groups()]
    for vector, group in zip(vectors, agent.parameter_groups()):
        bpo.vector_to_parameters(vector.data, group)
    return torch.optim.Adam(vectors, lr=torch.tensor(rate), fused=True)


@pytest.mark.parametrize(("loss", "kept"), [("bpo", True), ("ppo", False)])
def test_bpo_s_fixed_weights_are_the_rollout_s_in_all_epochs(loss, kept, monkeypatch):
    torch.manual_seed(0)
    args = bpo.stock_settings(rl_cfg(), bpo.Args(loss=loss, online_adv=False))
    agent, weights, total_loss = bpo.Agent(1, 2, 1, args), [], bpo.total_loss

    def spy(agent, args, batch, *rest):
        weights.append(batch["normalized_advantages"])
        return total_loss(agent, args, batch, *rest)

    monkeypatch.setattr(bpo, "total_loss", spy)
    estimate = lambda: {name: torch.randn(64) for name in ("values", "advantages", "returns")}  # noqa: E731
    batch = {"obs": torch.randn(64, 1), "critic_obs": torch.randn(64, 2), "actions": torch.randn(64, 1)} | estimate()
    batch |= {"means": torch.zeros(64, 1), "logprobs": bpo.log_prob(batch["actions"], torch.zeros(64, 1), agent.actor_logstd)}
    batch["logprobs"] = batch["logprobs"].detach()
    bpo.update(agent, adam(agent), dict(batch), args, estimate)
    expected = (batch["advantages"] - batch["advantages"].mean()) / (batch["advantages"].std() + 1e-8)
    epochs = torch.stack([torch.cat(weights[i : i + 4]).sort()[0] for i in range(0, 16, 4)])
    torch.testing.assert_close(epochs[0], expected.sort()[0])
    assert torch.equal(epochs, epochs[:1].expand(4, 64)) == kept


def test_kl_and_log_prob_are_those_of_normal_distributions():
    torch.manual_seed(0)
    means, other_means, logstd, other_logstd = torch.randn(7, 3), torch.randn(7, 3), torch.randn(3), torch.randn(3)
    old, new = torch.distributions.Normal(means, logstd.exp()), torch.distributions.Normal(other_means, other_logstd.exp())
    expected = torch.distributions.kl_divergence(old, new).sum(-1)
    torch.testing.assert_close(bpo.gaussian_kl(means, logstd, other_means, other_logstd), expected, rtol=1e-4, atol=1e-5)
    assert (bpo.gaussian_kl(means, logstd, means, logstd) == 0).all()
    actions = torch.randn(7, 3)
    torch.testing.assert_close(bpo.log_prob(actions, means, logstd), old.log_prob(actions).sum(-1))


def test_returns_bootstrap_from_where_each_action_led():
    torch.manual_seed(0)
    args = bpo.stock_settings(rl_cfg(), bpo.Args())
    agent = bpo.Agent(2, 3, 1, args)
    obs, last_obs = torch.randn(9, 5, 3), torch.randn(8, 5, 3)
    terminations, truncations = (torch.rand(8, 5) < 0.2 for _ in range(2))
    next_obs = torch.where((truncations & ~terminations)[..., None], last_obs, obs[1:])
    rollout = {"critic_obs": obs[:-1], "next_obs": next_obs, "rewards": torch.randn(8, 5), "terminations": terminations.float()}
    rollout["dones"] = (terminations | truncations).float()
    estimates = bpo.estimate_returns(agent, rollout, args)
    with torch.no_grad():
        values, next_values = agent.get_values(obs[:-1])[0], agent.get_values(next_obs)[0]
    ends = rollout["terminations"], rollout["dones"]
    advantages = bpo.gae(rollout["rewards"], values, next_values, *ends, args.gamma, args.gae_lambda)
    assert (truncations & ~terminations)[:-1].any() and (truncations & ~terminations)[-1].any()
    torch.testing.assert_close(estimates["advantages"], advantages.flatten())
    torch.testing.assert_close(estimates["returns"], (advantages + values).flatten())


@pytest.mark.parametrize(("kl", "factor"), [(0.021, 1 / 1.5), (0.02, 1), (0.005, 1), (0.004, 1.5), (0.0, 1)])
def test_the_learning_rate_follows_the_kl_within_its_bounds(kl, factor, monkeypatch):
    args = bpo.stock_settings(rl_cfg(), bpo.Args(update_epochs=1, num_minibatches=1))
    agent, zeros = bpo.Agent(1, 2, 1, args), torch.zeros(64, 1)
    batch = {"obs": zeros, "critic_obs": torch.randn(64, 2), "actions": torch.randn(64, 1), "means": zeros}
    batch |= {name: torch.randn(64) for name in ("logprobs", "values", "advantages", "returns")}
    optimizer = adam(agent)
    for value, expected in ((kl, 1e-3 * factor), *[(1.0, None)] * 50, (0.0, 1e-5)):
        monkeypatch.setattr(bpo, "gaussian_kl", lambda *_, value=value: torch.tensor([value]))
        bpo.update(agent, optimizer, batch, args)
        assert expected in (None, pytest.approx(optimizer.param_groups[0]["lr"].item()))


def test_running_statistics_are_those_of_all_batches_together():
    batches = [torch.randn(size, 4) * size + size for size in (3, 50, 7)]
    statistics = bpo.RunningMeanStd(4)
    for batch in batches:
        statistics.update(batch)
    together = torch.cat(batches)
    torch.testing.assert_close(statistics.mean, together.mean(0))
    torch.testing.assert_close(statistics.var, together.var(0, correction=0))


def test_observations_are_normalised_as_rsl_rl_does():
    statistics = bpo.RunningMeanStd(2)
    torch.testing.assert_close(statistics(torch.tensor([1.01, -2.02])), torch.tensor([1.0, -2.0]))  # before any batch
    statistics.update(torch.tensor([[5.0, 1.0], [5.0, 3.0]]))
    obs = torch.tensor([[5.001, 2.0], [5.0, 2.0 + 1.01 * 50]])  # the first was constant so far; nothing is clipped
    torch.testing.assert_close(statistics(obs), torch.tensor([[0.1, 0.0], [0.0, 50.0]]), rtol=1e-3, atol=1e-5)


def test_observations_are_normalised_as_the_installed_rsl_rl_does():
    rsl_rl = pytest.importorskip("rsl_rl.modules", reason="rsl_rl is not installed")
    torch.manual_seed(0)
    ours, theirs = bpo.RunningMeanStd(4), rsl_rl.EmpiricalNormalization(4)
    for size in (3, 50, 700):
        batch = torch.randn(size, 4) * torch.tensor([1.0, 1e-3, 100.0, 0.0]) + torch.tensor([0.0, 0.1, -50.0, 7.0])
        torch.testing.assert_close(ours(batch * 3), theirs(batch * 3), rtol=1e-5, atol=1e-5)
        ours.update(batch), theirs.update(batch)
        torch.testing.assert_close(ours(batch * 3), theirs(batch * 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("final_obs", [True, False])
def test_a_cut_episode_goes_on_in_the_critic_s_eyes(final_obs):
    torch.manual_seed(0)
    envs = bpo.Envs(PointMass(4, final_obs), rl_cfg())
    obs, critic_obs = envs.reset(random_start=True)
    assert obs.shape == (4, 1) and critic_obs.shape == (4, 2)
    seen = 0
    for _ in range(12):
        before = critic_obs
        _, critic_obs, led_to, _, terminations, truncations, _ = envs.step(torch.zeros(4, 1))
        done = truncations & ~terminations
        assert torch.equal(led_to[~done], critic_obs[~done])
        if final_obs:  # where the point stood, which did not move, and the time that had passed
            assert torch.equal(led_to[done][:, 0], before[done][:, 0]) and (led_to[done][:, 1] == 1).all()
        else:
            assert torch.equal(led_to[done], before[done])
        seen += int(done.sum())
    assert seen >= 4


def test_the_time_limit_of_a_finite_horizon_is_an_end(monkeypatch):
    monkeypatch.setattr(PointMass, "cfg", SimpleNamespace(is_finite_horizon=True))
    envs = bpo.Envs(PointMass(4), rl_cfg())
    envs.reset()
    ends = [envs.step(torch.zeros(4, 1))[4:6] for _ in range(10)]
    assert not any(terminations.any() for terminations, _ in ends[:9])
    assert all(flags.all() for flags in ends[9])


def test_evaluation_plays_whole_episodes_of_tasks_that_start_at_random_lengths(monkeypatch):
    reset = PointMass.reset
    monkeypatch.setattr(
        PointMass, "reset", lambda self: (reset(self), self.episode_length_buf.random_(10))[0]
    )  # as Isaac Lab's AnymalC
    envs = bpo.Envs(PointMass(16), rl_cfg())
    envs.reset()
    assert not envs.step(torch.zeros(16, 1))[5].any()


def test_what_a_failed_simulation_leaves_reaches_no_return(point_mass, monkeypatch):
    step = PointMass.step

    def failing(self, actions):
        obs, rewards, terminated, truncated, extras = step(self, actions)
        terminated[0] = True
        extras["final_obs"]["critic"][0] = math.nan
        return obs, rewards, terminated, truncated, extras

    monkeypatch.setattr(PointMass, "step", failing)
    run_dir = bpo.train(bpo.Args(total_timesteps=32 * 8 * 3, **SMALL))
    assert checkpoint(run_dir)["state"]["step"] == 32 * 8 * 3


def test_nan_after_a_termination_reaches_no_return_at_the_end_of_a_rollout_either():
    args = bpo.stock_settings(rl_cfg(), bpo.Args())
    obs, ends = torch.randn(8, 5, 3), torch.zeros(8, 5)
    next_obs = torch.cat((obs[1:], obs[:1]))
    ends[3, 0] = ends[7, 1] = 1
    next_obs[3, 0] = next_obs[7, 1] = math.nan
    rollout = {"critic_obs": obs, "next_obs": next_obs, "rewards": torch.randn(8, 5), "terminations": ends, "dones": ends}
    estimates = bpo.estimate_returns(bpo.Agent(2, 3, 1, args), rollout, args)
    assert all(tensor.isfinite().all() for tensor in estimates.values())


def test_rewards_and_ends_may_be_columns(point_mass, monkeypatch):
    step = PointMass.step

    def in_columns(self, actions):
        obs, *results, extras = step(self, actions)
        return obs, *(result[:, None] for result in results), extras

    args = bpo.Args(total_timesteps=32 * 8 * 3, **SMALL)
    weights = checkpoint(bpo.train(args))["agent"]
    monkeypatch.setattr(PointMass, "step", in_columns)
    again = checkpoint(bpo.train(args))["agent"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize(
    "flags",
    [{"loss": "bpo"}, {"loss": "ppo", "reevaluate": False}, {"reevaluate": False, "online_adv": False}, {"use_median": False}],
)
def test_it_learns_to_go_to_the_middle(flags, point_mass, capsys):
    run_dir = bpo.train(bpo.Args(total_timesteps=32 * 8 * 60, **SMALL | flags))
    score = float(capsys.readouterr().out.split("evaluation: ")[1].split()[0])
    assert score > -2.0  # standing still gives −5 on average, going straight to the middle about −1
    rows = (run_dir / "episodes.csv").read_text().splitlines()
    assert len(rows) > 50 and (run_dir / "learning_curve.png").exists()
    assert json.loads((run_dir / "config.json").read_text())["gamma"] == 0.97


def test_exported_policies_are_the_network(point_mass):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    from onnx.reference import ReferenceEvaluator

    run_dir = bpo.train(bpo.Args(total_timesteps=32 * 8 * 20, **SMALL))
    agent = bpo.Agent(1, 2, 1, bpo.stock_settings(rl_cfg(), bpo.Args(**SMALL)))
    agent.load_state_dict(checkpoint(run_dir)["agent"])
    obs = torch.linspace(-3, 3, 20)[:, None]
    expected = agent.actor(obs).detach()
    assert expected.std() > 0.01
    policy = torch.jit.load(run_dir / "exported" / "policy.pt")
    torch.testing.assert_close(policy(obs), expected)
    assert {tensor.dtype for tensor in policy.state_dict().values()} == {torch.float32}
    graph = onnx.load(run_dir / "exported" / "policy.onnx")
    values = ReferenceEvaluator(graph).run(None, {"obs": obs.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(values), expected, rtol=1e-4, atol=1e-5)
    assert "DOUBLE" not in onnx.printer.to_text(graph).upper()


def test_a_stopped_run_goes_on_and_says_that_episodes_begin_anew(point_mass, capsys):
    args = bpo.Args(total_timesteps=32 * 8 * 4, checkpoint_every=1, **SMALL)
    run_dir = bpo.train(args)
    state = checkpoint(run_dir)
    state["args"]["total_timesteps"] *= 2
    state["state"]["world_size"] = 2
    state["args"]["device"] = "nowhere"  # it goes on where it was, unless told otherwise
    torch.save(state, run_dir / "checkpoint.pt")
    with pytest.raises(RuntimeError, match="nowhere"):
        bpo.train(bpo.Args(resume=str(run_dir)))
    bpo.train(bpo.Args(resume=str(run_dir), device="cpu"))
    output = capsys.readouterr().out
    assert "new episodes begin" in output and "2 processes, now 1" in output
    assert checkpoint(run_dir)["state"]["step"] == 32 * 8 * 8
    steps = [int(row.split(",")[0]) for row in (run_dir / "episodes.csv").read_text().splitlines()[1:]]
    assert steps == sorted(set(steps)) and steps[-1] == 32 * 8 * 8


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["bpo_isaaclab.py", *map(str, flags)])
    bpo.main()


FLAGS = ["--num-envs", 32, "--num-steps", 8, "--update-epochs", 2, "--actor-hidden-dims", 16, "--critic-hidden-dims", 16]
FLAGS += ["--device", "cpu"]


def test_words_without_dashes_are_overrides_and_a_whole_number_may_be_a_power_of_ten(monkeypatch):
    words = "--num-envs=1e3 env.x=1e6 --total-timesteps 1e6 agent.y=[1,2] --learning-rate 1e-3 --no-use-median"
    monkeypatch.setattr(sys, "argv", ["bpo_isaaclab.py", *words.split()])
    args, given = bpo.command_line()
    assert (args.num_envs, args.total_timesteps, args.learning_rate, args.use_median) == (1000, 1_000_000, 1e-3, False)
    assert args.overrides == ("env.x=1e6", "agent.y=[1,2]")
    assert given == {"num_envs", "total_timesteps", "learning_rate", "use_median"}


def test_a_finished_run_can_be_extended_and_keeps_its_configuration(point_mass, monkeypatch, capsys):
    run_dir = bpo.train(bpo.Args(total_timesteps=256 * 4, **SMALL))
    for flags in (["--seed", 1], ["--task", "Isaac-Humanoid"], ["--reevaluate"], ["--gamma=0.97"]):
        with pytest.raises(SystemExit, match="only --total-timesteps and --device"):
            main(monkeypatch, "--resume", run_dir, *flags)
        with pytest.raises(SystemExit, match="--eval-episodes, --capture-video and --device"):
            main(monkeypatch, "--evaluate", run_dir, *flags)
    before = {path: path.read_bytes() for path in run_dir.glob("*.*")}
    for total in (0, 256, 256 * 3 + 9):
        with pytest.raises(SystemExit, match=f"is at step {256 * 4} already, beyond --total-timesteps {total}$"):
            main(monkeypatch, "--resume", run_dir, "--total-timesteps", total)
    with pytest.raises(SystemExit, match="from its folder"):
        main(monkeypatch, "--resume", run_dir / "checkpoint.pt")
    assert before == {path: path.read_bytes() for path in run_dir.glob("*.*")}
    monkeypatch.chdir(run_dir)
    main(monkeypatch, "--resume", ".", "--total-timesteps", 256 * 6, "--device", "cpu")
    assert "new episodes begin" in capsys.readouterr().out
    assert checkpoint(".")["state"]["step"] == checkpoint(".")["args"]["total_timesteps"] == 256 * 6
    config = json.loads(Path("config.json").read_text())
    assert (config["total_timesteps"], config["gamma"], config["resume"]) == (256 * 6, 0.97, None)


def test_load_agent_acts_as_the_evaluation_does_without_a_simulator(point_mass, monkeypatch, capsys):
    run_dir = bpo.train(bpo.Args(total_timesteps=256 * 5, eval_episodes=32, **SMALL))
    capsys.readouterr()
    main(monkeypatch, "--evaluate", run_dir / "checkpoint.pt", "--eval-episodes", 32, "--device", "cpu")
    played = capsys.readouterr().out
    monkeypatch.setattr(bpo, "load_task", None)
    agent, env, score, over = bpo.load_agent(str(run_dir)), PointMass(32), 0, torch.zeros(32, dtype=bool)
    env.reset()  # `main` and `evaluate` reset once each
    obs, _ = env.reset()
    while not over.all():
        obs, rewards, terminated, truncated, _ = env.step(agent.act(obs["policy"]))
        score += (rewards * ~over).mean()
        over |= terminated | truncated
    assert f"evaluation: {score:.5g} ±" in played
    raw = torch.linspace(-9, 9, 5)[:, None]
    actions = agent.act(raw)
    assert actions.std() > 0.01 and not actions.requires_grad
    torch.testing.assert_close(torch.from_numpy(agent.act(raw.double().numpy())), actions)
    torch.testing.assert_close(agent.act(raw[3]), actions[3])
    torch.testing.assert_close(torch.jit.load(run_dir / "exported" / "policy.pt")(raw), actions)


def test_networks_without_hidden_layers_or_statistics_are_loaded_too(point_mass):
    settings = SMALL | {"actor_hidden_dims": (), "norm_obs": False}
    run_dir = bpo.train(bpo.Args(total_timesteps=256, **settings))
    assert bpo.load_agent(run_dir).act(torch.ones(3, 1)).shape == (3, 1)


PREAMBLE = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, bpo_isaaclab as bpo, test_isaaclab as stand_in
bpo.load_task = stand_in.load_point_mass
"""


@pytest.mark.slow
def test_the_best_policy_of_the_evaluations_on_the_way_is_kept(point_mass, tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "program.py").write_text(PREAMBLE + "bpo.main()")
    monkeypatch.setattr(bpo, "__file__", str(tmp_path / "program.py"))
    args = bpo.Args(total_timesteps=256 * 6, eval_episodes=8, learning_rate=1e-2, device="cpu", **SMALL)
    run_dir, plain = bpo.train(dataclasses.replace(args, eval_every=2)), bpo.train(args)
    weights, others = checkpoint(run_dir)["agent"], checkpoint(plain)["agent"]
    assert all(torch.equal(weights[name], others[name]) for name in weights)  # to look on changes nothing
    scores = [(event.step, event.value) for event in EventAccumulator(str(run_dir)).Reload().Scalars("eval/mean_return")]
    assert [step for step, _ in scores] == [512, 1024, 1536]
    best = torch.load(run_dir / "best.pt", weights_only=True)["state"]
    assert (best["step"], best["best"]) == pytest.approx(max(scores, key=lambda pair: pair[1]))
    assert not list(run_dir.glob("candidate*")) and not list(plain.glob("best*"))
    capsys.readouterr()
    main(monkeypatch, "--evaluate", run_dir / "best.pt", "--eval-episodes", 8, "--device", "cpu")
    assert f"evaluation: {best['best']:.5g} ±" in capsys.readouterr().out
    assert bpo.load_agent(run_dir / "best.pt").act(torch.zeros(1)).shape == (1,)


def test_an_evaluation_that_fails_on_the_way_is_told_and_costs_no_training(point_mass, tmp_path, monkeypatch, capsys):
    (tmp_path / "program.py").write_text("raise MemoryError('none left')")
    monkeypatch.setattr(bpo, "__file__", str(tmp_path / "program.py"))
    run_dir = bpo.train(bpo.Args(total_timesteps=256 * 2, eval_every=1, device="cpu", **SMALL))
    assert capsys.readouterr().err.count("the evaluation failed: MemoryError: none left\n") == 2
    assert checkpoint(run_dir)["state"]["step"] == 256 * 2 and not (run_dir / "best.pt").exists()


def test_the_bar_says_return_and_speed_and_without_a_terminal_once_a_minute(point_mass, capsys):
    bpo.train(bpo.Args(total_timesteps=256 * 10, **SMALL))
    bars = capsys.readouterr().err.split("\r")
    assert len(bars) <= 4 and all(word in bars[-1] for word in ("100%", "steps/s", "return="))


def test_a_long_evaluation_shows_where_it_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(PointMass, "max_episode_length", 250)
    envs = bpo.Envs(PointMass(4), rl_cfg())
    step = PointMass.step
    calls = []

    def unending(self, actions):
        obs, rewards, _, _, extras = step(self, actions)
        calls.append(self)
        return obs, rewards, torch.zeros(4, dtype=bool), torch.full((4,), len(calls) == 250), extras

    monkeypatch.setattr(PointMass, "step", unending)
    args = bpo.stock_settings(rl_cfg(), bpo.Args(**SMALL))
    bpo.evaluate(bpo.Agent(1, 2, 1, args), envs, args, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "of 250: 0 of 4 episodes" in line]
    assert len(lines) == 2


def test_config_and_events_tell_versions_commit_and_flags(point_mass):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = bpo.train(bpo.Args(total_timesteps=256, exp_name="first/try", **SMALL))
    assert run_dir.name.startswith("Isaac-Humanoid__first-try__1__")
    config = json.loads((run_dir / "config.json").read_text())
    assert {"python", "torch", "numpy"} <= set(config["versions"])
    assert not (ROOT / ".git").exists() or len(config["commit"].removesuffix("-dirty")) == 40
    for package in ("mjlab", "isaaclab"):
        assert (package in config["versions"]) == (importlib.util.find_spec(package) is not None)
    (text,) = EventAccumulator(str(run_dir)).Reload().Tensors("hyperparameters/text_summary")
    assert b"|epsilon|0.3|" in text.tensor_proto.string_val[0]


@pytest.fixture
def interrupted(point_mass, monkeypatch, capsys):
    """Folder and output of a run that Ctrl-C stopped in its sixth update; its last checkpoint is of the fourth."""
    update, calls = bpo.update, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(bpo, "update", stopped)
    with pytest.raises(SystemExit) as stop:
        bpo.train(bpo.Args(total_timesteps=256 * 8, checkpoint_every=4, device="cpu", **SMALL))
    assert stop.value.code == 130
    (run_dir,) = Path("runs").iterdir()
    return run_dir, capsys.readouterr().out


def test_the_curve_is_drawn_after_ctrl_c_too(interrupted):
    run_dir, output = interrupted
    assert (run_dir / "learning_curve.png").exists()
    assert f"stopped; to go on from the last checkpoint: python bpo_isaaclab.py --resume {run_dir}\n" in output


def test_rows_after_the_checkpoint_are_dropped_and_each_resume_gives_the_same_weights(interrupted):
    def steps(run_dir):
        return [int(row.split(",")[0]) for row in (run_dir / "episodes.csv").read_text().splitlines()[1:]]

    run_dir, _ = interrupted
    assert checkpoint(run_dir)["state"]["step"] == 256 * 4 and steps(run_dir)[-1] == 256 * 5
    with open(run_dir / "episodes.csv", "a") as file:
        file.write("1536,-1.")  # a killed run may have cut a row
    again = run_dir.with_name("again")
    shutil.copytree(run_dir, again)
    for folder in (run_dir, again):
        bpo.train(bpo.Args(resume=str(folder)))
        assert steps(folder) == sorted(set(steps(folder))) and steps(folder)[-1] == 256 * 8
    first, second = checkpoint(run_dir)["agent"], checkpoint(again)["agent"]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_wandb_gets_the_code_and_a_resumed_run_keeps_its_name(tmp_path):
    (tmp_path / "program.py").write_text(PREAMBLE + "bpo.main()")
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}

    def run(folder, *flags):
        command = [sys.executable, str(tmp_path / "program.py"), *map(str, flags)]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr

    run(tmp_path, *FLAGS, "--total-timesteps", 256, "--track")
    (run_dir,) = (tmp_path / "runs").iterdir()
    run(run_dir, "--resume", ".", "--total-timesteps", 512)
    folders = list(run_dir.glob("wandb/offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(run_dir.name) for folder in folders)
    assert all((folder / "files" / "bpo_isaaclab.py").exists() for folder in folders)


@pytest.mark.parametrize("overrides", [(), ("physics=none",)])
def test_an_error_of_a_task_s_own_code_is_one_line(overrides, point_mass, monkeypatch):
    def broken():
        raise KeyError("no such\nmodel")

    monkeypatch.setattr(bpo, "load_task", lambda args, launched: (rl_cfg(), broken))
    words = "Isaac-Humanoid can't be made" + "".join(f" with {override}" for override in overrides) + ": KeyError: "
    with pytest.raises(SystemExit, match=words) as stop:
        bpo.train(bpo.Args(overrides=overrides, **SMALL))
    assert "\n" not in stop.value.code and not Path("runs").exists()


def run_two_processes(tmp_path, program, port):
    (tmp_path / "program.py").write_text(PREAMBLE + program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "program.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_see_different_episodes(tmp_path):
    program = """
agents, agent = [], bpo.Agent
bpo.Agent = lambda *args: agents.append(agent(*args)) or agents[-1]
bpo.train(bpo.Args(total_timesteps=2 * 32 * 8 * 6, **stand_in.SMALL))
weights = agents[0].state_dict()
torch.save(weights | {"own": torch.rand(1)}, f"weights{bpo.RANK}.pt")
"""
    result = run_two_processes(tmp_path, program, "29517")
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"weights{rank}.pt", weights_only=True) for rank in range(2))
    assert first.pop("own") != second.pop("own")
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert first["actor.normalize.count"] == 2 * 32 * 8 * 6


@pytest.mark.slow
def test_ctrl_c_in_two_processes_says_how_both_go_on(tmp_path):
    program = """
calls, update = [], bpo.update
def interrupted(*args):
    calls.append(args)
    if len(calls) == 3:
        raise KeyboardInterrupt
    return update(*args)
bpo.update = interrupted
bpo.train(bpo.Args(total_timesteps=2 * 32 * 8 * 6, checkpoint_every=2, **stand_in.SMALL))
"""
    result = run_two_processes(tmp_path, program, "29518")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert "to go on from the last checkpoint: torchrun --nproc-per-node 2" in result.stdout, result.stderr
    assert checkpoint(run_dir)["state"]["step"] == 2 * 32 * 8 * 2


def test_a_single_episode_of_any_run_can_be_played(point_mass, monkeypatch, capsys):
    run_dir = bpo.train(bpo.Args(total_timesteps=32 * 8, **SMALL))
    monkeypatch.setattr(sys, "argv", ["bpo_isaaclab.py", "--evaluate", str(run_dir), "--eval-episodes", "1", "--device", "cpu"])
    bpo.main()
    assert "of 1 episodes" in capsys.readouterr().out


BAD_INPUT = [
    (["--epsilom", "1"], "--epsilom"),
    (["nonsense"], "override"),
    (["--clip-coef", "0.2"], "--epsilon"),
    (["--no-cuda"], "--device"),
    (["--target_kl=0.01", "env.episode_length_s=5"], "--desired-kl"),
    (["--env-id", "Isaac-Ant"], "--task"),
    (["--capture-video"], "Isaac Sim"),
    (["--resume", "nowhere"], "nowhere"),
    (["--resume", "nowhere", "--seed", "3"], "only --total-timesteps and --device"),
    (["--resume", "nowhere", "env.episode_length_s=5"], "only --total-timesteps and --device"),
    (["--evaluate", "nowhere", "env.episode_length_s=5"], "--eval-episodes"),
    (["--resume", "nowhere", "--device", "cpu"], "nowhere"),
    (["--evaluate", "nowhere"], "nowhere"),
    (["--evaluate", "nowhere", "--seed", "3"], "--eval-episodes"),
    (["--task", "Mjlab-Cartpole-Balance", "--device", "cuda:9"], "--device"),
]
if importlib.util.find_spec("isaaclab") is None:
    BAD_INPUT.append((["--task", "Isaac-Humanoid"], "pip install -r requirements-isaaclab.txt"))
else:
    BAD_INPUT += [
        (["--task", "Isaac-Humanoid-v0"], "--task Isaac-Humanoid"),
        (["--task", "Isaac-Humanoud"], "Isaac-Humanoid"),
        (["--task", "IsaacContrib-Franka-Pour"], "HeteroscedasticGaussianDistribution"),
        (["--task", "Isaac-Ant", "env.episode_length=5"], "env.episode_length"),
        (["--task", "Isaac-Ant", "nonsense=5"], "nonsense=5 is no setting"),
        (["--task", "Isaac-Ant", "presets=nonsense"], "nonsense"),
        (["--task", "Isaac-Ant", "env.episode_length_s=abc"], "env.episode_length_s=abc"),
        (["--task", "Isaac-Ant", "env.scene.num_envs=7"], "--num-envs"),
        (["--task", "Isaac-Ant", "agent.algorithm.clip_param=0.2"], "--epsilon"),
        (["--task", "Isaac-Shadow-Handover-Direct"], "several agents"),
        (["--task", "Isaac-Ant", "--device", "cpu", "--num-envs", "2", "physics=physx"], "can't be made with physics=physx"),
    ]
if importlib.util.find_spec("mjlab") is None:
    BAD_INPUT.append((["--task", "Mjlab-Cartpole-Balance"], "pip install -r requirements-mjlab.txt"))
else:
    BAD_INPUT += [
        (["--task", "Mjlab-Cartpole-Balanse"], "Mjlab-Cartpole-Balance"),
        (["--task", "Mjlab-Cartpole-Balance", "env.nonsense=5"], "env.nonsense=5 is no setting"),
        (["--task", "Mjlab-Cartpole-Balance", "env.episode_length_s=long"], "env.episode_length_s=long"),
        (["--task", "Mjlab-Cartpole-Balance", 'env.episode_length_s="5"'], "env.episode_length_s="),
        (["--task", "Mjlab-Cartpole-Balance", "env.scene.num_envs=7"], "--num-envs"),
        (["--task", "Mjlab-Tracking-Flat-Unitree-G1", "--device", "cpu", "--num-envs", "2"], "motion_file"),
    ]


@pytest.mark.parametrize(("flags", "words"), BAD_INPUT, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_answered_in_one_line(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bpo_isaaclab.py", *flags])
    with pytest.raises(SystemExit) as stop:
        bpo.main()
    assert words in stop.value.code and "\n" not in stop.value.code and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [({"seed": -1}, "--seed"), ({"init_std": 0.0}, "--init-std"), ({"max_grad_norm": -1.0}, "--max-grad-norm"),
     ({"epsilon": 1.5}, "--epsilon"), ({"temperature": 0.0}, "--temperature"), ({"num_minibatches": 999}, "--num-minibatches"),
     ({"gamma": 1.5}, "--gamma"), ({"gae_lambda": -3.0}, "--gae-lambda"), ({"desired_kl": -1.0}, "--desired-kl"),
     ({"median_coef": -1.0}, "--median-coef"), ({"actor_hidden_dims": (-4,)}, "--actor-hidden-dims"),
     ({"eval_every": -1}, "--eval-every"), ({"num_envs": 10**9, "total_timesteps": 10**13}, "--num-envs"),
     ({"num_steps": 10**12, "total_timesteps": 10**15}, "--num-steps"),
     ({"actor_hidden_dims": (10**6, 10**6)}, "--actor-hidden-dims"),
     ({"critic_hidden_dims": (10**11,)}, "--critic-hidden-dims"),
     ({"total_timesteps": 9}, "--total-timesteps"), ({"activation": "none"}, "--activation"), ({"num_envs": 0}, "--num-envs")],
)  # fmt: skip
def test_impossible_settings_are_answered_in_one_line(flags, words, point_mass):
    with pytest.raises(SystemExit, match=words):
        bpo.train(bpo.Args(**SMALL | flags))
    assert not Path("runs").exists()


FLOATS = [field.name for field in dataclasses.fields(bpo.Args) if "float" in str(field.type)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_finite(name, value, point_mass):
    with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} ") as stop:
        bpo.train(bpo.Args(**SMALL | {name: value}))
    assert "\n" not in stop.value.code and not Path("runs").exists()


def test_images_and_missing_observations_are_refused_and_others_left_alone():
    envs = bpo.Envs(PointMass(2), rl_cfg())
    with pytest.raises(SystemExit, match="images"):
        envs.split({"policy": torch.zeros(2, 3, 8, 8)})
    obs = {"policy": torch.zeros(2, 3), "camera": torch.zeros(2, 3, 8, 8), "terms": {"speed": torch.zeros(2, 1)}}
    assert [part.shape for part in envs.split(obs)] == [(2, 3), (2, 3)]
    envs.groups = {"actor": ["policy"], "critic": ["policy", "privileged"]}
    with pytest.raises(SystemExit, match="'privileged', its environment has policy, camera, terms"):
        envs.split(obs)


@pytest.mark.parametrize("random_start", [True, False])
def test_episodes_start_at_random_lengths_where_the_task_wants_it(random_start, point_mass, monkeypatch):
    configuration, started = rl_cfg(), []
    configuration.init_at_random_ep_len = random_start
    monkeypatch.setattr(bpo, "load_task", lambda args, launched: (configuration, lambda: PointMass(args.num_envs)))
    reset = bpo.Envs.reset
    monkeypatch.setattr(
        bpo.Envs, "reset", lambda self, *args: (reset(self, *args), started.append(self.env.episode_length_buf.clone()))[0]
    )
    bpo.train(bpo.Args(total_timesteps=32 * 8, **SMALL))
    assert (started[0] > 0).any() == random_start


@pytest.mark.parametrize("kind", ["RNNModel", "HeteroscedasticGaussianDistribution"])
def test_agents_of_another_kind_are_refused(kind, point_mass, monkeypatch):
    configuration = rl_cfg()
    (configuration.actor if "Model" in kind else configuration.actor.distribution_cfg).class_name = kind
    monkeypatch.setattr(bpo, "load_task", lambda args, launched: (configuration, lambda: PointMass(args.num_envs)))
    with pytest.raises(SystemExit, match=f"has a {kind}"):
        bpo.train(bpo.Args(**SMALL))


def test_an_observation_that_is_not_finite_reaches_no_checkpoint(point_mass, monkeypatch):
    step, calls = PointMass.step, []

    def overflowing(self, actions):
        obs, *rest = step(self, actions)
        calls.append(self)
        if len(calls) == 12:
            obs["critic"][3] = math.inf
        return obs, *rest

    monkeypatch.setattr(PointMass, "step", overflowing)
    with pytest.raises(SystemExit, match=f"stopped at step {32 * 8 * 2}: an observation is not finite"):
        bpo.train(bpo.Args(total_timesteps=32 * 8 * 4, checkpoint_every=1, **SMALL))
    (run_dir,) = Path("runs").iterdir()
    assert checkpoint(run_dir)["state"]["step"] == 32 * 8
    assert all(tensor.isfinite().all() for tensor in checkpoint(run_dir)["agent"].values())


# The real stacks ------------------------------------------------------------------------------------------------------


def run_real(tmp_path, *flags, **environment):
    command = [sys.executable, str(ROOT / "bpo_isaaclab.py"), "--device", "cpu", *map(str, flags)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="session")
def isaac_assets():
    if importlib.util.find_spec("isaaclab") is None:
        pytest.skip("Isaac Lab is not installed (pip install -r requirements-isaaclab.txt on Python 3.12)")
    import isaaclab_assets_offline

    version = hashlib.sha256(Path(isaaclab_assets_offline.__file__).read_bytes()).hexdigest()[:8]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "brrl" / f"isaac_assets-{version}"
    return {"ISAACSIM_ASSET_ROOT": str(isaaclab_assets_offline.build(folder)), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_missing_assets_are_one_line(isaac_assets, tmp_path):
    command = [sys.executable, str(ROOT / "bpo_isaaclab.py"), "--task", "Isaac-Ant", "--num-envs", "2", "--device", "cpu"]
    environment = os.environ | isaac_assets | {"ISAACSIM_ASSET_ROOT": str(tmp_path / "empty")}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and "set ISAACSIM_ASSET_ROOT" in result.stderr.splitlines()[-1]


def score(output):
    return float(output.split("evaluation: ")[1].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["bpo", "ppo"])
def test_isaac_lab_s_cartpole_is_learned(loss, isaac_assets, tmp_path):
    flags = ["--task", "Isaac-Cartpole-Direct", "--num-envs", 256, "--total-timesteps", 256 * 16 * 100, "--loss", loss]
    assert score(run_real(tmp_path, *flags, **isaac_assets)) > 2.0  # at the start it is about −1; upright to the end is 4.9
    (run_dir,) = (tmp_path / "runs").iterdir()
    again = run_real(tmp_path, "--evaluate", run_dir, "--eval-episodes", 16, **isaac_assets)
    assert score(again) > 2.0 and "16 episodes" in again


@pytest.mark.slow
def test_the_peer_trains_on_isaac_lab(isaac_assets, tmp_path):
    flags = ["--num-envs", "32", "--total-timesteps", str(32 * 16 * 20)]
    command = [sys.executable, str(ROOT / "benchmark/peer_rsl_rl.py"), *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | isaac_assets)
    assert result.returncode == 0, result.stderr[-3000:]
    steps = [int(row.split(",")[0]) for row in (tmp_path / "runs/rsl_rl/episodes.csv").read_text().splitlines()[1:]]
    assert steps and steps[-1] == 32 * 16 * 20


@pytest.mark.slow
@pytest.mark.parametrize("task", ["Isaac-Ant", "Isaac-Humanoid"])
def test_isaac_lab_s_walkers_train(task, isaac_assets, tmp_path):
    flags = ["--task", task, "--num-envs", 16, "--total-timesteps", 16 * 32 * 3, "env.episode_length_s=1"]
    flags += ["--eval-every", 2, "--eval-episodes", 4]
    output = run_real(tmp_path, *flags, **isaac_assets)
    assert math.isfinite(score(output))
    assert int(output.split("mean actions), ")[1].split()[0]) > 25  # a humanoid in free fall is out after 20 steps
    (run_dir,) = (tmp_path / "runs").iterdir()
    config = json.loads((run_dir / "config.json").read_text())
    assert config["actor_hidden_dims"] == [400, 200, 100] and config["num_steps"] == 32
    assert config["versions"]["isaaclab"] and (run_dir / "best.pt").exists()
    assert {path.name for path in (run_dir / "exported").iterdir()} == {"policy.pt", "policy.onnx"}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "num_envs"), [("Mjlab-Cartpole-Balance", 32), ("Mjlab-Velocity-Flat-Unitree-G1", 2)])
def test_mjlab_trains(task, num_envs, tmp_path):
    if importlib.util.find_spec("mjlab") is None:
        pytest.skip("mjlab is not installed (pip install -r requirements-mjlab.txt)")
    flags = ["--task", task, "--num-envs", num_envs, "--num-steps", 4, "--num-minibatches", 2, "env.episode_length_s=0.5"]
    assert math.isfinite(score(run_real(tmp_path, *flags, "--total-timesteps", num_envs * 4 * 2)))
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "exported" / "policy.pt").exists()


def test_mjlab_s_settings_are_overridden_by_values_of_their_kind(monkeypatch):
    if importlib.util.find_spec("mjlab") is None:
        pytest.skip("mjlab is not installed (pip install -r requirements-mjlab.txt)")
    import mjlab.envs

    monkeypatch.setattr(mjlab.envs, "ManagerBasedRlEnv", lambda cfg, **_: SimpleNamespace(cfg=cfg, close=None))
    sites = "env.rewards.foot_slip.params.asset_cfg.site_names"
    overrides = (f'{sites}=["FR", "FL"]', "env.episode_length_s=3", "env.auto_reset=False")
    args = bpo.Args(task="Mjlab-Velocity-Flat-Unitree-Go1", overrides=overrides, device="cpu")
    with contextlib.ExitStack() as launched:
        cfg = bpo.load_mjlab(args, launched)[1]().cfg
        launched.pop_all()
    assert cfg.rewards["foot_slip"].params["asset_cfg"].site_names == ("FR", "FL")
    assert cfg.episode_length_s == 3 and cfg.auto_reset is False


@pytest.mark.slow
def test_a_renderer_that_does_not_work_is_one_line_before_there_is_a_run_folder(tmp_path):
    if importlib.util.find_spec("mjlab") is None:
        pytest.skip("mjlab is not installed (pip install -r requirements-mjlab.txt)")
    command = [sys.executable, str(ROOT / "bpo_isaaclab.py"), "--task", "Mjlab-Cartpole-Balance", "--device", "cpu"]
    for variables in ({"DISPLAY": ":77", "MUJOCO_GL": "glfw"}, {"MUJOCO_GL": "nonsense"}):
        result = subprocess.run([*command, "--num-envs", "4", "--capture-video"], cwd=tmp_path, capture_output=True, text=True,
                                env=os.environ | variables)  # fmt: skip
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("bpo_isaaclab: ")]
        assert result.returncode == 1 and re.search("mjlab can't be imported|Mjlab-Cartpole-Balance can't be made", line)
        assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_mjlab_is_filmed_without_a_screen(tmp_path):
    if importlib.util.find_spec("mjlab") is None:
        pytest.skip("mjlab is not installed (pip install -r requirements-mjlab.txt)")
    flags = ["--task", "Mjlab-Cartpole-Balance", "--num-envs", 4, "--num-steps", 4, "--total-timesteps", 16]
    output = run_real(tmp_path, *flags, "--capture-video", "--eval-every", 1, "env.episode_length_s=0.5")
    (video,) = (tmp_path / "runs").glob("*/videos/eval.mp4")
    assert f"video: {video.relative_to(tmp_path)}\n" in output and (video.parent.parent / "best.pt").exists()
