"""GBPO or GRPO inside TRL on gbpo_llm.py's scratch task, leaving the episodes.csv that run.py reads: a row for each batch.

pip install -r requirements.txt -r requirements-llm.txt && python benchmark/trl_grpo.py --loss gbpo --seed 1
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "integrations")]
from gbpo_trl import GBPOConfig, GBPOTrainer  # noqa: E402

from gbpo_llm import largest_digit_task, scratch_model  # noqa: E402

ITERATIONS = 4  # passes over a batch, one step each


@dataclass
class Args:
    task: Literal["largest_digit"] = "largest_digit"  # the only one
    seed: int = 1  # seed of the model, its completions and the order of prompts
    total_batches: int = 100  # batches of 16 prompts with 8 completions each
    loss: Literal["gbpo", "grpo"] = "gbpo"  # the loss
    learning_rate: float = 5e-4  # Adam's, falling linearly to 0


def reward(completions, answer, **_):
    """1 for the right digit: completions and answers (B,) → (B,)."""
    return [float(completion == right) for completion, right in zip(completions, answer)]


if __name__ == "__main__":
    args = tyro.cli(Args)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    task = largest_digit_task()
    model, tokenizer = scratch_model(task)
    config, trainer = (GBPOConfig, GBPOTrainer) if args.loss == "gbpo" else (GRPOConfig, GRPOTrainer)
    folder = Path("runs/trl_grpo")
    settings = config(output_dir=str(folder), seed=args.seed, learning_rate=args.learning_rate, max_completion_length=1,
                      max_steps=ITERATIONS * args.total_batches, num_iterations=ITERATIONS, num_generations=8,
                      per_device_train_batch_size=128, logging_steps=1, report_to="none", save_strategy="no",
                      disable_tqdm=True, use_cpu=True, bf16=False)  # fmt: skip
    data = Dataset.from_list([{"prompt": example["prompt"], "answer": example["answer"]} for example in task.train])
    trained = trainer(model=model, processing_class=tokenizer, reward_funcs=reward, train_dataset=data, args=settings)
    trained.train()
    with open(folder / "episodes.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "return", "length"))
        logs = [row for row in trained.state.log_history if "rewards/reward/mean" in row]
        writer.writerows(((row["step"] - 1) // ITERATIONS + 1, row["rewards/reward/mean"], 1) for row in logs)
