"""Reading a TOML file so that every key keeps its line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from spearrl.config.problems import Problem

MAX_BYTES = 1 << 20
LONGEST = 100  # lines of a statement
_LONG_KEY = re.compile(r"""(?<![\w"'-])(?:[\w"'-]+[ \t]*\.[ \t]*){64}""")
_AT = re.compile(r" \(at line (\d+), column \d+\)$")


class Source:
    """A parsed config file. `tree` is its content; `at(key)` says where a key stands, as "run.toml:14"."""

    def __init__(self, name: str, tree: dict[str, Any], lines: dict[tuple[str, ...], int]):
        self.name, self.tree, self._lines = name, tree, lines

    def at(self, key: tuple[str, ...]) -> str:
        """Line of the key, or of the nearest table that holds it (inline tables have one line)."""
        line = next((self._lines[key[:end]] for end in range(len(key), 0, -1) if key[:end] in self._lines), None)
        return f"{self.name}:{line}" if line else self.name


def read(path: str | Path) -> Source | Problem:
    """The file, or what is wrong with it. A directory stands for the config.toml in it."""
    name = str(path)[:300]
    try:
        file = Path(path)
        if file.is_dir():
            file = file / "config.toml"
            name = str(file)
        if not file.exists():
            return Problem(
                "the config file does not exist",
                "use the path of a TOML file or of a run directory, or --preset tiny",
                name,
            )
        if not file.is_file():
            return Problem("is not a regular file", "use the path of a TOML file", name)
        with file.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        return Problem(f"cannot be read: {getattr(error, 'strerror', None) or error}", "use a readable TOML file", name)
    if len(raw) > MAX_BYTES:
        return Problem(
            f"is larger than {MAX_BYTES >> 20} MiB, which no config is", "use a config file, not a data file", name
        )
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        return Problem(f"is not UTF-8 text (byte {error.start})", "fix the encoding: save the file as UTF-8", name)
    return parse(text, name)


def parse(text: str, name: str) -> Source | Problem:
    """The TOML text, or its first syntax error."""
    if found := _LONG_KEY.search(text):  # tomllib takes quadratic time on these
        line = text.count("\n", 0, found.start()) + 1
        return Problem(
            "a key of more than 64 parts is nested too deeply", "use plain tables such as [rollout]", f"{name}:{line}"
        )
    try:
        return Source(name, tomllib.loads(text), _lines_of(text))
    except tomllib.TOMLDecodeError as error:
        return _syntax_problem(text, name, str(error))
    except RecursionError:
        return Problem("is nested too deeply", "use plain tables such as [rollout]", name)
    except ValueError as error:  # a date that does not exist, an integer of too many digits
        return Problem(f"holds a value that TOML cannot read: {str(error)[:120]}", "fix the value", name)


def _syntax_problem(text: str, name: str, message: str) -> Problem:
    found = _AT.search(message)
    line = int(found.group(1)) if found else len(text.splitlines()) or 1
    lines = text.split("\n")
    shown = lines[line - 1].strip()[:80] if line <= len(lines) else ""
    where = f"{name}:{line}"
    what = _AT.sub("", message).removesuffix(" (at end of document)")
    if "overwrite" in what or "twice" in what or "Cannot declare" in what or "mutate" in what:
        return Problem(
            f"{shown!r} sets a key or table that is set already", "give each key and each [table] once", where
        )
    if name.endswith((".yaml", ".yml", ".json")):
        return Problem("is not TOML", "use TOML: [rollout] on one line, group_size = 8 on the next", where)
    if "Invalid value" in what and "=" in shown:
        return Problem(
            f"{shown!r} has no valid value",
            'use "…" around text; true and false are lower case; numbers as 8, 0.2 or 1e-6',
            where,
        )
    return Problem(
        f"{shown!r} is not TOML: {what}", "fix the line: [section] for a table, key = value for a setting", where
    )


def _lines_of(text: str) -> dict[tuple[str, ...], int]:
    """Line number of every table header and assignment of a valid TOML text, by full key. A statement ends where it is valid by itself."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    statement, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            tree = tomllib.loads(statement)
        except ValueError:
            if number - start < LONGEST:
                continue
            return lines  # the rest is at no line
        if statement.lstrip(" \t").startswith("["):
            table = _keys(tree)
            lines.setdefault(table, start)
        else:
            key = table + _keys(tree)
            for stop in range(len(table) + 1, len(key) + 1):
                lines.setdefault(key[:stop], start)
        statement, start = "", number + 1
    return lines


def _keys(tree: Any) -> tuple[str, ...]:
    """The dotted key of the only entry of a tree."""
    tree = tree[0] if isinstance(tree, list) and len(tree) == 1 else tree
    if not isinstance(tree, dict) or len(tree) != 1:
        return ()
    ((name, below),) = tree.items()
    return (name, *_keys(below))
