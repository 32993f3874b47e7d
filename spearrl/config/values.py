"""A value that does not suit its setting: what to say about it."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic.fields import FieldInfo

from spearrl.config.dump import toml_value
from spearrl.config.fields import alternative, base_type, choices, constraint, default_of, named
from spearrl.config.problems import Problem

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def wrong_value(key: str, info: FieldInfo, value: Any, where: str) -> Problem:
    """The problem of a value that its setting refuses."""
    return Problem(
        f"{key} = {shorten(value)} does not fit; expected {constraint(info)}", _fix(key, info, value), where, (key,)
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
    kind, words = base_type(info), choices(info)
    if words and not all(isinstance(word, str) for word in words):
        return f"use {constraint(info)}"
    if words:
        near = difflib.get_close_matches(str(value).lower()[:80], words, n=1, cutoff=0.4)
        return f'did you mean {key}="{near[0]}"?' if near else "use " + " or ".join(f'"{word}"' for word in words)
    if (names := named(info)) and isinstance(value, str):
        near = difflib.get_close_matches(value.lower()[:80].replace("-", "_"), names, n=1, cutoff=0.4)
        return f'did you mean {key}="{near[0]}"? ({key} is {constraint(info)})' if near else f"use {constraint(info)}"
    if (
        alternative(info)
        and isinstance(value, str)
        and (share := re.search(r"[a-z].*?(0?\.[0-9]{1,9})$", value.lower()[:80]))
    ):
        return f'did you mean {key}="quantile:{float(share.group(1)):g}"? ({key} is a {constraint(info)})'
    if kind is bool and str(value).lower() in (*_YES, *_NO):
        return f"use {key}={'true' if str(value).lower() in _YES else 'false'}"
    if kind in (int, float) and isinstance(value, str) and (number := _number(value, kind)) is not None:
        return f"use {key}={number}, without quotes"
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
