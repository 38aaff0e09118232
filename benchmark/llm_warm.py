"""The paper's setting on a small model: labels teach it for 20 batches, until it is right in a quarter of its answers; then it
goes on as the flags say, such as with a majority vote in place of labels.

    python benchmark/llm_warm.py --loss gbpo --reward majority --vote-size 64 --group-size 32 --seed 1

All flags are gbpo_llm.py's; the first 20 batches have none of them but the seed, and leave nothing behind.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "gbpo_llm.py"
TASK = ["--max-new-tokens", "1", "--update-epochs", "4"]  # as from scratch

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seed", default="1")
    seed = parser.parse_known_args()[0].seed
    with tempfile.TemporaryDirectory() as folder:
        first = [sys.executable, SCRIPT, "--seed", seed, "--total-batches", "20", "--eval-prompts", "1"]
        subprocess.run(first, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (model,) = Path(folder).glob("runs/*/model")
        second = [sys.executable, SCRIPT, "--model-name", model, *TASK, *sys.argv[1:]]
        sys.exit(subprocess.run(second).returncode)
