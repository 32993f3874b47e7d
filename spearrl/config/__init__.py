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
        ClipCovSection,
        EnvSection,
        EvalSection,
        FilterSection,
        GroupSection,
        IntrinsicSection,
        LearnerSection,
        ModelSection,
        PolicySection,
        RolloutSection,
        RunConfig,
        RunSection,
        ScheduleSection,
        Section,
        SftSection,
        SilSection,
        TinySection,
    )

__all__ = [
    "GroupSection",
    "AlgoSection",
    "ClipCovSection",
    "EnvSection",
    "EvalSection",
    "FilterSection",
    "IntrinsicSection",
    "LearnerSection",
    "ModelSection",
    "PolicySection",
    "Resolved",
    "RolloutSection",
    "RunConfig",
    "RunSection",
    "ScheduleSection",
    "Section",
    "SftSection",
    "SilSection",
    "TinySection",
    "advice",
    "check",
    "diff",
    "load_config",
    "resolve",
    "to_toml",
]

_ELSEWHERE = {"advice": "checks", "check": "checks", "diff": "dump", "to_toml": "dump", "Resolved": "loading", "load_config": "loading", "resolve": "loading"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'sections')}"), name)
    raise AttributeError(f"module 'spearrl.config' has no attribute {name!r}")
