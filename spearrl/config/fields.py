"""What settings exist: their keys, kinds and constraints in words, and the key somebody probably meant."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from spearrl.config.algo import CALLABLE, QUANTILE
from spearrl.config.sections import ENVIRONMENT, LIST, PLAIN_TEXT, RUN_NAME, VARIABLE, RunConfig, Section
from spearrl.config.tables import table

Key = tuple[str, ...]
FREE = ("env", "options")  # below this key any name may stand; the environment knows which mean something
ALIASES: dict[str, list[str]] = table(__file__, "aliases.toml")  # keys as other trainers call them
_PATTERNS = {
    RUN_NAME: "text of a-z, 0-9, '.', '_' and '-' that begins with a letter or digit, at most 64 characters",
    PLAIN_TEXT: "text without control characters, not empty",
    LIST: "names with commas between them, or empty",
    VARIABLE: "name of an environment variable",
    ENVIRONMENT: 'a built-in name such as "webshop", or an import path "my_pkg.mod:Class"',
    CALLABLE: 'an import path "my_pkg.mod:fn"',
    QUANTILE: '"quantile:0.8"',
}
_KINDS = {int: "integer", float: "number", bool: "true or false", str: "text", dict: "table"}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def dotted(key: Key) -> str:
    """("run", "seed") -> "run.seed"."""
    return ".".join(key)


@cache
def sections() -> dict[Key, type[Section]]:
    """Every section by its key; () is the whole config. A parent comes just before its children."""
    return dict(_below((), RunConfig))


def _below(key: Key, section: type[Section]) -> Iterator[tuple[Key, type[Section]]]:
    yield key, section
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from _below((*key, name), info.annotation)


@cache
def leaves() -> dict[Key, FieldInfo]:
    """Every setting that is a value, by its key."""
    return {
        (*parent, name): info
        for parent, model in sections().items()
        for name, info in model.model_fields.items()
        if (*parent, name) not in sections()
    }


def base_type(info: FieldInfo) -> Any:
    """The annotation without "or None": a plain type, or a Literal."""
    if get_origin(info.annotation) is Literal:
        return info.annotation
    members = [member for member in get_args(info.annotation) if member is not NoneType]
    if get_origin(info.annotation) is dict:
        return dict
    return members[0] if members else info.annotation


def accepts_none(info: FieldInfo) -> bool:
    return NoneType in get_args(info.annotation)


def choices(info: FieldInfo) -> tuple[Any, ...]:
    """The words or numbers a Literal field accepts; () for other fields."""
    kind = base_type(info)
    return get_args(kind) if get_origin(kind) is Literal else ()


def named(info: FieldInfo) -> tuple[str, ...]:
    """The built-in names of a setting that also takes an import path; () for other fields."""
    return tuple(info.examples or ())


def alternative(info: FieldInfo) -> str:
    """The form of text that a number's setting takes as well, in words; "" for other fields."""
    parts = [item for member in get_args(info.annotation) for item in getattr(member, "__metadata__", ())]
    pattern = next(
        (
            found
            for part in parts
            for item in getattr(part, "metadata", ())
            if (found := getattr(item, "pattern", None))
        ),
        None,
    )
    return _PATTERNS[pattern] if pattern else ""


def default_of(info: FieldInfo) -> Any:
    return info.get_default(call_default_factory=True)


def constraint(info: FieldInfo) -> str:
    """Kind and bounds in words. Example: "number > 0 and < 1"."""
    if choices(info):
        words = "one of " + ", ".join(
            f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices(info)
        )
    else:
        pattern = next((item.pattern for item in info.metadata if getattr(item, "pattern", None)), None)
        words = _PATTERNS[pattern] if pattern else _KINDS[base_type(info)]
        words = ", ".join((*(f'"{name}"' for name in named(info)), f"or {words}")) if named(info) else words
        bounds = [
            f"{sign} {getattr(item, name):g}" for item in info.metadata for name, sign in _BOUNDS if hasattr(item, name)
        ]
        words += f" {' and '.join(bounds)}" if bounds else ""
        words += f", or {alternative(info)}" if alternative(info) else ""
    return f'{words}, or "none"' if accepts_none(info) else words


def nearest(key: Key) -> str:
    """What to do about a key that is not a setting: the likeliest one, or those of its section."""
    known = {dotted(k): k for k in (*leaves(), *sections()) if k}
    name = key[-1][:80]
    parent = next(key[:end] for end in range(len(key) - 1, -1, -1) if key[:end] in sections())
    wrong = key[len(parent)][:80]
    siblings = list(sections()[parent].model_fields)
    elsewhere = [text for text, k in known.items() if k[-1] == name]
    near = difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.75)
    moved = (*parent, *near, *key[len(parent) + 1 :])
    if moved in leaves():
        found = [dotted(moved)]
    elif name in ALIASES and not any(_close(key, known[text]) for text in elsewhere):
        found = ALIASES[name]
    elif elsewhere:
        found = elsewhere[:2]
    elif near:
        found = [dotted((*parent, *near))]
    elif (
        alias := [part for part in reversed(key[len(parent) :]) if part in ALIASES] or _similar(name) or _similar(wrong)
    ):
        found = ALIASES[alias[0]]
    else:
        found = difflib.get_close_matches(dotted(key)[:160], known, n=1, cutoff=0.7) or [
            dotted((*parent, s)) for s in difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.55)
        ]
    if found:
        return f"did you mean {' or '.join(_described(known[text]) for text in found)}?"
    where = f"{dotted(parent)} has" if parent else "the sections are"
    return f"use one of the known settings ({where}: {', '.join(siblings)})"


def _similar(name: str) -> list[str]:
    return difflib.get_close_matches(name, ALIASES, n=1, cutoff=0.85)


def _close(key: Key, known: Key) -> bool:
    """They share more than their last part, or the known one is a value: "sil.gamma" means algo.sil.gamma, a bare "gamma" does not."""
    return known in leaves() or bool(set(key[:-1]) & set(known[:-1]) - {"algo"})


def _described(key: Key) -> str:
    if key in sections():
        return f"the section {dotted(key)}"
    default = json.dumps(default_of(leaves()[key]))
    return f"{dotted(key)} ({constraint(leaves()[key])}, default {default})"
