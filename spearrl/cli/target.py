"""What `check-env` and `play` are pointed at: an environment's name, or a config file or run directory that names one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spearrl.config import RunConfig

TARGET_HELP = 'built-in environment, "my_pkg.mod:Class" of your own, or a config file or run directory that names one'
OVERRIDES_HELP = "settings, e.g. env.options.seed=3"


def config_of(target: str, overrides: Sequence[str], *, model: str | None = None) -> RunConfig:
    """The config of a file or a run directory; for a name, the defaults of every setting (no preset) and the overrides. Raises ConfigError."""
    from spearrl.config import load_config

    if target.endswith(".toml") or Path(target).is_dir():
        return load_config(target, overrides, model=model)
    return load_config(None, overrides, env=target, model=model or "tiny")
