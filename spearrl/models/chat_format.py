"""What every chat format offers: messages to token ids, and a reply's ids back to what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spearrl.models.layouts import THINK, THOUGHT, Call, parts_of, split_thought
from spearrl.models.stops import Stops
from spearrl.models.vision import Vision
from spearrl.types import Message

# Of `model.format`: the tokenizer's chat template, with calls read by a layout, or by its response template.
TEMPLATE, RESPONSE_TEMPLATE = "template", "response_template"
SWITCHES = ("enable_thinking", "thinking")  # what templates call the setting that turns thinking on and off


class ChatFormat(Protocol):
    """How a model writes messages, thoughts and calls, and how its replies are read.

    Attributes:
        name: what `model.format` calls it.
        reader: what reads calls.
        stops: what ends a reply, and where that was found; `stop_ids` the tokens.
        opens_thought: prompts end inside a thought, which the reply goes on with.
        rewrites_history: earlier turns change when new ones come: conversations are rendered anew every turn.
        options: the settings of the template that were chosen, thinking among them.
    """

    name: str
    reader: str
    tokenizer: Any
    vision: Vision | None
    stops: Stops
    stop_ids: tuple[int, ...]
    opens_thought: bool
    rewrites_history: bool
    options: dict[str, Any]

    def start(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> tuple[int, ...]:
        """Ids of a whole conversation, ready for a reply. `tools`: function schemas to show.

        Raises:
            ConfigError: the format does not take such messages. ContractError: bytes that are no image.
        """

    def extend(
        self, prompt_ids: Sequence[int], sampled_ids: Sequence[int], new_messages: Sequence[Message]
    ) -> tuple[int, ...] | None:
        """Ids after a reply and the messages since, ready for the next reply; they begin with both arguments' ids.

        None: these cannot grow, the conversation is rendered anew.
        """

    def reply_ids(self, text: str) -> tuple[int, ...]:
        """A reply as the policy would have said it after a prompt, with what ends it."""

    def reply_text(self, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> str:
        """A sampled reply as environments read it: `<think>…</think> … <tool_call>{…}</tool_call>`.

        Args:
            prompt_ids: what it replies to; left out, a prompt like any other.
        """

    def check_images(self) -> None:
        """Refuse an environment that shows pictures where the format, or the model, drops them. Raises ConfigError."""


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """A reply in its parts. `reasoning`: None where there is no thought; `ended`: whether a stop token ends it."""

    content: str
    reasoning: str | None
    calls: tuple[Call, ...]
    ended: bool


def parse_reply(chat: ChatFormat, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> ParsedReply:
    """A sampled reply in its parts. Calls that are broken stay in the content."""
    thought, content, calls = parts_of(chat.reply_text(ids, prompt_ids))
    return ParsedReply(content, thought, tuple(calls), bool(ids) and ids[-1] in chat.stop_ids)


def next_prompt(
    chat: ChatFormat,
    turn: tuple[Sequence[int], Sequence[int]],
    conversation: Sequence[Message],
    new: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[int, ...]:
    """Ids for the next reply: grown from a turn where the format can, else the conversation rendered anew.

    Args:
        turn: ids of its prompt and of its reply. conversation: all messages, those since, `new`, among them.
    """
    grown = None if chat.rewrites_history else chat.extend(*turn, new)
    return chat.start(conversation, tools) if grown is None else grown


def with_answers(messages: Sequence[Message]) -> list[Message]:
    """Messages, what follows a reply without calls said by the user: templates refuse results that nothing called."""
    called, said = False, []
    for message in messages:
        if message.role == "assistant":
            called = bool(parts_of(message.text)[2])
        said.append(message if called or message.role != "tool" else Message("user", message.content))
    return said


def reply_parts(text: str, *, structured: bool, takes_thoughts: bool) -> tuple[str | None, str, list[Call]]:
    """A reply as a chat gets it: thought, other text, calls.

    Args:
        structured: calls are handed over as such; else they stay in the text.
        takes_thoughts: thoughts are handed over apart; else they stay in the text, and are left out beside calls.
    """
    thought, content, calls = parts_of(text)
    if calls and not structured:
        content, calls = split_thought(text)[1].strip(), []
    if thought is None or takes_thoughts:
        return thought, content, calls
    return None, content if calls else f"{THINK}\n{thought}\n{THOUGHT}\n\n{content}", calls


def name_results(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say of each tool's result which call it belongs to: several results are of the calls before them, in order."""
    calls: list[dict[str, Any]] = []
    for message in chat:
        calls = message.get("tool_calls", calls)
        if message["role"] == "tool" and calls:
            message |= {"name": calls[0]["function"]["name"], "tool_call_id": calls[0]["id"]}
            calls = calls[1:] or calls
    return chat
