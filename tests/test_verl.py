"""GBPO inside verl 0.9.1, on a CPU: in verl's own `compute_advantage` and `ppo_loss`, and in its trainer (verl_on_cpu.py)."""

import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed: it wants other versions of transformers, so it has an environment of its own "
                "(docs/integrations.md)", allow_module_level=True)  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "integrations")]
import gbpo_verl  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.trainer.config import AlgoConfig  # noqa: E402
from verl.trainer.ppo.ray_trainer import compute_advantage  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

import gbpo_llm  # noqa: E402

GROUPS, SIZE, LENGTH = 6, 8, 5


def actor_config():
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_dynamic_bsz=True,
                       policy_loss=PolicyLossConfig(loss_mode="gbpo"), clip_ratio_low=0.2, clip_ratio_high=0.3,
                       entropy_coeff=0.0)  # fmt: skip


def estimated(rewards, mask, **options):
    """What verl's trainer hands on: (B, T) advantages, of rewards (P, G) in an order of their own."""
    scores = torch.zeros(mask.shape)
    scores[:, 0] = rewards.flatten()
    uid = np.array([f"prompt {i // SIZE}" for i in range(len(mask))], dtype=object)
    order = np.random.default_rng(0).permutation(len(mask))
    data = DataProto.from_dict(tensors={"token_level_rewards": scores[order], "response_mask": mask[order]},
                               non_tensors={"uid": uid[order]})  # fmt: skip
    data = compute_advantage(data, "gbpo", config=AlgoConfig(adv_estimator="gbpo", **options))
    return data.batch["advantages"][np.argsort(order)]


def verl_loss(log_prob, old_log_prob, advantages, mask, config):
    """verl's loss of (B, T) log-probabilities, which its engine gives without padding, prompts (of one token) included."""
    lengths = mask.sum(1).tolist()
    nested = lambda rows: torch.nested.as_nested_tensor(rows, layout=torch.jagged)  # noqa: E731
    cut = lambda tensor: nested([row[:n] for row, n in zip(tensor, lengths)])  # noqa: E731
    data = TensorDict({"prompts": nested([torch.zeros(1)] * len(mask)), "responses": cut(mask), "response_mask": cut(mask),
                       "old_log_probs": cut(old_log_prob), "advantages": cut(advantages)}, batch_size=len(mask))  # fmt: skip
    for name, value in dict(dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=len(mask)).items():
        tu.assign_non_tensor(data, **{name: value})
    values = torch.cat([torch.cat([row[:n], row.new_zeros(1)]) for row, n in zip(log_prob, lengths)])
    return ppo_loss(config, {"log_probs": values}, data)


def test_sigma_rides_in_the_last_bits_of_the_advantages():
    advantages = torch.randn(10_000) * 10.0 ** torch.randint(-4, 2, (10_000,))
    sigmoids = torch.tensor([0.0, 0.5, 1.0, 0.123]).repeat(2500)
    unpacked, read = gbpo_verl.unpack(gbpo_verl.pack(advantages, sigmoids))
    torch.testing.assert_close(unpacked, advantages, rtol=2.0**-15, atol=0)
    assert (read[0::4] == 0).all() and (read[1::4] == 0.5).all() and (read[2::4] == 1).all()
    assert (read[3::4] - 0.123).abs().max() < 1 / 500
    with pytest.raises(TypeError, match="float32"):
        gbpo_verl.unpack(advantages.bfloat16())


