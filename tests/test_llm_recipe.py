"""The paper's recipe in gbpo_llm.py, models that can't be trained, and log-probabilities in bfloat16."""

import copy
import itertools
import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="gbpo_llm.py's own requirements, requirements-llm.txt, are not installed")

import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import gbpo_llm as gbpo

ROOT = Path(__file__).resolve().parent.parent
TINY = gbpo.SCRATCH | gbpo.LARGEST_DIGIT | {"epsilon_low": 0.3, "epsilon_high": 0.3}
SMALL = gbpo.Args(**{**TINY, "num_prompts": 4, "total_batches": 6, "eval_prompts": 10, "checkpoint_every": 2})
SIZES = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
TOKENS = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)


def tiny_llama(vocabulary=20, seed=3, **changes):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(**{"vocab_size": vocabulary, "initializer_range": 0.5, **sizes, **changes})
    return transformers.LlamaForCausalLM(config)


def policy_of(model, ends=(0,), **changes):
    return gbpo.Policy(model, torch.tensor(ends), replace(SMALL, **changes))


def random_groups(groups, group_size, seed=0, longest=9):
    """Questions of 2–9 tokens and answers up to `longest`, of tokens that are no end token."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    prompts = [[draw(1, 20) for _ in range(draw(2, 10))] for _ in range(groups)]
    return prompts, [[draw(1, 20) for _ in range(draw(1, longest + 1))] for _ in range(groups * group_size)]


def run_main(monkeypatch, *flags):
    """Arguments with which `train` would be called."""
    seen = []
    monkeypatch.setattr(gbpo, "train", seen.append)
    monkeypatch.setattr(sys, "argv", ["gbpo_llm.py", *map(str, flags)])
    gbpo.main()
    return seen[0]


# The preset -----------------------------------------------------------------------------------------------------------

RECIPE = dict(
    model_name="Qwen/Qwen2.5-Math-1.5B", reward="majority", num_prompts=8, vote_size=64, group_size=32, instruction="",
    sampling_temperature=1.0, max_new_tokens=3072, total_batches=240, num_minibatches=4, update_epochs=10, epsilon_low=0.3,
    epsilon_high=0.3, target_temperature=1e-4, learning_rate=5e-7, warmup_ratio=0.03, kl_coef=0.001, ent_coef=0.005,
    weight_decay=0.01, max_grad_norm=1.0, eval_samples=16, eval_temperature=0.6, eval_top_p=0.95, eval_every=2, loss="gbpo",
    require_box=True, threshold="median", ratio_level="token",
)  # fmt: skip


def test_the_preset_is_the_recipe_and_flags_beside_it_win_in_any_order(monkeypatch):
    args = run_main(monkeypatch, "--preset", "paper")
    assert {name: getattr(args, name) for name in RECIPE} == RECIPE
    flags = ["--epsilon-low", 0.2, "--model-name", "scratch", "--task", "largest_digit"]
    for order in (["--preset", "paper", *flags], [*flags, "--preset", "paper"]):
        args = run_main(monkeypatch, *order)
        own = RECIPE | dict(epsilon_low=0.2, epsilon_high=0.2, model_name="scratch")
        assert {name: getattr(args, name) for name in RECIPE} == own and args.task == "largest_digit"


def test_the_rows_of_amc_and_math_are_in_the_source_as_flags_that_parse(monkeypatch):
    source = (ROOT / "gbpo_llm.py").read_text()
    comment = " ".join(line.strip("# ") for line in source.split("LARGEST_DIGIT = ")[1].split("PAPER = ")[0].splitlines()[1:])
    amc, mathematics = (part.strip(" .").split() for part in comment.split("add ")[1].split("; for MATH"))
    args = run_main(monkeypatch, "--preset", "paper", *amc)
    assert (args.total_batches, args.ent_coef, args.num_minibatches, args.epsilon_high) == (300, 0, 4, 0.3)
    args = run_main(monkeypatch, "--preset", "paper", *mathematics)
    assert (args.total_batches, args.num_minibatches, args.update_epochs, args.ent_coef) == (150, 32, 5, 0)
    assert args.epsilon_low == args.epsilon_high == 0.2 and args.num_prompts == 32


def test_the_recipe_s_parts_train_a_tiny_model_and_resume_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {name: value for name, value in gbpo.PAPER.items() if name not in ("model_name", "task", "require_box")}
    sizes = dict(num_prompts=4, group_size=4, vote_size=8, max_new_tokens=2, total_batches=4, update_epochs=2, eval_prompts=10)
    args = gbpo.Args(**recipe | sizes | dict(epsilon_high=0.3, learning_rate=1e-3, checkpoint_every=2))
    finished = gbpo.train(args)
    update, calls = gbpo.update, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 4:
            raise FloatingPointError("stop")
        return update(*given)

    with monkeypatch.context() as patch:
        patch.setattr(gbpo, "update", interrupted)
        with pytest.raises(SystemExit, match="stop"):
            gbpo.train(args)
    (killed,) = set(Path("runs").iterdir()) - {finished}
    assert gbpo.load_checkpoint(killed)[0]["batch"] == 2
    gbpo.train(replace(args, resume=str(killed)))
    first, second = (load_file(folder / "checkpoint.safetensors") for folder in (finished, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    evaluations = [gbpo.load_checkpoint(folder)[0]["evaluations"] for folder in (finished, killed)]
    assert evaluations[0] == evaluations[1] and set(evaluations[0]) == {"0", "2", "4"}


# Votes ----------------------------------------------------------------------------------------------------------------


def test_all_answers_vote_and_the_first_are_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate_all, update, sampled, learned = gbpo.generate_all, gbpo.update, [], []

    def generate(policy, prompts, group_size, temperature, *rest):
        result = generate_all(policy, prompts, group_size, temperature, *rest)
        sampled.append((group_size, result[0]))
        return result

    def recorded(policy, reference, optimizer, prompts, answers, batch, *rest):
        learned.append((answers, batch))
        return update(policy, reference, optimizer, prompts, answers, batch, *rest)

    monkeypatch.setattr(gbpo, "generate_all", generate)
    monkeypatch.setattr(gbpo, "update", recorded)
    gbpo.train(replace(SMALL, reward="majority", group_size=3, vote_size=7, total_batches=2, eval_samples=0))
    groups = [answers for size, answers in sampled if size == 7]
    assert len(groups) == 2
    differing = 0
    for answers, (trained, batch) in zip(groups, learned):
        for k in range(4):
            voters = answers[7 * k : 7 * k + 7]
            assert trained[3 * k : 3 * k + 3] == voters[:3]
            full = [answer for answer in voters if answer[0] > 2]  # tokens for end and padding alone are an empty answer
            majority = max(full, key=full.count)
            few = [answer for answer in voters[:3] if answer[0] > 2]
            differing += not few or majority != max(few, key=few.count)
            rewards = torch.tensor([[float(answer == majority) for answer in voters[:3]]])
            assert torch.allclose(batch["advantages"][3 * k : 3 * k + 3], gbpo.group_advantages(rewards)[0])
    assert differing  # somewhere the three alone would have voted otherwise


def test_an_answer_without_a_box_has_no_vote_and_no_reward():
    args = replace(SMALL, reward="majority", require_box=True)
    task = gbpo.Task([], [], gbpo.math_score, gbpo.same_math)
    answers = ["it is 7", "7", "7", "\\boxed{3}", "so \\boxed{3}", "\\boxed{4}", "\\boxed{7", "a box is \\boxed{}"]
    assert gbpo.group_rewards(answers, {"answer": "7"}, task, args) == [0, 0, 0, 1, 1, 0, 0, 0]
    assert gbpo.group_rewards(answers, {"answer": "7"}, task, replace(args, require_box=False))[:4] == [0, 1, 1, 0]
    scored = gbpo.group_rewards(["7", "\\boxed{7}"], {"answer": "7"}, task, replace(args, reward="task"))
    assert scored == [0, 1]
    generous = gbpo.Task([], [], lambda answer, example: 0.1)  # as some scorers of reasoning-gym are to an empty answer
    assert gbpo.group_rewards(["7"], {}, generous, replace(args, reward="task")) == [0]


@pytest.mark.parametrize("reward, others, told", [("majority", 13, 1), ("majority", 4, 0), ("task", 13, 0)])
def test_a_vote_that_has_collapsed_is_told_once(reward, others, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answers = lambda prompts, size: [[13]] * (len(prompts) * size - 1) + [[others]]  # 13 is "=" and 4 is "1"  # noqa: E731
    monkeypatch.setattr(gbpo, "generate_all", lambda policy, prompts, size, *_: (answers(prompts, size), 0.1))
    gbpo.train(replace(SMALL, reward=reward, total_batches=3))
    error = capsys.readouterr().err
    assert error.count("the vote has collapsed") == error.count("batch 1: all completions of all prompts are '='") == told


# Terms of the loss ----------------------------------------------------------------------------------------------------


def brute_force_entropy(model, prompts, answers, group_size, temperature):
    """Mean entropy of what predicts the answers' tokens, from a forward pass for each answer."""
    entropies = []
    for i, answer in enumerate(answers):
        prompt = prompts[i // group_size]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
        probabilities = logits.softmax(-1)
        entropies += [-(row * row.log()).sum() for row in probabilities]
    return torch.stack(entropies).mean()


def one_step(policy, first, rewards, prompts, answers, **changes):
    """Weights before and after one step of plain gradient descent at rate 1, without clipping."""
    args = replace(policy.args, group_size=rewards.shape[1], update_epochs=1, num_minibatches=1, max_grad_norm=1e9, **changes)
    policy.args, reference = args, (lambda rows: first(rows)[0])
    batch = {"groups": torch.arange(rewards.numel()).view(rewards.shape)}
    batch["advantages"] = gbpo.group_advantages(rewards).flatten()
    batch["target_ratios"] = gbpo.group_target_ratios(rewards, 0.3, 0.3, 1e-4).flatten()
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer, accelerator = torch.optim.SGD(policy.parameters(), lr=1.0), gbpo.Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(0)
    metrics = gbpo.update(policy, reference, optimizer, prompts, answers, batch, args, accelerator, generator)
    return before, [p.detach().clone() for p in policy.parameters()], metrics


def test_groups_without_signal_feel_kl_and_entropy_alone_by_their_gradients():
    prompts, answers = random_groups(3, 4)
    for coefficients in (dict(kl_coef=0.3), dict(ent_coef=0.7), dict(kl_coef=0.3, ent_coef=0.7), {}):
        policy = policy_of(tiny_llama().double(), sampling_temperature=0.8, tokens_per_microbatch=40)
        reference = policy_of(tiny_llama(seed=4).double(), sampling_temperature=0.8)
        model = copy.deepcopy(policy.model)
        entropy = brute_force_entropy(model, prompts, answers, 4, 0.8)
        rows = gbpo.pack(prompts, answers, 4, range(12))
        old = gbpo.Policy(model, torch.tensor([0]), policy.args)(rows)[0]
        difference = reference(rows)[0].detach() - old
        kl = (difference.exp() - 1 - difference)[rows.mask].mean()
        expected = coefficients.get("kl_coef", 0) * kl - coefficients.get("ent_coef", 0) * entropy
        gradients = torch.autograd.grad(expected, model.parameters())
        equal = torch.full((3, 4), 0.5)
        before, after, metrics = one_step(policy, reference, equal, prompts, answers, **coefficients)
        for old, new, gradient in zip(before, after, gradients):
            assert (old - new - gradient).norm() < 1e-4 * gradient.norm() + 1e-9  # Llama's norms are in single precision
        assert metrics["policy_loss"] == 0
        if "ent_coef" in coefficients:
            assert metrics["entropy"] == pytest.approx(float(entropy), rel=1e-6)
        assert any((old != new).any() for old, new in zip(before, after)) == bool(coefficients)


def test_entropies_are_those_of_each_token_at_the_temperature():
    prompts, answers = random_groups(2, 3)
    policy = policy_of(tiny_llama().double(), sampling_temperature=0.7)
    rows = gbpo.pack(prompts, answers, 3, range(6))
    logprobs, entropies = policy(rows, True)
    assert torch.equal(logprobs, policy(rows)[0]) and (entropies[~rows.mask] == 0).all()
    for row, mask, i in zip(entropies, rows.mask, rows.completions):
        own = [brute_force_entropy(policy.model, [prompts[i // 3] + answers[i][:t]], [answers[i][t : t + 1]], 1, 0.7)
               for t in range(len(answers[i]))]  # fmt: skip
        assert torch.allclose(row[mask], torch.stack(own), atol=1e-6)


def test_all_groups_are_learned_from_where_kl_or_entropy_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    update, seen = gbpo.update, []
    monkeypatch.setattr(gbpo, "update", lambda *given: (seen.append(given[5]["groups"].tolist()), update(*given))[1])
    monkeypatch.setattr(gbpo, "group_rewards", lambda texts, *_: [0.0] * len(texts))
    for changes in ({}, {"kl_coef": 0.1}, {"ent_coef": 0.1}):
        gbpo.train(replace(SMALL, total_batches=1, **changes))
    assert [len(groups) for groups in seen] == [0, 4, 4] and seen[1][1] == list(range(8, 16))


def test_weights_decay_by_learning_rate_times_weight_decay(tmp_path, monkeypatch):
    """The KL to the first model has no gradient at the first model, so that one step is decay alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gbpo, "group_rewards", lambda texts, *_: [0.0] * len(texts))
    args = replace(SMALL, total_batches=1, update_epochs=1, kl_coef=0.1, weight_decay=0.25, learning_rate=0.02)
    decayed = load_file(gbpo.train(args) / "checkpoint.safetensors")
    for name, before in gbpo.trained_parameters(gbpo.prepare(args)[-1]).items():
        assert torch.allclose(decayed[f"model.{name}"], before * (1 - 0.02 * 0.25), rtol=1e-6)


# Validation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95, 1.0])
def test_top_p_draws_from_the_fewest_likeliest_tokens_that_hold_so_much(top_p):
    policy = policy_of(tiny_llama(8), ends=(), max_new_tokens=1)
    answers, _ = policy.generate([[3, 4, 5], [6, 2]], 4000, 1.3, torch.Generator().manual_seed(0), top_p)
    for k, prompt in enumerate(([3, 4, 5], [6, 2])):
        probabilities = policy.model(torch.tensor([prompt])).logits[0, -1].div(1.3).softmax(-1).tolist()
        expected, held = torch.zeros(8), 0.0
        for token in sorted(range(8), key=lambda i: -probabilities[i]):
            if held < top_p:
                expected[token] = probabilities[token]
            held += probabilities[token]
        expected /= expected.sum()
        counts = torch.bincount(torch.tensor([a[0] for a in answers[4000 * k : 4000 * (k + 1)]]), minlength=8) / 4000
        assert torch.allclose(counts, expected, atol=0.03)
        assert (counts[expected == 0] == 0).all() and (top_p == 1 or (expected == 0).any())


def test_the_validation_has_its_own_temperature_and_top_p_every_so_many_batches(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generate_all, seen = gbpo.generate_all, []

    def generate(policy, prompts, group_size, temperature, generator, args, top_p=1.0, what=""):
        seen.append((len(prompts), group_size, temperature, top_p))
        return generate_all(policy, prompts, group_size, temperature, generator, args, top_p, what)

    monkeypatch.setattr(gbpo, "generate_all", generate)
    validation = dict(eval_every=2, eval_samples=3, eval_temperature=0.6, eval_top_p=0.9, sampling_temperature=0.8)
    run_dir = gbpo.train(replace(SMALL, total_batches=5, **validation))
    assert set(gbpo.load_checkpoint(run_dir)[0]["evaluations"]) == {"0", "2", "4", "5"}
    assert seen.count((10, 1, 0.0, 1.0)) == seen.count((10, 3, 0.6, 0.9)) == 4 and seen.count((4, 8, 0.8, 1.0)) == 5
    assert capsys.readouterr().out.count("test, batch") == 4
    seen.clear()
    gbpo.train(replace(SMALL, total_batches=1, sampling_temperature=0.8))
    assert seen.count((10, 4, 0.8, 1.0)) == 2  # as in training, before and after


# Models ---------------------------------------------------------------------------------------------------------------


def make(name, **changes):
    """A tiny random model: the class of transformers and what its configuration takes beside `SIZES`."""
    torch.manual_seed(0)
    sizes = SIZES | changes
    kind = getattr(transformers, name)
    return kind(kind.config_class(**sizes)).eval()


LLAMA = dict(intermediate_size=48, num_key_value_heads=2, **TOKENS)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
BERT = dict(intermediate_size=48, pad_token_id=0)
JAMBA = dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
JAMBA |= dict(num_experts=2, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False)
GRIFFIN = dict(num_hidden_layers=3, intermediate_size=48, lru_width=32, attention_window_size=6, **TOKENS)
ONE_ROW_EACH = {
    "FalconForCausalLM": dict(alibi=True),
    "BloomForCausalLM": dict(n_layer=2, n_head=4),
    "MptForCausalLM": dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "MistralForCausalLM": dict(LLAMA, sliding_window=6),
    "Gemma2ForCausalLM": dict(LLAMA, head_dim=8),
    "Gemma3ForCausalLM": dict(LLAMA, head_dim=8, num_hidden_layers=6, sliding_window=6),
    "GPTNeoForCausalLM": dict(num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4, window_size=6),
    "JambaForCausalLM": dict(LLAMA, **JAMBA),
    "Lfm2ForCausalLM": dict(LLAMA, layer_types=["conv", "full_attention"]),
    "Mamba2ForCausalLM": dict(state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
}
SHARED_ROWS = {
    "LlamaForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "GPT2LMHeadModel": GPT2,
    "OPTForCausalLM": dict(ffn_dim=48, word_embed_proj_dim=32),
    "FalconForCausalLM": {},
    "MixtralForCausalLM": dict(LLAMA, num_local_experts=2),
    "BertLMHeadModel": dict(BERT, is_decoder=True),
}
REFUSED = {
    "MambaForCausalLM": dict(state_size=8),
    "FalconMambaForCausalLM": dict(state_size=8),
    "RwkvForCausalLM": dict(attention_hidden_size=32),
    "RecurrentGemmaForCausalLM": GRIFFIN,
    "BertLMHeadModel": dict(BERT, is_decoder=False),
    "ElectraForCausalLM": dict(intermediate_size=48, embedding_size=32),
    "RobertaForCausalLM": dict(BERT, is_decoder=True),
    "XLNetLMHeadModel": dict(d_model=32, n_layer=2, n_head=4, d_inner=48),
    "BartForCausalLM": dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48),
    "Gemma3ForCausalLM": dict(LLAMA, head_dim=8, use_bidirectional_attention=True),
}
QUESTIONS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15], [16, 17]]


@pytest.mark.parametrize("name", SHARED_ROWS)
def test_the_right_models_are_let_through(name):
    gbpo.check_model(policy_of(make(name, **SHARED_ROWS[name])).eval(), QUESTIONS, replace(SMALL, max_new_tokens=8))


@pytest.mark.parametrize("name", ONE_ROW_EACH)
def test_models_that_mix_answers_of_a_row_have_a_row_for_each(name):
    policy, args = policy_of(make(name, **ONE_ROW_EACH[name])).eval(), replace(SMALL, max_new_tokens=8)
    with pytest.raises(SystemExit, match="--tokens-per-microbatch 1"):
        gbpo.check_model(policy, QUESTIONS, args)
    gbpo.check_model(policy, QUESTIONS, replace(args, tokens_per_microbatch=1))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("questions, length", [(QUESTIONS, 8), ([[5, 6, 7, 8]] * 4, 1)])
def test_models_whose_samples_or_rows_are_not_theirs_are_refused_by_type(name, questions, length):
    model = make(name, **REFUSED[name])
    for tokens in (1, 1024):
        with pytest.raises(SystemExit, match=f"type {model.config.model_type}, which can't be trained") as error:
            gbpo.check_model(
                policy_of(model).eval(), questions, replace(SMALL, max_new_tokens=length, tokens_per_microbatch=tokens)
            )
        assert "\n" not in str(error.value)


def test_a_refused_model_leaves_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, tokenizer = gbpo.scratch_model(gbpo.load_task(SMALL))
    make("MambaForCausalLM", state_size=8, pad_token_id=1, eos_token_id=0).save_pretrained("mamba")
    tokenizer.save_pretrained("mamba")
    with pytest.raises(SystemExit, match="type mamba"):
        gbpo.train(replace(SMALL, model_name="mamba"))
    assert not Path("runs").exists()


def test_a_cache_under_another_name_is_found_out(monkeypatch):
    """Earlier releases of transformers took `past_key_values=` and passed over `cache=`."""
    policy = policy_of(make("LlamaForCausalLM", **LLAMA)).eval()
    forward = policy.model.forward
    monkeypatch.setattr(policy.model, "forward", lambda cache=None, **given: forward(**given))
    with pytest.raises(SystemExit, match="type llama"):
        gbpo.check_model(policy, QUESTIONS, SMALL)


@pytest.mark.parametrize("version", ["4.57.6", "5.23.0"])
def test_an_old_transformers_is_one_line(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(SystemExit, match=f"{version} is older .*requirements-llm.txt") as error:
        gbpo.prepare(SMALL)
    assert "\n" not in str(error.value)


def test_answers_are_sampled_with_a_cache_when_activations_are_computed_again():
    """GPT-2 keeps none in training mode with checkpointing."""
    model = make("GPT2LMHeadModel", **GPT2, initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = policy_of(model, max_new_tokens=6).train()
    gbpo.check_model(policy, QUESTIONS, replace(SMALL, max_new_tokens=6))
    assert policy.training and model.training
    answers, _ = policy.generate(QUESTIONS, 2, 0.0, None)
    assert answers == policy.eval().generate(QUESTIONS, 2, 0.0, None)[0]


# bfloat16 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerator():
    """Room for an accelerator of another precision: there is one kind in a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def bfloat16_update(monkeypatch, targets, *, rate=0.0, minibatches=4, epochs=2, fillers=0):
    """Log-ratios of every pass, gradient norms of every step, and the weights after an update in bfloat16."""
    prompts, answers = random_groups(8, 4, longest=30)
    args = replace(SMALL, group_size=4, num_minibatches=minibatches, update_epochs=epochs, tokens_per_microbatch=100)
    accelerator = gbpo.Accelerator(cpu=True, mixed_precision="bf16")
    policy = gbpo.Policy(tiny_llama(initializer_range=0.1), torch.tensor([0]), args)
    policy, optimizer = accelerator.prepare(policy, torch.optim.SGD(policy.parameters(), lr=rate))
    batch = {"advantages": torch.ones(32), "target_ratios": targets, "groups": torch.arange(32).view(8, 4)}
    logratios, norms, gbpo_loss = [], [], gbpo.gbpo_loss
    clip = accelerator.clip_grad_norm_

    def recorded(logprobs, old_logprobs, advantages, targets, mask, level):
        logratios.append((logprobs - old_logprobs)[mask])
        return gbpo_loss(logprobs, old_logprobs, advantages, targets, mask, level)

    def clipped(parameters, _):
        norms.append(float(clip(parameters, 1e9)))
        return norms[-1]

    with monkeypatch.context() as patch:
        patch.setattr(gbpo, "gbpo_loss", recorded)
        patch.setattr(accelerator, "clip_grad_norm_", clipped)
        patch.setattr(accelerator, "gather", lambda count: count + fillers)  # as if another process had so many more
        generator = torch.Generator().manual_seed(0)
        gbpo.update(policy, None, optimizer, prompts, answers, batch, args, accelerator, generator)
    return logratios, norms, torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_old_log_probabilities_are_those_of_the_very_pass_in_bfloat16(monkeypatch, fresh_accelerator):
    logratios, norms, _ = bfloat16_update(monkeypatch, torch.ones(32))
    assert len(logratios) > 2 * 4 and all((ratios == 0).all() for ratios in logratios)
    assert norms == [0.0] * 8  # answers held at ρ* = 1 are pulled at by nothing
    assert all(norm > 0.1 for norm in bfloat16_update(monkeypatch, torch.full((32,), 1.3))[1])


def test_waiting_for_another_process_changes_nothing(monkeypatch, fresh_accelerator):
    targets = torch.ones(32).index_fill(0, torch.arange(1, 32, 4), 1.3)
    alone, waiting = (bfloat16_update(monkeypatch, targets, rate=0.1, fillers=fillers) for fillers in (0, 2))
    assert len(waiting[0]) == len(alone[0]) + 2 * 4 * 2 and alone[1] == waiting[1]
    assert torch.equal(alone[2], waiting[2])


def test_the_output_layer_computes_in_float32_and_a_copy_has_its_own():
    policy = policy_of(tiny_llama())
    prompts, answers = random_groups(2, 3)
    rows = gbpo.pack(prompts, answers, 3, range(6))
    head, seen = policy.model.get_output_embeddings(), []
    with torch.autocast("cpu", torch.bfloat16), head.register_forward_hook(lambda *given: seen.append(given[1:])):
        policy(rows)[0]
        policy.generate(prompts, 1, 1.0, torch.Generator().manual_seed(0))
    for (hidden,), logits in seen:
        assert logits.dtype == torch.float32 and torch.equal(logits, F.linear(hidden.float(), head.weight))
    assert len(seen) > 1 and policy(rows)[0].dtype == torch.float32
    assert gbpo.Policy(tiny_llama().double(), torch.tensor([0]), SMALL)(rows)[0].dtype == torch.float64
    first, before = copy.deepcopy(policy), policy(rows)[0].detach()
    with torch.no_grad():
        head.weight.mul_(2)
    assert torch.equal(first(rows)[0], before) and not torch.equal(policy(rows)[0], before)


# Conduct --------------------------------------------------------------------------------------------------------------

FLOATS = [field.name for field in fields(gbpo.Args) if "float" in str(field.type)]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_flag_takes_what_is_not_finite(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flag = f"--{name.replace('_', '-')}"
    monkeypatch.setattr(sys, "argv", ["gbpo_llm.py", f"{flag}={value}"])
    with pytest.raises(SystemExit, match=flag) as error:
        gbpo.main()
    assert "\n" not in str(error.value) and not Path("runs").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--reward", "majority", "--vote-size", "4"], "--vote-size"),
        (["--eval-top-p", "0"], "--eval-top-p"),
        (["--eval-top-p", "1.5"], "--eval-top-p"),
        (["--eval-temperature", "0"], "--eval-temperature"),
        (["--eval-every", "-1"], "--eval-every"),
        (["--ent-coef", "-1"], "--ent-coef"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--preset", "paper"], "AIME-TTT.json"),
    ],
)
def test_bad_input_is_one_clear_line(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gbpo_llm.py", *flags])
    with pytest.raises(SystemExit) as error:
        gbpo.main()
    assert words in str(error.value) and "\n" not in str(error.value) and not Path("runs").exists()


def test_a_checkpoint_is_written_every_five_minutes_at_least(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock, save, update, saved = [0.0], gbpo.save_checkpoint, gbpo.update, []
    monkeypatch.setattr(gbpo.time, "time", lambda: clock[0])

    def slow(*given):
        clock[0] += 120
        return update(*given)

    def recorded(run_dir, state, *rest):
        saved.append(state["batch"])
        save(run_dir, state, *rest)

    monkeypatch.setattr(gbpo, "update", slow)
    monkeypatch.setattr(gbpo, "save_checkpoint", recorded)
    gbpo.train(replace(SMALL, total_batches=7, checkpoint_every=1000))
    assert sorted(set(saved)) == [0, 2, 4, 6, 7]


def test_the_progress_bar_fits_a_terminal_and_shows_what_the_page_says_to_watch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    formats = []

    class Bar(gbpo.tqdm):
        def __init__(self, *args, **options):
            formats.append(options.get("bar_format"))
            super().__init__(*args, **options)

    monkeypatch.setattr(gbpo, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # elsewhere there is no bar
    gbpo.train(replace(SMALL, total_batches=3))
    last = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("3/3")][-1]
    shown = dict(part.split("=") for part in last.split(", ") if "=" in part)
    assert list(shown) == ["reward", "signal", "outside", "entropy"]
    postfix = "reward=-0.50, signal=100%, outside=100%, entropy=11.93"  # 11.93 is the logarithm of 150,000 tokens
    (bar_format,) = filter(None, formats)
    assert len(Bar.format_meter(500, 1000, 43_210, bar_format=bar_format, postfix=postfix)) <= 80


# The surroundings of a run --------------------------------------------------------------------------------------------


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gbpo_llm.py", *map(str, flags)])
    gbpo.main()


def weights(run_dir):
    return load_file(run_dir / "checkpoint.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rewards_of(run_dir):
    return [row.split(",")[1] for row in (run_dir / "episodes.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-prompts", "1000000000000"],
        ["--num-prompts", "1e12", "--task", "reasoning_gym/chain_sum"],
        ["--group-size", "1e9"],
        ["--vote-size", "1e12"],
        ["--max-new-tokens", "1e12"],
        ["--eval-samples", "1e12"],
        ["--eval-prompts", "1e12", "--task", "reasoning_gym/chain_sum"],
        ["--few-shot", "1e12"],
        ["--num-minibatches", "1e12"],
        ["--lora-rank", "1e9"],
        ["--seed", "1e30"],
    ],
)
def test_what_memory_can_t_hold_is_one_line(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *flags)
    assert flags[0] in stop.value.code and "\n" not in stop.value.code and not Path("runs").exists()


def test_which_flags_were_given_decides_what_a_tiny_model_takes(monkeypatch):
    args = run_main(monkeypatch)
    assert (args.learning_rate, args.total_batches, args.update_epochs, args.max_new_tokens) == (5e-4, 100, 4, 1)
    args = run_main(monkeypatch, "--total-batches", "2e2", "--update-epochs=2")  # the defaults of other models
    assert (args.learning_rate, args.total_batches, args.update_epochs) == (5e-4, 200, 2)
    assert run_main(monkeypatch, "--task", "reasoning_gym/chain_sum").max_new_tokens == 512
    args = run_main(monkeypatch, "--preset", "paper", "--no-require-box", "--total-batches", "200")
    assert (args.require_box, args.total_batches, args.eval_every) == (False, 200, 2)
    assert run_main(monkeypatch, "--model-name", "smollm2", "--lora-rank", "8").learning_rate == 1e-4


@pytest.mark.parametrize("flag", ["--cuda", "--total-timesteps=1000", "--num-envs=8", "--clip-coef=0.2", "--no-anneal-lr"])
def test_cleanrl_s_other_flags_are_told_what_stands_for_them(flag, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, flag)
    name = flag.split("=")[0].replace("--no-", "--")
    assert stop.value.code == 2 and f"gbpo_llm: {name}: " in capsys.readouterr().err.splitlines()[-1]


def test_a_finished_run_can_be_extended_but_not_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rate = gbpo.learning_rate
    monkeypatch.setattr(gbpo, "learning_rate", lambda batch, args: 1e-3)
    whole, first = (gbpo.train(replace(SMALL, total_batches=batches)) for batches in (5, 3))
    main(monkeypatch, "--resume", first, "--total-batches", 5)
    assert same(weights(whole), weights(first)) and rewards_of(whole) == rewards_of(first)
    assert json.loads((first / "config.json").read_text())["total_batches"] == 5
    assert set(gbpo.load_checkpoint(first)[0]["evaluations"]) == {"0", "3", "5"}
    monkeypatch.setattr(gbpo, "learning_rate", rate)
    capsys.readouterr()
    main(monkeypatch, "--resume", first, "--total-batches", 10)
    expected = rate(5, replace(SMALL, total_batches=10))
    assert f"follows the cosine of 10 batches; here it is {expected:.3g}" in capsys.readouterr().out
    config = (first / "config.json").read_text()
    for flags, words in (
        (["--total-batches", 4], "at batch 10 already"),
        (["--total-batches", 0], "at batch 10 already"),
        (["--seed", 1], "only --total-batches"),
        (["--update-epochs=2"], "only --total-batches"),
        (["--no-allow-code"], "only --total-batches"),
    ):
        with pytest.raises(SystemExit, match=words):
            main(monkeypatch, "--resume", first, *flags)
    with pytest.raises(SystemExit, match="takes a run folder"):
        main(monkeypatch, "--resume", first / "checkpoint.safetensors")
    with pytest.raises(SystemExit, match="--eval-prompts and --eval-samples"):
        main(monkeypatch, "--evaluate", first, "--seed", 1)
    assert (first / "config.json").read_text() == config


def test_the_best_model_of_the_evaluations_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluate, scores, seen = gbpo.evaluate, iter([0.1, 0.1, 0.7, 0.5, 0.7, 0.2]), {}

    def scored(policy, *rest):
        score = next(scores)
        seen.setdefault(score, {name: tensor.clone() for name, tensor in policy.model.state_dict().items()})
        return evaluate(policy, *rest) | {"pass@1": score}

    plain = gbpo.train(SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(gbpo, "evaluate", scored)
        run_dir = gbpo.train(replace(SMALL, total_batches=5, eval_every=1))
        assert f"best model, that of batch 2: {run_dir / 'best'}" in capsys.readouterr().out
        model = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "best")
        assert same(model.state_dict(), seen[0.7]) and not same(seen[0.7], seen[0.1])
        assert transformers.AutoTokenizer.from_pretrained(run_dir / "best").decode([3, 4])
    looked_on = gbpo.train(replace(SMALL, eval_every=2))
    assert same(weights(looked_on), weights(plain)) and rewards_of(looked_on) == rewards_of(plain)
    assert not (plain / "best").exists()
    capsys.readouterr()
    main(monkeypatch, "--evaluate", looked_on / "checkpoint.safetensors", "--eval-prompts", 10)
    evaluation = gbpo.load_checkpoint(looked_on)[0]["evaluations"]["6"]
    assert gbpo.describe(evaluation, SMALL) in capsys.readouterr().out


def test_the_best_adapters_load_by_peft(tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tmp_path)
    base = gbpo.train(replace(SMALL, total_batches=1)) / "model"
    run_dir = gbpo.train(replace(SMALL, total_batches=2, model_name=str(base), lora_rank=2, eval_every=1))
    for name in ("best", "model"):
        model = AutoPeftModelForCausalLM.from_pretrained(run_dir / name)
        assert model(torch.tensor([[3, 4]])).logits.isfinite().all()


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_best_model_can_be_evaluated(lora_rank, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / gbpo.train(replace(SMALL, total_batches=1)) / "model" if lora_rank else "scratch"
    args = replace(SMALL, model_name=str(base), lora_rank=lora_rank, learning_rate=1e-2, total_batches=3, eval_every=1)
    scores, seen = iter([0.1, 0.7, 0.2, 0.2, 0.7, 0.2]), []

    def scored(policy, *_):
        seen.append({name: tensor.clone() for name, tensor in policy.state_dict().items()})
        return {"pass@1": next(scores), "pass@1_error": 0.0}

    monkeypatch.setattr(gbpo, "evaluate", scored)
    run_dir = gbpo.train(args)
    main(monkeypatch, "--evaluate", run_dir / "best", "--eval-prompts", 10)
    assert same(seen[4], seen[1]) and not same(seen[1], seen[0]) and not same(seen[1], seen[3])
    assert "pass@1 0.700" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.chdir(run_dir / "model")
    main(monkeypatch, "--evaluate", ".", "--eval-prompts", 10)
    assert same(seen[5], seen[3])


def test_the_bar_says_reward_and_without_a_terminal_once_a_minute(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gbpo.train(replace(SMALL, total_batches=2, answers_at_a_time=4))
    bars = capsys.readouterr().err
    assert len(bars.split("\r")) < 20 and "2/2" in bars and "reward=" in bars


def test_config_and_events_tell_versions_commit_and_flags(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    run_dir = gbpo.train(replace(SMALL, total_batches=1, exp_name="first/try"))
    assert run_dir.name.startswith("largest_digit__first-try__1__")
    config = json.loads((run_dir / "config.json").read_text())
    assert config["versions"]["transformers"] == transformers.__version__
    assert {"python", "torch", "numpy", "accelerate", "peft"} <= set(config["versions"])
    assert not (ROOT / ".git").exists() or len(config["commit"].removesuffix("-dirty")) == 40
    (text,) = EventAccumulator(str(run_dir)).Reload().Tensors("hyperparameters/text_summary")
    assert b"|epsilon_low|0.3|" in text.tensor_proto.string_val[0]


def test_a_run_of_a_file_in_another_folder_has_a_plain_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for task in ("../data/sums.json", "/data/sums.json", "C:/data/sums.json"):
        name = gbpo.new_run_dir(replace(SMALL, task=task)).name
        assert "data-sums.json__gbpo_llm__1__" in name and name[0] not in ".-" and "/" not in name


def test_a_run_resumed_from_within_its_folder_keeps_its_name_at_wandb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    record = lambda name: lambda *given, **settings: calls.append((name, given, settings))  # noqa: E731
    wandb = SimpleNamespace(**{name: record(name) for name in ("init", "save", "finish")})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_dir = gbpo.train(replace(SMALL, total_batches=1, track=True))
    monkeypatch.chdir(run_dir)
    gbpo.train(replace(SMALL, resume="."), 2)
    assert [name for name, *_ in calls] == ["init", "save", "finish"] * 2
    assert all(calls[k][2]["id"] == run_dir.name for k in (0, 3)) and calls[3][2]["config"]["total_batches"] == 2
    assert calls[1][1] == (str(ROOT / "gbpo_llm.py"),)


# The vote and the scorer ----------------------------------------------------------------------------------------------


def test_a_vote_of_many_goes_through_the_scorer_with_and_without_boxes():
    args = replace(SMALL, reward="majority", group_size=3, vote_size=7, require_box=True)
    task = gbpo.Task([], [], gbpo.math_score, gbpo.same_math)
    answers = ["\\boxed{3}", "\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "is \\boxed{\\frac{2}{4}}", "3", "3", "3"]
    assert gbpo.group_rewards(answers, {"answer": "3"}, task, args) == [0, 1, 1, 1, 0, 0, 0]
    free = gbpo.group_rewards(answers, {"answer": "?"}, task, replace(args, require_box=False))
    assert free == [1, 0, 0, 0, 1, 1, 1]
    gbpo.PROBLEMS.clear()
    towers = ["\\boxed{9^{9^{9^{9}}}}"] * 4 + ["\\boxed{2}"] * 2  # what can't be computed has no vote
    assert gbpo.group_rewards(towers, {"answer": "2"}, task, args) == [0, 0, 0, 0, 1, 1]
    assert gbpo.PROBLEMS["scorer_failures"] == 1


@pytest.mark.parametrize(
    "texts, require_box, collapsed",
    [
        (["\\boxed{1}", "so \\boxed{1}"], True, True),
        (["1"], True, True),
        ([""], False, True),
        (["\\boxed{1}", "\\boxed{2}"], True, False),
        (["it is 1", "it is 2"], True, False),
        (["<think>cut off", "<think>another"], False, False),
        (["\\boxed{1", "\\boxed{2"], False, False),
    ],
)
def test_only_answers_that_are_all_the_same_have_collapsed(texts, require_box, collapsed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answers = itertools.cycle(texts)
    monkeypatch.setattr(gbpo, "decode", lambda *_: next(answers))
    gbpo.train(replace(SMALL, reward="majority", vote_size=9, total_batches=1, require_box=require_box))
    assert ("the vote has collapsed" in capsys.readouterr().err) == collapsed
