"""integrations/bpo_rsl_rl.py on the real rsl_rl, which comes with Isaac Lab (5.5) and with mjlab (5.4)."""

import importlib
import inspect
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("rsl_rl", reason="rsl_rl comes with requirements-isaaclab.txt and requirements-mjlab.txt")
from rsl_rl.models import MLPModel
from rsl_rl.runners import OnPolicyRunner
from rsl_rl.storage import RolloutStorage
from tensordict import TensorDict

import bpo_isaaclab as script

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "integrations"))
bpo_rsl_rl = importlib.import_module("bpo_rsl_rl")
GAUSSIAN = {"class_name": "GaussianDistribution", "init_std": 0.7, "std_type": "scalar"}


class Aim:
    """Each step's reward is how near the action, one number, comes to the first of two observations."""

    num_envs, num_actions, max_episode_length, device, cfg = 64, 1, 8, "cpu", {}

    def __init__(self):
        self.episode_length_buf, self.generator = torch.zeros(64, dtype=torch.long), torch.Generator().manual_seed(0)
        self.unwrapped = self
        self.look()

    def look(self):
        self.obs = torch.rand(64, 2, generator=self.generator) * 2 - 1
        return TensorDict({"policy": self.obs}, batch_size=64)

    def get_observations(self):
        return TensorDict({"policy": self.obs}, batch_size=64)

    def step(self, actions):
        rewards = -(actions[:, 0] - self.obs[:, 0]).square()
        self.episode_length_buf += 1
        dones = self.episode_length_buf >= self.max_episode_length
        self.episode_length_buf[dones] = 0
        return self.look(), rewards, dones.long(), {"time_outs": dones, "log": {}}


def runner(folder, **algorithm):
    model = {"class_name": "MLPModel", "hidden_dims": [32, 32], "activation": "elu", "obs_normalization": True}
    options = {"class_name": "bpo_rsl_rl:BPO", "learning_rate": 3e-3, "clip_param": 0.2, "use_clipped_value_loss": True}
    config = {
        "actor": model | {"distribution_cfg": dict(GAUSSIAN)},
        "critic": model,
        "algorithm": options | {"rnd_cfg": None, "symmetry_cfg": None} | algorithm,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "num_steps_per_env": 16,
        "save_interval": 1000,
        "logger": "tensorboard",
        "multi_gpu": None,
    }
    torch.manual_seed(0)
    return OnPolicyRunner(Aim(), config, log_dir=str(folder), device="cpu")


def error(trained):
    """Mean square of what the trained policy's mean action misses."""
    obs = Aim().get_observations()
    with torch.no_grad():
        return (trained.alg.get_policy()(obs)[:, 0] - obs["policy"][:, 0]).square().mean().item()


def test_the_equations_are_the_script_s():
    for name in ("target_ratio", "bpo_loss", "median_loss"):
        assert inspect.getsource(getattr(bpo_rsl_rl, name)) == inspect.getsource(getattr(script, name))


