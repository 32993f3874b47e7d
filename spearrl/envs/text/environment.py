"""The base of the built-in text environments: their common options, slots and checks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import Field

from spearrl.envs.base import Environment, check_split
from spearrl.envs.text.tagged_replies import PLAIN, TAGGED, projection
from spearrl.envs.tool_calls import after_thought
from spearrl.errors import ContractError
from spearrl.types import Action, Message, Observation, Reply

Episode = TypeVar("Episode")


class TextEnvironment(Environment, Generic[Episode]):
    """One action a reply, inside tags or alone.

    Slots share everything but `_episode`, the state of the running episode (None before the first reset).
    """

    splits: tuple[str, ...] = ("train", "val")
    thought = "The next step follows from what I see."  # what `format` puts inside <think>
    tail = 20  # characters at the end of a reply without tags that stand for its action, as in verl-agent

    class Options(Environment.Options):
        observation: Literal["text", "compact"] = Field(
            "text", description="How texts are written; compact: short, for tiny models."
        )
        reply: Literal["tagged", "plain"] = Field(
            "tagged", description="<think>…</think><action>…</action>, or the action alone."
        )
        history_length: int = Field(2, ge=0, description="Earlier turns a windowed prompt shows.")
        seed: int = Field(0, ge=0, description="Fixes what is generated.")

    options: Options
    _episode: Episode | None = None

    def __init__(self, **options: Any):
        super().__init__(**{name: str(value) if isinstance(value, Path) else value for name, value in options.items()})
        self._tagged, self._compact = self.options.reply == "tagged", self.options.observation == "compact"

    def spawn(self) -> Self:
        """A slot that shares this one's data and caches."""
        slot = copy.copy(self)
        slot._episode = None
        return slot

    def messages(self, observation: Observation, turn: int) -> list[Message]:
        """Turn 0: the rules (not in compact) and what is shown first; later turns only what came back."""
        if turn > 0:
            return [Message("user", observation.info.get("chat", observation.text))]
        rules = "" if self._compact else f"{self._rules()}\n{TAGGED if self._tagged else PLAIN}\n\n"
        return [Message("user", rules + observation.text)]

    def parse(self, reply: Reply) -> Action:
        """Tagged: verl-agent's projection of the reply. Plain: the reply itself, in lower case."""
        if self._tagged:
            return self._action(*projection(reply.text, self.tail))
        return self._action(after_thought(reply.text).lower().strip(), True)

    def format(self, text: str) -> str:
        """A reply that `parse` turns into `text`."""
        return f"<think>{self.thought}</think><action>{text}</action>" if self._tagged else text

    def _rules(self) -> str:
        """What a chat opens with, before how to write an action."""
        raise NotImplementedError

    def _action(self, text: str, valid: bool) -> Action:
        """The action that a text in lower case means; `valid`: whether the reply around it has its form."""
        raise NotImplementedError

    def _running(self) -> Episode:
        if self._episode is None:
            hint = "call reset(task, seed) first"
            raise ContractError("step() or expert() before reset()", where=self._where(), hint=hint)
        return self._episode

    def _check_split(self, split: str) -> None:
        check_split(split, self.splits, self._where())

    def _recent(self, history: Sequence[tuple[Observation, Action]]) -> Sequence[tuple[Observation, Action]]:
        """The steps that a windowed prompt shows."""
        return history[max(0, len(history) - self.options.history_length) :]

    @classmethod
    def _where(cls) -> str:
        return f"env {cls.__name__.lower()}"
