"""Data tables: the TOML files that lie beside the modules that use them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNSET = "unset"  # how a table writes None, which TOML does not have


def table(module: str, name: str) -> dict[str, Any]:
    """The file `name` beside a module. Example: table(__file__, "presets.toml")."""
    return tomllib.loads(Path(module).with_name(name).read_text(encoding="utf-8"))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys, in order: {"sil": {"unit": "row"}} is {"sil.unit": "row"}. "unset" is None."""
    settings: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            settings |= flat(value, f"{prefix}{name}.")
        else:
            settings[f"{prefix}{name}"] = None if value == UNSET else value
    return settings


def nested(settings: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Values by the parts of their keys as nested tables: {("sil", "unit"): "row"} is {"sil": {"unit": "row"}}."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        branch = tree
        for part in key[:-1]:
            branch = branch.setdefault(part, {})
        branch[key[-1]] = value
    return tree
