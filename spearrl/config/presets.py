"""Named starting points, from presets.toml: dotted key -> value."""

from __future__ import annotations

from typing import Any

from spearrl.config.tables import flat, table

_TABLE = table(__file__, "presets.toml")
_ENTRIES: dict[str, dict[str, Any]] = {**_TABLE["part"], **_TABLE["preset"]}
DEFAULTS: dict[str, list[str]] = _TABLE["default"]  # environment -> what runs by default: embedded, on real data
DESCRIPTIONS: dict[str, str] = {name: preset["about"] for name, preset in _TABLE["preset"].items()}


def _settings(name: str) -> dict[str, object]:
    entry = dict(_ENTRIES[name])
    entry.pop("about", None)
    below = {key: value for part in entry.pop("like", ()) for key, value in _settings(part).items()}
    return below | flat(entry)


PRESETS: dict[str, dict[str, object]] = {name: _settings(name) for name in DESCRIPTIONS}
