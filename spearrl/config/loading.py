"""From a file, a preset and a command line to one RunConfig. Every wrong setting is reported, not the first one only.

Lowest first: defaults, preset, file, command line. An algo name sets its fields just below the layer that gives it, so
that `--algo grpo` switches SPEAR off in any file, and a file that names grpo+spear may still say
algo.sil.enabled = false; `layers` has the rules.
"""

from __future__ import annotations

import difflib
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spearrl.config import checks, foreign
from spearrl.config.dump import NONE, REDACTED
from spearrl.config.fields import (
    OPTIONS,
    Key,
    accepts_none,
    base_type,
    constraint,
    default_of,
    dotted,
    is_option,
    leaves,
    sections,
)
from spearrl.config.file import ConfigFile, read
from spearrl.config.layers import ENVIRONMENT, NAME, Layer, Setting, merge
from spearrl.config.presets import DEFAULTS, PRESETS
from spearrl.config.problems import Problem, raise_all, written
from spearrl.config.sections import MAX_OPTION_DEPTH, RunConfig, option_problem
from spearrl.config.suggestions import nearest, shorten, wrong_value
from spearrl.config.tables import nested

# A config, and the dotted keys that nobody set -> values for some of these.
Derive = Callable[[RunConfig, Collection[str]], Mapping[str, Any]]
MAX_SETTINGS = 2000
COMMAND_LINE = "command line"
PRESET: Key = ("preset",)
MODEL: Key = ("model", "path")
_GPUS: Key = ("placement", "gpus")
_DATA: Key = ("env", "options", "data")
_STALENESS: Key = ("rollout", "max_staleness")
_CORRECTION: Key = ("algo", "correction", "mode")
_STARTED_FROM: Key = ("run", "started_from")


@dataclass(frozen=True)
class Resolved:
    """A config, and where its values came from.

    Attributes:
        sources: dotted key -> "run.toml:14", "command line", "preset tiny", "algo grpo+spear", "fidelity paper",
            "placement" or "default".
        preset: the one it starts from; "": none.
        by_default: nobody named the preset; it is the embedded default.
        unrepeated: settings of a directory's config that count only where they are said again: (argument, reason).
    """

    config: RunConfig
    sources: Mapping[str, str]
    preset: str
    by_default: bool
    unrepeated: Sequence[tuple[str, str]] = ()


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    env: str | None = None,
    algo: str | None = None,
    model: str | None = None,
    preset: str | None = None,
) -> RunConfig:
    """The config of a TOML file (or of a run directory), a preset and overrides.

    Without any of these, and without a model: the preset "tiny" ("tiny-real" with env.options.data).

    Args:
        overrides: "section.key=value" each, the value as TOML or a bare text.
        env, algo, model, preset: what the flags of the command line set.

    Raises ConfigError that lists every problem with its place and fix; RefusedError where the config of a directory
    decides what only you may (`config.foreign`): `overrides` can say it again.

    Example:
        load_config("shop.toml", ["run.seed=3", "algo.sil.gamma.steps=50"], algo="grpo+spear")
    """
    return resolve(path, overrides, env=env, algo=algo, model=model, preset=preset).config


def resolve(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    env: str | None = None,
    algo: str | None = None,
    model: str | None = None,
    preset: str | None = None,
    gpus: int | None = None,
    derive: Derive | None = None,
    shown: bool = False,
) -> Resolved:
    """`load_config`, with the source of every value. `derive` gives values for settings that nobody set.

    Args:
        shown: the config is only looked at, so that nothing in it has to be said again.
    """
    problems: list[Problem] = []
    file = None if path is None else read(path)
    flags = {PRESET: preset, ENVIRONMENT: env, NAME: algo, MODEL: model, _GPUS: gpus}
    command = _of_command_line((overrides,) if isinstance(overrides, str) else overrides, flags, problems)
    of_file = _of_file(file, problems) if file is not None else {}

    named = command.get(PRESET) or of_file.get(PRESET)
    by_default = named is None and path is None and MODEL not in command
    start = _of_preset(_embedded(command) if by_default else named, problems)
    layers = [{key: s for key, s in layer.items() if key != PRESET} for layer in (start, of_file, command)]
    config, settings, refused = _build(_with_correction(merge(layers, problems)), problems)
    unrepeated = _unrepeated(path, settings)
    if path is not None and not shown and not problems:
        foreign.refuse(path, unrepeated)
    problems += (
        [] if shown else [_secret(key, setting) for key, setting in settings.items() if _is_hidden(key, setting)]
    )
    if derive is not None and not problems:
        unset = {dotted(key) for key in leaves() if key not in settings}
        derived = {tuple(key.split(".")): value for key, value in derive(config, unset).items()}
        settings |= {key: Setting(value, "placement") for key, value in derived.items()}
        config, settings, refused = _build(settings, problems)
    if not isinstance(file, Problem):
        contradictions = [p for p in checks.problems(config) if not refused.intersection(p.keys)]
        problems += [replace(p, where=_source_of(p, settings)) for p in contradictions]
    raise_all(problems)
    started_from = start[_STARTED_FROM].value if start else ""
    return Resolved(config, _sources(settings), started_from, by_default, unrepeated)


