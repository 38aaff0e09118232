"""The reference: Stable-Baselines3's PPO with its own defaults, leaving the episodes.csv that run.py reads.

pip install stable-baselines3==2.9.2 && python benchmark/sb3_ppo.py --env-id Hopper-v4 --seed 1
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"  # gymnasium id of the task
    seed: int = 1  # seed of networks, policy noise and environments
    total_timesteps: int = 1_000_000  # environment steps in all


class Episodes(BaseCallback):
    """Writes the row of each episode that ends: step, return, length."""

    def __init__(self, path):
        super().__init__()
        self.file = open(path, "w", newline="")  # noqa: SIM115
        self.writer = csv.writer(self.file)
        self.writer.writerow(("step", "return", "length"))

    def _on_step(self):
        for info in self.locals["infos"]:
            if "episode" in info:
                self.writer.writerow((self.num_timesteps, info["episode"]["r"], info["episode"]["l"]))
        return True

    def _on_training_end(self):
        self.file.close()


if __name__ == "__main__":
    args = tyro.cli(Args)
    gym.logger.min_level = gym.logger.ERROR
    torch.set_num_threads(1)
    folder = Path("runs/sb3_ppo")
    folder.mkdir(parents=True, exist_ok=True)
    model = PPO("MlpPolicy", args.env_id, seed=args.seed, device="cpu")
    model.learn(args.total_timesteps, callback=Episodes(folder / "episodes.csv"))
