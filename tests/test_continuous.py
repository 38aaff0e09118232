"""bpo_continuous.py and ppo_baseline.py on real environments: time limits, seeds, resume, conduct."""

import csv
import errno
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import bpo_continuous as bpo
import ppo_baseline as ppo

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"num_steps": 256, "num_minibatches": 4, "update_epochs": 2, "eval_episodes": 1, "hidden_size": 16}
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def command(script, *flags):
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def run(folder, script, *flags, **options):
    return subprocess.run(command(script, *flags), cwd=folder, capture_output=True, text=True, **options)


def checkpoint(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def episodes(run_dir):
    """Rows of episodes.csv without the wall time, which no two runs share."""
    with open(Path(run_dir) / "episodes.csv") as file:
        return [row[:3] for row in csv.reader(file)]


def assert_same_weights(first, second):
    first, second = checkpoint(first)["agent"], checkpoint(second)["agent"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class Countdown(gym.Env):
    """Observes (episode, step); ends by termination after 3 steps in even episodes, is truncated after 5 in odd ones."""

    observation_space = gym.spaces.Box(-1e6, 1e6, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        self.t += 1
        even = self.episode % 2 == 0
        return np.array([self.episode, self.t], float), 1.0, even and self.t == 3, not even and self.t == 5, {"info": self.t}


gym.register("Countdown-v0", Countdown)


@pytest.mark.parametrize("async_envs", [False, True])
def test_no_transition_crosses_a_reset_and_only_termination_ends_the_bootstrap(async_envs, tmp_path, monkeypatch):
    seen = {}
    gae = bpo.gae

    def spy_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
        seen.update(values=values, next_values=next_values, terminations=terminations, dones=dones)
        return gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda)

    def values(self, obs):  # a value that names the observation: 100·episode + step
        return (obs[..., 0] * 100 + obs[..., 1],) * 2

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo, "gae", spy_gae)
    monkeypatch.setattr(bpo.Agent, "get_values", values)
    monkeypatch.setattr(bpo, "update", lambda *_: torch.zeros(4))
    flags = {**SMALL, "num_steps": 16, "total_timesteps": 32, "num_envs": 2, "norm_obs": False, "async_envs": async_envs}
    bpo.train(bpo.Args(env_id="Countdown-v0", **flags))
    episode_0 = [0, 1, 2]  # terminates
    episode_1 = [100, 101, 102, 103, 104]  # is truncated
    assert seen["values"][:8, 1].tolist() == episode_0 + episode_1
    assert seen["next_values"][:8, 1].tolist() == [1, 2, 3, 101, 102, 103, 104, 105]
    assert seen["terminations"][:8, 1].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert seen["dones"][:8, 1].tolist() == [0, 0, 1, 0, 0, 0, 0, 1]


def test_dict_observations_are_flattened_and_actions_keep_their_shape(tmp_path, monkeypatch):
    class Nested(Countdown):
        observation_space = gym.spaces.Dict({"where": gym.spaces.Box(-9, 9, (2,)), "mode": gym.spaces.Discrete(3)})
        action_space = gym.spaces.Box(-1, 1, (2, 2))

        def reset(self, **kwargs):
            super().reset(**kwargs)
            return {"where": np.zeros(2, np.float32), "mode": 1}, {}

        def step(self, action):
            assert action.shape == (2, 2) and abs(action).max() <= 1
            _, reward, terminated, truncated, _ = super().step(action)
            return {"where": np.ones(2, np.float32), "mode": self.t % 3}, reward, terminated, truncated, {}

    gym.register("Nested-v0", Nested)
    monkeypatch.chdir(tmp_path)
    run_dir = bpo.train(bpo.Args(env_id="Nested-v0", total_timesteps=512, num_envs=2, **SMALL))
    assert checkpoint(run_dir)["agent"]["actor_mean.0.weight"].shape == (16, 5)


TASKS = ["Ant-v4", "HalfCheetah-v4", "Hopper-v5", "Humanoid-v4", "HumanoidStandup-v5", "InvertedDoublePendulum-v5", "Pusher-v5"]
TASKS += ["Reacher-v5", "Swimmer-v4", "Walker2d-v5", "MountainCarContinuous-v0", "Pendulum-v1"]


@pytest.mark.parametrize("env_id", TASKS)
def test_a_saved_episode_goes_on_bit_for_bit(env_id, tmp_path):
    env, twin = bpo.make_env(env_id), bpo.make_env(env_id)
    env.reset(seed=3)
    twin.reset(seed=4)
    actions = np.random.default_rng(0).uniform(-1, 1, (400, *env.action_space.shape)).astype(np.float32)

    def play(env, actions):
        trace = []
        for action in actions:
            obs, reward, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                obs, _ = env.reset()
            trace.append(np.append(obs, [reward, terminated, truncated]))
        return np.array(trace)

    play(env, actions[:60])
    play(twin, actions[:10])
    agent, args = bpo.Agent(1, 1, bpo.Args()), bpo.Args()
    bpo.save_checkpoint(tmp_path / "checkpoint.pt", agent, args, episodes=[env.episode])  # through the file
    (twin.episode,) = bpo.load_checkpoint(tmp_path)["episodes"]
    np.testing.assert_array_equal(env.obs, twin.obs)
    np.testing.assert_array_equal(play(env, actions[60:]), play(twin, actions[60:]))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_numpy_policy_is_the_torch_actor(activation):
    torch.manual_seed(0)
    agent = bpo.Agent(5, 3, bpo.Args(activation=activation))
    actor = bpo.in_numpy(agent.actor_mean)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # it follows the weights
    agent.obs_rms.update(3 + 2 * np.random.default_rng(0).normal(size=(100, 5)))
    obs = agent.normalize(np.random.default_rng(1).normal(size=(7, 5)) * 20)
    np.testing.assert_allclose(actor(obs), agent.actor_mean(torch.from_numpy(obs)).detach(), rtol=1e-4, atol=1e-5)


def test_the_numpy_policy_follows_whatever_network_a_fork_writes(tmp_path, monkeypatch):
    """Data collected by another policy than the one that is trained would show as ratios other than 1 at the start."""
    ratios, hidden_layers, total_loss = [], bpo.hidden_layers, bpo.total_loss

    def with_layer_norm(inputs, args, gain=2**0.5):
        layers = hidden_layers(inputs, args, gain)
        layers.insert(1, torch.nn.LayerNorm(args.hidden_size))
        return layers.append(torch.nn.Softplus())

    def spy(agent, args, obs, actions, logprobs, returns):
        z = (actions - agent.actor_mean(obs)) / agent.actor_logstd.exp()  # the noise that was drawn
        ratios.append(z.square().mean().item())
        return total_loss(agent, args, obs, actions, logprobs, returns)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo, "hidden_layers", with_layer_norm)
    monkeypatch.setattr(bpo, "total_loss", spy)
    settings = SMALL | {"num_minibatches": 1, "update_epochs": 1, "actor_gain": 30.0}
    bpo.train(bpo.Args(env_id="Hopper-v4", total_timesteps=1024, learning_rate=1e-9, **settings))
    assert len(ratios) == 4 and all(0.8 < ratio < 1.2 for ratio in ratios)
    torch.manual_seed(0)
    network = with_layer_norm(5, bpo.Args(hidden_size=16)).append(torch.nn.Linear(16, 3))
    obs = torch.randn(4, 5)
    np.testing.assert_allclose(bpo.in_numpy(network)(obs.numpy()), network(obs).detach(), rtol=1e-4, atol=1e-5)


