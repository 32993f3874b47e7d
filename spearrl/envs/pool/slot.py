"""One place to play at: an environment slot, and the history its prompts are made from. Runs wherever step() runs."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

from spearrl.envs.base import Environment
from spearrl.errors import ConfigError, ContractError
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task


@dataclass(slots=True)
class Shown:
    """What begins an episode."""

    observation: Observation
    messages: list[Message]  # of the first prompt
    tools: list[dict[str, Any]]  # function schemas, the same for the whole episode


@dataclass(slots=True)
class Played:
    """What came of a reply."""

    action: Action
    outcome: Outcome
    messages: list[Message]  # of the next prompt: all of it (windowed) or what is new (chat); empty where there is none


class Seat:
    """An environment slot as the collector uses it: replies in, prompts out.

    Args:
        style: "chat" (messages of a growing conversation) or "windowed" (a fresh prompt every turn).
    """

    def __init__(self, environment: Environment, style: str):
        self.environment, self.style = environment, style

    def start(self, task: Task, seed: int) -> Shown:
        """Begin an episode. Raises ConfigError where a windowed prompt is wanted and not offered."""
        self._task, self._seed, self._turn = task, seed, 0
        self._history: list[tuple[Observation, Action]] = []
        self._observation = self.environment.reset(task, seed)
        if not isinstance(self._observation, Observation):
            found = type(self._observation).__name__
            raise ContractError(
                f"reset() returned {found}, expected Observation",
                where=self.where,
                hint="return spearrl.types.Observation",
            )
        return Shown(self._observation, self._messages(), self.environment.tools())

    def act(self, reply: Reply, last: bool = False) -> Played:
        """Parse and step a reply. `last`: no prompt follows, whatever the outcome.

        Raises:
            ContractError: step() returned no Outcome, or a reward that is not a finite number.
        """
        action = self.environment.parse(reply)
        outcome = self.environment.step(action)
        self._check(outcome)
        self._turn += 1
        if self.style == "windowed":
            self._history.append((self._observation, action))
        self._observation = outcome.observation
        over = last or outcome.terminated or outcome.truncated
        return Played(action, outcome, [] if over else self._messages())

    def close(self) -> None:
        """Release the environment slot."""
        self.environment.close()

    @property
    def where(self) -> str:
        """Environment, task, seed and turn, for error messages."""
        return f"{type(self.environment).__name__}, task {self._task.id}, seed {self._seed}, turn {self._turn}"

    def _messages(self) -> list[Message]:
        if self.style != "windowed":
            return self.environment.messages(self._observation, self._turn)
        messages = self.environment.window(self._history, self._observation, self._task)
        if messages is None:
            raise ConfigError(
                f"{type(self.environment).__name__} offers no windowed prompts",
                where="env.style",
                hint='use env.style="chat"',
            )
        return messages

    def _check(self, outcome: Outcome) -> None:
        if not isinstance(outcome, Outcome):
            raise ContractError(
                f"step() returned {type(outcome).__name__}, expected Outcome",
                where=self.where,
                hint="return spearrl.types.Outcome",
            )
        if not isinstance(outcome.reward, numbers.Real) or not math.isfinite(outcome.reward):
            raise ContractError(
                f"reward {outcome.reward!r} is not a finite number",
                where=self.where,
                hint="step() must return a finite float",
            )
