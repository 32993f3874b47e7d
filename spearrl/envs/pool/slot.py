"""An environment slot and the history its prompts are made from.

It runs wherever step() runs: on the loop, in a thread or in a process.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, replace
from typing import Any

from spearrl.envs.base import Environment
from spearrl.errors import ConfigError, ContractError
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task


@dataclass(slots=True)
class EpisodeStart:
    """What begins an episode.

    The first observation, the messages of the first prompt, the function schemas of all prompts.
    """

    observation: Observation
    messages: list[Message]
    tools: list[dict[str, Any]]


@dataclass(slots=True)
class StepResult:
    """What a reply led to: the action in it, its outcome and the messages of the next prompt.

    `messages` is the whole next prompt (windowed style) or what is new in it (chat style); it is empty where no prompt
    follows.
    """

    action: Action
    outcome: Outcome
    messages: list[Message]


class Slot:
    """An environment that plays one episode at a time, as the collector uses it: replies in, prompts out.

    Args:
        style: "chat" (messages of a growing conversation) or "windowed" (a fresh prompt every turn).
    """

    def __init__(self, environment: Environment, style: str):
        self.environment, self.style = environment, style

    def start(self, task: Task, seed: int) -> EpisodeStart:
        """Begin an episode.

        Raises:
            ContractError: reset() returned no Observation.
            ConfigError: the style is "windowed", and the environment has no windowed prompts.
        """
        self._task, self._seed, self._turn = task, seed, 0
        self._history: list[tuple[Observation, Action]] = []
        self._observation = self.environment.reset(task, seed)
        if not isinstance(self._observation, Observation):
            raise self._wrong_type("reset()", self._observation, "Observation")
        return EpisodeStart(self._observation, self._messages(), self.environment.tools())

    def act(self, reply: Reply, last: bool = False) -> StepResult:
        """Parse and step a reply. `last`: no prompt follows, whatever the outcome.

        Raises:
            ContractError: step() returned no Outcome, or a reward that is not a finite number.
        """
        action = self.environment.parse(reply)
        outcome = self.environment.step(action)
        if not isinstance(outcome, Outcome):
            raise self._wrong_type("step()", outcome, "Outcome")
        if not isinstance(outcome.reward, numbers.Real) or not math.isfinite(outcome.reward):
            hint = "step() must return a finite float"
            raise ContractError(f"reward {outcome.reward!r} is not a finite number", where=self.where, hint=hint)
        if outcome.tool_calls is not None:
            action = replace(action, tool_calls=outcome.tool_calls)
        self._turn += 1
        if self.style == "windowed":
            self._history.append((self._observation, action))
        self._observation = outcome.observation
        over = last or outcome.terminated or outcome.truncated
        return StepResult(action, outcome, [] if over else self._messages())

    def close(self) -> None:
        """Release the environment."""
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
            name = type(self.environment).__name__
            raise ConfigError(f"{name} offers no windowed prompts", where="env.style", hint='use env.style="chat"')
        return messages

    def _wrong_type(self, method: str, value: Any, expected: str) -> ContractError:
        complaint = f"{method} returned {type(value).__name__}, expected {expected}"
        return ContractError(complaint, where=self.where, hint=f"return spearrl.types.{expected}")