def test_log_prob_and_entropy_are_those_of_a_normal_distribution():
    torch.manual_seed(0)
    agent = bpo.Agent(5, 3, bpo.Args(log_std_init=-0.7))
    obs, actions = torch.randn(6, 5), torch.randn(6, 3)
    normal = torch.distributions.Normal(agent.actor_mean(obs), agent.actor_logstd.exp())
    torch.testing.assert_close(agent.log_prob(obs, actions), normal.log_prob(actions).sum(-1))
    torch.testing.assert_close(agent.entropy(), normal.entropy()[0].sum())


def test_running_statistics_are_those_of_all_batches_together():
    batches = [torch.randn(size, 4, dtype=torch.float64) * size + size for size in (3, 50, 7)]
    statistics = bpo.RunningMeanStd(4)
    for batch in batches:
        statistics.update(batch.numpy())
    together = torch.cat(batches)
    torch.testing.assert_close(statistics.mean, together.mean(0))
    torch.testing.assert_close(statistics.var, together.var(0, correction=0))


def flat_optimizer(script, agent, learning_rate):
    """As `train` makes it: Adam over one vector that holds the agent's parameters."""
    weights = torch.nn.Parameter(script.parameters_to_vector(agent.parameters()).detach())
    script.vector_to_parameters(weights.data, agent.parameters())
    return torch.optim.Adam([weights], lr=learning_rate, eps=1e-5, fused=True)


def random_batch(script, size=32):
    """A batch of random numbers in the order in which the script's `update` takes them: 4 observations, 2 actions."""
    torch.manual_seed(0)
    others = 1 if script is bpo else 3
    return [torch.randn(size, 4), torch.randn(size, 2), -3 + torch.rand(size), *torch.randn(others, size)]


