"""bpo_atari.py on the real Arcade Learning Environment: preprocessing, ends of lives and games, replay, learning, conduct."""

import csv
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import bpo_atari as bpo

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "update_epochs": 1, "eval_episodes": 1, "num_threads": 1}
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["bpo_atari.py", *map(str, flags)])
    bpo.main()


def events(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir)).Reload()


def checkpoint(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def assert_same_weights(first, second):
    first, second = checkpoint(first)["agent"], checkpoint(second)["agent"]
    assert all(torch.equal(first[name], second[name]) for name in first)


class Reference:
    """One game in gymnasium's own wrappers, started as the vector environment starts it: FIRE where there is one, no-ops."""

    def __init__(self, env_id, **options):
        game = gym.spec(env_id).kwargs
        base = gym.make(env_id, frameskip=1, repeat_action_probability=game["repeat_action_probability"])
        self.env = gym.wrappers.AtariPreprocessing(base, noop_max=0, **options)
        self.fire = "FIRE" in base.unwrapped.get_action_meanings()
        self.ale = base.unwrapped.ale

    def reset(self, frames, seed=None):
        self.env.reset(seed=seed)
        action = int(self.fire)
        while self.ale.getEpisodeFrameNumber() < frames:  # some games begin with frames of their own
            self.ale.act(action)
            action = 0
        self.ale.getScreenGrayscale(self.env.obs_buffer[0])
        self.env.obs_buffer[1].fill(0)
        self.lives = self.env.lives = self.ale.lives()
        self.stack = np.zeros((4, 84, 84), np.uint8)
        return self.push(self.env._get_obs())

    def push(self, screen):
        self.stack = np.concatenate((self.stack[1:], screen[None]))
        return self.stack

    def step(self, action):
        screen, reward, game_over, _, _ = self.env.step(action)
        life_lost, self.lives = self.ale.lives() < self.lives, self.ale.lives()
        if life_lost:  # Stable-Baselines3's stack begins anew with each life
            self.stack[:] = 0
        return self.push(screen), reward, game_over or life_lost, game_over


def ale_seed(seed):
    """gymnasium's Atari environment hands ALE the second word that its seed generates."""
    return np.random.SeedSequence(seed).generate_state(2)[1].astype(np.int32)


def first_of(*values):
    """The parameters of a test whose others are slow."""
    return [values[0], *(pytest.param(value, marks=pytest.mark.slow) for value in values[1:])]


@pytest.mark.parametrize("env_id", first_of("PongNoFrameskip-v4", "BreakoutNoFrameskip-v4", "ALE/Boxing-v5", "ALE/Asterix-v5"))
def test_screens_rewards_and_ends_are_those_of_gymnasium_s_wrappers(env_id):
    num_envs, steps, gym_seeds = 2, 3000, [1, 4]
    seeds = np.array([ale_seed(seed) for seed in gym_seeds])
    assert (seeds >= 0).all()
    envs, references = bpo.AtariEnvs(env_id, num_envs), [Reference(env_id) for _ in range(num_envs)]
    obs = envs.seeded_reset(seeds.copy())
    for i, reference in enumerate(references):
        np.testing.assert_array_equal(obs[i], reference.reset(envs.frames[i], gym_seeds[i]))
    actions = np.random.default_rng(0).integers(0, envs.single_action_space.n, (steps, num_envs))
    ends = rewarded = 0
    life_lost = np.zeros(num_envs, bool)
    for action in actions:
        obs, rewards, terminations, truncations, infos = envs.step(action)
        np.testing.assert_array_equal(infos["forced"], life_lost & references[0].fire)
        life_lost = terminations & ~infos["game_over"]
        for i, reference in enumerate(references):
            expected_obs, reward, terminated, game_over = reference.step(1 if infos["forced"][i] else action[i])
            assert (rewards[i], terminations[i], infos["game_over"][i]) == (reward, terminated, game_over)
            if game_over:
                expected_obs = reference.reset(envs.frames[i])
            np.testing.assert_array_equal(obs[i], expected_obs)
            ends, rewarded = ends + terminated, rewarded + (reward != 0)
        assert not truncations.any()
    assert ends > 0 and rewarded > 20


def ends_of_lives(env_id, steps):
    """Of each random action: does it terminate, here and in gymnasium's wrapper, and does the game go on at a counter of 0?"""
    envs, reference = bpo.AtariEnvs(env_id, 1), Reference(env_id, frame_skip=1, terminal_on_life_loss=True)
    envs.seeded_reset(np.array([ale_seed(1)]))
    reference.reset(envs.frames[0], 1)
    ends = []
    for action in np.random.default_rng(0).integers(0, envs.single_action_space.n, steps):
        _, _, terminations, _, infos = envs.step(np.array([action]))
        wrapper_ended = False
        for _ in range(4):
            wrapper_ended |= reference.env.step(envs.fire if infos["forced"][0] else action)[2]
            if reference.ale.game_over():
                break
        assert infos["game_over"][0] == reference.ale.game_over()
        ends.append((terminations[0], wrapper_ended, envs.life_lost[0] and envs.lives[0] == 0))
        if infos["game_over"][0]:
            reference.reset(envs.frames[0])
    return np.array(ends).T


@pytest.mark.parametrize("env_id", ["ALE/BankHeist-v5", "ALE/MsPacman-v5"])
def test_a_lost_life_terminates_where_gymnasium_s_wrapper_has_it_with_a_counter_of_0_too(env_id):
    ours, wrappers, went_on = ends_of_lives(env_id, 700)
    np.testing.assert_array_equal(ours, wrappers)
    assert ours.sum() > 3 and went_on.any() == (env_id == "ALE/BankHeist-v5")


def test_no_transition_crosses_a_reset_and_a_lost_life_ends_the_bootstrap_but_not_the_game(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen, gae, step, ends = {}, bpo.gae, bpo.AtariEnvs.step, []

    def spy_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
        seen.update(values=values, next_values=next_values, terminations=terminations, dones=dones)
        return gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda)

    def cut_step(envs, actions):  # as if the time limit fell on every 50th step of the first game
        obs, rewards, terminations, truncations, infos = step(envs, actions)
        ends.append((terminations.copy(), infos["game_over"].copy()))
        if len(ends) % 50 == 0 and not terminations[0]:
            truncations = np.array([True, False])
            infos = infos | {"final_obs": np.full_like(obs, 7)}
        return obs, rewards, terminations, truncations, infos

    class Constant(bpo.Agent):
        def forward(self, obs):  # a value that names the screens
            names = obs.float().sum((1, 2, 3))
            return torch.zeros(len(obs), 4), names, names

    monkeypatch.setattr(bpo, "gae", spy_gae)
    monkeypatch.setattr(bpo, "Agent", Constant)
    monkeypatch.setattr(bpo, "update", lambda *_: {})
    monkeypatch.setattr(bpo.AtariEnvs, "step", cut_step)
    monkeypatch.setattr(bpo, "evaluate", lambda *_: [])
    flags = SMALL | {"num_steps": 300, "total_timesteps": 600}
    bpo.train(bpo.Args(env_id="BreakoutNoFrameskip-v4", **flags))
    terminations, game_over = (np.array(column) for column in zip(*ends))
    assert terminations.sum() > game_over.sum() > 0  # lives and games ended
    np.testing.assert_array_equal(seen["terminations"], terminations)
    truncated = (seen["dones"] - seen["terminations"])[:, 0].nonzero()[:, 0].tolist()
    assert truncated and all(step % 50 == 49 for step in truncated)
    following = torch.cat((seen["values"][1:], seen["next_values"][-1:]))
    following[truncated, 0] = 7.0 * 4 * 84 * 84  # the last screens of the game that was cut off, not the first of the next
    assert torch.equal(seen["next_values"], following)


def test_a_value_of_nan_after_a_termination_does_not_stop_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo, "evaluate", lambda *_: [])
    step, forward, played = bpo.AtariEnvs.step, bpo.Agent.forward, []

    def ending_step(envs, actions):
        obs, rewards, terminations, truncations, infos = step(envs, actions)
        played.append(actions)
        if len(played) == SMALL["num_steps"]:  # both games end, the first by its time limit as well
            obs, infos = np.full_like(obs, 255), infos | {"final_obs": np.full_like(obs, 255)}
            terminations, truncations = np.array([True, True]), np.array([True, False])
        return obs, rewards, terminations, truncations, infos

    def forward_with_nan(agent, obs):
        logits, values, median_values = forward(agent, obs)
        return logits, values.where((obs < 255).any((1, 2, 3)), np.nan), median_values

    monkeypatch.setattr(bpo.AtariEnvs, "step", ending_step)
    monkeypatch.setattr(bpo.Agent, "forward", forward_with_nan)
    run_dir = bpo.train(bpo.Args(env_id="ALE/Boxing-v5", total_timesteps=64, **SMALL))
    assert checkpoint(run_dir)["iteration"] == 1


