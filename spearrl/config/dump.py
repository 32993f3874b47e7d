"""Configs as TOML text, and the difference of two."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from typing import Any

from spearrl.config.fields import FREE, leaves, sections
from spearrl.config.sections import RunConfig

_BARE = re.compile(r"[A-Za-z0-9_-]+")
NONE = "none"  # TOML has no null


def to_toml(config: RunConfig, comments: Mapping[str, str] | None = None) -> str:
    """Every setting of the config; `load_config` of the text gives an equal config.

    Args:
        comments: dotted key -> words put behind its line.
    """
    tree = config.model_dump()
    lines: list[str] = []
    for section in (key for key in sections() if key):
        values = _at(tree, section)
        names = [name for name in values if (*section, name) in leaves() and (*section, name) != FREE]
        if names:
            lines += ["", f"[{'.'.join(section)}]"]
        for name in names:
            lines.append(_line(name, values[name], ".".join((*section, name)), comments))
        if section == FREE[:1] and values[FREE[1]]:
            lines += ["", f"[{'.'.join(FREE)}]"]
            lines += [_line(name, value, ".".join((*FREE, name)), comments) for name, value in values[FREE[1]].items()]
    return "\n".join(lines[1:]) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML. Texts escape what must be; tables are inline."""
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return repr(value)


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting by dotted key; options of the environment by their own names."""
    tree = config.model_dump()
    values: dict[str, Any] = {}
    for key in leaves():
        if key == FREE:
            values |= {".".join((*FREE, name)): option for name, option in _at(tree, key).items()}
        else:
            values[".".join(key)] = _at(tree, key)
    return values


def diff(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: dotted key -> (value in a, value in b); None where an option is absent."""
    left, right = flat(a), flat(b)
    return {key: (left.get(key), right.get(key)) for key in {**left, **right} if left.get(key) != right.get(key)}


def _at(tree: Any, key: tuple[str, ...]) -> Any:
    for part in key:
        tree = tree[part]
    return tree


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else toml_value(name)


def _line(name: str, value: Any, dotted: str, comments: Mapping[str, str] | None) -> str:
    text = f"{_key(name)} = {toml_value(value)}"
    comment = "".join(c if c.isprintable() else "?" for c in (comments or {}).get(dotted, ""))
    return f"{text}  # {comment}" if comment else text
