"""The reference: Stable-Baselines3's PPO with its own defaults, leaving the episodes.csv that run.py reads; or BPO inside it.

pip install stable-baselines3==2.9.2 && python benchmark/sb3_ppo.py --env-id Hopper-v4 --seed 1
python benchmark/sb3_ppo.py --loss bpo --settings bpo --env-id Hopper-v4 --seed 1
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integrations"))
from bpo_sb3 import BPO

# The defaults of bpo_continuous.py and of ppo_baseline.py, under the host's names; both normalise observations and rewards.
SETTINGS = {
    "bpo": dict(n_steps=1024, learning_rate=lambda left: 6e-4 * left, ent_coef=3e-3, policy_kwargs={"log_std_init": -0.7}),
    "ppo": dict(n_steps=2048, learning_rate=lambda left: 3e-4 * left),
}


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"  # gymnasium id of the task
    seed: int = 1  # seed of networks, policy noise and environments
    total_timesteps: int = 1_000_000  # environment steps in all
    loss: Literal["ppo", "bpo"] = "ppo"  # the loss
    settings: Literal["sb3", "bpo", "ppo"] = "sb3"  # the host's own, or those of bpo_continuous.py or ppo_baseline.py


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
    env = args.env_id if args.settings == "sb3" else VecNormalize(make_vec_env(args.env_id, seed=args.seed))
    algorithm = BPO if args.loss == "bpo" else PPO
    model = algorithm("MlpPolicy", env, seed=args.seed, device="cpu", **SETTINGS.get(args.settings, {}))
    model.learn(args.total_timesteps, callback=Episodes(folder / "episodes.csv"))
