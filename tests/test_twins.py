"""What two scripts share is the same to the letter."""

import ast
import difflib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What may differ between bpo_continuous.py and ppo_baseline.py: hyperparameters, loss and median critic.
OWN = {
    "Args",
    "CLEANRL",
    "PAPER_ALL",
    "PAPER",
    "paper_settings",
    "check_loss_args",
    "Agent",
    "loss_coefficients",
    "minibatch_losses",
    "ratio_metrics",
}
SHARED_WITH_ATARI = {"gae", "target_ratio", "bpo_loss", "median_loss", "update", "flatten_parameters", "layer_init", "convert"}
SHARED_WITH_ATARI |= {
    "SCRIPT",
    "gym.logger.min_level",
    "command_line",
    "new_run_dir",
    "write_config",
    "start_wandb",
    "finish",
    "one_line",
    "save_checkpoint",
    "load_checkpoint",
    "append_episodes",
    "plot_learning_curve",
}
SHARED_WITH_ISAACLAB = {"gae", "target_ratio", "bpo_loss", "median_loss", "convert", "SCRIPT"}
SHARED_WITH_ISAACLAB |= {"save_checkpoint", "load_checkpoint", "append_episodes", "plot_learning_curve"}
SHARED_WITH_ISAACLAB |= {"write_config", "start_wandb", "one_line"}
LOSSES = {"target_ratio", "bpo_loss", "median_loss", "ppo_loss", "clipped_value_loss"}


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


def test_ppo_and_bpo_differ_in_loss_and_median_critic_only():
    ours, theirs = definitions("bpo_continuous.py"), definitions("ppo_baseline.py")
    assert set(ours) ^ set(theirs) == LOSSES
    different = {name for name in set(ours) & set(theirs) if ours[name] != theirs[name]}
    assert different == OWN


def test_bpo_atari_shares_loss_update_and_run_folder():
    atari, continuous, ppo = (definitions(script) for script in ("bpo_atari.py", "bpo_continuous.py", "ppo_baseline.py"))
    assert {name for name in set(atari) & set(continuous) if atari[name] == continuous[name]} == SHARED_WITH_ATARI
    assert atari["ppo_loss"] == ppo["ppo_loss"]


def test_bpo_isaaclab_shares_loss_and_run_folder():
    isaac, continuous, ppo = (definitions(script) for script in ("bpo_isaaclab.py", "bpo_continuous.py", "ppo_baseline.py"))
    assert {name for name in set(isaac) & set(continuous) if isaac[name] == continuous[name]} == SHARED_WITH_ISAACLAB
    assert all(isaac[name] == ppo[name] for name in ("ppo_loss", "clipped_value_loss"))
    assert isaac["new_run_dir"].replace("task", "env_id") == continuous["new_run_dir"].replace("<env>", "<env_id>")
    assert isaac["finish"].replace(', "iteration"', "") == continuous["finish"]


def test_gbpo_llm_shares_what_it_can_of_the_run_folder():
    llm, continuous = (definitions(script) for script in ("gbpo_llm.py", "bpo_continuous.py"))
    shared = {"SCRIPT", "append_episodes", "command_line", "write_config", "start_wandb", "one_line"}
    assert {name for name in set(llm) & set(continuous) if llm[name] == continuous[name]} == shared


def test_the_diff_stays_short():
    files = [(ROOT / script).read_text().splitlines() for script in ("ppo_baseline.py", "bpo_continuous.py")]
    added = [line for line in difflib.unified_diff(*files, n=0) if line.startswith("+")]
    assert len(added) < 110
