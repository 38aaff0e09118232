"""integrations/gbpo_trl.py on the real TRL."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="requirements-llm.txt is not installed")
from datasets import Dataset

import gbpo_llm as script

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "integrations"))
gbpo_trl = importlib.import_module("gbpo_trl")
TASK = script.largest_digit_task()
DATA = [{"prompt": example["prompt"], "answer": example["answer"]} for example in TASK.train]


def reward(completions, answer, **_):
    return [float(completion == right) for completion, right in zip(completions, answer)]


def config(folder, **changes):
    settings = dict(per_device_train_batch_size=32, num_generations=8, max_completion_length=1, max_steps=2, logging_steps=1)
    settings |= dict(learning_rate=5e-4, report_to="none", save_strategy="no", use_cpu=True, bf16=False, seed=1)
    return gbpo_trl.GBPOConfig(output_dir=str(folder), **settings | changes)


def trainer(folder, model=None, options=None, **changes):
    torch.manual_seed(0)
    scratch, tokenizer = script.scratch_model(TASK)
    given = dict(processing_class=tokenizer, reward_funcs=reward, train_dataset=Dataset.from_list(DATA)) | (options or {})
    return gbpo_trl.GBPOTrainer(model=model or scratch, args=config(folder, **changes), **given)


def rewards_of(trained):
    return [row["rewards/reward/mean"] for row in trained.state.log_history if "rewards/reward/mean" in row]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("epsilon_high", [None, 0.5])
def test_loss_and_gradient_are_the_script_s(level, epsilon_high, tmp_path, monkeypatch):
    """In float64, with old log-probabilities of another policy, on completions of different lengths."""
    changes = dict(importance_sampling_level=level, loss_type="bnpo" if level == "token" else "grpo", epsilon_high=epsilon_high)
    ours = trainer(tmp_path, **changes)
    model, low, high = ours.model.double().train(), 0.3, epsilon_high or 0.3
    prompts, completions = torch.randint(3, 13, (8, 4)), torch.randint(3, 13, (8, 6))
    mask = (torch.arange(6) < torch.tensor([6, 1, 3, 4, 6, 2, 5, 6])[:, None]).long()
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 1.0]], dtype=torch.float64)
    advantages = script.group_advantages(rewards).flatten()
    targets = gbpo_trl.group_target_ratios(rewards, low, high, 1e-4).flatten()
    assert torch.equal(targets, script.group_target_ratios(rewards, low, high, 1e-4).flatten())

    def logprobs():
        logits = model(
            input_ids=torch.cat((prompts, completions), 1), attention_mask=torch.cat((torch.ones_like(prompts), mask), 1)
        ).logits
        return logits[:, 3:-1].log_softmax(-1).gather(-1, completions[..., None])[..., 0]

    # The host's output layer computes in float32.
    in_float64 = lambda *_, **__: (logprobs(), torch.zeros(8, 6, dtype=torch.float64), None)  # noqa: E731
    monkeypatch.setattr(gbpo_trl.GRPOTrainer, "_get_per_token_logps_and_entropies", in_float64)
    old = logprobs().detach() + 0.4 * torch.randn(8, 6, dtype=torch.float64)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": mask,
    }
    inputs |= {"advantages": advantages, "target_ratios": targets, "old_per_token_logps": old}
    ours.current_gradient_accumulation_steps = 1
    loss = ours._compute_loss(model, inputs)
    expected = script.gbpo_loss(logprobs(), old, advantages, targets, mask.bool(), level)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    parameters = [parameter for parameter in model.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected))):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    assert inputs["advantages"] is advantages and 0 < ours._metrics["train"]["outside_band"][0] < 1


def test_the_targets_equation_is_the_script_s_with_the_median(tmp_path):
    rewards = torch.rand(5, 8)
    assert torch.equal(gbpo_trl.group_target_ratios(rewards, 0.2, 0.3, 0.1), script.group_target_ratios(rewards, 0.2, 0.3, 0.1))
    lines = inspect.getsource(script.group_target_ratios)
    code = [line.strip() for line in inspect.getsource(gbpo_trl.group_target_ratios).splitlines()[2:]]
    assert all(line in lines for line in code)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_it_learns_and_not_with_a_wrong_sign(sign, tmp_path, monkeypatch):
    targets = gbpo_trl.group_target_ratios
    monkeypatch.setattr(gbpo_trl, "group_target_ratios", lambda rewards, *band: targets(sign * rewards, *band))
    changes = dict(
        per_device_train_batch_size=128, num_iterations=4, max_steps=300, logging_steps=50, lr_scheduler_type="cosine"
    )
    ours = trainer(tmp_path, **changes)
    ours.train()
    assert rewards_of(ours)[-1] > 0.5 if sign > 0 else rewards_of(ours)[-1] < 0.12


def test_old_log_probabilities_are_those_of_the_policy_that_sampled(tmp_path):
    """With num_iterations 2 the second pass has ratios other than 1, the first has not."""
    ours = trainer(tmp_path, num_iterations=2, max_steps=4, learning_rate=1e-2)
    seen, compute = [], ours._compute_loss

    def spy(model, inputs):
        seen.append(inputs.get("old_per_token_logps") is not None and inputs["target_ratios"].unique().tolist())
        return compute(model, inputs)

    ours._compute_loss = spy
    ours.train()
    assert len(seen) == 4 and all(targets and min(targets) >= 0.7 and max(targets) <= 1.3 for targets in seen)
    outside = [row["outside_band"] for row in ours.state.log_history if "outside_band" in row]
    assert outside[0] == 0 and max(outside) > 0


def test_a_run_is_saved_and_resumed(tmp_path):
    ours = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    ours.train()
    again = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and (tmp_path / "checkpoint-4/model.safetensors").exists()


def test_adapters_alone_are_trained(tmp_path):
    from peft import LoraConfig

    model, _ = script.scratch_model(TASK)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ours = trainer(tmp_path, model, {"peft_config": LoraConfig(r=2, target_modules="all-linear")}, beta=0.1)
    ours.train()
    assert all(torch.equal(before[name], parameter) for name, parameter in ours.model.get_base_model().named_parameters()
               if name in before)  # fmt: skip
    assert any(name.endswith("lora_B.default.weight") and parameter.any() for name, parameter in ours.model.named_parameters())


@pytest.mark.slow
def test_two_processes_take_their_own_part_of_the_targets(tmp_path):
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_trl
ours = test_trl.trainer({str(tmp_path)!r}, num_iterations=2, max_steps=4)
compute = ours._compute_loss
def spy(model, inputs):
    signs = (inputs["advantages"].sign(), (inputs["target_ratios"] - 1).sign())
    wrong = (signs[0] * signs[1] < 0).sum().item()  # a target on the other side of 1 than the advantage
    with open({str(tmp_path)!r} + f"/checked-{{ours.accelerator.process_index}}", "a") as file:
        print(len(signs[0]), wrong, file=file)
    return compute(model, inputs)
ours._compute_loss = spy
ours.train()
weights = ours.accelerator.gather(next(ours.model.parameters()).detach().flatten()[None])
assert (weights == weights[:1]).all(), "the processes' weights differ"
"""
    (tmp_path / "run.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "run.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(2):
        assert (tmp_path / f"checked-{rank}").read_text().splitlines() == ["32 0"] * 4


def test_options_of_vllm_are_the_host_s(tmp_path):
    changed = config(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url="http://localhost:1", epsilon_high=0.4)
    assert changed.use_vllm and (changed.epsilon, changed.epsilon_high, changed.target_temperature) == (0.3, 0.4, 1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"loss_type": "cispo"}, "cispo is another loss"),
        ({"delta": 2.0}, "delta"),
        ({"epsilon": 1.5}, "between 0 and 1"),
        ({"target_temperature": 0.0}, "above 0"),
    ],
)
def test_what_can_t_be_is_told_when_the_configuration_is_made(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        config(tmp_path, **changes)


def test_a_configuration_of_grpo_is_told(tmp_path):
    model, tokenizer = script.scratch_model(TASK)
    args = gbpo_trl.GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=8
    )
    with pytest.raises(ValueError, match="GBPOConfig"):
        gbpo_trl.GBPOTrainer(
            model=model, args=args, processing_class=tokenizer, reward_funcs=reward, train_dataset=Dataset.from_list(DATA)
        )