@pytest.mark.parametrize("script", [bpo, ppo])
def test_one_update_step_is_that_of_adam_on_the_clipped_gradient(script):
    """The flat parameter vector must do what one Adam over the separate layers does."""
    args = script.Args(num_minibatches=1, update_epochs=1, max_grad_norm=0.1)
    batch = random_batch(script)
    flat, plain = (script.Agent(4, 2, args) for _ in range(2))
    plain.load_state_dict(flat.state_dict())
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, eps=1e-5)
    loss, _ = script.total_loss(plain, args, *batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), args.max_grad_norm)
    optimizer.step()
    script.update(flat, flat_optimizer(script, flat, 1e-3), batch, args)
    for ours, theirs in zip(flat.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("script", [bpo, ppo])
def test_the_compiled_step_is_the_plain_one(script):
    """Over several steps with minibatches of two sizes, at a learning rate that changes."""
    args = script.Args(max_grad_norm=0.1, num_minibatches=3, update_epochs=3)
    batch = random_batch(script)
    agents = [script.Agent(4, 2, args) for _ in range(2)]
    for parameter in agents[0].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    agents[1].load_state_dict(agents[0].state_dict())
    optimizers = [flat_optimizer(script, agent, 1e-2) for agent in agents]
    terms = []
    for agent, optimizer, step in zip(agents, optimizers, (script.step, script.compiled_step(agents[1], args))):
        for learning_rate in (1e-2, 1e-3):
            optimizer.param_groups[0]["lr"] = learning_rate
            torch.manual_seed(1)
            terms.append(script.update(agent, optimizer, batch, args, step))
    torch.testing.assert_close(terms[:2], terms[2:], rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(*(agent.parameters() for agent in agents)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    (plain,), (compiled,) = (optimizer.state.values() for optimizer in optimizers)
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("use_median", [True, False])
def test_the_separate_median_head_learns_only_if_it_is_used(use_median):
    args = bpo.Args(median_head="separate", use_median=use_median, num_minibatches=2, update_epochs=1)
    batch = random_batch(bpo)
    agent = bpo.Agent(4, 2, args)
    before = agent.median_head[0].weight.clone(), agent.value_head.weight[1].clone()
    bpo.update(agent, flat_optimizer(bpo, agent, 1e-3), batch, args)
    assert torch.equal(agent.median_head[0].weight, before[0]) != use_median
    assert torch.equal(agent.value_head.weight[1], before[1])  # the shared output is idle


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("bpo_continuous.py", []),
        pytest.param("ppo_baseline.py", [], marks=pytest.mark.slow),
        pytest.param("bpo_continuous.py", ["--compile"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_weights_and_episodes(script, more, tmp_path):
    flags = [*FLAGS, *more, "--env-id", "Hopper-v4", "--num-envs", 2, "--total-timesteps", 512 * 20, "--checkpoint-every", 2]
    whole = run(tmp_path, script, *flags)
    assert whole.returncode == 0, whole.stderr
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    process = subprocess.Popen(command(script, *flags), **pipes)
    killed = tmp_path / process.stdout.readline().split()[-1]
    iteration = 0
    for pause in (0.0, 0.15):  # instants that fall anywhere in an iteration, after some were learned from
        while not (killed / "checkpoint.pt").exists() or checkpoint(killed)["iteration"] <= iteration + 2:
            time.sleep(0.01)
        time.sleep(pause)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        iteration = checkpoint(killed)["iteration"]
        assert 2 < iteration < 20
        with open(killed / "episodes.csv", "a") as file:
            file.write("999," * 10_000)  # whatever a dying process may leave
        process = subprocess.Popen(command(script, "--resume", killed), **pipes)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    (finished,) = {path for path in (tmp_path / "runs").iterdir()} - {killed}
    assert_same_weights(finished, killed)
    assert episodes(finished) == episodes(killed) and len(episodes(killed)) > 20


@pytest.mark.slow
def test_ctrl_c_draws_the_curve_and_asynchronous_environments_resume_too(tmp_path):
    flags = [*FLAGS, "--env-id", "Hopper-v4", "--num-envs", 2, "--async-envs", "--total-timesteps", 512 * 40]
    flags += ["--checkpoint-every", 1]
    assert run(tmp_path, "bpo_continuous.py", *flags).returncode == 0
    process = subprocess.Popen(command("bpo_continuous.py", *flags), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    stopped = tmp_path / process.stdout.readline().split()[-1]
    while not (stopped / "checkpoint.pt").exists() or checkpoint(stopped)["iteration"] < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130 and f"--resume runs/{stopped.name}" in output
    assert (stopped / "learning_curve.png").exists() and 2 <= checkpoint(stopped)["iteration"] < 40
    assert run(tmp_path, "bpo_continuous.py", "--resume", stopped).returncode == 0
    (finished,) = {path for path in (tmp_path / "runs").iterdir()} - {stopped}
    assert_same_weights(finished, stopped)


def test_a_task_that_does_not_repeat_itself_resumes_with_new_episodes_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_dir = bpo.train(bpo.Args(env_id="Countdown-v0", total_timesteps=512, **SMALL))
    main(bpo, monkeypatch, "--resume", run_dir, "--total-timesteps", 1024)
    assert "led to another state: new episodes begin" in capsys.readouterr().out
    assert checkpoint(run_dir)["iteration"] == 4


class Unseeded(Countdown):
    """Observes nothing and ends never; its rewards follow from no seed."""

    def step(self, action):
        action *= 0  # an action that a task changes is saved as it was
        return np.zeros(2), np.random.default_rng().normal(), False, False, {}


gym.register("Unseeded-v0", Unseeded)


def test_a_replay_with_other_rewards_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo, "evaluate", lambda *_: [])
    run_dir = bpo.train(bpo.Args(env_id="Unseeded-v0", total_timesteps=512, **SMALL))
    main(bpo, monkeypatch, "--resume", run_dir, "--total-timesteps", 1024)
    assert "led to another state: new episodes begin" in capsys.readouterr().out


def test_actions_are_kept_as_they_were_and_not_without_end():
    env = bpo.Task(Unseeded())
    env.reset(seed=1)
    for _ in range(100_001):  # so the length of a replay is not that of the episode
        env.step(np.ones(1))
    assert len(env.episode["actions"]) == 100_000 and env.episode["actions"].min() == 1


@pytest.mark.parametrize("async_envs", [False, True])
def test_a_task_in_a_wrapper_of_its_own_resumes_to_the_same_weights(async_envs, tmp_path, monkeypatch, capsys):
    gym.register("Stacked-v0", lambda **kwargs: gym.wrappers.FrameStackObservation(gym.make("Hopper-v5", **kwargs), 2))
    monkeypatch.chdir(tmp_path)
    args = bpo.Args(env_id="Stacked-v0", total_timesteps=2048, num_envs=2, async_envs=async_envs, anneal_lr=False, **SMALL)
    whole, half = bpo.train(args), bpo.train(replace(args, total_timesteps=1024))
    main(bpo, monkeypatch, "--resume", half, "--total-timesteps", 2048)
    assert_same_weights(whole, half)
    assert episodes(whole) == episodes(half) and "new episodes" not in capsys.readouterr().out


def test_seeds_of_episodes_differ_and_follow_from_the_first():
    first, second, env = [], [], bpo.make_env("Pendulum-v1")
    for starts in (first, second):
        starts += [env.reset(seed=5 if i == 0 else None)[0] for i in range(50)]
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first, axis=0)) == 50
    plain, _ = gym.make("Pendulum-v1").reset(seed=5)
    np.testing.assert_array_equal(first[0], plain)  # the first episode is that of the user's seed


def test_a_folder_for_runs_that_leads_nowhere_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError):
        bpo.begin(bpo.Args(env_id="Pendulum-v1"))


def test_same_seed_same_weights_and_another_seed_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [bpo.train(bpo.Args(env_id="Pendulum-v1", total_timesteps=512, seed=seed, **SMALL)) for seed in (1, 1, 2)]
    assert_same_weights(runs[0], runs[1])
    assert not torch.equal(checkpoint(runs[0])["agent"]["critic.0.weight"], checkpoint(runs[2])["agent"]["critic.0.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["bpo_continuous.py", "ppo_baseline.py"])
def test_it_learns_to_balance_a_pole(script, tmp_path):
    flags = ["--env-id", "InvertedPendulum-v5", "--total-timesteps", 24576, "--num-steps", 2048, "--num-minibatches", 16]
    flags += ["--learning-rate", "1e-3"]
    result = run(tmp_path, script, *flags, "--eval-episodes", 5)
    assert result.returncode == 0, result.stderr
    score = float(result.stdout.split("evaluation: ")[1].split()[0])
    assert score > 400, result.stdout  # a random policy balances for about 6 steps, the task ends after 1000


def test_a_run_leaves_what_the_readme_lists(tmp_path):
    result = run(tmp_path, "bpo_continuous.py", *FLAGS, "--env-id", "Pendulum-v1", "--total-timesteps", 1024)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("Pendulum-v1__bpo_continuous__1__") and run_dir.name in result.stdout
    assert "100%" in result.stderr and len(result.stderr.splitlines()) < 5  # the bar, once a minute
    assert json.loads((run_dir / "config.json").read_text())["epsilon"] == bpo.Args().epsilon
    assert episodes(run_dir)[0] == ["step", "return", "length"] and episodes(run_dir)[1][::2] == ["200", "200"]
    assert (run_dir / "learning_curve.png").stat().st_size > 10_000
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = set(EventAccumulator(str(run_dir)).Reload().Tags()["scalars"])
    losses = "policy_loss value_loss median_loss entropy old_approx_kl approx_kl clipfrac ratio_error explained_variance"
    charts = "episodic_return episodic_length learning_rate SPS"
    assert {f"losses/{name}" for name in losses.split()} | {f"charts/{name}" for name in charts.split()} <= tags

    result = run(tmp_path, "bpo_continuous.py", "--evaluate", run_dir, "--eval-episodes", 2)
    assert result.returncode == 0 and "mean ± std of 2 episodes" in result.stdout


@pytest.mark.slow
def test_wandb_works_without_an_account(tmp_path):
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = [*FLAGS, "--env-id", "Pendulum-v1", "--total-timesteps", 256, "--track"]
    result = run(tmp_path, "bpo_continuous.py", *flags, env=environment)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "runs").glob("*/wandb/offline-run-*"))


def test_video_is_filmed_without_a_screen(tmp_path):
    flags = [*FLAGS, "--env-id", "InvertedPendulum-v5", "--total-timesteps", 256, "--capture-video"]
    result = run(tmp_path, "bpo_continuous.py", *flags)
    if result.returncode and "EGL" in result.stderr:
        pytest.skip("this machine has no EGL to render with")
    assert result.returncode == 0, result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert {path.name.split("-")[0] for path in run_dir.glob("videos/*.mp4")} == {"train", "eval"}


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    class Poisoned(Countdown):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, reward if self.episode < 100 else np.nan, *rest

    gym.register("Poisoned-v0", Poisoned)
    monkeypatch.chdir(tmp_path)
    args = bpo.Args(env_id="Poisoned-v0", total_timesteps=256 * 10, checkpoint_every=1, norm_reward=False, **SMALL)
    with pytest.raises(SystemExit, match=r"stopped at step 512: policy_loss is not finite"):
        bpo.train(args)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert checkpoint(run_dir)["iteration"] == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint(run_dir)["agent"].values())


@pytest.mark.parametrize("iteration", [0, 1])
def test_an_observation_that_is_not_finite_reaches_no_checkpoint(iteration, tmp_path, monkeypatch):
    """Normalised it would be clipped to 10, and only the running statistics, seen no sooner than the next loss, be lost."""

    class Overflowing(Countdown):
        steps = 0

        def step(self, action):
            obs, *rest = super().step(action)
            self.steps += 1
            return obs + (np.inf if self.steps == 256 * iteration + 100 else 0.0), *rest

    gym.register(f"Overflowing{iteration}-v0", Overflowing)
    monkeypatch.chdir(tmp_path)
    args = bpo.Args(env_id=f"Overflowing{iteration}-v0", total_timesteps=256 * 10, checkpoint_every=1, **SMALL)
    with pytest.raises(SystemExit, match=f"stopped at step {256 * (iteration + 1)}: .* is not finite"):
        bpo.train(args)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert checkpoint(run_dir)["iteration"] == iteration
    assert all(tensor.isfinite().all() for tensor in checkpoint(run_dir)["agent"].values())


def test_a_weight_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """The critic's, after an update's last step, which no loss has seen."""
    monkeypatch.chdir(tmp_path)
    step, calls = torch.optim.Adam.step, []

    def poisoned_step(self):
        step(self)
        calls.append(self)
        if len(calls) == 2 * SMALL["update_epochs"] * SMALL["num_minibatches"]:
            self.param_groups[0]["params"][0].data[-1] = np.nan

    monkeypatch.setattr(torch.optim.Adam, "step", poisoned_step)
    with pytest.raises(SystemExit, match=r"stopped at step 512: .* is not finite"):
        bpo.train(bpo.Args(env_id="Pendulum-v1", total_timesteps=1024, checkpoint_every=1, **SMALL))


def test_an_evaluation_ends_where_episodes_do_not(tmp_path, monkeypatch, capsys):
    class Endless(Countdown):
        def step(self, action):
            return np.zeros(2), 1.0, False, False, {}

    gym.register("Endless-v0", Endless)
    monkeypatch.chdir(tmp_path)
    bpo.train(bpo.Args(env_id="Endless-v0", total_timesteps=256, **SMALL))
    assert "evaluation: 100000.0" in capsys.readouterr().out


def test_a_full_disk_ends_a_run_with_one_line_and_it_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = bpo.Args(env_id="Pendulum-v1", total_timesteps=1280, checkpoint_every=1, **SMALL)
    whole, save, calls = bpo.train(args), torch.save, []

    def full_disk(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(*args)

    monkeypatch.setattr(torch, "save", full_disk)
    flags = [*FLAGS, "--env-id", "Pendulum-v1", "--total-timesteps", 1280, "--checkpoint-every", 1]
    with pytest.raises(SystemExit, match="No space left on device"):
        main(bpo, monkeypatch, *flags)
    (stopped,) = set((tmp_path / "runs").iterdir()) - {tmp_path / whole}
    assert checkpoint(stopped)["iteration"] == 1
    main(bpo, monkeypatch, "--resume", stopped)
    assert_same_weights(whole, stopped)
    assert episodes(whole) == episodes(stopped)


@pytest.mark.parametrize("cut", ["1", "14", "1408,", "1408,-3.5,200,0."])
def test_a_row_that_was_cut_off_does_not_outlive_a_resume(cut, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = bpo.train(bpo.Args(env_id="Pendulum-v1", total_timesteps=512, **SMALL))
    before = episodes(run_dir)
    with open(run_dir / "episodes.csv", "a") as file:
        file.write("300000,-3.5,200,0.1\n" + cut)
    bpo.begin(bpo.Args(resume=str(run_dir)))
    assert episodes(run_dir) == before


def test_train_works_in_a_thread_and_importing_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    thread = threading.Thread(
        target=lambda: folders.append(bpo.train(bpo.Args(env_id="Pendulum-v1", total_timesteps=512, **SMALL)))
    )
    thread.start()
    thread.join()
    assert checkpoint(folders[0])["iteration"] == 2
    program = (
        "import os, signal, sys, gymnasium, matplotlib, torch\n"
        "look = lambda: (gymnasium.logger.min_level, matplotlib.get_backend(), dict(os.environ), torch.get_num_threads(),"
        " torch.get_rng_state().sum(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)])\n"
        f"before = look(); sys.path.insert(0, {str(ROOT)!r})\n"
        "import bpo_continuous, ppo_baseline\n"
        "assert look() == before"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_evaluation_that_fails_is_not_passed_over(tmp_path, monkeypatch):
    def broken(*_):
        raise FileNotFoundError("no mesh")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo, "evaluate", broken)
    monkeypatch.setattr(sys, "argv", ["bpo.py", *map(str, FLAGS), "--env-id", "Pendulum-v1", "--total-timesteps", "256"])
    with pytest.raises(SystemExit, match="FileNotFoundError: no mesh"):
        bpo.main()


def test_whole_numbers_are_observations_too(tmp_path, monkeypatch):
    class Whole(Countdown):
        observation_space = gym.spaces.Discrete(1000)

        def reset(self, **kwargs):
            return int(super().reset(**kwargs)[0].sum()), {}

        def step(self, action):
            obs, *rest = super().step(action)
            return int(obs.sum()), *rest

    gym.register("Whole-v0", Whole)
    monkeypatch.chdir(tmp_path)
    bpo.train(bpo.Args(env_id="Whole-v0", total_timesteps=512, **SMALL))


def test_bytes_that_are_no_image_are_observations_too(tmp_path, monkeypatch):
    class Bytes(Countdown):
        observation_space = gym.spaces.Box(0, 255, (2,), np.uint8)

        def reset(self, **kwargs):
            return super().reset(**kwargs)[0].astype(np.uint8), {}

        def step(self, action):
            obs, *rest = super().step(action)
            return obs.astype(np.uint8), *rest

    gym.register("Bytes-v0", Bytes)
    monkeypatch.chdir(tmp_path)
    run_dir = bpo.train(bpo.Args(env_id="Bytes-v0", total_timesteps=256, **SMALL))
    assert checkpoint(run_dir)["agent"]["obs_rms.mean"][1] > 0


def test_a_curve_is_drawn_though_a_full_disk_cut_a_row(tmp_path):
    (tmp_path / "episodes.csv").write_text("step,return,length,wall_time\n64,1.0,8,0.1\n128,2.0,8,0.2\n19")
    bpo.finish(bpo.Args(), tmp_path)
    assert (tmp_path / "learning_curve.png").exists()


def test_what_can_t_be_filmed_or_tracked_is_one_line(tmp_path):
    environment = os.environ | {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "",
        "WANDB_BASE_URL": "http://localhost:1",
        "HOME": str(tmp_path),
    }
    tracked = run(tmp_path, "bpo_continuous.py", "--env-id", "Pendulum-v1", "--track", env=environment)
    assert tracked.returncode == 1 and "bpo_continuous: --track: " in tracked.stderr and "Traceback" not in tracked.stderr
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import test_continuous, bpo_continuous\n"
        "sys.argv[1:] = ['--env-id', 'Countdown-v0', '--capture-video']\n"
        "bpo_continuous.main()\n"
    )
    filmed = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert filmed.returncode == 1 and filmed.stderr.startswith("bpo_continuous: Countdown-v0 can't be made"), filmed.stderr


@pytest.mark.slow
def test_without_a_compiler_compile_says_so_and_goes_on(tmp_path):
    nowhere = {"PATH": "", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = [*FLAGS, "--env-id", "Pendulum-v1", "--compile", "--total-timesteps", 512, "--num-minibatches", 3]
    result = run(tmp_path, "bpo_continuous.py", *flags, env=os.environ | nowhere)
    (line,) = [line for line in result.stdout.splitlines() if "--compile" in line]
    assert result.returncode == 0 and "No working C++ compiler found" in line and "evaluation:" in result.stdout


BAD_INPUT = [
    (["--env-id", "HalfCheeta-v4"], "HalfCheetah"),
    (["--env-id", "HalfCheetah-v77"], "HalfCheetah-v"),
    (["--env-id", "CartPole-v1"], "continuous actions"),
    (["--env-id", "ALE/Pong-v5"], "bpo_atari.py"),
    (["--env-id", "Images-v0"], "images"),
    (["--env-id", "WholeActions-v0"], "a Box of reals"),
    (["--gamma", "1.5"], "--gamma"),
    (["--epsilon", "1.5"], "--epsilon"),
    (["--epsilon", "0"], "--epsilon"),
    (["--temperature", "0"], "--temperature"),
    (["--num-minibatches", "4096"], "--num-minibatches"),
    (["--total-timesteps", "100"], "--total-timesteps"),
    (["--num-envs", "0"], "--num-envs"),
    (["--seed", "-1"], "--seed"),
    (["--learning-rate", "0"], "--learning-rate"),
    (["--max-grad-norm", "-1"], "--max-grad-norm"),
    (["--env-id", "Reacher-v5", "--preset", "paper"], "Ant, HalfCheetah, Hopper, Humanoid, Swimmer"),
    (["--resume", "nowhere"], "nowhere"),
    (["--evaluate", "nowhere"], "nowhere"),
    (["--resume", "nowhere", "--seed", "3"], "only --total-timesteps"),
    (["--evaluate", "nowhere", "--env-id", "Hopper-v4"], "--eval-episodes"),
]


@pytest.mark.parametrize(("flags", "words"), BAD_INPUT, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_answered_in_one_line(flags, words, tmp_path, monkeypatch, capsys):
    class Images(Countdown):
        observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)

    class WholeActions(Countdown):
        action_space = gym.spaces.Box(-1, 1, (1,), np.int64)

    gym.registry.pop("Images-v0", None), gym.registry.pop("WholeActions-v0", None)
    gym.register("Images-v0", Images)
    gym.register("WholeActions-v0", WholeActions)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bpo_continuous.py", *flags])
    with pytest.raises(SystemExit) as stop:
        bpo.main()
    assert words in stop.value.code and "\n" not in stop.value.code and not (tmp_path / "runs").exists()


def test_foreign_and_damaged_run_folders_are_answered_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = bpo.train(bpo.Args(env_id="Pendulum-v1", total_timesteps=256, **SMALL))
    with pytest.raises(SystemExit, match="is a run of bpo_continuous"):
        ppo.load_checkpoint(run_dir)
    monkeypatch.setattr(sys, "argv", ["bpo_continuous.py", "--evaluate", str(run_dir), "--eval-episodes", "0"])
    with pytest.raises(SystemExit, match="--eval-episodes 0 must be at least 1"):
        bpo.main()
    whole = (run_dir / "checkpoint.pt").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not a checkpoint"):
        (run_dir / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(SystemExit, match="damaged"):
            bpo.load_checkpoint(run_dir)
    torch.save({"weights": 1}, run_dir / "checkpoint.pt")
    with pytest.raises(SystemExit, match="no checkpoint of this version"):
        bpo.load_checkpoint(run_dir)


def test_the_paper_preset_is_the_authors_row_and_flags_win_over_it(tmp_path, monkeypatch):
    seen = []
    only_parse(monkeypatch, seen)
    main(bpo, monkeypatch, "--env-id", "Hopper-v4", "--preset", "paper", "--gamma", "0.5")
    (args,) = seen
    assert (args.num_envs, args.num_steps, args.num_envs * args.num_steps // args.num_minibatches) == (4, 512, 32)
    assert (args.epsilon, args.temperature, args.learning_rate, args.gamma) == (0.25, 10.0, 9.808e-5, 0.5)
    assert not (args.norm_obs or args.norm_reward or args.norm_adv or args.anneal_lr)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("Ant", (2048, 256, 1e-4, 10, 0.3, 1e-3, 0.99, 0.95, 1.0, 0.0)),
        ("HalfCheetah", (512, 64, 2.0633e-5, 20, 0.1, 1e-3, 0.98, 0.92, 1.0, 0.000401762)),
        ("Hopper", (2048, 32, 9.808e-5, 10, 0.25, 10.0, 0.999, 0.95, 1.0, 0.0)),
        ("Humanoid", (512, 128, 1e-4, 5, 0.2, 1e-3, 0.99, 0.95, 2.0, 0.0)),
        ("Swimmer", (4096, 256, 3e-4, 10, 0.1, 0.01, 0.9999, 0.98, 1.0, 0.0)),
    ],
)
def test_no_change_of_the_default_reaches_the_authors_rows(task, row):
    """Batch, minibatch, learning rate, epochs, ε, λ, γ, λ of GAE, largest gradient and entropy bonus, as published."""
    args = bpo.Args(**{**bpo.PAPER_ALL, **bpo.PAPER[task]})
    batch = args.num_envs * args.num_steps
    assert row == (batch, batch // args.num_minibatches, args.learning_rate, args.update_epochs, args.epsilon, args.temperature,
                   args.gamma, args.gae_lambda, args.max_grad_norm, args.ent_coef)  # fmt: skip
    assert (args.log_std_init, args.hidden_size, args.activation) == (0.0, 256, "relu")


# What a run is told, and what it tells -----------------------------------------------------------------------------------


def only_parse(monkeypatch, seen):
    """Makes main() append its arguments to `seen` and train nothing."""
    monkeypatch.setattr(bpo, "begin", lambda args, *_: (None, args, None))
    monkeypatch.setattr(bpo, "train", lambda args, _: seen.append(args))


def main(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", *map(str, flags)])
    script.main()


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e20, 1e100])
def test_the_unit_of_observations_and_rewards_does_not_matter(scale):
    obs = 3 + np.random.default_rng(0).normal(size=(200, 4))
    obs[:, 3] = 7.0  # a constant is centred
    agents = [bpo.Agent(4, 2, bpo.Args()) for _ in range(2)]
    for agent, batch in zip(agents, (obs, obs * scale)):
        agent.obs_rms.update(batch[:50])
        agent.obs_rms.update(batch[50:])
    np.testing.assert_allclose(agents[1].normalize(obs * scale)[:, :3], agents[0].normalize(obs)[:, :3], rtol=1e-5, atol=1e-6)
    assert abs(agents[1].normalize(obs * scale)[:, 3]).max() < 1e-3 * max(scale, 1e3) and agents[0].obs_rms.scale[3] == 1
    if scale < 1e30:  # float32 observations
        narrow = bpo.RunningMeanStd(4)
        narrow.update((obs * scale).astype(np.float32))
        assert 0 < narrow.scale.min() * scale < 10


@pytest.mark.parametrize("script", [bpo, ppo])
def test_a_value_after_a_termination_may_be_anything(script):
    shape = (6, 2)
    rewards, values = torch.rand(shape), torch.rand(shape)
    next_values, terminations = torch.rand(shape), (torch.rand(shape) < 0.4).float()
    terminations[2, 0] = 1
    expected = script.gae(rewards, values, next_values, terminations, terminations, 0.9, 0.8)
    wild = torch.where(terminations > 0, torch.nan, next_values)
    torch.testing.assert_close(script.gae(rewards, values, wild, terminations, terminations, 0.9, 0.8), expected)


def test_a_run_survives_nan_where_an_episode_terminated_and_rewards_in_arrays(tmp_path, monkeypatch):
    class Last(Countdown):
        def step(self, action):
            obs, reward, terminated, *rest = super().step(action)
            return obs if not terminated else obs * np.nan, np.array([reward]), terminated, *rest

    gym.register("Last-v0", Last)
    monkeypatch.chdir(tmp_path)
    run_dir = bpo.train(bpo.Args(env_id="Last-v0", total_timesteps=512, **SMALL))
    assert all(tensor.isfinite().all() for tensor in checkpoint(run_dir)["agent"].values())


@pytest.mark.parametrize("script", [bpo, ppo])
def test_no_number_may_be_nan_or_infinite(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [name for name, value in vars(script.Args()).items() if isinstance(value, float)]
    assert len(names) >= 9
    for name in [*names, *(["median_temperature"] if script is bpo else [])]:
        flag = f"--{name.replace('_', '-')}"
        for value in ("nan", "inf", "-inf"):
            with pytest.raises(SystemExit, match=flag):
                main(script, monkeypatch, "--env-id", "Pendulum-v1", f"{flag}={value}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-steps", "1000000000000", "--total-timesteps", "10000000000000"],
        ["--num-envs", "1e9", "--num-steps", "1", "--total-timesteps", "1e10"],
        ["--hidden-size", "1000000000"],
        ["--num-threads", "1000000000000"],
    ],
)
def test_what_memory_can_t_hold_is_one_line(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(bpo, monkeypatch, "--env-id", "Pendulum-v1", *flags)
    assert flags[0] in stop.value.code and "\n" not in stop.value.code and not (tmp_path / "runs").exists()


def test_a_whole_number_may_be_written_as_a_power_of_ten(monkeypatch):
    seen = []
    only_parse(monkeypatch, seen)
    main(bpo, monkeypatch, "--total-timesteps", "1E+6", "--num-steps=2e3", "--learning-rate", "1e-3")
    assert (seen[0].total_timesteps, seen[0].num_steps, seen[0].learning_rate) == (1_000_000, 2000, 1e-3)
    with pytest.raises(SystemExit):
        main(bpo, monkeypatch, "--total-timesteps", "1.5e0")


@pytest.mark.parametrize("flag", ["--cuda", "--torch-deterministic", "--target-kl=0.1", "--save-model", "--clip-coef=0.2"])
def test_cleanrl_s_other_flags_are_told_what_stands_for_them(flag, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(bpo, monkeypatch, flag)
    assert stop.value.code == 2 and f"bpo_continuous: {flag.split('=')[0]}: " in capsys.readouterr().err.splitlines()[-1]


def test_resume_and_evaluate_know_which_flags_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = bpo.train(bpo.Args(env_id="Pendulum-v1", total_timesteps=512, **SMALL))
    default = bpo.Args()
    for flags in (["--seed", default.seed], ["--anneal-lr"], ["--env-id", default.env_id], [f"--gamma={default.gamma}"]):
        with pytest.raises(SystemExit, match="only --total-timesteps"):
            main(bpo, monkeypatch, "--resume", run_dir, *flags)
        with pytest.raises(SystemExit, match="--eval-episodes and --capture-video"):
            main(bpo, monkeypatch, "--evaluate", run_dir, *flags)
    for steps in (256, 0):
        with pytest.raises(SystemExit, match=r"already|at least one batch"):
            main(bpo, monkeypatch, "--resume", run_dir, "--total-timesteps", steps)
    with pytest.raises(SystemExit, match="takes a run folder"):
        main(bpo, monkeypatch, "--resume", run_dir / "checkpoint.pt")
    assert json.loads((run_dir / "config.json").read_text())["total_timesteps"] == 512


@pytest.mark.parametrize("anneal_lr", [False, True])
def test_a_finished_run_can_be_extended(anneal_lr, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = SMALL | {"env_id": "Hopper-v4", "anneal_lr": anneal_lr}
    whole, first = (bpo.train(bpo.Args(total_timesteps=steps, **settings)) for steps in (1024, 512))
    main(bpo, monkeypatch, "--resume", first, "--total-timesteps", 1024)
    assert checkpoint(first)["iteration"] == 4 and checkpoint(first)["args"]["total_timesteps"] == 1024
    assert json.loads((first / "config.json").read_text())["total_timesteps"] == 1024
    assert ("falls to 0 at step 1,024; here it is 0.0003" in capsys.readouterr().out) == anneal_lr
    if not anneal_lr:
        assert_same_weights(whole, first)
        assert episodes(whole) == episodes(first)


def test_a_run_that_is_extended_and_interrupted_at_once_stays_extended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = bpo.train(bpo.Args(env_id="Hopper-v4", total_timesteps=512, **SMALL))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bpo, "update", interrupted)
    with pytest.raises(SystemExit):
        main(bpo, monkeypatch, "--resume", run_dir, "--total-timesteps", 1024)
    assert checkpoint(run_dir)["args"]["total_timesteps"] == 1024 and checkpoint(run_dir)["iteration"] == 2


def test_load_agent_acts_as_the_evaluation_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for script, rescale in ((bpo, False), (bpo, True), (ppo, False)):
        args = script.Args(env_id="Pendulum-v1", total_timesteps=512, rescale_actions=rescale, **SMALL)
        run_dir = script.train(args)
        agent, env, score, done = script.load_agent(str(run_dir)), gym.make("Pendulum-v1"), 0.0, False
        assert agent.act(np.zeros((5, 3))).shape == (5, 1)
        obs, _ = env.reset(seed=args.seed + 1_050_000)
        while not done:
            action = agent.act(obs)
            assert env.action_space.contains(action.astype(np.float32))
            obs, reward, terminated, truncated, _ = env.step(action)
            score, done = score + float(reward), terminated or truncated
        assert f"evaluation: {score:.1f} ±" in capsys.readouterr().out


def test_the_best_policy_of_the_evaluations_on_the_way_is_kept(tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    args = bpo.Args(env_id="Pendulum-v1", total_timesteps=256 * 6, **SMALL | {"eval_episodes": 3, "learning_rate": 1e-2})
    run_dir, plain = bpo.train(replace(args, eval_every=1)), bpo.train(args)
    assert_same_weights(run_dir, plain)  # to look on changes nothing
    scores = [(event.step, event.value) for event in EventAccumulator(str(run_dir)).Reload().Scalars("eval/mean_return")]
    assert [step for step, _ in scores] == [256 * i for i in range(1, 7)]
    best = torch.load(run_dir / "best.pt", weights_only=True)
    assert (best["step"], best["score"]) == pytest.approx(max(scores, key=lambda pair: pair[1]))
    capsys.readouterr()
    main(bpo, monkeypatch, "--evaluate", run_dir / "best.pt", "--eval-episodes", 3)
    assert f"evaluation: {best['score']:.1f} ±" in capsys.readouterr().out
    assert bpo.load_agent(run_dir / "best.pt").act(np.zeros(3)).shape == (1,)


def test_rescaled_actions_are_those_of_gymnasium_s_wrapper():
    low, high = np.array([[1000.0, -3.0]], np.float32), np.array([[2000.0, 1.0]], np.float32)
    agent = bpo.Agent(3, 2, bpo.Args(rescale_actions=True))
    agent.action_bounds = low, high

    class Wide(Countdown):
        action_space = gym.spaces.Box(low, high)

    wrapper = gym.wrappers.RescaleAction(Wide(), -1.0, 1.0)
    for action in np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32):
        expected = wrapper.action(action.reshape(1, 2).clip(-1, 1))
        np.testing.assert_allclose(agent.bound(action[None])[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1000, 2000, "less than a tenth of"),
        (-100, 100, "less than a tenth of"),
        (-1e-3, 1e-3, "more than ten times"),
        (-1, 1, None),
        (-np.inf, np.inf, None),
        (0, np.inf, None),
        (0, 0, None),
    ],
)
def test_a_first_policy_that_misses_the_range_of_actions_is_told(low, high, words, tmp_path, monkeypatch, capsys):
    seen = []

    class Ranged(Countdown):
        action_space = gym.spaces.Box(low, high, (1,), np.float32)

        def step(self, action):
            seen.append(action)
            return super().step(action)

    gym.registry.pop("Ranged-v0", None)
    gym.register("Ranged-v0", Ranged)
    monkeypatch.chdir(tmp_path)
    bpo.train(bpo.Args(env_id="Ranged-v0", total_timesteps=256, **SMALL))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the first policy")]
    assert bool(lines) == bool(words) and (not words or (words in lines[0] and "--rescale" in lines[0]))
    if words:
        seen.clear()
        bpo.train(bpo.Args(env_id="Ranged-v0", total_timesteps=256, rescale_actions=True, **SMALL))
        assert "the first policy" not in capsys.readouterr().out
        assert low <= np.min(seen) < low + 0.4 * (high - low) and high >= np.max(seen) > high - 0.4 * (high - low)
    elif high == np.inf:
        with pytest.raises(SystemExit, match="--rescale-actions"):
            bpo.train(bpo.Args(env_id="Ranged-v0", total_timesteps=256, rescale_actions=True, **SMALL))


@pytest.mark.parametrize("failure", ["raise ValueError('broken')", "return np.zeros(3), 0.0, False, False, {}", "os._exit(3)"])
def test_an_error_in_one_process_ends_a_run(failure, tmp_path):
    program = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import gymnasium as gym, numpy as np, bpo_continuous

class Failing(gym.Env):
    observation_space, action_space, t = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,)), 0

    def reset(self, *, seed=None, options=None):
        self.slow = seed is not None and seed > 1
        return np.zeros(2, np.float32), {{}}

    def step(self, action):
        self.t += 1
        if self.t == 20:
            if self.slow:
                time.sleep(2)
            else:
                {failure}
        return np.zeros(2, np.float32), 0.0, False, False, {{}}

