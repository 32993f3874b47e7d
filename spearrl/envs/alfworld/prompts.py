"""Prompts around the engine's text: the rules that open a chat, and SPEAR's windowed prompt (arXiv 2509.22601)."""

from __future__ import annotations

from collections.abc import Sequence

from spearrl.config.tables import table
from spearrl.envs.text.tagged_replies import PLAIN, REASON, TAGGED, past_steps

_TEXT = table(__file__, "prompts.toml")
HELP: str = _TEXT["help"]  # the engine's own


def rules(*, tagged: bool, old: bool) -> str:
    """What a chat opens with."""
    words = _TEXT["old_grammar" if old else "grammar"]
    return f"{_TEXT['rules'].format(**words)}\n{TAGGED if tagged else PLAIN}"


def windowed(
    task: str, text: str, actions: Sequence[str], steps: Sequence[tuple[str, str]], count: int, *, tagged: bool
) -> str:
    """One turn's whole prompt: task, the last `steps` of `count` taken, observation, actions but `help`.

    The first observation holds the task itself.
    """
    shown = "\n ".join(f"'{action}'" for action in actions if action != "help")
    end = [_TEXT["choices"].format(actions=shown), "", REASON if tagged else PLAIN]
    if not count:
        return "\n".join([_TEXT["role"], _TEXT["first"].format(text=text), *end])
    begin, past = f"{_TEXT['role']} Your task is to: {task}", [past_steps(steps, count)] if steps else []
    return "\n".join([begin, *past, _TEXT["now"].format(step=count + 1, text=text), *end])