def test_fire_follows_a_lost_life_and_is_not_learned_from(tmp_path, monkeypatch):
    envs = bpo.AtariEnvs("BreakoutNoFrameskip-v4", 2)
    envs.seeded_reset(np.arange(2))
    over = sum(envs.step(np.zeros(2, int))[4]["game_over"] for _ in range(300))
    assert (over > 0).all()  # without FIRE the ball would lie still after the first life
    monkeypatch.chdir(tmp_path)
    step, played, batches = bpo.AtariEnvs.step, [], []

    def spy_step(envs, actions):
        result = step(envs, actions)
        played.append((actions.copy(), result[4]["forced"]))
        return result

    monkeypatch.setattr(bpo.AtariEnvs, "step", spy_step)
    monkeypatch.setattr(bpo, "update", lambda agent, optimizer, batch, args: batches.append(batch) or {})
    monkeypatch.setattr(bpo, "evaluate", lambda *_: [])
    bpo.train(bpo.Args(env_id="BreakoutNoFrameskip-v4", **SMALL | {"num_steps": 300, "total_timesteps": 600}))
    actions, forced = (np.array(column) for column in zip(*played))
    assert forced.any()
    np.testing.assert_array_equal(batches[0][1].numpy(), actions[~forced])
    assert {len(tensor) for tensor in batches[0]} == {600 - forced.sum()}