gym.register("Failing-v0", Failing)
if __name__ == "__main__":
    sys.argv[1:] = "--env-id Failing-v0 --async-envs --num-envs 2 --num-steps 64 --num-minibatches 2".split()
    bpo_continuous.main()
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    words = {"raise": "broken", "retur": "shape", "os._e": "the process of an environment ended"}[failure[:5]]
    assert result.returncode == 1 and words in result.stderr


def test_the_bar_says_return_and_speed_and_without_a_terminal_once_a_minute(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bpo.train(bpo.Args(env_id="Pendulum-v1", total_timesteps=256 * 20, **SMALL))
    bars = capsys.readouterr().err.split("\r")
    assert len(bars) <= 4 and "100%" in bars[-1] and "steps/s" in bars[-1] and "return=-" in bars[-1]


@pytest.mark.slow
def test_a_renderer_that_does_not_work_is_one_line_before_there_is_a_run_folder(tmp_path):
    flags = ["--env-id", "Hopper-v4", "--capture-video", "--total-timesteps", 2048]
    for variables in ({"DISPLAY": ":77", "MUJOCO_GL": "glfw"}, {"MUJOCO_GL": "nonsense"}):
        result = run(tmp_path, "bpo_continuous.py", *flags, env=os.environ | variables)
        assert result.returncode == 1 and not list(tmp_path.iterdir())
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("bpo_continuous: ")]
        assert "MUJOCO_GL" in line and "Traceback" not in result.stderr