def _unrepeated(path: str | Path | None, settings: Layer) -> list[tuple[str, str]]:
    """What a directory's config decides that has to be said again."""
    if path is None or not foreign.in_directory(path):
        return []
    given = {key: setting.value for key, setting in settings.items() if setting.source != COMMAND_LINE}
    return foreign.dangers(given, imported=sys.modules)


def _is_hidden(key: Key, setting: Setting) -> bool:
    return is_option(key) and any(value == REDACTED for _, value in foreign.singles(key, setting.value, lists=True))


def _secret(key: Key, setting: Setting) -> Problem:
    """A secret is in no file that we wrote."""
    name = dotted(key)
    return Problem(f"{name} is a secret, which was not stored", f"give it again: {name}=…", setting.source)


def _of_file(file: ConfigFile | Problem, problems: list[Problem]) -> Layer:
    """The settings of a file."""
    if isinstance(file, Problem):
        problems.append(file)
        return {}
    settings = {key: Setting(value, file.at(key)) for key, value in _flatten((), file.tree)}
    if len(settings) > MAX_SETTINGS:
        what, fix = f"holds {len(settings)} settings, which no config does", f"use at most {MAX_SETTINGS}"
        problems.append(Problem(what, fix, where=file.name))
        return {}
    return _existing(settings, problems)


def _of_command_line(overrides: Sequence[str], flags: Mapping[Key, Any], problems: list[Problem]) -> Layer:
    """The settings of "section.key=value" texts, then those of the flags that are given."""
    settings: Layer = {}
    for text in overrides:
        name, separator, raw = str(text).partition("=")
        key = tuple(part.strip() for part in name.split("."))
        if separator and all(key):
            for below, value in _flatten(key, _value(key, raw)):
                settings.pop(below, None)  # what is said again comes last
                settings[below] = Setting(value, COMMAND_LINE)
        else:
            hint = "; a config file stands alone, once" if name.endswith(".toml") else ""
            fix = f"use section.key=value, e.g. run.seed=3{hint}"
            problems.append(Problem(f"{shorten(text)} is not a setting", fix, where=COMMAND_LINE))
    for key, value in flags.items():
        if value is not None and key in settings and settings[key].value != value:
            twice = f"{dotted(key)} is given twice, as {shorten(settings[key].value)} and as {shorten(value)}"
            problems.append(Problem(twice, f"use either the flag or {dotted(key)}=…", where=COMMAND_LINE))
    settings |= {key: Setting(value, COMMAND_LINE) for key, value in flags.items() if value is not None}
    return _existing(settings, problems)


def _value(key: Key, raw: str) -> Any:
    """TOML where it is TOML; else, and for every setting that is a text, the bare text."""
    try:
        tree = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    value = tree["value"]
    bare = key in leaves() and base_type(leaves()[key]) is str and not isinstance(value, str)
    return raw if bare or len(tree) > 1 else value


def _flatten(key: Key, value: Any) -> Iterator[tuple[Key, Any]]:
    """The single settings of a tree. Tables of unknown names, and those nested too deeply, stay whole."""
    shallow_option = is_option(key) and len(key) - len(OPTIONS) <= MAX_OPTION_DEPTH
    known = key in sections() or key in leaves() or shallow_option
    if not isinstance(value, dict) or not known or not (value or key in sections() or key == OPTIONS):
        yield key, value
        return
    for name, item in value.items():
        yield from _flatten((*key, name), item)


def _existing(settings: Layer, problems: list[Problem]) -> Layer:
    """Those that exist; a problem for each of the others."""
    complaints = {key: _complaint(key, *setting) for key, setting in settings.items()}
    problems += [complaint for complaint in complaints.values() if complaint]
    return {key: setting for key, setting in settings.items() if complaints[key] is None}


