"""An environment slot and the history its prompts are made from.

It runs wherever step() runs: on the loop, in a thread or in a process.
"""

from __future__ import annotations

import dis
import math
import numbers
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from spearrl.envs.base import Environment
from spearrl.errors import ConfigError, ContractError, EnvironmentFault
from spearrl.faults import strike
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task, Text

TEXT_CHARS = 1_000_000  # of one text that an environment shows, where nobody says how many


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

    def __init__(self, environment: Environment, style: str, text_chars: int = TEXT_CHARS):
        self.environment, self.style, self._chars = environment, style, text_chars

    def start(self, task: Task, seed: int) -> EpisodeStart:
        """Begin an episode.

        Raises:
            ContractError: reset() returned no Observation.
            ConfigError: the style is "windowed", and the environment has no windowed prompts.
            EnvironmentFault: the environment wanted to end the process (also of `act`).
        """
        self._task, self._seed, self._turn = task, seed, 0
        self._history: list[tuple[Observation, Action]] = []
        with self._exits_caught():
            strike("env.reset")
            observation = self.environment.reset(task, seed)
            if not isinstance(observation, Observation):
                raise self._wrong_type("reset()", observation, "Observation")
            self._observation = self._cut(observation)
            return EpisodeStart(self._observation, self._messages(), self.environment.tools())

    def act(self, reply: Reply, last: bool = False) -> StepResult:
        """Parse and step a reply. `last`: no prompt follows, whatever the outcome.

        Raises:
            ContractError: step() returned no Outcome, or a reward that is not a finite number.
        """
        with self._exits_caught():
            return self._act(reply, last)

    def _act(self, reply: Reply, last: bool) -> StepResult:
        action = self.environment.parse(reply)
        spoilt = strike("env.step")
        outcome = self.environment.step(action)
        if spoilt:
            outcome = replace(outcome, reward=math.nan)
        if not isinstance(outcome, Outcome):
            raise self._wrong_type("step()", outcome, "Outcome")
        if not isinstance(outcome.reward, numbers.Real) or not math.isfinite(outcome.reward):
            hint = "step() must return a finite float"
            raise ContractError(f"reward {outcome.reward!r} is not a finite number", where=self.where, hint=hint)
        if outcome.tool_calls is not None:
            action = replace(action, tool_calls=outcome.tool_calls)
        if (observation := self._cut(outcome.observation)) is not outcome.observation:
            outcome = replace(outcome, observation=observation)
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

    @contextmanager
    def _exits_caught(self) -> Iterator[None]:
        """sys.exit, or an interrupt that the environment raised itself, ends its episode and not the training."""
        try:
            yield
        except Exception:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not _raised_by_environment(error):
                raise
            text = f"the environment raised {type(error).__name__}, which would end the process, in {self.where}"
            raise EnvironmentFault(f"{text}:\n{''.join(traceback.format_exception(error)).rstrip()}") from None

    def _messages(self) -> list[Message]:
        if self.style != "windowed":
            messages = self.environment.messages(self._observation, self._turn)
        else:
            window = self.environment.window(self._history, self._observation, self._task)
            if window is None:
                name = type(self.environment).__name__
                raise ConfigError(f"{name} offers no windowed prompts", where="env.style", hint='use env.style="chat"')
            messages = window
        return [self._cut_message(message) for message in messages]

    def _cut(self, observation: Observation) -> Observation:
        if not isinstance(observation, Observation) or len(observation.text) <= self._chars:
            return observation
        return replace(observation, text=cut(observation.text, self._chars))

    def _cut_message(self, message: Message) -> Message:
        if not isinstance(message, Message) or len(message.text) <= self._chars:
            return message
        if isinstance(message.content, str):
            return replace(message, content=cut(message.content, self._chars))
        parts = (Text(cut(part.text, self._chars)) if isinstance(part, Text) else part for part in message.content)
        return replace(message, content=tuple(parts))

    def _wrong_type(self, method: str, value: Any, expected: str) -> ContractError:
        complaint = f"{method} returned {type(value).__name__}, expected {expected}"
        return ContractError(complaint, where=self.where, hint=f"return spearrl.types.{expected}")


def cut(text: str, limit: int) -> str:
    """Head and tail of a text that has more than `limit` characters, and how many are missing between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters cut ...]\n{text[-half:]}"


def _raised_by_environment(error: BaseException) -> bool:
    """Whether a `raise` statement outside of this package made it: Ctrl-C comes from a signal handler instead."""
    if threading.current_thread() is not threading.main_thread():
        return True  # signals are handled by the main thread only
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == "spearrl":
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