def test_mujoco_s_own_models_give_no_warning_and_no_file(tmp_path):
    result = run(tmp_path, "bpo_continuous.py", *FLAGS, "--env-id", "HalfCheetah-v4", "--total-timesteps", 256)
    assert result.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert not re.search("mujoco|warning", result.stderr, re.IGNORECASE)


def test_an_error_of_a_task_s_own_code_is_one_line(tmp_path, monkeypatch):
    def broken(**_):
        raise KeyError("no such model")

    gym.register("Unmade-v0", broken)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"Unmade-v0 can't be made: KeyError: 'no such model'"):
        main(bpo, monkeypatch, "--env-id", "Unmade-v0")


def test_config_and_events_tell_versions_commit_and_flags(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    run_dir = bpo.train(bpo.Args(env_id="Pendulum-v1", total_timesteps=256, exp_name="first/try", **SMALL))
    assert run_dir.name.startswith("Pendulum-v1__first-try__1__")
    config = json.loads((run_dir / "config.json").read_text())
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"python", "numpy", "gymnasium", "mujoco"} <= set(config["versions"])
    assert not (ROOT / ".git").exists() or len(config["commit"].removesuffix("-dirty")) == 40
    events = EventAccumulator(str(run_dir)).Reload()
    (text,) = events.Tensors("hyperparameters/text_summary")
    assert b"|epsilon|0.3|" in text.tensor_proto.string_val[0]