def _complaint(key: Key, value: Any, where: str) -> Problem | None:
    """What is wrong with a setting's key, or with the form of an option."""
    name = dotted(key)[:120]
    if key == PRESET or (key in leaves() and key != OPTIONS):
        return None
    if is_option(key):
        deep = len(key) - len(OPTIONS) > MAX_OPTION_DEPTH
        fault = f"is nested deeper than {MAX_OPTION_DEPTH} levels" if deep else option_problem(value)
        fix = "use text, numbers, true/false, lists and tables of them"
        return Problem(f"{name} {fault}", fix, where) if fault else None
    leaf = next((key[:end] for end in range(1, len(key)) if key[:end] in leaves()), None)
    if key in sections() or key == OPTIONS:
        message = f"{name} = {shorten(value)}: {name} is a section, not a value"
        example = f"{name}.key=value" if where == COMMAND_LINE else f"[{name}] on one line and its settings below"
        fix = f"use {example}"
    elif leaf:
        message = f"{name}: {dotted(leaf)} is a single value, not a section"
        fix = f"use {dotted(leaf)}=… ({constraint(leaves()[leaf])})"
    else:
        message, fix = f"{name} is not a {'section' if isinstance(value, dict) else 'setting'}", nearest(key)
    return Problem(message, fix, where)


def _embedded(command: Layer) -> Setting:
    """The preset of a run that names none, by its environment; another one where there is real data."""
    environment = command[ENVIRONMENT].value if ENVIRONMENT in command else default_of(leaves()[ENVIRONMENT])
    return Setting(DEFAULTS.get(str(environment), DEFAULTS["other"])[_DATA in command], "default")


def _of_preset(named: Setting | None, problems: list[Problem]) -> Layer:
    """The preset's settings, the record of its name last."""
    if named is None or named.value == "":
        return {}
    name = named.value
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name)[:80], PRESETS, n=1, cutoff=0.5)
        fix = f"did you mean preset {near[0]!r}? " if near else "use one: "
        problems.append(Problem(f"preset {shorten(name)} does not exist", f"{fix}({', '.join(PRESETS)})", named.source))
        return {}
    values = {**PRESETS[name], dotted(_STARTED_FROM): name}
    return {tuple(key.split(".")): Setting(value, f"preset {name}") for key, value in values.items()}


def _with_correction(settings: Layer) -> Layer:
    """With the importance weights (TIS) that generation ahead of the learner needs, unless a correction was set."""
    ahead, correction = settings.get(_STALENESS), settings.get(_CORRECTION)
    if ahead is None or not isinstance(ahead.value, int) or ahead.value < 1:
        return settings
    if correction and not correction.source.startswith(f"algo {settings[NAME].value}"):
        return settings
    mode = correction.value if correction and correction.value != "none" else "tis"
    return settings | {_CORRECTION: Setting(mode, f"rollout.max_staleness={ahead.value}")}


def _build(settings: Layer, problems: list[Problem]) -> tuple[RunConfig, Layer, set[str]]:
    """The config and its settings, without the values it refuses (their keys come last); those become problems."""
    refused: set[str] = set()
    while True:
        tree = nested({key: _value_of(key, setting) for key, setting in settings.items()})
        try:
            return RunConfig.model_validate(tree, strict=True), settings, refused
        except ValidationError as error:
            for key in {_key_of(item["loc"]): None for item in error.errors(include_url=False, include_input=False)}:
                for part in [part for part in settings if part[: len(key)] == key]:
                    problems.append(wrong_value(key, *settings.pop(part)))
                    refused.add(dotted(key))


def _key_of(location: tuple[int | str, ...]) -> Key:
    """The setting a pydantic error is about. Raises KeyError where it is about something else (a bug here)."""
    path = tuple(str(part) for part in location)
    ends = [end for end in range(len(path), 0, -1) if path[:end] in leaves()]
    if not ends:
        raise KeyError(f"no setting at {path}")
    return path[: ends[0]]


def _value_of(key: Key, setting: Setting) -> Any:
    """Its value, "none" as None where the setting takes that."""
    return None if key in leaves() and setting.value == NONE and accepts_none(leaves()[key]) else setting.value


def _source_of(problem: Problem, settings: Layer) -> str:
    """Where the settings of a contradiction were given: the first that somebody wrote, else the first of them."""
    keys = [tuple(name.split(".")) for name in problem.keys]
    sources = [settings[key].source for key in keys if key in settings]
    return next((source for source in sources if written(source)), next(iter(sources), "default"))


def _sources(settings: Layer) -> dict[str, str]:
    sources = {
        dotted(key): settings[key].source if key in settings else "default" for key in leaves() if key != OPTIONS
    }
    options = {dotted(key[: len(OPTIONS) + 1]): setting.source for key, setting in settings.items() if is_option(key)}
    return sources | options