def test_a_real_time_limit_cuts_the_game_and_leaves_its_last_screens(monkeypatch):
    game = bpo.check_env_id("PongNoFrameskip-v4") | {"max_num_frames_per_episode": 400}
    monkeypatch.setattr(bpo, "check_env_id", lambda _: game)
    envs = bpo.AtariEnvs("PongNoFrameskip-v4", 3)
    obs, cut = envs.seeded_reset(np.arange(3)), 0
    for action in np.random.default_rng(0).integers(0, 6, (250, 3)):
        before = obs
        obs, _, terminations, truncations, infos = envs.step(action)
        assert not terminations.any() and (infos["game_over"] == truncations).all()
        for i in np.flatnonzero(truncations):
            np.testing.assert_array_equal(infos["final_obs"][i][:-1], before[i][1:])  # one more screen of the same game
            assert (obs[i][1:] != infos["final_obs"][i][:-1]).any()
            cut += 1
    assert 6 <= cut <= 9  # 400 frames are 100 actions and the no-ops before them


@pytest.mark.parametrize("env_id", first_of("BreakoutNoFrameskip-v4", "ALE/Boxing-v5"))
def test_replayed_games_go_on_bit_for_bit(env_id, monkeypatch):
    monkeypatch.setattr(bpo.AtariEnvs, "reseed_after", 200)  # so that games of several seeds are met
    envs, twin = bpo.AtariEnvs(env_id, 3), bpo.AtariEnvs(env_id, 3)
    envs.seeded_reset(5 + np.arange(3))
    actions, played = np.random.default_rng(0).integers(0, envs.single_action_space.n, (1400, 3)), 0
    while played < 1100 or not (envs.life_lost.any() or env_id == "ALE/Boxing-v5"):  # in Breakout FIRE is due
        obs, *_ = envs.step(actions[played])
        played += 1
    lengths = [len(played) for played in envs.actions]
    assert len(set(lengths)) > 1 or env_id != "BreakoutNoFrameskip-v4"
    np.testing.assert_array_equal(
        obs, twin.replay(envs.seeds.copy(), [np.frombuffer(bytes(a), np.uint8) for a in envs.actions])
    )
    np.testing.assert_array_equal(envs.life_lost, twin.life_lost)
    for action in actions[played:]:
        for ours, theirs in zip(envs.step(action)[:4], twin.step(action)[:4]):
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(envs.seeds, twin.seeds)
    assert envs.actions == twin.actions


