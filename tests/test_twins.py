"""The equations are the same to the letter wherever they stand, and PPO's script differs from BPO's by the algorithm alone."""

import ast
import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BPO, PPO = {"target_ratio", "bpo_loss", "median_loss"}, {"ppo_loss", "clipped_value_loss"}
EQUATIONS = {
    "bpo_continuous.py": BPO | {"gae"},
    "ppo_baseline.py": PPO | {"gae"},
    "bpo_atari.py": BPO | {"gae", "ppo_loss"},
    "bpo_isaaclab.py": BPO | PPO | {"gae"},
}
# What may differ between bpo_continuous.py and ppo_baseline.py: hyperparameters, critics and loss.
OWN = {"Args", "check_args", "Agent", "total_loss", "train", "ratio_metrics", "PAPER_ALL", "PAPER", "paper_settings", "CLEANRL"}


def definitions(script):
    """{name: source} of the functions, classes and constants of a script."""
    source = (ROOT / script).read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.get_source_segment(source, node)
    return found


@pytest.mark.parametrize("script", EQUATIONS)
def test_the_equations_are_the_same_in_all_scripts(script):
    ours = definitions(script)
    assert EQUATIONS[script] == set(ours) & (BPO | PPO | {"gae"})
    for reference in ("bpo_continuous.py", "ppo_baseline.py"):
        theirs = definitions(reference)
        assert all(ours[name] == theirs[name] for name in EQUATIONS[script] & EQUATIONS[reference])


def test_ppo_and_bpo_differ_in_the_algorithm_only():
    ours, theirs = definitions("bpo_continuous.py"), definitions("ppo_baseline.py")
    assert set(ours) ^ set(theirs) == BPO | PPO
    assert {name for name in set(ours) & set(theirs) if ours[name] != theirs[name]} == OWN


def test_the_diff_stays_short():
    files = [(ROOT / script).read_text().splitlines() for script in ("ppo_baseline.py", "bpo_continuous.py")]
    added = [line for line in difflib.unified_diff(*files, n=0) if line.startswith("+")]
    assert len(added) < 100


@pytest.mark.parametrize(("script", "last"), [("bpo_continuous.py", 160), ("ppo_baseline.py", 160), ("bpo_atari.py", 160),
                                              ("bpo_isaaclab.py", 170), ("gbpo_llm.py", 260)])  # fmt: skip
def test_the_equations_come_first(script, last):
    """Before any network or environment; the first lines are docstring, imports and arguments."""
    lines = (ROOT / script).read_text().splitlines()
    (end,) = [n for n, line in enumerate(lines, 1) if line.startswith(("# Network ---", "# Model ---"))]
    assert end <= last
