"""Complaints about settings are collected, then raised together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from spearrl.config.dump import toml_value
from spearrl.config.fields import leaves
from spearrl.errors import ConfigError

if TYPE_CHECKING:
    from spearrl.config.sections import RunConfig

Finding = tuple[str, str]  # what contradicts, or disappoints, with settings as [section.key]; and the fix
_SETTING = re.compile(r"\[([a-z_]+(?:\.[a-z_0-9]+)+)\]")
LISTED = 40  # complaints written out; the rest is counted


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        message: what was seen and what was expected.
        fix: an instruction, or a "did you mean".
        where: where they were given: "run.toml:14", "command line", "preset tiny".
        keys: of a contradiction: the settings involved.
    """

    message: str
    fix: str
    where: str = ""
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        fix = self.fix if self.fix.startswith("did you mean") else f"fix: {self.fix}"
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{_printable(text)}\n  {_printable(fix)}"


def problem_of(finding: Finding, config: RunConfig) -> Problem:
    """The problem of a config, with the settings it names in the form key=value."""
    message, fix = finding
    keys = [key for key in _SETTING.findall(message) if tuple(key.split(".")) in leaves()]
    for key in keys:
        value = reduce(getattr, key.split("."), config)
        shown = f"{value:g}" if isinstance(value, float) else toml_value(value)
        message = message.replace(f"[{key}]", f"{key}={shown}")
    return Problem(message, fix, keys=tuple(keys))


def written(source: str) -> bool:
    """Whether somebody wrote the setting that came from `source`: it stands in a file or on the command line."""
    return not source.startswith(("preset ", "algo ", "fidelity ", "default"))


def _printable(text: str) -> str:
    """Control characters escaped: file names and keys may hold what drives a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", errors="replace").decode() for c in text)


def raise_all(problems: Sequence[Problem]) -> None:
    """Raise ConfigError listing every problem; return where there is none."""
    if not problems:
        return
    lines = ["invalid settings", *map(str, problems[:LISTED])]
    if len(problems) > LISTED:
        lines.append(f"… and {len(problems) - LISTED} more")
    lines.append(f"{len(problems)} error{'s' if len(problems) > 1 else ''}; nothing was started.")
    raise ConfigError("\n".join(lines))
