"""Every name that a package offers is there."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "spearrl",
        "spearrl.config",
        "spearrl.batching",
        "spearrl.buffers",
        "spearrl.losses",
        "spearrl.learner",
        "spearrl.rollout",
        "spearrl.envs",
    ],
)
def test_public_names_resolve(module: str):
    package = importlib.import_module(module)
    assert package.__all__ and all(getattr(package, name) is not None for name in package.__all__)


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = (
        "import sys, spearrl, spearrl.envs; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_config_made_in_code_means_what_its_algorithm_says():
    from spearrl import RunConfig

    algo = RunConfig.model_validate({"algo": {"name": "grpo+spear"}}).algo
    assert algo.sil.enabled and algo.intrinsic.enabled and algo.clip_cov.enabled
    algo = RunConfig.model_validate({"algo": {"name": "grpo+spear", "sil": {"enabled": False, "capacity": 7}}}).algo
    assert not algo.sil.enabled and algo.sil.capacity == 7 and algo.clip_cov.enabled
