"""Named starting points, from presets.toml: dotted key -> value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spearrl.config.tables import flat, table

_TABLE = table(__file__, "presets.toml")
_ENTRIES: dict[str, dict[str, Any]] = {**_TABLE["part"], **_TABLE["preset"], **_TABLE["cell"]}
_ONLY_SPEAR = "with_spear."  # before settings of a cell that its column SPEAR alone has
DEFAULTS: dict[str, list[str]] = _TABLE["default"]  # environment -> what runs by default: embedded, on real data


def _settings(name: str) -> dict[str, Any]:
    entry = {key: value for key, value in _ENTRIES[name].items() if key not in ("about", "needs", "bases", "like")}
    below = {key: value for part in _ENTRIES[name].get("like", ()) for key, value in _settings(part).items()}
    return below | flat(entry)


def _columns(name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, description and settings of each column of a cell."""
    cell, settings = _ENTRIES[name], _settings(name)
    common = {key: value for key, value in settings.items() if not key.startswith(_ONLY_SPEAR)}
    spear = {key.removeprefix(_ONLY_SPEAR): value for key, value in settings.items() if key not in common}
    needs = f"; give {cell['needs']}" if "needs" in cell else ""
    for base, suffix, label in (("grpo", "", "GRPO"), ("gigpo", "-gigpo", "GiGPO")):
        abouts = {
            "spear": f"{cell['about']}, {label}+Dr.BoT+SPEAR{needs}",
            "drbot": f"the same without SPEAR: {label}+Dr.BoT",
            "base": f"the same with plain {label}",
        }
        for column, about in abouts.items() if base in cell.get("bases", ["grpo"]) else ():
            values = common | flat(_TABLE["column"][column]) | (spear if column == "spear" else {})
            values["algo.name"] = values["algo.name"].replace("grpo", base)
            yield f"{name}{suffix}{'' if column == 'spear' else f'-{column}'}", about, values


_CELLS = [column for name in _TABLE["cell"] for column in _columns(name)]
PRESETS = {name: _settings(name) for name in _TABLE["preset"]} | {name: values for name, _, values in _CELLS}
DESCRIPTIONS = {name: entry["about"] for name, entry in _TABLE["preset"].items()}
DESCRIPTIONS |= {name: about for name, about, _ in _CELLS}
