"""Replies as verl-agent reads them, and what the windowed prompts of SPEAR (arXiv 2509.22601) have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence

from spearrl.envs.tool_calls import THINK, THOUGHT, without_thought

TAGGED = "Think inside <think> </think> tags, then give one action inside <action> </action> tags."
PLAIN = "Answer with the action alone."
REASON = (
    "It is your turn. Reason step by step inside <think> </think> tags first, "
    "then give one admissible action inside <action> </action> tags."
)
_CHINESE = re.compile("[\u4e00-\u9fff]")


def projection(reply: str, tail: int) -> tuple[str, bool]:
    """verl-agent's projection of a reply: the action inside <action>, in lower case, and whether the reply is valid.

    A valid one has reasoning (`has_reasoning`). Without <action> tags its last `tail` characters stand for the action.
    An action that is quoted within the thought is none, other than in verl-agent.
    """
    lowered = without_thought(reply).lower()
    start, end = lowered.find("<action>"), lowered.find("</action>")
    if start < 0 or end < 0:
        return reply.lower()[-tail:], False
    return lowered[start + len("<action>") : end].strip(), has_reasoning(reply)


def has_reasoning(reply: str) -> bool:
    """Whether a reply holds a thought, and nothing Chinese: what verl-agent asks of a valid one, besides its action.

    A </think> without <think> closes a thought that the prompt opened.
    """
    thought, closed, _ = reply.partition(THOUGHT)
    return bool(closed) and (THINK in reply or bool(thought.strip())) and not _CHINESE.search(reply)


def past_steps(steps: Sequence[tuple[str, str]], count: int) -> str:
    """The paragraph of a windowed prompt about the last (observation, action) pairs, of `count` steps taken."""
    lines = [
        f"[Observation {number}: '{observation}', Action {number}: '{action}']"
        for number, (observation, action) in enumerate(steps, count - len(steps) + 1)
    ]
    taken = (
        f"So far you have taken {count} step(s). The last {len(steps)} observation(s) with the action taken at each:"
    )
    return "\n".join([taken, *lines])


def compact_window(task: str, steps: Sequence[tuple[str, str]], page: str) -> str:
    """The windowed prompt of the compact observations: task, last steps, what is there now."""
    return "\n".join(filter(None, [task, *(f"{observation}\n> {action}" for observation, action in steps), page]))
