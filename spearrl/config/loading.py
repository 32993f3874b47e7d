"""From a file, a preset and a command line to one RunConfig. Every wrong setting is reported, not the first one only.

Lowest first: defaults, preset, file, command line. An algo name sets its fields just below the layer that gives it, so that `--algo grpo`
switches SPEAR off in any file, and a file that names grpo+spear may still say algo.sil.enabled = false; `layers` has the rules.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spearrl.config import checks
from spearrl.config.dump import NONE
from spearrl.config.fields import (
    FREE,
    Key,
    accepts_none,
    base_type,
    constraint,
    default_of,
    dotted,
    leaves,
    nearest,
    sections,
)
from spearrl.config.layers import ENV, NAME, Setting, merge
from spearrl.config.presets import DEFAULTS, PRESETS
from spearrl.config.problems import Problem, given, raise_all
from spearrl.config.sections import MAX_OPTION_DEPTH, RunConfig, option_problem
from spearrl.config.source import Source, read
from spearrl.config.values import shorten, wrong_value

COMMAND_LINE, PLACEMENT = "command line", "placement"
WorkOut = Callable[
    [RunConfig, Collection[str]], Mapping[str, Any]
]  # config, dotted keys that nobody set -> values for some of them
MAX_SETTINGS = 2000
PRESET: Key = ("preset",)
_MODEL: Key = ("model", "path")
_DATA: Key = ("env", "options", "data")
_STALENESS: Key = ("rollout", "max_staleness")
_CORRECTION: Key = ("algo", "correction", "mode")
_RECORD: Key = ("run", "started_from")


@dataclass(frozen=True)
class Resolved:
    """A config, and where each value came from: "run.toml:14", "command line", "preset tiny", "algo grpo+spear", "fidelity paper", "default"."""

    config: RunConfig
    sources: Mapping[str, str]
    preset: str  # "": none
    by_default: bool  # nobody asked for the preset; it is the embedded default


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    env: str | None = None,
    algo: str | None = None,
    model: str | None = None,
    preset: str | None = None,
) -> RunConfig:
    """The config of a TOML file (or of a run directory), a preset and overrides; without any, preset "tiny" ("tiny-real" with env.options.data).

    Args:
        overrides: "section.key=value" each, the value as TOML or a bare text.
        env, algo, model, preset: what the flags of the command line set.

    Raises ConfigError that lists every problem with its place and fix.

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
    work_out: WorkOut | None = None,
) -> Resolved:
    """`load_config`, with the source of every value. `work_out` gives values for settings that nobody set. Raises ConfigError."""
    problems: list[Problem] = []
    source = None if path is None else read(path)
    if isinstance(source, Problem):
        problems.append(source)
    typed = list(_typed((overrides,) if isinstance(overrides, str) else overrides, problems))
    flags = [
        Setting(key, value, COMMAND_LINE)
        for key, value in ((PRESET, preset), (ENV, env), (NAME, algo), (_MODEL, model))
        if value is not None
    ]
    problems += _contradictions(typed, flags)
    command = _known([*typed, *flags], problems)
    written = _known(_written(source, problems), problems) if isinstance(source, Source) else []

    chosen = next((s for layer in (command, written) for s in reversed(layer) if s.key == PRESET), None)
    by_default = chosen is None and path is None and not any(s.key == _MODEL for s in command)
    environment = next((s.value for s in reversed(command) if s.key == ENV), default_of(leaves()[ENV]))
    embedded = DEFAULTS.get(str(environment), DEFAULTS["other"])[any(s.key == _DATA for s in command)]
    start = _preset(Setting(PRESET, embedded, "default") if by_default else chosen, problems)
    layers = [[s for s in layer if s.key != PRESET] for layer in (start, written, command)]
    config, settings, refused = _build(_with_correction(merge(layers, problems)), problems)
    if work_out is not None and not problems:
        free = {dotted(key) for key in leaves() if key not in settings}
        found = {tuple(key.split(".")): value for key, value in work_out(config, free).items()}
        config, settings, refused = _build(
            settings | {key: Setting(key, value, PLACEMENT) for key, value in found.items()}, problems
        )
    if not isinstance(source, Problem):
        wrong = [p for p in checks.problems(config) if not refused.intersection(p.keys)]
        problems += [replace(p, where=_place_of(p, settings)) for p in wrong]
    raise_all(problems)
    name = start[-1].value if start else ""
    return Resolved(config, _sources(config, settings), name, by_default)


