"""Formats of the library `renderers` (PyPI, Apache-2.0): made by hand for a family of models each, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from spearrl.errors import ConfigError
from spearrl.models.chat_format import SWITCHES, name_results, reply_parts, with_answers
from spearrl.models.layouts import CLOSE, OPEN, THINK, THOUGHT, Call, named_call, parts_of, said_text, split_thought
from spearrl.models.plain_text import PlainText, decoded
from spearrl.models.stops import TurnEnds, find_stops
from spearrl.models.vision import Vision
from spearrl.types import Message

INSTALL = 'pip install "spearrl[formats]"'
_ASKED, _MARK = "\ue002asked\ue002", "\ue003"
_BY_NAME_ONLY = "gpt-oss"  # downloads a vocabulary of its own


def known_models() -> dict[str, str]:
    """The library's format of every model of the hub that it knows by name; none where it is not installed."""
    if find_spec("renderers") is None:
        return {}
    from renderers.base import MODEL_RENDERER_MAP

    return MODEL_RENDERER_MAP


class LibraryFormat:
    """A chat format of the library. It takes no images.

    A reply is followed by the library's bridge where that keeps every sampled token, else the conversation is rendered
    anew. What its parser finds broken is handed on as a broken call.

    Args:
        name: of the library's format.
        thinking: "on" or "off" where the format has a switch; "auto": as the tokenizer's chat template has it.
        tools: function schemas that the environment offers; without them calls are text.
    Raises:
        ConfigError: the library is not installed, knows no such format, or the tokenizer lacks its tokens; there is
            no switch for thinking.
    """

    vision: Vision | None = None

    def __init__(self, tokenizer: Any, name: str, *, thinking: str = "auto", tools: Sequence[dict[str, Any]] = ()):
        names = dict.fromkeys(known_models().values())
        if name not in names:
            text = f"model.format={name!r} is not known" if names else f"model.format={name!r} needs renderers"
            hint = f"one of auto, template, response_template, {', '.join(names)}" if names else INSTALL
            raise ConfigError(text, where="model.format", hint=hint)
        self.tokenizer, self.name = tokenizer, name
        self.reader = f"renderers {metadata.version('renderers')}"
        self._text, self._offered, self._tools = PlainText(tokenizer), bool(tools), list(tools)
        self.options, self._renderer = self._made(thinking)
        self._prompt = self._render([Message("user", _ASKED)])
        parsed = self._renderer.parse_response(self._text.plain("x"), prompt_ids=self._prompt)
        self.opens_thought = parsed.reasoning_complete is False
        ids = self._renderer.get_stop_token_ids()
        self.stops = find_stops(tokenizer, TurnEnds((), (), (), self._prompt), own=ids, source=f"format {name}")
        self.stop_ids = tuple(self.stops.sources)
        self._takes_thoughts = True
        self._takes_thoughts = _MARK in decoded(self.tokenizer, self._said(f"{THINK}{_MARK}{THOUGHT}so")[0])
        self.reply_ids = lru_cache(maxsize=4096)(self._reply_ids)
        self.rewrites_history = False
        first, second = Message("user", "one"), Message("user", "two")
        grown = self.extend(self.start([first]), self.reply_ids("so"), [second])
        whole = self.start([first, Message("assistant", "so"), second])
        self.rewrites_history = grown is not None and decoded(self.tokenizer, grown) != decoded(self.tokenizer, whole)

    def start(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> tuple[int, ...]:
        """Ids of a whole conversation, ready for a reply. Raises ConfigError where the format does not take it."""
        if tools:
            self._tools = list(tools)
        return tuple(self._render(messages, tools))

    def extend(
        self, prompt_ids: Sequence[int], sampled_ids: Sequence[int], new_messages: Sequence[Message]
    ) -> tuple[int, ...] | None:
        """Ids after a reply and the messages since; None where the library cannot keep what was sampled."""
        known = [*prompt_ids, *sampled_ids]
        parsed = self._parsed(sampled_ids, prompt_ids)
        chat = self._chat([Message("assistant", self._canonical(parsed)), *new_messages])
        for call, said in zip(chat[0].get("tool_calls", ()), parsed.tool_calls, strict=False):
            call["id"] = said.id or call["id"]  # some formats name the tool in it
        new, tools = name_results(chat)[1:], self._tools or None
        bridged = self._renderer.bridge_to_next_turn(list(prompt_ids), list(sampled_ids), new, tools=tools)
        ids = [] if bridged is None else list(bridged.token_ids)
        return tuple(ids) if ids[: len(known)] == known and len(ids) > len(known) else None

    def reply_text(self, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> str:
        """A sampled reply as environments read it."""
        return self._canonical(self._parsed(ids, prompt_ids))

    def _parsed(self, ids: Sequence[int], prompt_ids: Sequence[int]) -> Any:
        prompt = list(prompt_ids) or self._prompt
        return self._renderer.parse_response(list(ids), tools=self._tools or None, prompt_ids=prompt)

    @staticmethod
    def _canonical(parsed: Any) -> str:
        calls: list[Call] = []
        broken = []
        for call in parsed.tool_calls:
            try:
                calls.append(named_call({"name": call.name, "arguments": call.arguments or {}}))
            except ValueError:
                broken.append(f"{OPEN}{call.raw.strip().removeprefix(OPEN).removesuffix(CLOSE).strip()}{CLOSE}")
        closed = parsed.reasoning_complete is not False
        text = said_text(parsed.reasoning_content, parsed.content, calls, closed=closed)
        return "\n".join([*([text] if text else []), *broken])

    def check_images(self) -> None:
        """Refuse an environment that shows pictures. Raises ConfigError."""
        text = f"the environment shows pictures, which model.format={self.name} does not take here"
        hint = "use model.format=template with a model of the Qwen2-VL family, or have the environment show text"
        raise ConfigError(text, where="model.format", hint=hint)

    def _made(self, thinking: str) -> tuple[dict[str, Any], Any]:
        """The settings that were chosen, and the library's renderer with them."""
        from renderers import config_from_name, create_renderer

        base: Any = config_from_name(self.name)
        switch = next((name for name in SWITCHES if name in base.template_field_names()), None)
        if thinking != "auto" and switch is None:
            text = f"model.format={self.name} has no switch for thinking ({' or '.join(SWITCHES)})"
            raise ConfigError(text, where="model.thinking", hint="use model.thinking=auto")
        tried: list[dict[str, Any]] = [{}]
        if switch is not None:
            tried = [{switch: thinking == "on"}] if thinking != "auto" else [{}, {switch: True}, {switch: False}]
        template_end, made = self._template_end(), []
        for options in tried:
            try:
                self._renderer = create_renderer(_Tokenizer(self.tokenizer, self._text), type(base)(**options))
                prompt = self._render([Message("user", _ASKED)])
            except Exception as error:  # the library says in many ways that a tokenizer lacks its tokens
                text = f"model.format={self.name} does not go with the model's tokenizer: {error}"
                hint = "choose another model.format, or the model's own tokenizer"
                raise ConfigError(text, where="model.format", hint=hint) from error
            made.append((options, self._renderer))
            if decoded(self.tokenizer, prompt).rpartition(_ASKED)[2] == template_end:
                return made[-1]
        return made[0]

    def _template_end(self) -> str | None:
        """What the tokenizer's own template puts before a reply; None where it has none, or one that fails."""
        try:
            chat = [{"role": "user", "content": _ASKED}]
            rendered = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception:  # no template, or whatever jinja2 and the template raise
            return None
        return str(rendered).rpartition(_ASKED)[2]

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        chat = name_results(self._chat(messages))
        try:
            return list(self._renderer.render_ids(chat, tools=list(tools) or None, add_generation_prompt=True))
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            roles = ", ".join(message["role"] for message in chat)
            text = f"model.format={self.name} failed on messages of roles {roles}: {error}"
            hint = "use roles the format knows in Environment.messages, or another model.format"
            raise ConfigError(text, where="model.format", hint=hint) from error

    def _chat(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as the library takes them, replies in their parts."""
        chat: list[dict[str, Any]] = []
        number = 0
        for message in with_answers(messages) if self._offered else messages:
            if message.images:
                self.check_images()
            chat.append({"role": message.role, "content": self._text.hide(message.text)})
            if message.role != "assistant":
                continue
            parts = reply_parts(message.text, structured=self._offered, takes_thoughts=self._takes_thoughts)
            thought, content, calls = parts
            if thought is not None:
                chat[-1]["reasoning_content"] = self._text.hide(thought)
            chat[-1]["content"] = self._text.hide(content)
            if calls:
                functions = [{"name": name, "arguments": self._text.hide_all(given)} for name, given in calls]
                # Kimi K2 writes the name of a tool as its call's id, in this form.
                chat[-1]["tool_calls"] = [
                    {"type": "function", "id": f"functions.{function['name']}:{n}", "function": function}
                    for n, function in enumerate(functions, number)
                ]
                number += len(calls)
        return chat

    def _reply_ids(self, text: str) -> tuple[int, ...]:
        """A reply as the policy would have said it after a prompt, with what ends it."""
        thought, _, calls = parts_of(text)
        said, whole = self._said(text)
        if self.opens_thought and (thought is None or not whole or thought not in decoded(self.tokenizer, said)):
            said = self._closing(thought or "", text)
        ends = [position for position, i in enumerate(said) if i in self.stop_ids]
        if ends:
            return tuple(said[: ends[-1] + 1])
        # The end of this format's turns is the beginning of the next one.
        following = Message("tool" if calls and self._offered else "user", "x")
        chat = name_results(self._chat([Message("user", _ASKED), Message("assistant", text), following]))
        sampled = self._sampled(self._renderer.render(chat))
        return (*said, *(sampled[-1:] if sampled[-1:] and sampled[-1] in self.stop_ids else ()))

    def _said(self, text: str) -> tuple[list[int], bool]:
        """Ids of a reply, and whether they follow a prompt as they are: its end may change with the reply."""
        rendered = self._renderer.render(self._chat([Message("user", _ASKED), Message("assistant", text)]))
        ids, size = list(rendered.token_ids), len(self._prompt)
        return (ids[size:], True) if ids[:size] == self._prompt else (self._sampled(rendered), False)

    def _closing(self, thought: str, text: str) -> list[int]:
        """A reply that ends the thought that its prompt has opened."""
        answer = split_thought(text)[1]
        said, whole = self._said(f"{THINK}{_MARK}{THOUGHT}{answer}")
        mark, size = self._text.plain(_MARK), len(self._text.plain(_MARK))
        at = next((n for n in range(len(said)) if said[n : n + size] == mark), None)
        if whole and at is not None:
            return [*self._text.plain(thought), *said[at + size :]]
        said = self._said(answer)[0]
        closed = "" if decoded(self.tokenizer, said).lstrip().startswith(THOUGHT) else f"\n{THOUGHT}\n\n"
        return [*self._text.plain(thought), *self._text.ids(closed), *said]

    @staticmethod
    def _sampled(rendered: Any) -> list[int]:
        """What the library says the model samples of the second message."""
        marked = zip(rendered.token_ids, rendered.sampled_mask, rendered.message_indices, strict=True)
        return [i for i, sampled, message in marked if sampled and message == 1]


def recognised(
    tokenizer: Any, chat: list[dict[str, Any]], tool: dict[str, Any], *, first: str | None = None
) -> str | None:
    """The library's format that writes a conversation as the tokenizer's template does, token for token; None: none.

    Args:
        chat, tool: messages and a function schema, as chat templates take them. Beginnings of `chat` are compared too.
        first: the format that is tried first.
    """
    names = sorted({*known_models().values()} - {_BY_NAME_ONLY}, key=lambda name: (name != first, name))
    chats, text = [chat[:length] for length in range(1, len(chat) + 1, 2)], PlainText(tokenizer)
    options: dict[str, Any] = {"tools": [tool], "tokenize": False, "add_generation_prompt": True}
    try:
        expected = [text.ids(str(tokenizer.apply_chat_template(part, **options))) for part in chats] if names else []
    except Exception:  # whatever the template refuses such a conversation with
        return None
    for name in names:
        try:
            render = LibraryFormat(tokenizer, name, tools=[tool])._renderer.render_ids
            if [list(render(part, tools=[tool], add_generation_prompt=True)) for part in chats] == expected:
                return name
        except ConfigError:  # it does not go with this tokenizer
            continue
    return None


class _Tokenizer:
    """The tokenizer as the library sees it: control tokens of message text become plain text."""

    def __init__(self, tokenizer: Any, text: PlainText):
        self._tokenizer, self._text = tokenizer, text

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self._text.ids(text)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._tokenizer, name)
