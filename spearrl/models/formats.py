"""Which format a model's chats have, found out before weights are loaded: a conversation with a thought, a call and its
result is rendered through the chat template, and the call is read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from spearrl.config.sections import ModelSection
from spearrl.errors import ConfigError
from spearrl.models.chat import ChatEncoder
from spearrl.models.chat_format import RESPONSE_TEMPLATE, TEMPLATE, ChatFormat, next_prompt, parse_reply
from spearrl.models.hub import is_hub_name
from spearrl.models.layouts import HERMES, LAYOUTS, Reader, ResponseTemplate, call_text, parts_of, said_text, types_of
from spearrl.models.renderers import INSTALL, LibraryFormat, known_models, recognised
from spearrl.types import Message

PLACE, TIMES = {"type": "string", "description": "where"}, {"type": "integer", "description": "how often"}
PARAMETERS = {"type": "object", "properties": {"place": PLACE, "times": TIMES}, "required": ["place", "times"]}
FUNCTION = {"name": "look_around", "description": "Look at a place.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
ARGUMENTS = {"place": 'the "red" room', "times": 2}
ASKED, REASONING, RESULT = "what is there?", "let me look", "a lamp7"
_ALSO = {**ARGUMENTS, "also": ["a", True, None, {"b": 1.5}]}
_CALL = {"type": "function", "id": "functions.look_around:0", "function": {"name": "look_around", "arguments": _ALSO}}
TRIED_CHAT: list[dict[str, Any]] = [  # by which a format of the library is recognised
    {"role": "user", "content": ASKED},
    {"role": "assistant", "content": "", "reasoning_content": REASONING, "tool_calls": [_CALL]},
    {"role": "tool", "name": "look_around", "tool_call_id": _CALL["id"], "content": RESULT},
    {"role": "assistant", "content": "so"},
    {"role": "user", "content": "and now?"},
]
WAYS_OUT = "set env.options.describe=prompt (the environment describes tools in its own words), or take another model"


def probe_template(encoder: ChatEncoder, readers: Sequence[Reader] = LAYOUTS) -> tuple[Reader | None, str]:
    """Try a chat template: what reads the calls that it writes, and why tools cannot be used through it; empty: they
    can.
    """
    asked, thought, result = TRIED_CHAT[:3]
    function = {"name": "look_around", "arguments": ARGUMENTS}
    calls = [{"type": "function", "id": "call00001", "function": function}]
    call, result = {"role": "assistant", "content": "", "tool_calls": calls}, result | {"tool_call_id": "call00001"}
    prompt, _ = _render(encoder, [asked], prompt=True)
    said, fault = _render(encoder, [asked, thought | call], prompt=False)
    rendered, result_fault = _render(encoder, [asked, call, result], prompt=True)
    reply = _without_end(encoder, said.rpartition(ASKED)[2].removeprefix(prompt.rpartition(ASKED)[2]))
    expected, types = [("look_around", ARGUMENTS)], types_of([TOOL])
    reader = next((one for one in readers if parts_of(one.canonical(reply, types))[2] == expected), None)
    faults = (
        ("place" not in prompt or "look_around" not in prompt, "does not show the environment's tools"),
        (bool(fault), f"refuses tool calls: {fault}"),
        ("look_around" not in reply, "leaves tool calls out"),
        (reader is None, f"writes a tool call as no reader knows: {reply.strip()[:300]!r}"),
        (bool(result_fault), f"refuses results of tools: {result_fault}"),
        (RESULT not in rendered, "leaves results of tools out"),
    )
    return reader, next((f"the chat template {text}" for found, text in faults if found), "")


def open_format(
    tokenizer: Any, settings: ModelSection, tools: Sequence[Mapping[str, Any]] = (), *, path: str = "model.path"
) -> ChatFormat:
    """The format of a model's chats that `settings.format` names, tried.

    "auto" is the library's format that writes a conversation token for token as the template does (or, where there is
    no template, that of the model's name on the hub); else the template, with calls read by the tokenizer's response
    template where it has one that reads them back, else by a layout.

    Args:
        tools: function schemas that the environment offers through the format.
        path: what to blame, in errors.
    Raises:
        ConfigError: the format fails, or tools are offered and its calls cannot be used.
    """
    offered = [dict(tool) for tool in tools]
    if settings.format == "auto":
        chat, problem = _chosen(tokenizer, settings, offered)
    else:
        chat, problem = _named(tokenizer, settings, settings.format, offered)
    if problem and tools:
        raise ConfigError(problem, where=path, hint=_ways_out(tokenizer, settings))
    return chat


def _chosen(tokenizer: Any, settings: ModelSection, tools: list[dict[str, Any]]) -> tuple[ChatFormat, str]:
    """What "auto" takes, and why tools cannot be used through it."""
    problem, notes = "", tuple[str, ...]()
    known = known_models().get(settings.path.partition("@")[0]) if is_hub_name(settings.path) else None
    template = str(getattr(tokenizer, "chat_template", None) or "")
    name = recognised(tokenizer, TRIED_CHAT, TOOL, first=known) if "tools" in template else None
    if known and template and not name:
        notes = (f"format {known} of renderers writes chats otherwise than the model's own template, which is used",)
    if name or (known and not template):
        chat, problem = _named(tokenizer, settings, str(name or known), tools)
        if not problem or not tools or not template:
            return chat, problem
        notes = (problem,)
    for name in (RESPONSE_TEMPLATE, TEMPLATE):
        if name == TEMPLATE or getattr(tokenizer, "response_template", None) is not None:
            chat, problem = _named(tokenizer, settings, name, tools)
            if not problem:
                break
            if name == RESPONSE_TEMPLATE:
                notes += (f"the tokenizer's response template is not used: {problem}",)
    chat.stops = replace(chat.stops, notes=(*notes, *chat.stops.notes))
    return chat, problem


def _named(tokenizer: Any, settings: ModelSection, name: str, tools: list[dict[str, Any]]) -> tuple[ChatFormat, str]:
    """A format by its name, and why tools cannot be used through it."""
    if name not in (TEMPLATE, RESPONSE_TEMPLATE):
        chat = LibraryFormat(tokenizer, name, thinking=settings.thinking, tools=tools)
        return chat, round_trip_problem(chat) if tools else ""
    if name == RESPONSE_TEMPLATE and getattr(tokenizer, "response_template", None) is None:
        text = "the tokenizer carries no response template"
        raise ConfigError(text, where="model.format", hint="use model.format=auto or template")
    readers: Sequence[Reader] = LAYOUTS if name == TEMPLATE else (ResponseTemplate(tokenizer),)
    reader, problem = probe_template(ChatEncoder(tokenizer, thinking=settings.thinking), readers)
    layout = HERMES if problem or reader is None else reader
    layout = readers[0] if name == RESPONSE_TEMPLATE and layout is HERMES else layout
    encoder = ChatEncoder(tokenizer, layout=layout, thinking=settings.thinking, structured=bool(tools))
    encoder.verify()
    return encoder, problem or (round_trip_problem(encoder) if tools else "")


def round_trip_problem(chat: ChatFormat) -> str:
    """Why a call and its result do not come through a format opened with tools, through its own ids; empty: they do."""
    asked, call = Message("user", ASKED), call_text("look_around", ARGUMENTS)
    try:
        prompt, reply = chat.start([asked], [TOOL]), chat.reply_ids(call)
        read, shown = parse_reply(chat, reply, prompt), chat.tokenizer.decode(list(prompt))
        said, result = Message("assistant", chat.reply_text(reply, prompt)), Message("tool", RESULT)
        after = next_prompt(chat, (prompt, reply), [asked, said, result], [result], [TOOL])
    except ConfigError as error:
        return f"format {chat.name}: {error.message}"
    faults = (
        ("place" not in shown or "look_around" not in shown, "does not show the environment's tools"),
        (read.calls != (("look_around", ARGUMENTS),), f"writes a call that is not read back: {read}"),
        (not read.ended, "puts nothing after a reply that would end it"),
        (RESULT not in chat.tokenizer.decode(list(after)), "leaves results of tools out"),
    )
    return next((f"format {chat.name} {text}" for found, text in faults if found), "")


def _ways_out(tokenizer: Any, settings: ModelSection) -> str:
    """What to do where tools cannot be used, with the formats that would do."""
    names, fitting = dict.fromkeys(known_models().values()), []
    for name in names:
        try:
            if not _named(tokenizer, settings, name, [TOOL])[1]:
                fitting.append(name)
        except ConfigError:  # it does not go with this tokenizer
            continue
    if fitting:
        return f"set model.format to one that the tokenizer has the tokens for ({', '.join(fitting)}), or {WAYS_OUT}"
    more = "no other model.format goes with this tokenizer" if names else f"{INSTALL} brings more of model.format"
    return f"{WAYS_OUT}; {more}"


def describe_format(chat: ChatFormat) -> str:
    """A line: how chats are written and calls read, whether the model thinks, what ends a reply and who says so."""
    tokens = chat.tokenizer.convert_ids_to_tokens
    stops = "; ".join(f"{tokens(i)} ({', '.join(where)})" for i, where in chat.stops.sources.items()) or "none"
    switch = "".join(f", {name}={str(value).lower()}" for name, value in chat.options.items())
    thinking = ("in every reply: prompts open a thought" if chat.opens_thought else "as the model likes") + switch
    return f"format {chat.name}, calls: {chat.reader}; thinking {thinking}; stop tokens: {stops}"


def explain_format(tokenizer: Any, settings: ModelSection) -> list[str]:
    """What the probe sees, as lines: the format, a conversation with ids and their action mask, what is read of it.

    Raises:
        ConfigError: the format fails on a plain conversation.
    """
    problem = ""
    try:
        chat = open_format(tokenizer, settings, [TOOL])
    except ConfigError as error:
        chat, problem = open_format(tokenizer, settings), f"no: {error.message}; ways out: {error.hint}"
    tools = () if problem else (TOOL,)
    asked, said = Message("user", ASKED), said_text(REASONING, "", [("look_around", ARGUMENTS)])
    result = Message("tool" if tools else "user", RESULT)
    prompt, reply = chat.start([asked], tools), chat.reply_ids(said)
    text, known = chat.reply_text(reply, prompt), (*prompt, *reply)
    after = next_prompt(chat, (prompt, reply), [asked, Message("assistant", text), result], [result], tools)
    again = "the whole next prompt, rendered anew: the format rewrites earlier turns"
    if after[: len(known)] == known:
        after, again = after[len(known) :], "what follows"
    lines = [describe_format(chat), *(f"note: {note}" for note in chat.stops.notes)]
    lines += [f"model.format={settings.format}: {chat.name}", f"tools through the format: {problem or 'yes'}"]
    decode = chat.tokenizer.decode
    for name, mask, ids in (("prompt", 0, prompt), ("reply", 1, reply), (again, 0, after)):
        lines += [f"--- {name}: {len(ids)} tokens, action mask {mask}", decode(list(ids)), f"ids {list(ids)}"]
    read = parse_reply(chat, reply, prompt)
    parts = {"content": read.content, "reasoning": read.reasoning, "calls": list(read.calls), "ended": read.ended}
    lines += ["--- the reply as environments read it", text, "--- in its parts"]
    return [*lines, *(f"{name}: {part!r}" for name, part in parts.items())]


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