def _with_correction(settings: dict[Key, Setting]) -> dict[Key, Setting]:
    """Generation that runs ahead of the learner needs importance weights (truncated ones: TIS): on unless a correction was chosen."""
    ahead, chosen = settings.get(_STALENESS), settings.get(_CORRECTION)
    if (
        ahead is None
        or not isinstance(ahead.value, int)
        or ahead.value < 1
        or (chosen and not chosen.source.startswith(f"algo {settings[NAME].value}"))
    ):
        return settings
    mode = chosen.value if chosen and chosen.value != "none" else "tis"
    return settings | {_CORRECTION: Setting(_CORRECTION, mode, f"rollout.max_staleness={ahead.value}")}


def _written(source: Source, problems: list[Problem]) -> list[Setting]:
    """The settings of a file."""
    found = [Setting(key, value, source.at(key)) for key, value in _flatten((), source.tree)]
    if len(found) > MAX_SETTINGS:
        problems.append(
            Problem(f"holds {len(found)} settings, which no config does", f"use at most {MAX_SETTINGS}", source.name)
        )
        return []
    return found


def _typed(overrides: Sequence[str], problems: list[Problem]) -> Iterator[Setting]:
    """The settings of "section.key=value" texts."""
    for text in overrides:
        name, separator, raw = str(text).partition("=")
        key = tuple(part.strip() for part in name.split("."))
        if not separator or not all(key):
            fix = "use section.key=value, e.g. run.seed=3" + (
                "; a config file stands alone, once" if name.endswith(".toml") else ""
            )
            problems.append(Problem(f"{shorten(text)} is not a setting", fix, COMMAND_LINE))
            continue
        for found, value in _flatten(key, _value(key, raw)):
            yield Setting(found, value, COMMAND_LINE)


def _value(key: Key, raw: str) -> Any:
    """TOML where it is TOML; else, and for every setting that is a text, the bare text."""
    try:
        tree = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    value = tree["value"]
    plain = key in leaves() and base_type(leaves()[key]) is str and not isinstance(value, str)
    return raw if plain or len(tree) > 1 else value


def _flatten(key: Key, value: Any) -> Iterator[tuple[Key, Any]]:
    """The single settings of a tree. Tables of unknown names, and those nested too deeply, stay whole."""
    free = len(key) - len(FREE) if key[: len(FREE)] == FREE else 0
    known = key in sections() or key in leaves() or 0 < free <= MAX_OPTION_DEPTH
    if not isinstance(value, dict) or not known or not (value or key in sections() or key == FREE):
        yield key, value
        return
    for name, item in value.items():
        yield from _flatten((*key, name), item)


def _known(settings: Sequence[Setting], problems: list[Problem]) -> list[Setting]:
    """Those that exist; a problem for each of the others."""
    kept = []
    for setting in settings:
        if problem := _unknown(setting):
            problems.append(problem)
        else:
            kept.append(setting)
    return kept