@pytest.mark.parametrize("loss", first_of("bpo", "ppo"))
def test_a_stopped_run_resumes_to_the_same_weights_and_episodes(loss, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo, "evaluate", lambda *_: [])
    args = bpo.Args(env_id="ALE/Breakout-v5", loss=loss, total_timesteps=64 * 12, checkpoint_every=3, **SMALL)
    whole = bpo.train(args)
    save, saved = bpo.save_checkpoint, []

    def dying_save(path, agent, args, iteration, **state):
        save(path, agent, args, iteration=iteration, **state)
        saved.append(iteration)
        if saved[-1] == 6:
            raise KeyboardInterrupt  # as if killed

    monkeypatch.setattr(bpo, "save_checkpoint", dying_save)
    with pytest.raises(KeyboardInterrupt):
        bpo.train(args)
    (killed,) = set(Path("runs").iterdir()) - {whole}
    monkeypatch.setattr(bpo, "save_checkpoint", save)
    with open(killed / "episodes.csv", "a") as file:
        file.write("500,1.0,100,1.0\n1")  # what was played after the checkpoint, the last row cut off
    bpo.train(bpo.Args(resume=str(killed)))
    assert saved == [0, 3, 6] and checkpoint(killed)["iteration"] == 12
    assert_same_weights(whole, killed)
    rows = [[row[:3] for row in csv.reader(open(run / "episodes.csv"))] for run in (whole, killed)]  # noqa: SIM115
    assert rows[0] == rows[1] and len(rows[0]) > 2


@pytest.mark.slow
def test_a_run_fits_its_values_and_keeps_its_ratios_in_the_band(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo, "evaluate", lambda *_: [])
    flags = {"num_envs": 8, "num_steps": 32, "num_minibatches": 1, "update_epochs": 4}
    run_dir = bpo.train(bpo.Args(env_id="ALE/Boxing-v5", total_timesteps=32 * 8 * 10, **flags))
    logged = events(run_dir)
    explained = [event.value for event in logged.Scalars("losses/explained_variance")]
    outside = [event.value for event in logged.Scalars("losses/clipfrac")]
    assert np.mean(explained[-3:]) > np.mean(explained[:3])
    assert max(outside) < 0.2
    errors = [event.value for event in logged.Scalars("losses/ratio_error")]
    assert len(errors) == 10 and all(0 < error < 0.6 for error in errors)
    assert (run_dir / "learning_curve.png").stat().st_size > 10_000


def test_the_policy_samples_its_own_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    actions = (logits.log_softmax(-1) + bpo.gumbel(200_000, 4)).argmax(-1)
    torch.testing.assert_close(actions.bincount() / 200_000, logits.softmax(-1), atol=5e-3, rtol=0)


def test_log_prob_and_entropy_are_those_of_a_categorical_distribution():
    torch.manual_seed(0)
    agent = bpo.Agent(6, bpo.Args())
    obs, zeros = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8), torch.zeros(5)
    log_policy, expected_values, _ = agent(obs)
    torch.testing.assert_close(log_policy.exp().sum(-1), torch.ones(5))
    actions, logprobs, values = agent.sample(obs, bpo.gumbel(5, 6))
    expected = torch.distributions.Categorical(logits=log_policy)
    torch.testing.assert_close(logprobs, expected.log_prob(actions))
    assert torch.equal(values, expected_values)
    _, terms = bpo.total_loss(agent, bpo.Args(), obs, actions, logprobs, zeros, zeros)
    torch.testing.assert_close(terms["entropy"], expected.entropy().mean())


@pytest.mark.parametrize("use_median", [True, False])
def test_the_ratio_error_is_the_distance_to_the_target_of_the_critics_as_they_are(use_median):
    torch.manual_seed(0)
    args = bpo.Args(use_median=use_median, num_minibatches=3, temperature=0.5)
    agent = bpo.Agent(6, args)
    obs, actions = torch.randint(256, (16, 4, 84, 84), dtype=torch.uint8), torch.randint(6, (16,))
    logprobs, returns = -1.8 + 0.1 * torch.randn(16), torch.randn(16)
    log_policy, values, median_values = agent(obs)
    ratio = torch.exp(log_policy[torch.arange(16), actions] - logprobs)
    threshold = median_values if use_median else values
    target = 1 + 0.3 * torch.tanh(returns - threshold)
    assert torch.equal(median_values, values) != use_median
    batch = obs, actions, logprobs, None, returns
    torch.testing.assert_close(bpo.ratio_metrics(agent, args, *batch)["ratio_error"], (ratio - target).abs().mean())
    args = replace(args, loss="ppo")
    assert "ratio_error" not in bpo.ratio_metrics(bpo.Agent(6, args), args, *batch)


