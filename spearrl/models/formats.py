"""Which format a model's chats have, found out before weights are loaded: a conversation with a thought, a call and its
result is rendered through the chat template, and the call is read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spearrl.config.sections import ModelSection
from spearrl.errors import ConfigError
from spearrl.models.chat import ChatEncoder
from spearrl.models.layouts import HERMES, LAYOUTS, Layout, call_text, parts_of, types_of
from spearrl.models.layouts import THINK as OPENED
from spearrl.models.layouts import THOUGHT as CLOSED
from spearrl.types import Message

PROPERTIES = {
    "place": {"type": "string", "description": "where"},
    "times": {"type": "integer", "description": "how often"},
}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["place", "times"]}
TOOL = {
    "type": "function",
    "function": {"name": "look_around", "description": "Look at a place.", "parameters": PARAMETERS},
}
ARGUMENTS = {"place": 'the "red" room', "times": 2}
ASKED, THOUGHT, RESULT = "what is there?", "let me look", "a lamp7"
WAYS_OUT = (
    "set env.options.describe=prompt (the environment says in its own words what its tools are), or take another model"
)


@dataclass(frozen=True, slots=True)
class FormatProbe:
    """What a chat template does with tools.

    Args:
        layout: what reads the calls that it writes; None: nothing does.
        problem: why tools cannot be used through the template; empty: they can.
        rendered: the conversation as the template writes it, up to the next reply.
        reply: its reply with the call, and `read`: what the environment would get of it.
    """

    layout: Layout | None
    problem: str
    rendered: str
    reply: str
    read: str


def probe_format(encoder: ChatEncoder) -> FormatProbe:
    """Try the chat template of an encoder, whatever its layout is."""
    asked = {"role": "user", "content": ASKED}
    prompt, _ = _render(encoder, [asked], prompt=True)
    said = rendered = fault = result_fault = ""
    for arguments in (ARGUMENTS, json.dumps(ARGUMENTS)):  # a few templates take them as JSON text only
        function = {"name": "look_around", "arguments": arguments}
        calls = [{"type": "function", "id": "call00001", "function": function}]
        call = {"role": "assistant", "content": "", "tool_calls": calls}
        result = {"role": "tool", "name": "look_around", "tool_call_id": "call00001", "content": RESULT}
        said, fault = _render(encoder, [asked, call | {"reasoning_content": THOUGHT}], prompt=False)
        rendered, result_fault = _render(encoder, [asked, call, result], prompt=True)
        if said:
            break
    start = prompt.rpartition(ASKED)[2]
    reply = said.rpartition(ASKED)[2]
    reply = _without_end(encoder, reply.removeprefix(start))
    layout = next((one for one in LAYOUTS if _reads(one, reply)), None)
    read = (layout or HERMES).canonical(reply, types_of([TOOL]))
    shown = "place" in prompt and "look_around" in prompt
    faults = (
        (not shown, "the chat template does not show the environment's tools"),
        (bool(fault), f"the chat template refuses tool calls: {fault}"),
        ("look_around" not in reply, "the chat template leaves tool calls out"),
        (layout is None, f"no reader knows how the chat template writes a tool call: {reply.strip()[:300]!r}"),
        (bool(result_fault), f"the chat template refuses results of tools: {result_fault}"),
        (RESULT not in rendered, "the chat template leaves results of tools out"),
    )
    return FormatProbe(
        layout, next((text for found, text in faults if found), ""), rendered or said or prompt, reply, read
    )


def open_format(
    tokenizer: Any, settings: ModelSection, tools: Sequence[Mapping[str, Any]] = (), *, path: str = "model.path"
) -> ChatEncoder:
    """The format of a model's chats, tried.

    Args:
        tools: function schemas that the environment offers through the template.
        path: what to blame, in errors.
    Raises:
        ConfigError: the template fails, or tools are offered and its calls cannot be used.
    """
    found = probe_format(ChatEncoder(tokenizer, thinking=settings.thinking))
    if tools and found.problem:
        raise ConfigError(found.problem, where=path, hint=WAYS_OUT)
    layout = HERMES if found.problem or found.layout is None else found.layout
    encoder = ChatEncoder(tokenizer, layout=layout, thinking=settings.thinking, structured=bool(tools))
    encoder.verify()
    return encoder


def describe_format(encoder: ChatEncoder) -> str:
    """A line: how chats are written and calls read, whether the model thinks, what ends a reply and who says so."""
    tokens = encoder.tokenizer.convert_ids_to_tokens
    stops = "; ".join(f"{tokens(i)} ({', '.join(where)})" for i, where in encoder.stops.sources.items()) or "none"
    switch = "".join(f", {name}={str(value).lower()}" for name, value in encoder.options.items())
    thinking = ("in every reply: prompts open a thought" if encoder.opens_thought else "as the model likes") + switch
    return f"format template, calls: {encoder.layout.name}; thinking {thinking}; stop tokens: {stops}"


def explain_format(tokenizer: Any, settings: ModelSection) -> list[str]:
    """What the probe sees, as lines: the format, the template's conversation, ids with their action mask, what is read.

    Raises:
        ConfigError: the template fails on a plain conversation.
    """
    found = probe_format(ChatEncoder(tokenizer, thinking=settings.thinking))
    tools = () if found.problem else (TOOL,)
    encoder = open_format(tokenizer, settings, tools)
    asked, said = Message("user", ASKED), f"{OPENED}\n{THOUGHT}\n{CLOSED}\n\n{call_text('look_around', ARGUMENTS)}"
    result = Message("tool" if tools else "user", RESULT)
    prompt, reply = encoder.start([asked], tools), encoder.reply_ids(said)
    anew = encoder.start([asked, encoder.reply_message(encoder.reply_text(reply)), result], tools)
    after = anew if encoder.rewrites_history else encoder.extend(prompt, reply, [result])[len(prompt) + len(reply) :]
    again = (
        "the whole next prompt, rendered anew: the template rewrites earlier turns" if encoder.rewrites_history else ""
    )
    lines = [describe_format(encoder), *(f"note: {note}" for note in encoder.stops.notes)]
    lines += [f"tools through the template: {f'no: {found.problem}' if found.problem else 'yes'}"]
    for name, mask, ids in (("prompt", 0, prompt), ("reply", 1, reply), (again or "what follows", 0, after)):
        lines += [f"--- {name}: {len(ids)} tokens, action mask {mask}", tokenizer.decode(list(ids)), f"ids {list(ids)}"]
    return [*lines, "--- the reply as environments read it", encoder.reply_text(reply)]


def _render(encoder: ChatEncoder, chat: list[dict[str, Any]], *, prompt: bool) -> tuple[str, str]:
    """The template's text, and what it refused the conversation with."""
    options = {"tokenize": False, "add_generation_prompt": prompt, "tools": [TOOL], **encoder.options}
    try:
        return str(encoder.tokenizer.apply_chat_template(encoder.in_parts(chat), **options)), ""
    except Exception as error:  # jinja2's and whatever the template raises itself
        return "", str(error) or type(error).__name__


def _without_end(encoder: ChatEncoder, reply: str) -> str:
    ends = [str(encoder.tokenizer.convert_ids_to_tokens(i)) for i in encoder.stop_ids]
    while end := next((end for end in ends if reply.rstrip().endswith(end)), ""):
        reply = reply.rstrip().removesuffix(end)
    return reply


def _reads(layout: Layout, reply: str) -> bool:
    return parts_of(layout.canonical(reply, types_of([TOOL])))[2] == [("look_around", ARGUMENTS)]
