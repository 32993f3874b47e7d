"""Typed run configs: sections, presets, the --algo grammar, TOML in and out. Names load lazily, so that --help needs no pydantic."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spearrl.config.algo import (
        AlgoSection,
        ClipCovSection,
        CorrectionSection,
        CriticSection,
        DynamicSection,
        FilterSection,
        GigpoSection,
        GroupSection,
        IntrinsicSection,
        KlCovSection,
        KlSection,
        PolicySection,
        ScheduleSection,
        SilSection,
    )
    from spearrl.config.base import Section
    from spearrl.config.checks import advice, check
    from spearrl.config.dump import diff, to_toml
    from spearrl.config.loading import Resolved, load_config, resolve
    from spearrl.config.sections import (
        EnvSection,
        EvalSection,
        LearnerSection,
        ModelSection,
        RolloutSection,
        RunConfig,
        RunSection,
        SftSection,
        TinySection,
    )

__all__ = [
    "AlgoSection",
    "ClipCovSection",
    "CorrectionSection",
    "CriticSection",
    "DynamicSection",
    "EnvSection",
    "EvalSection",
    "FilterSection",
    "GigpoSection",
    "GroupSection",
    "IntrinsicSection",
    "KlCovSection",
    "KlSection",
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

_HOME = {
    "Resolved": "loading",
    "Section": "base",
    "advice": "checks",
    "check": "checks",
    "diff": "dump",
    "load_config": "loading",
    "resolve": "loading",
    "to_toml": "dump",
}
_SECTIONS = ("EnvSection", "EvalSection", "LearnerSection", "ModelSection", "RolloutSection", "RunConfig", "RunSection", "SftSection", "TinySection")
_HOME |= dict.fromkeys(_SECTIONS, "sections")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_HOME.get(name, 'algo')}"), name)
    raise AttributeError(f"module 'spearrl.config' has no attribute {name!r}")
