"""A sound environment, and for each rule of `spearrl check-env` one that breaks it.

Imports no torch: some rules start fresh processes.
"""

from __future__ import annotations

import copy
import itertools
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field

from spearrl.envs import Done, Environment, ToolEnvironment, tool
from spearrl.errors import ConfigError
from spearrl.types import Action, Image, Message, Observation, Outcome, Reply, Task

counter = itertools.count()


class Sound(Environment):
    """Say the digit shown, twice."""

    max_turns = 4

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in ("train", "val"):
            raise ConfigError(f"split {split!r} is not one of train, val", hint="use train or val")
        return [Task(f"{split}-{i}", split, {"words": ["a", "b"]}) for i in range(5)]

    def reset(self, task: Task, seed: int) -> Observation:
        self.draw, self.won, self.over = random.Random(f"{seed} {task.id}"), 0, False
        return self.show()

    def step(self, action: Action) -> Outcome:
        if self.over:
            return Outcome(Observation("over"), 0.0, True, info={"success": False})
        self.won = self.won + 1 if action.text == self.digit else 0
        self.over = self.won == 2
        return Outcome(self.show(), 5.0 * self.over, self.over, info={"success": self.over})

    def show(self) -> Observation:
        self.digit = str(self.draw.randrange(10))
        return Observation(f"say {self.digit}", anchor=("digit", self.digit, self.won), admissible=tuple("0123456789"))

    def expert(self) -> str | None:
        return self.draw.choice("0123456789") if self.draw.random() < self.expert_noise else self.digit


class DoubledIds(Sound):
    def tasks(self, split):
        return [Task("one", split) for task in super().tasks(split)]


class NoTasks(Sound):
    def tasks(self, split):
        return []


class ChangingTasks(Sound):
    def tasks(self, split):
        return [Task(f"{task.id}-{next(counter)}", split) for task in super().tasks(split)]


class SharedTasks(Sound):
    def tasks(self, split):
        return [Task(task.id.removeprefix(f"{split}-"), split) for task in super().tasks(split)]


class TasksOfAnotherSplit(Sound):
    def tasks(self, split):
        return [Task(task.id, "test") for task in super().tasks(split)]


class AnySplit(Sound):
    def tasks(self, split):
        return [Task(f"{split}-{i}", split) for i in range(3)]


class NoTurns(Sound):
    max_turns = 0


class Outcomes(Sound):
    """Changes what step returns."""

    def step(self, action):
        return self.changed(super().step(action))


class NotANumber(Outcomes):
    def changed(self, o):
        return Outcome(o.observation, float("nan"), o.terminated, info=o.info)


class TextReward(Outcomes):
    def changed(self, o):
        return Outcome(o.observation, "5", o.terminated, info=o.info)


class NumberForFlag(Outcomes):
    def changed(self, o):
        return Outcome(o.observation, o.reward, int(o.terminated), info=o.info)


class BothFlags(Outcomes):
    def changed(self, o):
        return Outcome(o.observation, o.reward, o.terminated, o.terminated, o.info)


class SilentEnd(Outcomes):
    def changed(self, o):
        return Outcome(o.observation, o.reward, o.terminated)


class GymTuple(Outcomes):
    def changed(self, o):
        return (o.observation, o.reward, o.terminated, o.truncated, o.info)


class HalfCharacter(Outcomes):
    def changed(self, o):
        return Outcome(Observation("a\udc80"), o.reward, o.terminated, info=o.info)


class ListOfActions(Outcomes):
    def changed(self, o):
        return Outcome(Observation("a", admissible=["1", "2"]), o.reward, o.terminated, info=o.info)


class ListOfIds(Outcomes):
    def changed(self, o):
        return Outcome(Observation("a", allowed_ids=[1, 2]), o.reward, o.terminated, info=o.info)


class TextObservation(Sound):
    def reset(self, task, seed):
        return super().reset(task, seed).text


class NoMessages(Sound):
    def messages(self, observation, turn):
        return [] if turn else super().messages(observation, turn)


class HiddenPictures(Sound):
    def show(self):
        return replace(super().show(), images=(Image(b"png"),))


class EmptyWindow(Sound):
    def window(self, history, observation, task):
        return [Message("user", "")]


class OddTools(Sound):
    def tools(self):
        return [{"name": "search"}]


class CrashingStep(Sound):
    def step(self, action):
        if self.won:
            raise KeyError("shelf")
        return super().step(action)


class AlwaysRaises(Sound):
    def step(self, action):
        raise KeyError("shelf")


class Unseeded(Sound):
    def reset(self, task, seed):
        observation = super().reset(task, seed)
        self.draw = random.Random()
        return observation


class Leftover(Sound):
    played = 0

    def reset(self, task, seed):
        self.played += 1
        super().reset(task, seed)
        return Observation(f"episode {self.played}", admissible=tuple("0123456789"))


class HashOrder(Sound):
    def show(self):
        observation = super().show()
        return Observation(
            " ".join({"pear", "fig", "plum", "kiwi", "lime", "date"}), observation.anchor, observation.admissible
        )


class HashTasks(Sound):
    def tasks(self, split):
        return sorted(super().tasks(split), key=lambda task: hash(task.id))


