"""Prompts around the pages: the rules that open a chat, and SPEAR's windowed prompt (arXiv 2509.22601)."""

from __future__ import annotations

from collections.abc import Sequence

from spearrl.config.tables import table
from spearrl.envs.text.tagged_replies import PLAIN, TAGGED, past_steps

LONGEST = 13_000  # characters; a longer windowed prompt drops its history, as verl-agent does

_TEXT = table(__file__, "prompts.toml")


def rules(tagged: bool) -> str:
    """What a chat opens with."""
    return f"{_TEXT['rules']}\n{TAGGED if tagged else PLAIN}"


def windowed(
    task: str, page: str, actions: Sequence[str], steps: Sequence[tuple[str, str]], count: int, *, tagged: bool
) -> str:
    """One turn's whole prompt: task, the last `steps` of `count` taken (none where it gets too long), page, actions."""
    text = _TEXT["windowed"]
    begin = [text["role"], text["task"].format(task=task)]
    choices = text["choices"].format(actions="\n".join(f"'{action}'," for action in actions))
    end = [choices, text["decide"], text["reason"] if tagged else PLAIN]
    then = text["then"].format(step=count + 1, page=page)
    full = "\n".join([*begin, past_steps(steps, count), then, *end])
    return full if steps and len(full) <= LONGEST else "\n".join([*begin, text["now"].format(page=page), *end])
