"""Complaints about settings are collected, then raised together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spearrl.errors import ConfigError

_KEY = re.compile(r"\b[a-z]\w*(?:\.[a-z]\w*)+")
LISTED = 40  # complaints written out; the rest is counted


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        message: what was seen and what was expected.
        fix: an instruction, or a "did you mean".
        where: where they were given: "run.toml:14", "command line", "preset tiny".
    """

    message: str
    fix: str
    where: str = ""

    @property
    def keys(self) -> list[str]:
        """The settings involved: those that the message names."""
        return _KEY.findall(self.message)

    def __str__(self) -> str:
        fix = self.fix if self.fix.startswith("did you mean") else f"fix: {self.fix}"
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{_printable(text)}\n  {_printable(fix)}"


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