def _unknown(setting: Setting) -> Problem | None:
    key, value, where = setting
    name = dotted(key)[:120]
    if key == PRESET or (key in leaves() and key != FREE):
        return None
    if key[: len(FREE)] == FREE and key != FREE:
        complaint = (
            option_problem(value)
            if len(key) - len(FREE) <= MAX_OPTION_DEPTH
            else f"is nested deeper than {MAX_OPTION_DEPTH} levels"
        )
        return (
            Problem(f"{name} {complaint}", "use text, numbers, true/false, lists and tables of them", where, (name,))
            if complaint
            else None
        )
    if key in sections() or key == FREE:
        example = f"{name}.key=value" if where == COMMAND_LINE else f"[{name}] on one line and its settings below"
        return Problem(f"{name} = {shorten(value)}: {name} is a section, not a value", f"use {example}", where, (name,))
    if leaf := next((key[:end] for end in range(1, len(key)) if key[:end] in leaves()), None):
        return Problem(
            f"{name}: {dotted(leaf)} is a single value, not a section",
            f"use {dotted(leaf)}=… ({constraint(leaves()[leaf])})",
            where,
            (name,),
        )
    return Problem(
        f"{name} is not a {'section' if isinstance(value, dict) else 'setting'}", nearest(key), where, (name,)
    )


def _contradictions(typed: Sequence[Setting], flags: Sequence[Setting]) -> list[Problem]:
    given = {s.key: s.value for s in typed}
    return [
        Problem(
            f"{dotted(s.key)} is given twice, as {shorten(given[s.key])} and as {shorten(s.value)}",
            f"use either the flag or {dotted(s.key)}=…",
            s.source,
        )
        for s in flags
        if s.key in given and given[s.key] != s.value
    ]


def _preset(chosen: Setting | None, problems: list[Problem]) -> list[Setting]:
    """The preset's settings, the record of its name last."""
    if chosen is None or chosen.value == "":
        return []
    name = chosen.value
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name)[:80], PRESETS, n=1, cutoff=0.5)
        fix = f"did you mean preset {near[0]!r}? " if near else "use one: "
        problems.append(
            Problem(
                f"preset {shorten(name)} does not exist", f"{fix}({', '.join(PRESETS)})", chosen.source, ("preset",)
            )
        )
        return []
    where = f"preset {name}"
    return [
        Setting(tuple(key.split(".")), value, where) for key, value in {**PRESETS[name], dotted(_RECORD): name}.items()
    ]


def _build(settings: dict[Key, Setting], problems: list[Problem]) -> tuple[RunConfig, dict[Key, Setting], set[str]]:
    """The config, without the values it refuses; those become problems."""
    refused: set[str] = set()
    while True:
        try:
            return RunConfig.model_validate(_tree(settings), strict=True), settings, refused
        except ValidationError as error:
            for key in {_key_of(item["loc"]): None for item in error.errors(include_url=False, include_input=False)}:
                for setting in [s for k, s in settings.items() if k[: len(key)] == key]:
                    problems.append(wrong_value(dotted(key), leaves()[key], setting.value, setting.source))
                    refused.add(dotted(key))
                    del settings[setting.key]


def _key_of(location: tuple[int | str, ...]) -> Key:
    """The setting a pydantic error is about. Raises KeyError where pydantic complains about something else (a bug here)."""
    path = tuple(str(part) for part in location)
    found = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in leaves()), None)
    if found is None:
        raise KeyError(f"no setting at {path}")
    return found


def _tree(settings: Mapping[Key, Setting]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, setting in settings.items():
        branch = tree
        for part in key[:-1]:
            branch = branch.setdefault(part, {})
        unset = key in leaves() and setting.value == NONE and accepts_none(leaves()[key])
        branch[key[-1]] = None if unset else setting.value
    return tree


def _place_of(problem: Problem, settings: Mapping[Key, Setting]) -> str:
    """Where the settings of a cross-field problem were given: the first that somebody wrote, else the preset's."""
    places = [settings[key].source for name in problem.keys if (key := tuple(name.split("."))) in settings]
    return next((place for place in places if given(place)), next(iter(places), "default"))


def _sources(config: RunConfig, settings: Mapping[Key, Setting]) -> dict[str, str]:
    sources = {dotted(key): settings[key].source if key in settings else "default" for key in leaves() if key != FREE}
    for key in (k for k in settings if k[: len(FREE)] == FREE):
        sources[dotted(key[: len(FREE) + 1])] = settings[key].source
    return sources
