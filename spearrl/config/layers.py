"""Layers of settings, lowest first, become one setting per key; the later layer's wins.

An algorithm's name stands for fields, and so does a fidelity. Of several layers that give one, the highest counts, and
its fields are put just below what that layer sets itself:

- the name's fields, in the layer that gives the name;
- the fidelity's column for that name, in the layer that gives the fidelity, above the name's fields; where a higher
  layer gives the name, the column also has the last word there about what the name sets;
- the options that the fidelity sets for the environment, in the layer of the fidelity or that of the environment's
  name, whichever is higher.

What a lower layer's name or fidelity stood for is taken back, also where that layer writes the same values out (a saved
config does). Options and turn limit belong to an environment: a layer that names another one starts without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from spearrl.config.dump import NONE
from spearrl.config.fidelity import COLUMNS, column, environment_options
from spearrl.config.fields import OPTIONS, Key, default_of, dotted, is_option, leaves
from spearrl.config.grammar import Fields, GrammarError, algo_settings
from spearrl.config.problems import Problem

NAME: Key = ("algo", "name")
FIDELITY: Key = ("algo", "fidelity")
ENVIRONMENT: Key = ("env", "name")
MAX_TURNS: Key = ("env", "max_turns")


class Setting(NamedTuple):
    value: Any
    source: str


Layer = dict[Key, Setting]


def merge(layers: Sequence[Layer], problems: list[Problem]) -> Layer:
    """The settings of all layers. A wrong algorithm name becomes a problem and counts as not given."""
    defaults = {key: Setting(default_of(leaves()[key]), "default") for key in (NAME, ENVIRONMENT)}
    layers = [defaults, *(_checked(layer, problems) for layer in layers)]
    implied, taken_back = _implied(layers)
    settings: Layer = {}
    for layer, below, lost in zip(layers, implied, taken_back, strict=True):
        environment = layer.get(ENVIRONMENT)
        if environment and settings and environment.value != settings[ENVIRONMENT].value:
            settings = {key: s for key, s in settings.items() if key != MAX_TURNS and key[: len(OPTIONS)] != OPTIONS}
        own = {key: setting for key, setting in layer.items() if not _restates(key, setting, lost)}
        for key, setting in (*below.items(), *own.items()):
            if is_option(key):  # an option may be a table: it replaces what lies below it or holds it
                settings = {other: s for other, s in settings.items() if not _overlap(other, key)}
            settings[key] = setting
    return settings


def _checked(layer: Layer, problems: list[Problem]) -> Layer:
    """The layer, without an algorithm's name that means nothing."""
    name = layer.get(NAME)
    try:
        if name and isinstance(name.value, str):
            algo_settings(name.value)
    except GrammarError as error:
        problems.append(Problem(f"algo.name: {error}", error.fix, layer[NAME].source))
        return {key: setting for key, setting in layer.items() if key != NAME}
    return layer


def _implied(layers: Sequence[Layer]) -> tuple[list[Layer], list[Fields]]:
    """Per layer: the settings that stand below its own, and the fields whose values it loses."""
    implied: list[Layer] = [{} for _ in layers]

    def put(level: int, fields: Fields, source: str) -> None:
        implied[level] |= {tuple(key.split(".")): Setting(value, source) for key, value in fields.items()}

    def values_of(key: Key, usable: Callable[[Any], bool]) -> list[tuple[Any, int]]:
        """The usable values that layers give a key, each with the layer's number."""
        return [(s[key].value, level) for level, s in enumerate(layers) if key in s and usable(s[key].value)]

    names, fidelities = values_of(NAME, lambda value: isinstance(value, str)), values_of(FIDELITY, COLUMNS.__contains__)
    environment, home = values_of(ENVIRONMENT, lambda value: isinstance(value, str))[-1]
    name, top = names[-1]
    put(top, algo_settings(name), f"algo {name}")
    if fidelities:
        (fidelity, level), source = fidelities[-1], f"fidelity {fidelities[-1][0]}"
        fields = column(fidelity, name)
        put(level, fields, source)
        if top > level:
            put(top, {key: value for key, value in fields.items() if key in algo_settings(name)}, source)
        put(max(level, home), environment_options(fidelity, environment), source)
    taken_back: list[Fields] = [{} for _ in layers]
    for lower, level in names[:-1]:
        taken_back[level] |= algo_settings(lower)
    for lower, level in fidelities[:-1]:
        name_then = [value for value, of_layer in names if of_layer <= level][-1]
        taken_back[level] |= column(lower, name_then) | environment_options(lower, environment)
    return implied, taken_back


def _restates(key: Key, setting: Setting, fields: Fields) -> bool:
    """Whether the setting writes out what one of the fields says."""
    name = dotted(key)
    return name in fields and setting.value in ((None, NONE) if fields[name] is None else (fields[name],))


def _overlap(a: Key, b: Key) -> bool:
    """Whether one option's key holds the other."""
    shorter = min(len(a), len(b))
    return shorter > len(OPTIONS) and a[:shorter] == b[:shorter]
