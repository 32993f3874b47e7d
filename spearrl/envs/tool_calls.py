"""Tool calls in a model's reply, in the Hermes layout: <tool_call>{"name": …, "arguments": {…}}</tool_call>.

Other layouts are turned into this one where replies are decoded (`spearrl.models`), so environments read only it.
What a model thinks is text: calls and actions count where they follow the thought.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, THOUGHT = "<think>", "</think>"
TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
NO_CALL = f'no tool was called; reply with {OPEN}{{"name": …, "arguments": {{…}}}}{CLOSE}'


@dataclass(slots=True, frozen=True)
class ToolCall:
    """A call that the model wrote: the tool's name, and the arguments as JSON has them."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def text(self) -> str:
        """As the model writes it."""
        return OPEN + json.dumps({"name": self.name, "arguments": self.arguments}, ensure_ascii=False) + CLOSE


def after_thought(reply: str) -> str:
    """What follows the last </think>, whoever opened the thought; nothing where it was opened and not closed."""
    before, closed, after = reply.rpartition(THOUGHT)
    return after if closed else "" if THINK in before + after else reply


def without_thought(reply: str) -> str:
    """A reply without its thought: from <think>, or the beginning where the prompt opened it, to the last </think>."""
    thought, closed, after = reply.rpartition(THOUGHT)
    return thought.partition(THINK)[0] * (THINK in thought) + after if closed else reply


def read_calls(text: str) -> list[ToolCall | str]:
    """The calls in a text, in order; a text in their place says what is wrong with a broken one."""
    calls: list[ToolCall | str] = []
    rest = text
    while OPEN in rest:
        body, closed, rest = rest.partition(OPEN)[2].partition(CLOSE)
        call_or_problem = _read_call(body.strip().removeprefix(OPEN))  # a tag that was written twice
        if isinstance(call_or_problem, str) and not closed:
            call_or_problem = f"{call_or_problem}; {CLOSE} is missing"
        calls.append(call_or_problem)
    return calls


def _read_call(body: str) -> ToolCall | str:
    """One call, or what is wrong with it. Line ends and tabs inside a string of the JSON are read as they are."""
    try:
        value = json.loads(body, strict=False)
        if isinstance(value, dict) and isinstance(value.get("arguments"), str):  # JSON within JSON, as some APIs do
            value["arguments"] = json.loads(value["arguments"], strict=False)
        json.dumps(value)  # what is nested too deeply to be written again
    except (ValueError, RecursionError) as error:
        return f"the tool call is not JSON: {error}"
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not TOOL_NAME.fullmatch(value["name"]):
        return 'a tool call is {"name": "…", "arguments": {…}}'
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return f"the arguments of {value['name']} must be a JSON object"
    return ToolCall(value["name"], arguments)