def test_the_heads_are_the_authors():
    torch.manual_seed(0)
    agent, seen, eye = bpo.Agent(6, bpo.Args()), [], torch.eye(256)
    agent.features.register_forward_hook(lambda *call: seen.append(call[-1]))
    median_values = agent(torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8))[2]
    hidden = agent.critic(seen[0])
    first, _, last = agent.median_head
    torch.testing.assert_close(median_values, last(first(hidden).relu())[:, 0])  # on the critic's features
    torch.testing.assert_close(first.weight @ first.weight.T, eye, atol=1e-5, rtol=0)  # gain 1, not √2
    torch.testing.assert_close(agent.critic[0].weight @ agent.critic[0].weight.T, 2 * eye, atol=1e-5, rtol=0)
    for head, gain in ((last, 1.0), (agent.value_head, 1.0), (agent.actor[-1], 0.01)):
        torch.testing.assert_close(head.weight.norm(dim=1), torch.full((len(head.weight),), gain))
    for args in (bpo.Args(loss="ppo"), bpo.Args(use_median=False)):
        assert not hasattr(bpo.Agent(6, args), "median_head")
    ppo = bpo.Agent(6, bpo.Args(loss="ppo"))
    shapes = [tuple(p.shape) for name, p in ppo.named_parameters() if not name.startswith(("convolutions", "features"))]
    assert shapes == [(6, 512), (6,), (1, 512), (1,)]  # Stable-Baselines3's CnnPolicy: straight from the 512


def test_with_amp_only_the_trunk_is_in_bfloat16():
    torch.manual_seed(0)
    agent, seen = bpo.Agent(6, bpo.Args(amp=True)), []
    agent.features.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    obs = torch.randint(256, (64, 4, 84, 84), dtype=torch.uint8)
    logits, values, median_values = agent(obs)
    assert seen == [torch.bfloat16]
    for outputs in (logits, values, median_values):
        assert outputs.dtype == torch.float32
        assert (outputs.bfloat16() == outputs).float().mean() < 0.1  # not rounded to its 8 bits
    assert len(values.unique()) > 60


def test_the_network_is_the_nature_cnn():
    torch.manual_seed(0)
    agent = bpo.Agent(6, bpo.Args())
    obs = np.random.default_rng(0).integers(0, 256, (3, 4, 84, 84), np.uint8)
    x = agent.convolutions(torch.from_numpy(obs).float() / 255)  # as the layers are written, in torch's usual layout
    assert x.shape == (3, 64, 7, 7)
    features = agent.features(x.permute(0, 2, 3, 1).flatten(1))
    expected = agent.actor(features).log_softmax(-1)
    torch.testing.assert_close(agent(torch.from_numpy(obs))[0], expected, rtol=1e-4, atol=1e-5)


def test_ppo_and_bpo_have_the_authors_settings_and_flags_win(monkeypatch):
    seen = []
    monkeypatch.setattr(bpo, "begin", lambda args, _: (None, args, None))
    monkeypatch.setattr(bpo, "train", lambda args, _: seen.append(args))
    for flags in (
        [],
        ["--loss", "ppo"],
        ["--loss=ppo", "--epsilon", "0.2"],
        ["--epsilon", "0.3", "--no-norm-adv", "--loss", "ppo"],
    ):
        main(monkeypatch, *flags)
    rows = [(a.update_epochs, a.epsilon, a.ent_coef, a.max_grad_norm, a.learning_rate, a.gamma) for a in seen]
    assert rows[0] == (5, 0.3, 1e-3, 1.0, 2.5e-4, 0.98)
    assert rows[1] == (4, 0.1, 0.01, 0.5, 2.5e-4, 0.98) and rows[2][1] == 0.2
    assert rows[3] == (4, 0.3, 0.01, 0.5, 2.5e-4, 0.98)  # a flag wins with its default value too
    assert [a.norm_adv for a in seen] == [False, True, True, False]
    assert all(a.num_envs * a.num_steps // a.num_minibatches == 256 for a in seen)


@pytest.mark.slow
def test_a_game_is_filmed_and_a_trained_policy_played_again(tmp_path):
    def run(*flags):
        command = [sys.executable, str(ROOT / "bpo_atari.py"), *map(str, flags)]
        environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    result = run(*FLAGS, "--env-id", "ALE/Breakout-v5", "--total-timesteps", 64, "--capture-video", "--track")
    assert result.returncode == 0, result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    (video,) = run_dir.glob("videos/eval*.mp4")
    assert f"video: {video.relative_to(tmp_path)}\n" in result.stdout
    (tracked,) = run_dir.glob("wandb/offline-run-*/files")
    assert (tracked / "bpo_atari.py").exists() and list(tracked.glob("media/videos/**/*.mp4"))
    result = run("--evaluate", run_dir, "--eval-episodes", 3)
    assert result.returncode == 0 and "mean ± std of 3 games" in result.stdout, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()[:3]] == [f"evaluation, game {i} of 3" for i in (1, 2, 3)]
    result = run("--evaluate", run_dir, "--eval-episodes", 0)
    assert result.returncode == 1 and result.stderr.startswith("bpo_atari: --eval-episodes 0 must be from 1 to")


