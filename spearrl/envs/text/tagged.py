"""What the built-in environments share: replies as verl-agent reads them, and the windowed prompts of SPEAR (arXiv 2509.22601)."""

from __future__ import annotations

import re
from collections.abc import Sequence

TAGGED = "Think inside <think> </think> tags, then give one action inside <action> </action> tags."
PLAIN = "Answer with the action alone."
_CHINESE = re.compile("[\u4e00-\u9fff]")


def projected(reply: str, tail: int) -> tuple[str, bool]:
    """What stands in <action>, in lower case, and whether it is valid: with a <think> and without Chinese. Without tags: the last `tail` characters."""
    lowered = reply.lower()
    start, end = lowered.find("<action>"), lowered.find("</action>")
    if start < 0 or end < 0:
        return lowered[-tail:], False
    return lowered[start + len("<action>") : end].strip(), reasoned(reply)


def reasoned(reply: str) -> bool:
    """Does a reply hold a <think>, and nothing Chinese? What verl-agent asks of a valid one, besides its action."""
    return "<think>" in reply and "</think>" in reply and not _CHINESE.search(reply)


def numbered(past: Sequence[tuple[str, str]], count: int) -> str:
    """The last steps (observation, action) of `count` taken, a line each."""
    lines = enumerate(past, count - len(past) + 1)
    return "\n".join(f"[Observation {number}: '{seen}', Action {number}: '{done}']" for number, (seen, done) in lines)
