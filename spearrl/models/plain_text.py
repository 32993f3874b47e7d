"""Control tokens that occur in the text of messages stay text, whatever writes the messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Private-use characters stand in for control tokens that occur in message text while a conversation is rendered.
_OPEN, _CLOSE = "\ue000", "\ue001"
_STAND_IN = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids, control tokens in it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


class PlainText:
    """Hides the control tokens of message text before it is rendered, and encodes what was rendered."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.controls = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        # The opening stand-in is itself replaced, so that no text can be mistaken for a stand-in.
        self._replaced = [*self.controls, _OPEN]
        self._control = re.compile("|".join(map(re.escape, sorted(self._replaced, key=len, reverse=True))))

    def hide(self, text: str) -> str:
        """Message text with stand-ins for control tokens."""
        return self._control.sub(lambda match: f"{_OPEN}{self._replaced.index(match.group())}{_CLOSE}", text)

    def hide_all(self, value: Any) -> Any:
        """The same for every text of a JSON value."""
        if isinstance(value, dict):
            return {self.hide(key): self.hide_all(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide_all(item) for item in value]
        return self.hide(value) if isinstance(value, str) else value

    def ids(self, rendered: str) -> list[int]:
        """Control tokens of what was rendered become control ids; those of message text (stand-ins) plain text."""
        ids: list[int] = []
        for number, piece in enumerate(_STAND_IN.split(rendered)):
            if number % 2:
                ids += self.plain(self._replaced[int(piece)])
            elif piece:
                ids += self._tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def plain(self, text: str) -> list[int]:
        """Ids of text without control ids."""
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