@pytest.mark.slow
def test_a_run_goes_on_where_its_device_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = bpo.train(bpo.Args(total_timesteps=64, **SMALL))
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["args"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    state["args"] |= {"device": "cuda:9", "total_timesteps": 128}
    torch.save(state, run_dir / "checkpoint.pt")
    for flags, ends in (([], False), (["--device", "cpu"], True)):
        monkeypatch.setattr(sys, "argv", ["bpo_atari.py", "--resume", str(run_dir), *flags])
        if ends:
            bpo.main()
        else:
            with pytest.raises(SystemExit, match="cuda:9 is not to be had here: take --device cpu"):
                bpo.main()
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["iteration"] == 2


@pytest.mark.parametrize("env_id", ["ALE/VideoCheckers-v5", "ALE/Backgammon-v5"])
def test_games_without_a_noop_are_filmed_too(env_id, tmp_path, monkeypatch):
    args = bpo.Args(env_id=env_id, device="cpu")
    step, steps = bpo.gym.wrappers.AtariPreprocessing.step, []

    def short(self, action):
        obs, reward, _, truncated, info = step(self, action)
        steps.append(action)
        return obs, reward, len(steps) > 5, truncated, info

    monkeypatch.setattr(bpo.gym.wrappers.AtariPreprocessing, "step", short)
    num_actions = bpo.gym.make(env_id).action_space.n
    bpo.film_game(bpo.Agent(num_actions, args), args, tmp_path)
    assert list(tmp_path.glob("videos/eval*.mp4"))


def test_a_film_shows_the_policy_what_training_does(tmp_path, monkeypatch):
    args = bpo.Args(env_id="BreakoutNoFrameskip-v4", device="cpu")
    step, seen, played, lives = bpo.gym.wrappers.AtariPreprocessing.step, [], [], [5]

    def short(self, action):
        obs, reward, _, truncated, info = step(self, action)
        played.append(action)
        lives.append(info["lives"])
        return obs, reward, len(played) > 120, truncated, info

    class Idle:
        def act(self, obs, generator):
            seen.append(obs.any((1, 2)).tolist())
            return np.int64(0)

    monkeypatch.setattr(bpo.gym.wrappers.AtariPreprocessing, "step", short)
    bpo.film_game(Idle(), args, tmp_path)
    lost = [0] + [step for step in range(1, 121) if lives[step] < lives[step - 1]]
    assert len(lost) > 2 and [step for step, action in enumerate(played) if action == 1] == lost  # FIRE begins each life
    for step in lost:
        assert seen[step] == [False, False, False, True] and seen[step + 3] == [True] * 4


def test_openmp_s_variables_are_respected_and_its_idle_threads_sleep():
    command = [sys.executable, "-c", "import bpo_atari; print(bpo_atari.Args().num_threads)"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    for variables, threads, policy in (
        ({}, len(os.sched_getaffinity(0)), "PASSIVE"),
        ({"OMP_NUM_THREADS": "3,2", "OMP_WAIT_POLICY": "ACTIVE"}, 3, "ACTIVE"),
    ):
        variables |= {"OMP_DISPLAY_ENV": "true"}
        result = subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)
        assert result.stdout == f"{threads}\n" and f"OMP_WAIT_POLICY = '{policy}'" in result.stderr


def test_every_float_flag_must_be_finite():
    args = bpo.Args(device="cpu")
    names = [field.name for field in fields(args) if field.type is float]
    assert len(names) > 8
    for name in names:
        for value in (np.nan, np.inf, -np.inf):
            with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} {value} must be"):
                bpo.check_args(replace(args, **{name: value}))


# What a run is told, and what it tells -----------------------------------------------------------------------------------


def test_a_whole_number_may_be_written_as_a_power_of_ten_and_cleanrl_s_other_flags_are_answered(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(bpo, "begin", lambda args, _: (None, args, None))
    monkeypatch.setattr(bpo, "train", lambda args, _: seen.append(args))
    main(monkeypatch, "--total-timesteps", "1e6", "--num-steps=2e3", "--learning-rate", "1e-3")
    assert (seen[0].total_timesteps, seen[0].num_steps, seen[0].learning_rate) == (1_000_000, 2000, 1e-3)
    for flag in ("--cuda", "--no-cuda", "--clip-coef=0.2", "--clip_vloss", "--target-kl"):
        with pytest.raises(SystemExit):
            main(monkeypatch, flag)
        name = flag.split("=")[0].replace("--no-", "--").replace("_", "-")
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"bpo_atari: {name}: ")


