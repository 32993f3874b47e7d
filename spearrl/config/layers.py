"""Layers of settings, lowest first, become one setting per key; the later layer's wins.

An algorithm's name stands for fields, and so does a fidelity. Of several layers that give one, the highest counts, and its fields are put just
below what that layer sets itself:

- the name's fields, in the layer that gives the name;
- the fidelity's column for that name, in the layer that gives the fidelity, above the name's fields; where a higher layer gives the name, the
  column also has the last word there about what the name sets.

A fidelity also chooses the math environment's grader, in its own layer or the one above that names the environment.
What a lower layer's name or fidelity stood for is taken back, also where that layer writes the same values out (a saved config does).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from spearrl.config.dump import NONE
from spearrl.config.fidelity import COLUMNS, column, grading
from spearrl.config.fields import FREE, Key, default_of, leaves
from spearrl.config.grammar import Fields, GrammarError, algo_settings
from spearrl.config.problems import Problem

NAME: Key = ("algo", "name")
FIDELITY: Key = ("algo", "fidelity")
ENV: Key = ("env", "name")
_TURNS: Key = ("env", "max_turns")


class Setting(NamedTuple):
    key: Key
    value: Any
    source: str


class _Choice(NamedTuple):
    """The value of NAME or FIDELITY in force, and the layer that gives it (-1: none)."""

    value: str
    level: int


def merge(layers: Sequence[Sequence[Setting]], problems: list[Problem]) -> dict[Key, Setting]:
    """One setting per key. A wrong algorithm name becomes a problem and counts as not given."""
    default = [
        Setting(key, default_of(leaves()[key]), "default")
        for key in (NAME,)
        if not any(s.key == key for layer in layers for s in layer)
    ]
    layers = [default, *(_without_wrong_names(layer, problems) for layer in layers)]
    fields = _implied(layers)
    settings: dict[Key, Setting] = {}
    for level, layer in enumerate(layers):
        _leave_environment(settings, layer)
        for setting in (*fields.put[level], *(s for s in layer if not _equals(fields.taken_back[level], s))):
            for key in [k for k in settings if _overlap(k, setting.key)] if setting.key[: len(FREE)] == FREE else ():
                del settings[key]
            settings[setting.key] = setting
    return settings


def _without_wrong_names(layer: Sequence[Setting], problems: list[Problem]) -> list[Setting]:
    named = _last(layer, NAME)
    if named is None or not isinstance(named.value, str):
        return list(layer)
    try:
        algo_settings(named.value)
    except GrammarError as error:
        problems.append(Problem(f"algo.name: {error}", error.fix, named.source, ("algo.name",)))
        return [s for s in layer if s.key != NAME]
    return list(layer)


class _Implied(NamedTuple):
    """Per layer: the settings put below its own, and the fields whose values it loses."""

    put: list[list[Setting]]
    taken_back: list[Fields]


def _implied(layers: Sequence[Sequence[Setting]]) -> _Implied:
    name = _highest(layers, NAME, lambda value: isinstance(value, str), str(default_of(leaves()[NAME])))
    fidelity = _highest(layers, FIDELITY, lambda value: value in COLUMNS, "")
    found = _Implied([[] for _ in layers], [{} for _ in layers])
    fields = algo_settings(name.value)
    if name.level >= 0:
        found.put[name.level] += _settings(fields, f"algo {name.value}")
    if fidelity.level >= 0:
        values = column(fidelity.value, name.value)
        found.put[fidelity.level] += _settings(values, f"fidelity {fidelity.value}")
        if name.level > fidelity.level:
            found.put[name.level] += _settings(
                {key: value for key, value in values.items() if key in fields}, f"fidelity {fidelity.value}"
            )
        home = _highest(layers, ENV, lambda value: isinstance(value, str), "")
        if home.value == "math":
            found.put[max(home.level, fidelity.level)] += _settings(
                grading(fidelity.value), f"fidelity {fidelity.value}"
            )
    before = str(default_of(leaves()[NAME]))
    for level, layer in enumerate(layers):
        named, read = _last(layer, NAME), _last(layer, FIDELITY)
        before = named.value if named is not None and isinstance(named.value, str) else before
        if named is not None and isinstance(named.value, str) and level < name.level:
            found.taken_back[level].update(algo_settings(named.value))
        if read is not None and read.value in COLUMNS and level < fidelity.level:
            found.taken_back[level].update(column(read.value, before) | grading(read.value))
    return found


def _highest(layers: Sequence[Sequence[Setting]], key: Key, usable: Callable[[Any], bool], default: str) -> _Choice:
    given = [
        _Choice(setting.value, level)
        for level, layer in enumerate(layers)
        if (setting := _last(layer, key)) is not None and usable(setting.value)
    ]
    return given[-1] if given else _Choice(default, -1)


def _last(layer: Sequence[Setting], key: Key) -> Setting | None:
    return next((s for s in reversed(layer) if s.key == key), None)


def _settings(fields: Fields, source: str) -> list[Setting]:
    return [Setting(tuple(key.split(".")), value, source) for key, value in fields.items()]


def _equals(fields: Mapping[str, object], setting: Setting) -> bool:
    key = ".".join(setting.key)
    return key in fields and setting.value == (
        NONE if fields[key] is None and setting.value is not None else fields[key]
    )


def _overlap(a: Key, b: Key) -> bool:
    """One key holds the other; happens among options only."""
    shorter = min(len(a), len(b))
    return shorter > len(FREE) and a[:shorter] == b[:shorter]


def _leave_environment(settings: dict[Key, Setting], layer: Sequence[Setting]) -> None:
    """Options and turn limit belong to an environment: a layer that names another one starts without them."""
    named = _last(layer, ENV)
    before = settings[ENV].value if ENV in settings else default_of(leaves()[ENV])
    if named is None or named.value == before:
        return
    for key in [k for k in settings if k == _TURNS or k[: len(FREE)] == FREE]:
        del settings[key]
