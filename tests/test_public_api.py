"""Every name that a package offers is there, and `import spearrl` costs nothing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import spearrl

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "pydantic", "numpy", "vllm")
PACKAGES = ["", ".config", ".batching", ".buffers", ".losses", ".learner", ".rollout", ".envs", ".envs.check"]
PROMISED = {
    "Trainer",
    "RunConfig",
    "load_config",
    "evaluate",
    "EvalResult",
    "UpdateResult",
    "check_environment",
    "RuleFinding",
}
PROMISED |= {"Environment", "ToolEnvironment", "tool", "Done", "Task", "Action", "Observation", "Outcome"}
PROMISED |= {"Reply", "Message", "Text", "Image", "Trajectory", "Group"}


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_resolve(package: str):
    module = importlib.import_module(f"spearrl{package}")
    assert module.__all__ and all(getattr(module, name) is not None for name in module.__all__)
    assert len(module.__all__) == len(set(module.__all__))


def test_the_door_has_what_was_promised_and_lists_it():
    assert PROMISED <= set(spearrl.__all__) <= set(dir(spearrl))
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        spearrl.Trainr  # noqa: B018


def test_type_checkers_see_the_same_names():
    """The block that only they read imports every public name from where it comes from at run time."""
    tree = ast.parse(Path(spearrl.__file__).read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    homes = {alias.name: node.module for node in block.body for alias in node.names}
    assert set(homes) == {*spearrl.__all__} - {"__version__"}
    for name, home in homes.items():
        assert getattr(importlib.import_module(home), name) is getattr(spearrl, name), name
    assert (Path(spearrl.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("statement", ["import spearrl", "from spearrl import ConfigError, Observation, Outcome, Task"])
def test_importing_it_loads_nothing_heavy(statement: str):
    code = f"{statement}; import sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_environment_needs_no_torch():
    code = "import sys, spearrl; spearrl.ToolEnvironment; print([n for n in ('torch', 'vllm') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "path",
    [
        "spearrl/cli/scaffold/env.py.txt",
        "spearrl/cli/scaffold/test_env.py.txt",
        *sorted(map(str, ROOT.glob("examples/*/*.py"))),
    ],
)
def test_examples_import_spearrl_alone(path: str):
    text = (ROOT / path).read_text().replace("$name", "Name").replace("$package", "package")
    homes = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert "spearrl" in homes and not any(str(home).startswith("spearrl.") for home in homes)


def test_a_config_made_in_code_means_what_its_algorithm_says():
    algo = spearrl.RunConfig.model_validate({"algo": {"name": "grpo+spear"}}).algo
    assert algo.sil.enabled and algo.intrinsic.enabled and algo.clip_cov.enabled
    own = {"name": "grpo+spear", "sil": {"enabled": False, "capacity": 7}}
    algo = spearrl.RunConfig.model_validate({"algo": own}).algo
    assert not algo.sil.enabled and algo.sil.capacity == 7 and algo.clip_cov.enabled