@pytest.mark.parametrize("use_median", [True, False])
def test_loss_and_gradient_are_the_script_s(use_median):
    """In float64."""
    torch.manual_seed(0)
    obs, groups = TensorDict({"policy": torch.randn(40, 3)}, batch_size=40), {"actor": ["policy"], "critic": ["policy"]}
    actor = MLPModel(obs, groups, "actor", 2, [8], "elu", distribution_cfg=dict(GAUSSIAN))
    critic = MLPModel(obs, groups, "critic", 1, [8], "elu")
    storage = RolloutStorage("rl", 40, 1, obs, [2], "cpu")
    settings = dict(use_median=use_median, epsilon=0.2, temperature=0.1, median_temperature=0.5, median_coef=0.7)
    algorithm = bpo_rsl_rl.BPO(actor, critic, storage, value_loss_coef=0.6, entropy_coef=0.02, **settings)
    actor.double(), critic.double()
    obs = obs.double()
    actions, returns, logprobs = torch.randn(40, 2).double(), torch.randn(40, 1).double(), -2 + torch.rand(40, 1).double()
    batch = RolloutStorage.Batch(observations=obs, actions=actions, returns=returns, old_actions_log_prob=logprobs)

    class Agent:
        def actor(obs):
            actor(TensorDict({"policy": obs}, batch_size=40), stochastic_output=True)
            Agent.actor_logstd = actor.output_std[0].log()
            return actor.output_mean

        def get_values(obs):
            values = critic(TensorDict({"policy": obs}, batch_size=40)).flatten()
            return values, critic.mlp[-1].median_values.flatten()

    Agent.actor(obs["policy"])
    args = script.Args(vf_coef=0.6, ent_coef=0.02, online_adv=True, **settings)
    values = {"obs": obs["policy"], "critic_obs": obs["policy"], "actions": actions, "logprobs": logprobs.flatten()}
    values |= {"returns": returns.flatten(), "values": torch.zeros(40).double(), "means": torch.zeros(40, 2).double()}
    expected, _ = script.total_loss(Agent, args, values, torch.zeros(2).double())
    loss, _ = algorithm.total_loss(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    parameters = [*actor.parameters(), *critic.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reevaluate", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_it_learns_and_not_with_a_wrong_sign(sign, reevaluate, tmp_path, monkeypatch):
    right = bpo_rsl_rl.target_ratio
    monkeypatch.setattr(bpo_rsl_rl, "target_ratio", lambda a, *band: right(sign * a, *band))
    trained = runner(tmp_path, reevaluate=reevaluate)
    before = error(trained)
    trained.learn(40)
    assert error(trained) < 0.1 * before if sign > 0 else error(trained) > before


def test_save_load_and_go_on(tmp_path):
    first = runner(tmp_path)
    first.learn(3)
    first.save(str(tmp_path / "model.pt"))
    second = runner(tmp_path)
    second.load(str(tmp_path / "model.pt"))
    ours, theirs = (trained.alg.critic.state_dict() for trained in (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [tuple(parameter.shape) for parameter in second.alg.critic.mlp[-1].parameters()] == [(2, 32), (2,)]
    second.learn(2)
    assert not torch.equal(second.alg.critic.mlp[-1].weight[1], ours["mlp.4.weight"][1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epsilon": 2.0}, "between 0 and 1"),
        ({"rnd_cfg": {"weight": 1.0}}, "without rnd_cfg"),
        ({"symmetry_cfg": {"use_mirror_loss": True}}, "without symmetry_cfg"),
        ({"use_mixed_precision": True}, "without use_mixed_precision"),
    ],
)
def test_what_can_t_be_is_told_when_the_trainer_is_made(options, words):
    torch.manual_seed(0)
    obs, groups = TensorDict({"policy": torch.randn(4, 3)}, batch_size=4), {"actor": ["policy"], "critic": ["policy"]}
    actor = MLPModel(obs, groups, "actor", 2, [8], "elu", distribution_cfg=dict(GAUSSIAN))
    with pytest.raises(ValueError, match=words):
        bpo_rsl_rl.BPO(actor, MLPModel(obs, groups, "critic", 1, [8], "elu"), None, **options)


@pytest.mark.slow
def test_isaac_lab_s_own_command_trains_with_it(tmp_path):
    """The stock cartpole, from Isaac Lab's train entry point, with options on its command line."""
    if find_spec("isaaclab") is None:
        pytest.skip("Isaac Lab is not installed (pip install -r requirements-isaaclab.txt on Python 3.12)")
    import isaaclab_assets_offline

    assets = isaaclab_assets_offline.build(tmp_path / "assets")
    environment = {"ISAACSIM_ASSET_ROOT": str(assets), "PYTHONPATH": str(ROOT / "integrations"), "OMP_NUM_THREADS": "1"}
    command = [
        str(Path(sys.executable).parent / "isaaclab"),
        "train",
        "--rl_library",
        "rsl_rl",
        "--task",
        "Isaac-Cartpole-Direct",
    ]
    command += ["--num_envs", "256", "--device", "cpu", "--viz", "none", "agent.device=cpu"]
    command += ["agent.algorithm.class_name=bpo_rsl_rl:BPO"]
    options = dict(cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    trained = subprocess.run([*command, "--max_iterations", "40", "agent.algorithm.epsilon=0.3"], **options)
    lengths = [float(line.split()[-1]) for line in trained.stdout.splitlines() if "Mean episode length" in line]
    assert trained.returncode == 0 and "Mean median loss" in trained.stdout, trained.stderr[-2000:]
    assert lengths[-1] > 3 * lengths[0]
    wrong = subprocess.run([*command, "--max_iterations", "1", "agent.algorithm.epsilon=2.0"], **options)
    assert wrong.returncode and "BPO needs an epsilon between 0 and 1" in wrong.stdout + wrong.stderr


@pytest.mark.slow
def test_mjlab_s_own_command_trains_with_it(tmp_path):
    if find_spec("mjlab") is None:
        pytest.skip("mjlab is not installed (pip install -r requirements-mjlab.txt)")
    command = [str(Path(sys.executable).parent / "train"), "Mjlab-Cartpole-Balance", "--gpu-ids", "None"]
    command += ["--env.scene.num-envs", "64", "--agent.max-iterations", "3", "--agent.logger", "tensorboard"]
    command += ["--agent.algorithm.class-name", "bpo_rsl_rl:BPO"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "integrations"), "OMP_NUM_THREADS": "1"}
    trained = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert trained.returncode == 0 and trained.stdout.count("Mean median loss") == 3, trained.stderr[-2000:]