def test_resume_and_evaluate_know_which_flags_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo, "evaluate", lambda *_: [])
    run_dir, default = bpo.train(bpo.Args(total_timesteps=128, **SMALL)), bpo.Args()
    config = (run_dir / "config.json").read_text()
    for flags in (["--seed", default.seed], ["--no-anneal-lr"], [f"--gamma={default.gamma}"], ["--loss", "bpo"]):
        with pytest.raises(SystemExit, match="only --total-timesteps and --device"):
            main(monkeypatch, "--resume", run_dir, *flags)
        with pytest.raises(SystemExit, match="--eval-episodes, --capture-video and --device"):
            main(monkeypatch, "--evaluate", run_dir, *flags)
    for steps in (64, 0):
        with pytest.raises(SystemExit, match="at step 128 already"):
            main(monkeypatch, "--resume", run_dir, "--total-timesteps", steps)
    assert (run_dir / "config.json").read_text() == config


@pytest.mark.parametrize("anneal_lr", [False, True])
def test_a_finished_run_can_be_extended(anneal_lr, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo, "evaluate", lambda *_: [])
    settings = SMALL | {"env_id": "ALE/Breakout-v5", "anneal_lr": anneal_lr, "device": "cpu"}
    whole, first = (bpo.train(bpo.Args(total_timesteps=steps, **settings)) for steps in (256, 128))
    main(monkeypatch, "--resume", first, "--total-timesteps", 256)
    assert checkpoint(first)["iteration"] == 4 and checkpoint(first)["args"]["total_timesteps"] == 256
    assert json.loads((first / "config.json").read_text())["total_timesteps"] == 256
    assert ("falls to 0 at step 256; here it is 0.000125" in capsys.readouterr().out) == anneal_lr
    if not anneal_lr:
        assert_same_weights(whole, first)


@pytest.mark.parametrize("loss", ["bpo", "ppo"])
def test_load_agent_acts_as_the_evaluation_does(loss, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = bpo.Args(env_id="ALE/Breakout-v5", loss=loss, total_timesteps=128, device="cpu", **SMALL)
    agent = bpo.load_agent(str(bpo.train(args)))
    envs, generator, over, score = bpo.AtariEnvs(args.env_id, 1), torch.Generator().manual_seed(args.seed), False, 0.0
    obs = envs.seeded_reset(np.array([args.seed + 50_500]))
    while not over:
        obs, rewards, _, _, infos = envs.step(agent.act(obs, generator))
        score, over = score + rewards[0], infos["game_over"][0]
    assert f"evaluation: {score:.1f} ±" in capsys.readouterr().out
    env = gym.wrappers.AtariPreprocessing(gym.make(args.env_id, frameskip=1))
    env = gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")
    obs, _ = env.reset(seed=1)
    for _ in range(20):
        action = agent.act(obs)
        assert env.action_space.contains(action)
        obs, *_ = env.step(action)
    assert agent.act(np.stack([obs] * 5)).shape == (5,)
    with torch.no_grad():
        agent.actor[-1].bias[2] = 100
    assert agent.act(obs) == 2 and agent.act(np.stack([obs] * 3)).tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="channels"):
        agent.act(obs.transpose(1, 2, 0))


@pytest.mark.slow
def test_the_best_policy_of_the_evaluations_on_the_way_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = SMALL | {"eval_episodes": 2, "learning_rate": 1e-3, "device": "cpu"}
    args = bpo.Args(env_id="ALE/Breakout-v5", total_timesteps=64 * 3, exp_name="first/try", **flags)
    run_dir, plain = bpo.train(replace(args, eval_every=1)), bpo.train(args)
    assert_same_weights(run_dir, plain)  # to look on changes nothing
    logged = events(run_dir)
    scores = [(event.step, event.value) for event in logged.Scalars("eval/mean_return")]
    assert [step for step, _ in scores] == [64, 128, 192]
    best = torch.load(run_dir / "best.pt", weights_only=True)
    assert (best["step"], best["score"]) == pytest.approx(max(scores, key=lambda pair: pair[1]))
    capsys.readouterr()
    main(monkeypatch, "--evaluate", run_dir / "best.pt", "--eval-episodes", 2, "--device", "cpu")
    assert f"evaluation: {best['score']:.1f} ±" in capsys.readouterr().out
    assert bpo.load_agent(run_dir / "best.pt").act(np.zeros((3, 4, 84, 84), np.uint8)).shape == (3,)
    assert run_dir.name.startswith("ALE-Breakout-v5__first-try__1__")
    assert b"|epsilon|0.3|" in logged.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0]
    config = json.loads((run_dir / "config.json").read_text())
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    assert not (ROOT / ".git").exists() or len(config["commit"].removesuffix("-dirty")) == 40
    assert {"python", "numpy", "gymnasium", "ale-py"} <= set(config["versions"])