@pytest.mark.parametrize("kind", ["binary", "real"])
def test_loss_and_gradient_are_those_of_gbpo_llm(kind):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(GROUPS, SIZE, generator=generator)
    rewards = (rewards > 0.6).float() if kind == "binary" else rewards
    lengths = torch.randint(1, LENGTH + 1, (GROUPS * SIZE,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    old = torch.randn(GROUPS * SIZE, LENGTH, generator=generator, dtype=torch.float64)
    new = (old + 0.3 * torch.randn(old.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    packed = estimated(rewards, mask)
    loss, metrics = verl_loss(new, old, packed, mask, actor_config())
    (gradient,) = torch.autograd.grad(loss, new)

    targets = gbpo_llm.group_target_ratios(rewards, 0.2, 0.3, 1e-4).flatten().double()
    advantages = gbpo_llm.group_advantages(rewards).flatten().double()
    expected = gbpo_llm.gbpo_loss(new, old, advantages, targets, mask.bool())
    (expected_gradient,) = torch.autograd.grad(expected, new)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
    assert 0 < metrics["actor/pg_clipfrac"].aggregate() < 1


def test_verl_s_options_reach_the_estimator_and_the_loss():
    """Advantages without the division, a group of one answer, and weights for a rollout by another policy."""
    rewards, mask = torch.tensor([[0.0, 1, 0, 0, 0, 0, 0, 1]]), torch.ones(SIZE, 1, dtype=torch.long)
    plain, _ = gbpo_verl.unpack(estimated(rewards, mask, norm_adv_by_std_in_grpo=False))
    torch.testing.assert_close(plain.view(1, SIZE), rewards - 0.25, rtol=2.0**-15, atol=0)
    alone = gbpo_verl.group_sigmoids(torch.tensor([1.0]), 1e-4)
    assert alone.tolist() == [0.5]  # ρ* = 1 in a symmetric band
    log_prob, packed = torch.zeros(2, 1), gbpo_verl.pack(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0]))[:, None]
    config = types.SimpleNamespace(clip_ratio_low=0.2, clip_ratio_high=0.3, global_batch_info={})
    weights = torch.tensor([[2.0], [0.0]])
    weighted, _ = gbpo_verl.gbpo_policy_loss(log_prob, log_prob, packed, mask[:2], config=config, rollout_is_weights=weights)
    assert weighted.item() == pytest.approx(2 * 0.3 / 2)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_policy_learns_through_verl_s_own_functions(sign):
    """Tokens of eight kinds, a reward for the fifth: the estimator and the loss find it, and a wrong sign does not."""
    torch.manual_seed(0)
    logits = torch.zeros(8, requires_grad=True)
    optimizer, config = torch.optim.Adam([logits], lr=0.05), actor_config()
    for _ in range(40):
        policy = torch.distributions.Categorical(logits=logits.detach())
        tokens, mask = policy.sample((GROUPS * SIZE, 1)), torch.ones(GROUPS * SIZE, 1, dtype=torch.long)
        rewards = (tokens == 5).float().view(GROUPS, SIZE)
        advantages, old = estimated(sign * rewards, mask), policy.log_prob(tokens)
        for _ in range(4):
            new = torch.distributions.Categorical(logits=logits).log_prob(tokens)
            loss, _ = verl_loss(new, old, advantages, mask, config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    chance = float(logits.softmax(0)[5])
    assert chance > 0.8 if sign == 1 else chance < 0.1


def test_verl_finds_the_file_by_its_environment_variable():
    code = ("import verl; from verl.trainer.ppo.core_algos import get_adv_estimator_fn as a, get_policy_loss_fn as p; "
            "print(a('gbpo').__module__, p('gbpo').__module__)")  # fmt: skip
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "gbpo_verl", "PYTHONPATH": str(ROOT / "integrations")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["gbpo_verl", "gbpo_verl"], done.stderr


def test_verl_s_own_trainer_learns(tmp_path):
    """Ray, FSDP, the transfer queue and weights handed to the rollout are verl's; the tokens come from verl_on_cpu.py."""
    folders = os.pathsep.join([str(ROOT / "integrations"), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    environment["VERL_USE_EXTERNAL_MODULES"] = "verl_on_cpu,gbpo_verl"
    subprocess.run([sys.executable, ROOT / "tests/verl_on_cpu.py", tmp_path / "task"], env=environment, check=True)
    flags = ["algorithm.adv_estimator=gbpo", "actor_rollout_ref.actor.policy_loss.loss_mode=gbpo",
             "actor_rollout_ref.actor.clip_ratio_low=0.3", "actor_rollout_ref.actor.clip_ratio_high=0.3"]  # fmt: skip
    options = (tmp_path / "task/options").read_text().split()
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *flags, *options]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    rewards = [float(score) for score in re.findall(r"critic/score/mean:([\d.]+)", done.stdout)]
    assert done.returncode == 0 and len(rewards) == 15, (done.stdout + done.stderr)[-3000:]
    assert rewards[0] < 0.3 and rewards[-1] > 0.8, rewards
