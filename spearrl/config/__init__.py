"""Typed run configs: sections, presets, the --algo grammar, TOML in and out.

Names load lazily, so that --help needs no pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spearrl.config.algo import AlgoSection
    from spearrl.config.checks import check
    from spearrl.config.dump import diff, to_toml
    from spearrl.config.loading import Resolved, load_config, resolve
    from spearrl.config.pitfalls import advice
    from spearrl.config.sections import RunConfig

__all__ = ["AlgoSection", "Resolved", "RunConfig", "advice", "check", "diff", "load_config", "resolve", "to_toml"]
_HOME_OF = {"AlgoSection": "algo", "RunConfig": "sections", "advice": "pitfalls", "check": "checks"}
_HOME_OF |= {"diff": "dump", "to_toml": "dump"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_HOME_OF.get(name, 'loading')}"), name)
    raise AttributeError(f"module 'spearrl.config' has no attribute {name!r}")
