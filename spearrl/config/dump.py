"""Configs as TOML text, and the difference of two."""

from __future__ import annotations

import datetime
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from spearrl.config.fields import OPTIONS, Key, dotted, leaves, sections
from spearrl.config.sections import RunConfig
from spearrl.errors import is_secret

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
NONE = "none"  # TOML has no null
REDACTED = "[not shown]"  # in the place of an option whose name says that it is a secret


def to_toml(config: RunConfig, comments: Mapping[str, str] | None = None) -> str:
    """Every setting of the config; `load_config` of the text gives an equal config. Secrets are left out.

    Args:
        comments: dotted key -> words put behind its line.
    """
    tree = without_secrets(config.model_dump())
    lines: list[str] = []

    def write(table: Key, values: Mapping[str, Any]) -> None:
        if values:
            lines.extend(["", f"[{dotted(table)}]"])
        for name, value in values.items():
            comment = "".join(c if c.isprintable() else "?" for c in (comments or {}).get(dotted((*table, name)), ""))
            lines.append(f"{_toml_key(name)} = {toml_value(value)}" + (f"  # {comment}" if comment else ""))

    for section in (key for key in sections() if key):
        names = [(*section, name) for name in sections()[section].model_fields]
        write(section, {key[-1]: _at(tree, key) for key in names if key in leaves() and key != OPTIONS})
        if section == OPTIONS[:-1]:
            write(OPTIONS, _at(tree, OPTIONS))
    return "\n".join(lines[1:]) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML. Texts escape what must be; tables are inline."""
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        entries = ", ".join(f"{_toml_key(key)} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {entries} }}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return repr(value)


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting by dotted key; options of the environment by their own names, secret ones without their value."""
    tree = without_secrets(config.model_dump())
    values = {dotted(key): _at(tree, key) for key in leaves() if key != OPTIONS}
    return values | {dotted((*OPTIONS, name)): option for name, option in _at(tree, OPTIONS).items()}


def without_secrets(tree: dict[str, Any]) -> dict[str, Any]:
    """A dumped config whose options say nothing secret: texts whose names say that they are."""

    def cleared(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: cleared(item, str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [cleared(item, name) for item in value]
        return REDACTED if isinstance(value, str) and value and is_secret(name) else value

    return {**tree, "env": {**tree["env"], "options": cleared(tree["env"]["options"], "")}}


def command_line(words: Sequence[str]) -> str:
    """A command as a shell takes it, without the values of options whose names say that they are secret."""
    hidden = (w.startswith(dotted(OPTIONS)) and is_secret(w) for w in words)
    pairs = zip(words, hidden, strict=True)
    return shlex.join([f"{word.partition('=')[0]}={REDACTED}" if hide else word for word, hide in pairs])


def diff(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: dotted key -> (value in a, value in b); None where an option is absent."""
    left, right = flat(a), flat(b)
    return {key: (left.get(key), right.get(key)) for key in {**left, **right} if left.get(key) != right.get(key)}


def _at(tree: Any, key: Key) -> Any:
    for part in key:
        tree = tree[part]
    return tree


def _toml_key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else toml_value(name)
