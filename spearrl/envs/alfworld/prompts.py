"""Prompts around the engine's text: the rules at the start of a chat, and SPEAR's windowed prompt (arXiv 2509.22601, ALFWorld)."""

from __future__ import annotations

from collections.abc import Sequence

from spearrl.config.tables import table
from spearrl.envs.text.tagged import PLAIN, TAGGED, past_steps

_TEXT = table(__file__, "prompts.toml")
HELP: str = _TEXT["help"]  # the engine's own


def rules(*, tagged: bool, old: bool) -> str:
    """What a chat opens with."""
    put, example = (
        ("put (object) in/on (receptacle)", "put mug 1 in/on desk 2")
        if old
        else ("move (object) to (receptacle)", "move mug 1 to desk 2")
    )
    return f"{_TEXT['rules'].format(put=put, example=example)}\n{TAGGED if tagged else PLAIN}"


def windowed(
    task: str, text: str, actions: Sequence[str], past: Sequence[tuple[str, str]], count: int, *, tagged: bool
) -> str:
    """One turn's whole prompt: task, the last steps in `past` (of `count` taken), observation, actions but `help`.

    The first observation holds the task itself.
    """
    words = _TEXT["windowed"]
    shown = "\n ".join(f"'{action}'" for action in actions if action != "help")
    end = [words["choices"].format(actions=shown), "", words["reason"] if tagged else PLAIN]
    if not count:
        return "\n".join([words["role"], words["first"].format(text=text), *end])
    middle = [past_steps(past, count)] if past else []
    return "\n".join(
        [f"{words['role']} Your task is to: {task}", *middle, words["now"].format(step=count + 1, text=text), *end]
    )
