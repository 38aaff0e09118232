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
SHOWN = BPO | PPO | {"gae", "group_advantages", "soft_quantile", "group_target_ratios", "log_ratio", "masked_mean", "gbpo_loss"}
SHOWN |= {"grpo_loss", "kl_loss"}
# What may differ between bpo_continuous.py and ppo_baseline.py: hyperparameters, critics and loss.
OWN = {"AlgorithmArgs", "RunArgs", "check_args", "Agent", "total_loss", "train", "ratio_metrics", "PAPER_ALL", "PAPER"}
OWN |= {"paper_settings", "CLEANRL"}


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


@pytest.mark.parametrize("script", [*EQUATIONS, "gbpo_llm.py"])
def test_the_equations_come_first(script):
    """Above them are only the docstring, imports and arguments."""
    last, limit = ("kl_loss", 260) if script == "gbpo_llm.py" else ("gae", 160)
    body = ast.parse((ROOT / script).read_text()).body
    (end,) = [node.end_lineno for node in body if getattr(node, "name", "") == last]
    assert end <= limit
    assert not [node for node in body if isinstance(node, ast.FunctionDef) and node.lineno < end and node.name not in SHOWN]
