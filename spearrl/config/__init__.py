"""Typed run configs: sections, presets, the --algo grammar, TOML in and out. Names load lazily, so that --help needs no pydantic."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spearrl.config.checks import advice, check
    from spearrl.config.dump import diff, to_toml
    from spearrl.config.loading import Resolved, load_config, resolve
    from spearrl.config.sections import (
        AlgoSection,
        EnvSection,
        EvalSection,
        LearnerSection,
        LoraSection,
        ModelSection,
        PlacementSection,
        RolloutSection,
        RunConfig,
        RunSection,
        SftSection,
        SyncSection,
        TinySection,
        VllmSection,
    )

__all__ = [
    "AlgoSection",
    "EnvSection",
    "EvalSection",
    "LearnerSection",
    "LoraSection",
    "ModelSection",
    "PlacementSection",
]
__all__ += ["RolloutSection", "RunConfig", "RunSection", "SftSection", "SyncSection", "TinySection", "VllmSection"]
__all__ += ["Resolved", "advice", "check", "diff", "load_config", "resolve", "to_toml"]

_HOME = {
    "Resolved": "loading",
    "advice": "checks",
    "check": "checks",
    "diff": "dump",
    "load_config": "loading",
    "resolve": "loading",
    "to_toml": "dump",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_HOME.get(name, 'sections')}"), name)
    raise AttributeError(f"module 'spearrl.config' has no attribute {name!r}")
