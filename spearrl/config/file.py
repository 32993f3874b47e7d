"""Reading a TOML file so that every key keeps its line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from spearrl.config.problems import Problem

MAX_BYTES = 1 << 20
MAX_STATEMENT_LINES = 100
_LONG_KEY = re.compile(r"""(?<![\w"'-])(?:[\w"'-]+[ \t]*\.[ \t]*){64}""")
_AT_LINE = re.compile(r" \(at line (\d+), column \d+\)$")


class ConfigFile:
    """A parsed config file. `tree` is its content; `at(key)` says where a key stands, as "run.toml:14"."""

    def __init__(self, name: str, tree: dict[str, Any], lines: dict[tuple[str, ...], int]):
        self.name, self.tree, self._lines = name, tree, lines

    def at(self, key: tuple[str, ...]) -> str:
        """Line of the key, or of the nearest table that holds it (inline tables have one line)."""
        line = next((self._lines[key[:end]] for end in range(len(key), 0, -1) if key[:end] in self._lines), None)
        return f"{self.name}:{line}" if line else self.name


def read(path: str | Path) -> ConfigFile | Problem:
    """The file, or what is wrong with it. A directory stands for the config.toml in it."""
    name = str(path)[:300]
    try:
        file = Path(path)
        if file.is_dir():
            file = file / "config.toml"
            name = str(file)
            if file.is_symlink():
                return Problem("is a link, which is not followed out of a directory", "put the file there", where=name)
        if not file.exists():
            fix = "use the path of a TOML file or of a run directory, or --preset tiny"
            return Problem("the config file does not exist", fix, where=name)
        if not file.is_file():
            return Problem("is not a regular file", "use the path of a TOML file", where=name)
        with file.open("rb") as handle:
            content = handle.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            size = f"is larger than {MAX_BYTES >> 20} MiB, which no config is"
            return Problem(size, "use a config file, not a data file", where=name)
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        return Problem(
            f"is not UTF-8 text (byte {error.start})", "fix the encoding: save the file as UTF-8", where=name
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return Problem(f"cannot be read: {reason}", "use a readable TOML file", where=name)
    return parse(text, name)


def parse(text: str, name: str) -> ConfigFile | Problem:
    """The TOML text, or its first syntax error."""
    flat_tables = "use plain tables such as [rollout]"
    if long_key := _LONG_KEY.search(text):  # tomllib takes quadratic time on these
        line = text.count("\n", 0, long_key.start()) + 1
        return Problem("a key of more than 64 parts is nested too deeply", flat_tables, where=f"{name}:{line}")
    try:
        return ConfigFile(name, tomllib.loads(text), _lines_of(text))
    except tomllib.TOMLDecodeError as error:
        return _syntax_problem(text, name, str(error))
    except RecursionError:
        return Problem("is nested too deeply", flat_tables, where=name)
    except ValueError as error:  # a date that does not exist, an integer of too many digits
        return Problem(f"holds a value that TOML cannot read: {str(error)[:120]}", "fix the value", where=name)


def _syntax_problem(text: str, name: str, message: str) -> Problem:
    lines, at_line = text.split("\n"), _AT_LINE.search(message)
    number = int(at_line.group(1)) if at_line else len(text.splitlines()) or 1
    line = lines[number - 1].strip()[:80] if number <= len(lines) else ""
    reason = _AT_LINE.sub("", message).removesuffix(" (at end of document)")
    if any(word in reason for word in ("overwrite", "twice", "Cannot declare", "mutate")):
        what, fix = f"{line!r} sets a key or table that is set already", "give each key and each [table] once"
    elif name.endswith((".yaml", ".yml", ".json")):
        what, fix = "is not TOML", "use TOML: [rollout] on one line, group_size = 8 on the next"
    elif "Invalid value" in reason and "=" in line:
        what = f"{line!r} has no valid value"
        fix = 'use "…" around text; true and false are lower case; numbers as 8, 0.2 or 1e-6'
    else:
        what = f"{line!r} is not TOML: {reason}"
        fix = "fix the line: [section] for a table, key = value for a setting"
    return Problem(what, fix, where=f"{name}:{number}")


def _lines_of(text: str) -> dict[tuple[str, ...], int]:
    """Line number of every table header and assignment of a valid TOML text, by full key.

    A statement ends where it is valid by itself; keys below one of more than MAX_STATEMENT_LINES are left out.
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    statement, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            tree = tomllib.loads(statement)
        except ValueError:
            if number - start < MAX_STATEMENT_LINES:
                continue
            return lines
        if statement.lstrip(" \t").startswith("["):
            table = _only_key(tree)
            lines.setdefault(table, start)
        else:
            key = table + _only_key(tree)
            for end in range(len(table) + 1, len(key) + 1):
                lines.setdefault(key[:end], start)
        statement, start = "", number + 1
    return lines


def _only_key(tree: Any) -> tuple[str, ...]:
    """The dotted key of the only entry of a tree."""
    tree = tree[0] if isinstance(tree, list) and len(tree) == 1 else tree
    if not isinstance(tree, dict) or len(tree) != 1:
        return ()
    ((name, below),) = tree.items()
    return (name, *_only_key(below))
