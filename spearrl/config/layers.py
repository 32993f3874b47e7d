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
    key: Key
    value: Any
    source: str


Layer = Sequence[Setting]


def merge(layers: Sequence[Layer], problems: list[Problem]) -> dict[Key, Setting]:
    """One setting per key. A wrong algorithm name becomes a problem and counts as not given."""
    layers = [[Setting(NAME, default_of(leaves()[NAME]), "default")], *(_checked(layer, problems) for layer in layers)]
    implied, taken_back = _implied(layers)
    settings: dict[Key, Setting] = {}
    for level, layer in enumerate(layers):
        environment = _last(layer, ENVIRONMENT)
        before = settings[ENVIRONMENT].value if ENVIRONMENT in settings else default_of(leaves()[ENVIRONMENT])
        if environment is not None and environment.value != before:
            settings = {key: s for key, s in settings.items() if key != MAX_TURNS and key[: len(OPTIONS)] != OPTIONS}
        for setting in (*implied[level], *(s for s in layer if not _restates(s, taken_back[level]))):
            if is_option(setting.key):  # an option may be a table: it replaces what lies below it or holds it
                settings = {key: s for key, s in settings.items() if not _overlap(key, setting.key)}
            settings[setting.key] = setting
    return settings


def _checked(layer: Layer, problems: list[Problem]) -> Layer:
    """The layer, without an algorithm's name that means nothing."""
    name = _last(layer, NAME)
    if name is None or not isinstance(name.value, str):
        return layer
    try:
        algo_settings(name.value)
    except GrammarError as error:
        problems.append(Problem(f"algo.name: {error}", error.fix, name.source))
        return [setting for setting in layer if setting.key != NAME]
    return layer


def _implied(layers: Sequence[Layer]) -> tuple[list[list[Setting]], list[Fields]]:
    """Per layer: the settings that stand below its own, and the fields whose values it loses."""
    implied: list[list[Setting]] = [[] for _ in layers]

    def put(level: int, fields: Fields, source: str) -> None:
        implied[level] += [Setting(tuple(key.split(".")), value, source) for key, value in fields.items()]

    names = _given(layers, NAME, lambda value: isinstance(value, str))
    fidelities = _given(layers, FIDELITY, lambda value: value in COLUMNS)
    environments = _given(layers, ENVIRONMENT, lambda value: isinstance(value, str))
    environment, home = environments[-1] if environments else ("", 0)
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


def _given(layers: Sequence[Layer], key: Key, usable: Callable[[Any], bool]) -> list[tuple[Any, int]]:
    """The usable values that layers give a key, each with the layer's number."""
    last = [(_last(layer, key), level) for level, layer in enumerate(layers)]
    return [(setting.value, level) for setting, level in last if setting is not None and usable(setting.value)]


def _last(layer: Layer, key: Key) -> Setting | None:
    return next((setting for setting in reversed(layer) if setting.key == key), None)


def _restates(setting: Setting, fields: Fields) -> bool:
    """Whether the setting writes out what one of the fields says."""
    key = dotted(setting.key)
    return key in fields and setting.value in ((None, NONE) if fields[key] is None else (fields[key],))


def _overlap(a: Key, b: Key) -> bool:
    """Whether one option's key holds the other."""
    shorter = min(len(a), len(b))
    return shorter > len(OPTIONS) and a[:shorter] == b[:shorter]
