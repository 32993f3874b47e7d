"""Messages to token ids. What the engine sampled is kept as sampled: a conversation only ever grows by new ids.

ids = previous ids + sampled ids + (the template's rendering of a dummy reply and the new messages, minus its prefix)

The template shows an image as one image token; it is repeated as often as `spearrl.models.vision` counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from spearrl.errors import ConfigError
from spearrl.models.chat_format import RESPONSE_TEMPLATE, SWITCHES, TEMPLATE, name_results, reply_parts, with_answers
from spearrl.models.layouts import (
    HERMES,
    MARKS,
    THINK,
    THOUGHT,
    Layout,
    Reader,
    call_text,
    parts_of,
    types_of,
)
from spearrl.models.plain_text import PlainText, decoded
from spearrl.models.stops import TurnEnds, find_stops
from spearrl.models.vision import Vision, vision_of
from spearrl.types import Message, Text

_DUMMY, _NEXT = "\ue002reply\ue002", "\ue002next\ue002"
_TRIED_CALL = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {"at": "lamp"}}}

Content = str | tuple[str | int, ...]  # of a message: its text, or its texts and the numbers of tokens of its images
Key = tuple[tuple[str, Content], ...]  # messages as (role, content)


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    `rewrites_history` (known after `verify()`): the template changes earlier turns when new ones come (Qwen3 drops old
    thinking); then conversations are rendered anew every turn with `start`. `opens_thought`: prompts end inside a
    thought, which the reply goes on with. `stops`: what ends a reply, and where that was found.

    Args:
        layout: how the model writes calls.
        structured: the template gets the calls of replies as such and writes them its own way; else they are text.
        thinking: "on" or "off" where the template has a switch for it; "auto": as it is without one.
    Raises:
        ConfigError: the tokenizer has no chat template, or it has no switch for thinking.
    """

    def __init__(self, tokenizer: Any, *, layout: Reader = HERMES, thinking: str = "auto", structured: bool = False):
        if not getattr(tokenizer, "chat_template", None):
            hint = "use an instruct model, or set tokenizer.chat_template and save it"
            raise ConfigError("the tokenizer has no chat template", where="model.path", hint=hint)
        self.tokenizer, self.vision, self.rewrites_history = tokenizer, vision_of(tokenizer), False
        self._text = PlainText(tokenizer)
        self._whole = lru_cache(maxsize=256)(self._encode_whole)
        self._delta = lru_cache(maxsize=8192)(self._encode_delta)
        self.layout, self.reader, self._types = layout, layout.name, types_of(())
        self.name = TEMPLATE if isinstance(layout, Layout) else RESPONSE_TEMPLATE
        self._structured = structured and layout is not HERMES
        shown = {*MARKS, *layout.marks}
        marks = {i for i, token in tokenizer.added_tokens_decoder.items() if str(token) in shown}
        self._hidden = set(tokenizer.all_special_ids) - marks
        self._hidden |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i not in marks}
        self._in_parts = False  # whether the template takes text as a list of parts only, as those for pictures may
        self.options: dict[str, Any] = {}
        self._takes_thoughts = True  # the template writes a thought that it gets apart from the text
        asked = self._asked = self._prompt_end()
        if thinking != "auto":
            asked = self._asked = self._switch(thinking == "on")
        self._takes_thoughts = self._shows_thoughts()
        self.stops = find_stops(tokenizer, self._turn_ends())
        self.end_id, self.stop_ids = self.stops.end, tuple(self.stops.sources)
        thought = layout.canonical(asked, {})
        self.opens_thought = THINK in thought.rpartition(THOUGHT)[2]
        self._opened = THINK + thought.rpartition(THINK)[2] if self.opens_thought else ""
        closed = self._answered(_NEXT).partition(_NEXT)[0]
        self._no_thought = closed if THOUGHT in closed else f"\n{THOUGHT}\n\n"  # closes a prompt's thought at once

    def start(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> tuple[int, ...]:
        """Ids of a whole conversation, ready for a reply.

        Args:
            tools: function schemas for the template.
        Raises:
            ConfigError: images that the model or the template does not take. ContractError: bytes that are no image.
        """
        key = self._key(with_answers(messages) if self._structured else messages)
        if tools:
            self._types = types_of(tools)
        return self._encode_whole(key, tools) if tools else self._whole(key)

    def extend(
        self, prompt_ids: Sequence[int], sampled_ids: Sequence[int], new_messages: Sequence[Message]
    ) -> tuple[int, ...]:
        """Ids after a reply and the messages since, ready for the next reply.

        Args:
            sampled_ids: the reply as sampled; it may end with the end-of-turn token or not.
        """
        if self._structured and any(message.role == "tool" for message in new_messages):
            new_messages = with_answers([Message("assistant", self.reply_text(sampled_ids)), *new_messages])[1:]
        delta = self._delta(self._key(new_messages))
        last = sampled_ids[-1] if sampled_ids else None
        if last in self.stop_ids and last in delta and last == next(i for i in delta if i in self.stop_ids):
            delta = delta[delta.index(last) + 1 :]
        return (*prompt_ids, *sampled_ids, *delta)

    def reply_ids(self, text: str) -> tuple[int, ...]:
        """A reply as the policy would have said it: plain text and the end-of-turn token.

        Where prompts open a thought, it goes on with that one, or closes it at once.
        """
        if self._structured and parts_of(text)[2]:
            return self._call_ids(text)
        if self.opens_thought:
            text = text.partition(THINK)[2].removeprefix("\n") if THINK in text else self._no_thought + text
        ids = self._text.plain(text)
        return (*ids, self.end_id) if self.end_id is not None else tuple(ids)

    def check_images(self) -> None:
        """Refuse an environment that shows pictures where model or template drop them. Raises ConfigError."""
        self._needed_vision()
        self._encode_whole((("user", ("one", 1)),))

    def decode(self, ids: Sequence[int]) -> str:
        """Text without control tokens, except those that mark thoughts and calls."""
        shown = [i for i in ids if i not in self._hidden]
        return decoded(self.tokenizer, shown)

    def reply_text(self, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> str:
        """A sampled reply as environments read it: with a thought's beginning that the prompt has, calls as Hermes."""
        return self.layout.canonical(self._opened + self.decode(ids), self._types)

    def verify(self) -> None:
        """Compare growing a conversation with rendering it whole; sets `rewrites_history` where they differ.

        Raises:
            ConfigError: the template fails on a plain conversation, or renders control tokens of a message as such.
        """
        first, second = Message("user", "one"), Message("user", "two")
        self.rewrites_history = False
        for reply in ("so", "<think>\nwhy\n</think>\n\nso"):
            grown = self.extend(self.start([first]), self.reply_ids(reply), [second])
            whole = self.start([first, Message("assistant", reply), second])
            self.rewrites_history |= decoded(self.tokenizer, grown) != decoded(self.tokenizer, whole)
        if self._structured:
            self.rewrites_history |= self._rewrites_calls()
        hostile = self.start([Message("user", "one" + "".join(self._text.controls))])
        controls = set(self.tokenizer.all_special_ids)
        if sum(i in controls for i in hostile) != sum(i in controls for i in self.start([first])):
            text, hint = "control tokens in a message do not stay plain text", "use a tokenizer with a tokenizer.json"
            raise ConfigError(text, where="chat template", hint=hint)

    def _shows_thoughts(self) -> bool:
        thought = self._reply(f"{THINK}\n{_DUMMY}\n{THOUGHT}\n\nso")
        for message in (thought, thought | {"content": "", "tool_calls": [_TRIED_CALL]}):
            try:
                if _DUMMY in self._template([{"role": "user", "content": self._safe("x")}, message], False):
                    return True
            except ConfigError:
                continue
        return False

    def _rewrites_calls(self) -> bool:
        """Whether a call and its result grow into something else than the template renders, or cannot grow."""
        first, second = Message("user", "one"), Message("tool", "two")
        call = call_text("look", {"at": "lamp"})
        try:
            grown = self.extend(self.start([first]), self.reply_ids(call), [second])
        except ConfigError:  # the template wants a call before a result
            return True
        return grown != self.start([first, Message("assistant", call), second])

    def _prompt_end(self) -> str:
        """What the template puts between the last message and the reply; finds out how it takes text.

        Raises:
            ConfigError: it fails on a message, or leaves its text out.
        """
        key, fault = (("user", _DUMMY),), None
        for self._in_parts in (False, True):
            try:
                before, shown, after = self._render(key, True).rpartition(_DUMMY)
            except ConfigError as error:
                fault = fault or error
            else:
                if shown:
                    return after
        text, hint = "the chat template leaves the text of a message out", "use another chat template"
        raise fault or ConfigError(text, where="model.path", hint=hint)

    def _switch(self, on: bool) -> str:
        """Turn thinking on or off; returns what the template then puts before the reply."""
        for name in SWITCHES:
            ends = {}
            for self.options in ({name: not on}, {name: on}):
                ends[self.options[name]] = self._prompt_end()
            if ends[True] != ends[False]:
                return ends[on]
        text = f"the chat template has no switch for thinking ({' or '.join(SWITCHES)})"
        raise ConfigError(text, where="model.thinking", hint="use model.thinking=auto")

    def _answered(self, reply: str) -> str:
        """What the template renders of a reply after the prompt; nothing where it changes the prompt's own end."""
        text = self._render((("user", _DUMMY), ("assistant", reply)), False).rpartition(_DUMMY)[2]
        return text.removeprefix(self._asked) if text.startswith(self._asked) else ""

    def _call_ids(self, text: str) -> tuple[int, ...]:
        """A reply with calls as the model writes them: as the template renders it."""
        said = self._answered(text)
        if not said:
            rendered = self._render((("user", _DUMMY), ("assistant", text)), False).rpartition(_DUMMY)[2]
            said = self._no_thought * self.opens_thought + rendered.rpartition(THOUGHT)[2].removeprefix(self._asked)
        ids = self._text.ids(said)
        last = max((position for position, i in enumerate(ids) if i in self.stop_ids), default=len(ids))
        end = () if last < len(ids) or self.stops.call_end is None else (self.stops.call_end,)
        return (*ids[: last + 1], *end)

    def _turn_ends(self) -> TurnEnds:
        """What the template renders around a reply."""

        def after(*new: tuple[str, Content], call: bool = False) -> str:
            try:
                return self._render((("user", "x"), ("assistant", _DUMMY), *new), bool(new), call=call)
            except ConfigError:  # a template without tools, or without messages of this role
                return ""

        around = {role: after((role, _NEXT)).partition(_DUMMY)[2].partition(_NEXT) for role in ("user", "tool")}
        last, call = (self._text.ids(after(call=called).rpartition(_DUMMY)[2]) for called in (False, True))
        before_next = [self._text.ids(before) for before, _, _ in around.values()]
        return TurnEnds(last, call, before_next, [*before_next[0], *self._text.ids(around["user"][2])])

    def _encode_whole(self, key: Key, tools: Sequence[dict[str, Any]] = ()) -> tuple[int, ...]:
        return self._with_images(self._text.ids(self._render(key, True, tools)), key)

    def _encode_delta(self, key: Key) -> tuple[int, ...]:
        text = self._render((("user", "x"), ("assistant", _DUMMY), *key), True)
        return self._with_images(self._text.ids(text.partition(_DUMMY)[2]), key)

    def _render(self, key: Key, prompt: bool, tools: Sequence[dict[str, Any]] = (), *, call: bool = False) -> str:
        """The template's text; `call`: replies call a tool."""
        chat = [self._message(role, content) for role, content in key]
        chat = [m | {"tool_calls": [_TRIED_CALL]} if call and m["role"] == "assistant" else m for m in chat]
        return self._template(name_results(chat) if self._structured else chat, prompt, tools)

    def _template(self, chat: list[dict[str, Any]], prompt: bool, tools: Sequence[dict[str, Any]] = ()) -> str:
        options = {"tokenize": False, "add_generation_prompt": prompt, "tools": list(tools) or None, **self.options}
        try:
            return str(self.tokenizer.apply_chat_template(chat, **options))
        except Exception as error:  # jinja2's and whatever the template raises itself
            text = f"the chat template failed on messages of roles {', '.join(m['role'] for m in chat)}: {error}"
            hint = "use roles the template knows in Environment.messages, or another chat template"
            raise ConfigError(text, where="model.path", hint=hint) from error

    def _message(self, role: str, content: Content) -> dict[str, Any]:
        """A message as the template takes it; a reply in its parts, where the template writes calls its own way."""
        if role == "assistant" and self.layout is not HERMES and isinstance(content, str):
            return self._reply(content)
        return {"role": role, "content": self._safe(content)}

    def _reply(self, content: str) -> dict[str, Any]:
        parts = reply_parts(content, structured=self._structured, takes_thoughts=self._takes_thoughts)
        thought, text, calls = parts
        message: dict[str, Any] = {"role": "assistant", "content": self._safe(text)}
        if thought is not None:
            message |= {"reasoning_content": self._text.hide(thought), "thinking": self._text.hide(thought)}
        if calls:
            functions = [{"name": name, "arguments": self._text.hide_all(arguments)} for name, arguments in calls]
            named = enumerate(functions, 1)
            message["tool_calls"] = [{"type": "function", "id": f"call{n:05}", "function": f} for n, f in named]
            if thought is not None and self.layout.name == "harmony":  # its template takes one of them beside a call
                message["content"] = ""
        return message

    def in_parts(self, chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages as the template takes their text."""
        return [m | {"content": self._safe(m["content"])} for m in chat]

    def _safe(self, content: Content) -> str | list[dict[str, Any]]:
        """A message's content as the template takes it, with stand-ins for control tokens."""
        if isinstance(content, str):
            return self._text.hide(content) if not self._in_parts else self._safe((content,))
        image = {"type": "image"}
        return [image if isinstance(part, int) else {"type": "text", "text": self._text.hide(part)} for part in content]

    def _with_images(self, ids: list[int], key: Key) -> tuple[int, ...]:
        """Repeat each image's one token. Raises ConfigError where the template shows another number of images."""
        counts = [part for _, content in key if isinstance(content, tuple) for part in content if isinstance(part, int)]
        if not counts or self.vision is None:
            return tuple(ids)
        image_id, tokens = self.vision.image_id, iter(counts)
        if ids.count(image_id) != len(counts):
            text = f"the chat template shows {ids.count(image_id)} of {len(counts)} pictures"
            hint = "set the template that the model's processor comes with as the tokenizer's, and save it"
            raise ConfigError(text, where="model.path", hint=hint)
        return tuple(i for token in ids for i in ([token] * next(tokens) if token == image_id else [token]))

    def _key(self, messages: Sequence[Message]) -> Key:
        return tuple((m.role, tuple(map(self._part, m.content)) if m.images else m.text) for m in messages)

    def _part(self, part: Any) -> str | int:
        if isinstance(part, Text):
            return part.text
        return self._needed_vision().count(part)

    def _needed_vision(self) -> Vision:
        if self.vision is None:
            text = "the environment shows pictures, which this model does not take"
            family = "give a model of the Qwen2-VL family (model.tiny.vision=true for the tiny one)"
            hint = f"{family}, or have the environment show text"
            raise ConfigError(text, where="model.path", hint=hint)
        return self.vision