class ChangesTask(Sound):
    def reset(self, task, seed):
        task.data["words"].append("c")
        return super().reset(task, seed)


class PaysTwice(Sound):
    def step(self, action):
        if self.over:
            return Outcome(Observation("again"), 5.0, True, info={"success": True})
        return super().step(action)


class DiesAtTheEnd(Sound):
    def step(self, action):
        if self.over:
            raise AttributeError("no page")
        return super().step(action)


class TakesNumbers(Sound):
    def step(self, action):
        int(action.text)
        return super().step(action)


class ParseRaises(Sound):
    def parse(self, reply: Reply):
        return Action(
            reply.text.encode("ascii", "strict" if len(reply.text) > 99 else "ignore").decode() + reply.text[0]
        )


class Quadratic(Sound):
    def step(self, action):
        if len(action.text) > 10_000:
            while True:
                self.won += 0
        return super().step(action)


class Sleeper(Sound):
    def step(self, action):
        try:
            time.sleep(60)
        except Exception:
            return Outcome(Observation("hidden"), 0.0, False)


class OneWay(Sound):
    def format(self, text):
        return f"I say {text}"


class SpawnsItself(Sound):
    def spawn(self):
        return self


class SharedState(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.state = {}

    def spawn(self):
        return copy.copy(self)

    def step(self, action):
        self.state["turns"] = self.state.get("turns", 0) + 1
        return super().step(action)

    def reset(self, task, seed):
        self.state["turns"] = 0
        return super().reset(task, seed)

    def show(self):
        observation = super().show()
        return Observation(
            f"{observation.text} after {self.state['turns']}", observation.anchor, observation.admissible
        )


class ClosesAll(Sound):
    open = True

    def close(self):
        type(self).open = False

    def reset(self, task, seed):
        return super().reset(task, seed) if self.open else Observation("closed")


class SlowSpawn(Sound):
    def spawn(self):
        time.sleep(0.25)
        return super().spawn()


class ClosesOnce(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.files = ["catalogue"]

    def close(self):
        self.files.pop()


class GlobalDraw(Sound):
    def show(self):
        random.random()
        return super().show()


class GlobalSeed(Sound):
    def reset(self, task, seed):
        np.random.seed(seed % 2**32)
        return super().reset(task, seed)


class Phones(Sound):
    def step(self, action):
        try:
            socket.create_connection(("example.org", 80), timeout=1)
        except OSError:
            return super().step(action)
        return super().step(action)


class PhonesByNumber(Sound):
    def step(self, action):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
            line.sendto(b"hello", ("192.0.2.1", 9))
        return super().step(action)


class PhonesInAThread(Phones):
    execution = "thread"


class Loser(Sound):
    def expert(self):
        return "0"


class NumberExpert(Sound):
    def expert(self):
        return int(self.digit)


class SetAnchor(Sound):
    def show(self):
        observation = super().show()
        return Observation(observation.text, frozenset([self.digit]), observation.admissible)


class ListAnchor(Sound):
    def show(self):
        observation = super().show()
        return Observation(observation.text, [self.digit], observation.admissible)


class CannotTravel(Sound):
    execution = "process"

    def step(self, action):
        outcome = super().step(action)
        return Outcome(outcome.observation, outcome.reward, outcome.terminated, info={**outcome.info, "why": lambda: 1})


class UnknownExecution(Sound):
    execution = "gpu"


class SlowStep(Sound):
    def step(self, action):
        time.sleep(0.06)
        return super().step(action)


class NotBuilt(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        raise FileNotFoundError("catalogue.json")


class Unscripted(ToolEnvironment):
    """Sound tools, and no expert that would call them."""

    tasks = Sound.tasks

    def begin(self, task, draw):
        self.goal = draw.randint(2, 9)
        return f"give {self.goal}"

    @tool
    def double(self, value: int) -> int:
        return 2 * value

    @tool
    def give(self, value: int) -> Done:
        return Done(10.0 * (value == self.goal))


class ToolNaN(Unscripted):
    @tool
    def double(self, value: int) -> Outcome:
        return Outcome(Observation("x"), float("nan"), False)


class ToolGlobalDraw(Unscripted):
    @tool
    def double(self, value: int) -> float:
        return random.random()


class ToolPaysTwice(Unscripted):
    def step(self, action):
        return Outcome(Observation("again"), 5.0, True, info={"success": True}) if self._over else super().step(action)


class ToolUncallable(Unscripted):
    @tool
    def double(self, value: Annotated[str, Field(pattern="^[0-9]{7}$")]) -> str:
        return value

    @tool
    def give(self, value: Annotated[str, Field(pattern="^x{7}$")]) -> Done:
        return Done(1.0)


class LateWin(Sound):
    """The expert wins, chance does not."""

    def step(self, action):
        if self.over:
            return super().step(action)
        self.won = self.won + 1 if action.text == self.digit else 0
        self.over = self.won == 4
        return Outcome(self.show(), 5.0 * self.over, self.over, info={"success": self.over})


class LatePaysTwice(LateWin):
    def step(self, action):
        return Outcome(Observation("again"), 5.0, True, info={"success": True}) if self.over else super().step(action)
