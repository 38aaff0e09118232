"""Each script's inline metadata (PEP 723) names what it imports, in the versions of the requirements files."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "bpo_continuous.py": ["requirements.txt"],
    "ppo_baseline.py": ["requirements.txt"],
    "bpo_atari.py": ["requirements.txt"],
    "brrl_tabular.py": ["requirements.txt"],
    "gbpo_llm.py": ["requirements.txt", "requirements-llm.txt"],
    "bpo_isaaclab.py": ["requirements-isaaclab.txt"],
}
# What brings a module whose package is called otherwise, or comes with another package.
BROUGHT_BY = {"isaaclab_rl": "isaaclab", "isaaclab_tasks": "isaaclab", "torch": "isaaclab", "gymnasium": "isaaclab",
              "numpy": "isaaclab", "imageio": "isaaclab", "psutil": "accelerate", "sympy": "math_verify",
              "tokenizers": "transformers"}  # fmt: skip
OPTIONAL = {"mjlab"}  # in an environment of its own


def name(requirement):
    return re.split(r"[=\[]", requirement)[0].replace("-", "_")


def metadata(script):
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///\n", (ROOT / script).read_text())
    return tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))


@pytest.mark.parametrize("script", FILES)
def test_the_inline_metadata_is_the_requirements(script):
    required = {line for file in FILES[script] for line in (ROOT / file).read_text().splitlines()}
    dependencies = metadata(script)["dependencies"]
    assert set(dependencies) <= required and len(dependencies) == len(set(dependencies))
    named = {name(dependency) for dependency in dependencies}
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - OPTIONAL:
            assert module in named or BROUGHT_BY.get(module) in named, module


def test_pythons_are_those_that_the_readme_names():
    assert metadata("bpo_continuous.py")["requires-python"] == ">=3.11,<3.14"
    assert "Python 3.11–3.13" in (ROOT / "README.md").read_text()
