"""The interface of an environment: what you write to teach an agent something of your own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from spearrl.envs.option_errors import complaints
from spearrl.errors import ConfigError
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task, Text


class Environment:
    """A world in which an agent plays episodes. You write `tasks`, `reset` and `step`; the rest has working defaults.

    One instance plays one episode at a time; `spawn` makes further instances. `spearrl check-env` tries whether your
    class keeps the contract that is written here.

    Attributes:
        max_turns: replies an episode may have. The trainer counts them, not you; `env.max_turns` replaces the number.
        execution: where your methods run. "inline": in the trainer's own loop, which waits for them. "thread": in a
            thread, for steps that wait for a server or a program. "process": in another process, for steps that
            compute for long, hang or crash.
        shows_images: observations may hold pictures: a model that takes none is refused at the start.
        threads: how many threads, where `execution` is "thread". A step's deadline also runs while the step waits for
            something that lets fewer in.
        cut_reward: added to the last reward of an episode that runs out of turns, reply tokens or context.
        expert_noise: how imperfect `expert` should be, from 0 (perfect) to 1 (random). The cold start sets it.
        options: your settings, an instance of `Options`.

    Example:
        import random

        from spearrl import ConfigError, Environment, Observation, Outcome, Task

        class GuessNumber(Environment):
            max_turns = 5

            def tasks(self, split):
                if split not in ("train", "val"):
                    raise ConfigError(f"split {split!r} is not one of train, val", hint="use train or val")
                return [Task(f"{split}-{i}", split) for i in range(100)]

            def reset(self, task, seed):
                self.number = random.Random(f"{seed} {task.id}").randint(1, 9)
                self.low, self.high, self.over = 1, 9, False
                return Observation("Guess my number, from 1 to 9.", anchor=(1, 9))

            def step(self, action):
                if self.over:
                    return Outcome(Observation("The game is over."), 0.0, True, info={"success": False})
                guess = int(action.text) if action.text in set("123456789") else 0
                self.over = guess == self.number
                if self.over:
                    return Outcome(Observation("Right!"), 10.0, True, info={"success": True})
                if guess < self.number:
                    self.low = max(self.low, guess + 1)
                else:
                    self.high = min(self.high, guess - 1)
                word = "more" if guess < self.number else "less"
                return Outcome(Observation(f"It is {word} than {guess}.", anchor=(self.low, self.high)), 0.0, False)

            def expert(self):
                return str((self.low + self.high) // 2)
    """

    max_turns: int = 10
    execution: str = "inline"
    threads: int = 32
    shows_images: bool = False
    cut_reward: float = 0.0
    expert_noise: float = 0.0

    class Options(BaseModel):
        """Settings of your own: one pydantic field each, set as `env.options.<name>`. Unknown ones are refused."""

        model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **options: Any):
        try:
            self.options = self.Options(**options)
        except ValidationError as error:
            _, texts, fixes = zip(*complaints(type(self), error), strict=True)
            raise ConfigError("; ".join(texts), hint="; ".join(fixes)) from error

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of a split ("train", "val", …), each under an id of its own.

        Every instance, on every machine, must give the same tasks in the same order.

        Raises:
            ConfigError: there is no such split.
        """
        raise NotImplementedError

    def reset(self, task: Task, seed: int) -> Observation:
        """Begin an episode and return what the agent sees first.

        Draw all chance of the episode from `seed`: the same task and seed must always give the same episode. The
        siblings of a group have the same seed.
        """
        raise NotImplementedError

    def step(self, action: Action) -> Outcome:
        """Carry out an action. At the end, `Outcome.info["success"]` says whether the task was solved.

        The agent may say anything. An impossible action is an ordinary outcome whose observation says what is wrong;
        only what is not the agent's fault raises.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release what this instance holds. May be called twice. Default: nothing."""

    def spawn(self) -> Environment:
        """Another instance, for another episode at the same time. Default: a new one with the same options.

        Override it where instances can share data that is slow to load: `other = copy.copy(self)` and a state of its
        own.
        """
        return type(self)(**self.options.model_dump())

    def messages(self, observation: Observation, turn: int) -> list[Message]:
        """Chat style: the messages that are new in this turn (counted from 0). Default: the observation, as "user"."""
        if observation.images:
            return [Message("user", (Text(observation.text), *observation.images))]
        return [Message("user", observation.text)]

    def window(
        self, history: Sequence[tuple[Observation, Action]], observation: Observation, task: Task
    ) -> list[Message] | None:
        """Windowed style: the whole prompt of this turn. Default: None, which means that this style is not offered.

        Args:
            history: every earlier (observation, action) of the episode, oldest first.
        """
        return None

    def parse(self, reply: Reply) -> Action:
        """The action in a reply; `valid=False` where the format is broken. Never raises. Default: the whole text."""
        return Action(reply.text.strip(), valid=bool(reply.text.strip()))

    def format(self, text: str) -> str:
        """The reply that `parse` turns into the action `text`; the expert's replies are written with it."""
        return text

    def tools(self) -> list[dict[str, Any]]:
        """Function schemas for the chat template (OpenAI's layout). Default: none."""
        return []

    def expert(self) -> str | None:
        """The next action of a script that solves the task, for the cold start. Default: None, there is no script.

        The agent never sees it.
        """
        return None


def check_split(split: str, splits: Sequence[str], where: str, hint: str = "") -> None:
    """Raise ConfigError unless the split is one of `splits`."""
    if split not in splits:
        reason = f"split {split!r} is not one of {', '.join(splits)}"
        raise ConfigError(reason, where=where, hint=hint or f"use {' or '.join(splits)}")
