"""What somebody probably meant by a key that does not exist, or by a value that its setting refuses."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

from pydantic.fields import FieldInfo

from spearrl.config.dump import toml_value
from spearrl.config.fields import (
    Key,
    base_type,
    built_in,
    choices,
    constraint,
    default_of,
    dotted,
    leaves,
    sections,
    takes_quantile,
)
from spearrl.config.problems import Problem
from spearrl.config.tables import table

_OTHER_NAMES: dict[str, list[str]] = table(__file__, "aliases.toml")
ALIASES = {  # names that other trainers use -> the settings meant
    alias: [setting for setting, names in _OTHER_NAMES.items() if alias in names]
    for alias in (name for names in _OTHER_NAMES.values() for name in names)
}
_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def nearest(key: Key) -> str:
    """What to do about a key that is not a setting: the likeliest one, or those of its section."""
    known = {dotted(k): k for k in (*leaves(), *sections()) if k}
    name = key[-1][:80]
    parent = next(key[:end] for end in range(len(key) - 1, -1, -1) if key[:end] in sections())
    wrong = key[len(parent)][:80]
    siblings = list(sections()[parent].model_fields)
    elsewhere = [text for text, k in known.items() if k[-1] == name]
    near = difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.75)
    corrected = (*parent, *near, *key[len(parent) + 1 :])
    aliases = [part for part in reversed(key[len(parent) :]) if part in ALIASES] or _alias(name) or _alias(wrong)
    guesses = (
        [dotted(corrected)] if corrected in leaves() else [],
        ALIASES.get(name, []) if not any(_close(key, known[text]) for text in elsewhere) else [],
        elsewhere[:2],
        [dotted((*parent, *near))] if near else [],
        ALIASES[aliases[0]] if aliases else [],
        difflib.get_close_matches(dotted(key)[:160], known, n=1, cutoff=0.7),
        [dotted((*parent, sibling)) for sibling in difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.55)],
    )
    meant = next(filter(None, guesses), [])
    if meant:
        return f"did you mean {' or '.join(_described(known[text]) for text in meant)}?"
    where = f"{dotted(parent)} has" if parent else "the sections are"
    return f"use one of the known settings ({where}: {', '.join(siblings)})"


def _alias(name: str) -> list[str]:
    return difflib.get_close_matches(name, ALIASES, n=1, cutoff=0.85)


def _close(key: Key, known: Key) -> bool:
    """Whether the known key is a value or shares more than its last part, as algo.sil.gamma does with "sil.gamma"."""
    return known in leaves() or bool(set(key[:-1]) & set(known[:-1]) - {"algo"})


def _described(key: Key) -> str:
    if key in sections():
        return f"the section {dotted(key)}"
    return f"{dotted(key)} ({constraint(leaves()[key])}, default {json.dumps(default_of(leaves()[key]))})"


def wrong_value(key: Key, value: Any, where: str) -> Problem:
    """The problem of a value that its setting refuses."""
    info, name = leaves()[key], dotted(key)
    return Problem(
        f"{name} = {shorten(value)} does not fit; expected {constraint(info)}", _fix(name, info, value), where
    )


def shorten(value: Any) -> str:
    """A value as TOML on one short line."""
    try:
        text = toml_value(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of too many digits
        text = type(value).__name__
    text = text.encode(errors="replace").decode()
    return text if len(text) <= 60 else f"{text[:57]}…"


def _fix(key: str, info: FieldInfo, value: Any) -> str:
    kind, words, names = base_type(info), choices(info), built_in(info)
    if words and not all(isinstance(word, str) for word in words):
        return f"use {constraint(info)}"
    if words:
        near = difflib.get_close_matches(str(value).lower()[:80], words, n=1, cutoff=0.4)
        return f'did you mean {key}="{near[0]}"?' if near else "use " + " or ".join(f'"{word}"' for word in words)
    if isinstance(value, str):
        text = value.lower()[:80]
        if names:
            near = difflib.get_close_matches(text.replace("-", "_"), names, n=1, cutoff=0.4)
            return (
                f'did you mean {key}="{near[0]}"? ({key} is {constraint(info)})' if near else f"use {constraint(info)}"
            )
        if takes_quantile(info) and (share := re.search(r"[a-z].*?(0?\.[0-9]{1,9})$", text)):
            return f'did you mean {key}="quantile:{float(share.group(1)):g}"? ({key} is a {constraint(info)})'
        if kind in (int, float) and (number := _number(value, kind)) is not None:
            return f"use {key}={number}, without quotes"
    if kind is bool and str(value).lower() in (*_YES, *_NO):
        return f"use {key}={'true' if str(value).lower() in _YES else 'false'}"
    if kind is int and isinstance(value, float) and value.is_integer():
        return f"use {key}={int(value)}, without a fraction"
    if kind is str and not isinstance(value, str):
        return f'use {key}="…", in quotes'
    article = {int: "an ", float: "a finite " if isinstance(value, float) else "a "}.get(kind, "")
    default = default_of(info)
    return f"use {article}{constraint(info)}" + (f" (default {toml_value(default)})" if default != "" else "")


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        return None
