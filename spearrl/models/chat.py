"""Messages to token ids. What the engine sampled is kept as sampled: a conversation only ever grows by new ids.

ids = previous ids + sampled ids + (the template's rendering of a dummy reply and the new messages, minus its prefix)

The template shows an image as one image token; it is repeated as often as `spearrl.models.vision` counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from spearrl.errors import ConfigError
from spearrl.models.stops import TurnEnds, find_stops
from spearrl.models.vision import vision_of
from spearrl.types import Message, Text

# Private-use characters stand in for control tokens that occur in message text while the template is rendered.
_OPEN, _CLOSE = "\ue000", "\ue001"
_STAND_IN = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_DUMMY, _NEXT = "\ue002reply\ue002", "\ue002next\ue002"
_TRIED_CALL = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {"at": "lamp"}}}
THINK, THOUGHT = "<think>", "</think>"
MARKS = (
    THINK,
    THOUGHT,
    "<tool_call>",
    "</tool_call>",
)  # kept in replies, special tokens or not: environments read them

Content = str | tuple[str | int, ...]  # of a message: its text, or its texts and the numbers of tokens of its images
Key = tuple[tuple[str, Content], ...]  # messages as (role, content)


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    `rewrites_history` (known after `verify()`): the template changes earlier turns when new ones come (Qwen3 drops old
    thinking); then conversations are rendered anew every turn with `start`. `opens_thought`: prompts end inside a
    thought, which the reply goes on with. `stops`: what ends a reply, and where that was found.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            hint = "use an instruct model, or set tokenizer.chat_template and save it"
            raise ConfigError("the tokenizer has no chat template", where="model.path", hint=hint)
        self.tokenizer, self.vision, self.rewrites_history = tokenizer, vision_of(tokenizer), False
        # The opening stand-in is itself replaced, so that no text can be mistaken for a stand-in.
        self._specials = [*(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special), _OPEN]
        self._special = re.compile("|".join(map(re.escape, sorted(self._specials, key=len, reverse=True))))
        self._whole = lru_cache(maxsize=256)(self._encode_whole)
        self._delta = lru_cache(maxsize=8192)(self._encode_delta)
        marks = {i for i, token in tokenizer.added_tokens_decoder.items() if str(token) in MARKS}
        self._hidden = set(tokenizer.all_special_ids) - marks
        self._hidden |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i not in marks}
        self._in_parts = False  # whether the template takes text as a list of parts only, as those for pictures may
        asked = self._prompt_end()
        self.stops = find_stops(tokenizer, self._turn_ends())
        self.end_id, self.stop_ids = self.stops.end, tuple(self.stops.sources)
        self.opens_thought = THINK in asked.rpartition(THOUGHT)[2]
        answered = self._render((("user", _DUMMY), ("assistant", _NEXT)), False).rpartition(_DUMMY)[2]
        closed = answered.removeprefix(asked).partition(_NEXT)[0] if answered.startswith(asked) else ""
        self._no_thought = closed if THOUGHT in closed else f"\n{THOUGHT}\n\n"  # closes a prompt's thought at once

    def start(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> tuple[int, ...]:
        """Ids of a whole conversation, ready for a reply.

        Args:
            tools: function schemas for the template.
        Raises:
            ConfigError: images that the model or the template does not take. ContractError: bytes that are no image.
        """
        key = self._key(messages)
        return self._encode_whole(key, tools) if tools else self._whole(key)

    def extend(
        self, prompt_ids: Sequence[int], sampled_ids: Sequence[int], new_messages: Sequence[Message]
    ) -> tuple[int, ...]:
        """Ids after a reply and the messages since, ready for the next reply.

        Args:
            sampled_ids: the reply as sampled; it may end with the end-of-turn token or not.
        """
        delta = self._delta(self._key(new_messages))
        last = sampled_ids[-1] if sampled_ids else None
        if last in self.stop_ids and last in delta and last == next(i for i in delta if i in self.stop_ids):
            delta = delta[delta.index(last) + 1 :]
        return (*prompt_ids, *sampled_ids, *delta)

    def reply_ids(self, text: str) -> tuple[int, ...]:
        """A reply as the policy would have said it: plain text and the end-of-turn token.

        Where prompts open a thought, it goes on with that one, or closes it at once.
        """
        if self.opens_thought:
            text = text.partition(THINK)[2].removeprefix("\n") if THINK in text else self._no_thought + text
        ids = self._plain(text)
        return (*ids, self.end_id) if self.end_id is not None else tuple(ids)

    @staticmethod
    def reply_message(text: str) -> Message:
        """A reply as a message of the conversation."""
        return Message("assistant", text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without control tokens, except those that mark thoughts and calls."""
        shown = [i for i in ids if i not in self._hidden]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def reply_text(self, ids: Sequence[int]) -> str:
        """A sampled reply as environments read it: with the beginning of the thought that the prompt opened."""
        return f"{THINK}\n{self.decode(ids)}" if self.opens_thought else self.decode(ids)

    def verify(self) -> None:
        """Compare growing a conversation with rendering it whole; sets `rewrites_history` where they differ.

        Raises:
            ConfigError: the template fails on a plain conversation, or renders control tokens of a message as such.
        """
        decode = self.tokenizer.decode
        first, second = Message("user", "one"), Message("user", "two")
        self.rewrites_history = False
        for reply in ("so", "<think>\nwhy\n</think>\n\nso"):
            grown = self.extend(self.start([first]), self.reply_ids(reply), [second])
            whole = self.start([first, self.reply_message(reply), second])
            texts = [decode(list(ids), clean_up_tokenization_spaces=False) for ids in (grown, whole)]
            self.rewrites_history |= texts[0] != texts[1]
        hostile = self.start([Message("user", "one" + "".join(self._specials[:-1]))])
        controls = set(self.tokenizer.all_special_ids)
        if sum(i in controls for i in hostile) != sum(i in controls for i in self.start([first])):
            text, hint = "control tokens in a message do not stay plain text", "use a tokenizer with a tokenizer.json"
            raise ConfigError(text, where="chat template", hint=hint)

    def _prompt_end(self) -> str:
        """What the template puts between the last message and the reply.

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

    def _turn_ends(self) -> TurnEnds:
        """What the template renders around a reply."""

        def after(*new: tuple[str, Content], call: bool = False) -> str:
            try:
                return self._render((("user", "x"), ("assistant", _DUMMY), *new), bool(new), call=call)
            except ConfigError:  # a template without tools, or without messages of this role
                return ""

        around = {role: after((role, _NEXT)).partition(_DUMMY)[2].partition(_NEXT) for role in ("user", "tool")}
        last, call = (self._ids(after(call=called).rpartition(_DUMMY)[2]) for called in (False, True))
        before_next = [self._ids(before) for before, _, _ in around.values()]
        return TurnEnds(last, call, before_next, [*before_next[0], *self._ids(around["user"][2])])

    def _encode_whole(self, key: Key, tools: Sequence[dict[str, Any]] = ()) -> tuple[int, ...]:
        return self._with_images(self._ids(self._render(key, True, tools)), key)

    def _encode_delta(self, key: Key) -> tuple[int, ...]:
        text = self._render((("user", "x"), ("assistant", _DUMMY), *key), True)
        return self._with_images(self._ids(text.partition(_DUMMY)[2]), key)

    def _render(self, key: Key, prompt: bool, tools: Sequence[dict[str, Any]] = (), *, call: bool = False) -> str:
        """The template's text; `call`: replies call a tool."""
        chat: list[dict[str, Any]] = [{"role": role, "content": self._safe(content)} for role, content in key]
        chat = [m | {"tool_calls": [_TRIED_CALL]} if call and m["role"] == "assistant" else m for m in chat]
        options = {"tokenize": False, "add_generation_prompt": prompt, "tools": list(tools) or None}
        try:
            return str(self.tokenizer.apply_chat_template(chat, **options))
        except Exception as error:  # jinja2's and whatever the template raises itself
            text = f"the chat template failed on messages of roles {', '.join(role for role, _ in key)}: {error}"
            hint = "use roles the template knows in Environment.messages, or another chat template"
            raise ConfigError(text, where="model.path", hint=hint) from error

    def _safe(self, content: Content) -> str | list[dict[str, Any]]:
        """A message's content as the template takes it, with stand-ins for control tokens."""
        if isinstance(content, str):
            return self._plain_text(content) if not self._in_parts else self._safe((content,))
        image = {"type": "image"}
        return [
            image if isinstance(part, int) else {"type": "text", "text": self._plain_text(part)} for part in content
        ]

    def _plain_text(self, text: str) -> str:
        return self._special.sub(lambda match: f"{_OPEN}{self._specials.index(match.group())}{_CLOSE}", text)

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
        if self.vision is None:
            text = "the environment shows pictures, which this model does not take"
            family = "give a model of the Qwen2-VL family (model.tiny.vision=true for the tiny one)"
            hint = f"{family}, or have the environment show text"
            raise ConfigError(text, where="model.path", hint=hint)
        return self.vision.count(part)

    def _ids(self, rendered: str) -> list[int]:
        """Control tokens of the template become control ids; those of message text (stand-ins) become plain text."""
        ids: list[int] = []
        for number, piece in enumerate(_STAND_IN.split(rendered)):
            if number % 2:
                ids += self._plain(self._specials[int(piece)])
            elif piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