@pytest.mark.slow
def test_a_run_resumed_from_within_its_folder_keeps_its_name_at_wandb(tmp_path):
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = [*FLAGS, "--env-id", "Pendulum-v1", "--total-timesteps", 256, "--track"]
    assert run(tmp_path, "bpo_continuous.py", *flags, env=environment).returncode == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    resumed = run(run_dir, "bpo_continuous.py", "--resume", ".", "--total-timesteps", 512, env=environment)
    assert resumed.returncode == 0, resumed.stderr
    folders = list(run_dir.glob("wandb/offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(run_dir.name) for folder in folders)
    assert all((folder / "files" / "bpo_continuous.py").exists() for folder in folders)


def test_the_paper_s_networks_start_as_the_authors_do():
    for script in (bpo, ppo):
        settings = script.paper_settings("Hopper", script.Args())
        torch.manual_seed(0)
        agent = script.Agent(5, 3, script.Args(**settings))
        gain = lambda layer: float(torch.linalg.matrix_norm(layer.weight, 2))  # noqa: E731  an orthogonal matrix times gain
        assert [gain(layer) for layer in agent.actor_mean[::2]] == pytest.approx([2**0.5, 2**0.5, 0.01], rel=1e-3)
        if script is bpo:
            assert [gain(layer) for layer in agent.median_head[::2]] == pytest.approx([1, 1, 1], rel=1e-3)


def test_the_preset_has_unrounded_values_and_the_ablation_its_own_temperature(monkeypatch):
    seen = []
    only_parse(monkeypatch, seen)
    main(bpo, monkeypatch, "--env-id", "Humanoid-v4", "--preset", "paper")
    main(bpo, monkeypatch, "--env-id", "Humanoid-v4", "--preset", "paper", "--no-use-median")
    main(bpo, monkeypatch, "--env-id", "HalfCheetah-v4", "--preset", "paper", "--gamma", bpo.Args().gamma)
    assert [args.temperature for args in seen] == [1e-3, 0.01, 1e-3] and seen[2].gamma == 0.99
    assert (seen[2].vf_coef, seen[2].ent_coef) == (2 * 0.58096, 0.000401762)
    assert ppo.PAPER["Humanoid"]["learning_rate"] == 3.56987e-5 and ppo.PAPER["Ant"]["ent_coef"] == 4.9646e-7


def test_a_first_policy_that_looks_at_its_input_keeps_its_ratio_of_one(tmp_path, monkeypatch):
    """With normalised observations and an actor that is not zero, π₀ is what collected the rollout."""
    seen, update = [], bpo.update

    def spy(agent, optimizer, batch, *rest):
        seen.append((batch[0].clone(), agent.obs_rms.scale.clone()))
        return update(agent, optimizer, batch, *rest)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo, "update", spy)
    bpo.train(bpo.Args(env_id="Pendulum-v1", total_timesteps=512, actor_gain=0.01, **SMALL))
    assert (seen[0][1] == 1).all() and not (seen[1][1] == 1).any()