def test_a_large_run_is_evaluated_on_a_small_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_dir = bpo.train(bpo.Args(env_id="ALE/Breakout-v5", total_timesteps=64, **SMALL))
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    state["args"] |= {"num_envs": 10**6, "num_threads": 512, "total_timesteps": 10**9}
    torch.save(state, run_dir / "checkpoint.pt")
    main(monkeypatch, "--evaluate", run_dir, "--eval-episodes", 1)
    assert "(mean ± std of 1 games, sampled actions)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="out of memory: lower --num-envs"):
        main(monkeypatch, "--resume", run_dir)


def test_the_bar_says_return_and_speed_and_without_a_terminal_once_a_minute(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo, "evaluate", lambda *_: [])
    bpo.train(bpo.Args(total_timesteps=256, **SMALL))
    bars = capsys.readouterr().err.split("\r")
    assert len(bars) <= 4 and all(word in bars[-1] for word in ("100%", "steps/s", "return="))


def test_the_curve_is_drawn_after_ctrl_c_too(tmp_path):
    command = [sys.executable, str(ROOT / "bpo_atari.py"), *FLAGS, "--total-timesteps", "1e6"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    stopped = tmp_path / process.stdout.readline().split()[-1]
    while not (stopped / "checkpoint.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130 and (stopped / "learning_curve.png").exists() and "--resume" in output


def test_what_can_t_be_filmed_is_one_line_before_there_is_a_run_folder(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no encoder\nat all")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bpo.gym.wrappers.RecordVideo, "stop_recording", broken)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "--capture-video")
    assert stop.value.code == "bpo_atari: ALE/Pong-v5 can't be filmed: OSError: no encoder at all"
    assert not (tmp_path / "runs").exists()


BAD_INPUT = [
    (["--env-id", "ALE/Pon-v5"], "ALE/Pong-v5"),
    (["--env-id", "Pong-v4"], "PongNoFrameskip-v4"),
    (["--env-id", "Humanoid-v4"], "bpo_continuous.py"),
    (["--env-id", "Pong-ram-v4"], "-ram"),
    (["--epsilon", "1"], "--epsilon"),
    (["--ent-coef", "nan"], "--ent-coef"),
    (["--num-threads", "0"], "--num-threads"),
    (["--temperature", "0"], "--temperature"),
    (["--num-minibatches", "2000"], "--num-minibatches"),
    (["--total-timesteps", "10"], "--total-timesteps"),
    (["--device", "cuda:9"], "--device"),
    (["--seed", "3000000000"], "--seed"),
    (["--max-grad-norm", "-1"], "--max-grad-norm"),
    (["--resume", "nowhere"], "nowhere"),
    (["--resume", "nowhere", "--seed", "3"], "only --total-timesteps and --device"),
    (["--resume", __file__], "takes a run folder"),
    (["--eval-every", "-1"], "--eval-every"),
    (["--num-steps", "1e12", "--total-timesteps", "1e13"], "--num-steps"),
    (["--num-envs", "1e9", "--num-steps", "1", "--total-timesteps", "1e10"], "--num-envs"),
    (["--eval-episodes", "1e9"], "--eval-episodes"),
    (["--num-threads", "1e12"], "--num-threads"),
    (["--evaluate", "nowhere", "--seed", "3"], "--eval-episodes"),
]


@pytest.mark.parametrize(("flags", "words"), BAD_INPUT, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_answered_in_one_line(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bpo_atari.py", *flags])
    with pytest.raises(SystemExit) as stop:
        bpo.main()
    assert words in stop.value.code and "\n" not in stop.value.code and not (tmp_path / "runs").exists()


def test_a_missing_rom_is_one_line(monkeypatch):
    monkeypatch.setattr(bpo.ale_py.roms, "get_rom_path", lambda _: None)
    with pytest.raises(SystemExit, match="ROM of ALE/Pong-v5 is missing"):
        bpo.check_env_id("ALE/Pong-v5")
