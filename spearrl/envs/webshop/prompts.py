"""Prompts around the pages: the rules at the start of a chat, and SPEAR's windowed prompt (arXiv 2509.22601, WebShop)."""

from __future__ import annotations

from collections.abc import Sequence

from spearrl.config.tables import table
from spearrl.envs.text.tagged import PLAIN, TAGGED, numbered

LONGEST = 13_000  # characters; a longer windowed prompt drops its history, as verl-agent does

_TEXT = table(__file__, "prompts.toml")


def rules(tagged: bool) -> str:
    """What a chat opens with."""
    return f"{_TEXT['rules']}\n{TAGGED if tagged else PLAIN}"


def windowed(
    task: str, page: str, actions: Sequence[str], past: Sequence[tuple[str, str]], count: int, *, tagged: bool
) -> str:
    """One turn's whole prompt: task, the last steps in `past` (of `count` taken), page, actions. Without history where that gets too long."""
    text = _TEXT["windowed"]
    begin = [text["role"], text["task"].format(task=task)]
    end = [
        text["choices"].format(actions="\n".join(f"'{action}'," for action in actions)),
        text["decide"],
        text["reason"] if tagged else PLAIN,
    ]
    short = "\n".join([*begin, text["now"].format(page=page), *end])
    if not past:
        return short
    middle = [
        text["past"].format(count=count, shown=len(past), history=numbered(past, count)),
        text["then"].format(step=count + 1, page=page),
    ]
    full = "\n".join([*begin, *middle, *end])
    return full if len(full) <= LONGEST else short


def compact_window(task: str, page: str, past: Sequence[tuple[str, str]]) -> str:
    """The windowed prompt of the compact rendering: task, last steps, page."""
    return "\n".join([task, *(f"{seen}\n> {done}" for seen, done in past), page])
