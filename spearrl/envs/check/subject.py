"""An environment under examination: every call is timed, bounded and named, so that a finding can say where it happened."""

from __future__ import annotations

import math
import numbers
import random
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from spearrl.envs.base import Environment, load, make
from spearrl.envs.check.guards import deadline
from spearrl.envs.check.samples import random_calls
from spearrl.envs.tool import ToolEnvironment
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task

T = TypeVar("T")
TURNS = 12  # of an episode that is played to compare it
FALLBACK = ("look", "1", "help", "go on")  # said where there is neither an expert nor a list of actions


class BrokenRule(Exception):
    """The environment broke the contract: what was seen, and what to do."""

    def __init__(self, seen: str, fix: str):
        super().__init__(seen)
        self.seen, self.fix = seen, fix


class Moment(NamedTuple):
    """What one step showed, in values that compare and print."""

    text: str
    anchor: str
    admissible: str
    reward: float
    ended: str
    success: str


class Subject:
    """The environment `name` with its options. `at` says what was called last."""

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        max_turns: int = 0,
        splits: Sequence[str],
        deadline_s: float,
        seed: int,
        demanded: bool = False,
    ):
        self.name, self.options, self.splits, self.deadline_s, self.seed = (
            name,
            dict(options),
            list(splits),
            deadline_s,
            seed,
        )
        self.max_turns = max_turns  # 0: the environment's own limit
        self.cls = load(name)
        self.step_seconds: list[float] = []
        self.reset_seconds: list[float] = []
        self.at = ""
        self.demanded = demanded  # whether every one of `splits` must be there
        self.tool_calls = 0  # valid ones that were made
        self.root = self.build()
        self.played: list[Task] = []  # tasks to play, once `tasks` has been checked

    def build(self) -> Environment:
        """A fresh instance."""
        environment = self.call("__init__", lambda: make(self.name, **self.options))
        if self.max_turns:
            environment.max_turns = self.max_turns
        return environment

    def spawn(self) -> Environment:
        return self.call("spawn", self.root.spawn)

    def call(self, what: str, function: Callable[[], T]) -> T:
        self.at = f"{self.cls.__name__}.{what}"
        with deadline(self.deadline_s):
            return function()

    def reset(self, env: Environment, task: Task, seed: int) -> Observation:
        """reset(), checked."""
        start = time.perf_counter()
        observation = self.call(f"reset, task {task.id}, seed {seed}", lambda: env.reset(task, seed))
        self.reset_seconds.append(time.perf_counter() - start)
        check_observation(observation, "reset()")
        return observation

    def step(self, env: Environment, action: Action, where: str = "") -> Outcome:
        """step(), checked."""
        start = time.perf_counter()
        outcome = self.call(f"step{where}, action {short(action.text)}", lambda: env.step(action))
        self.step_seconds.append(time.perf_counter() - start)
        check_outcome(outcome)
        return outcome

    def parse(self, env: Environment, text: str) -> Action:
        """parse(), checked."""
        action = self.call(f"parse, reply {short(text)}", lambda: env.parse(Reply(text, (1,), "stop")))
        demand(
            isinstance(action, Action) and isinstance(action.text, str),
            f"parse() returned {action!r}",
            "return Action(text, valid=…)",
        )
        return action

    def expert(self, env: Environment) -> str | None:
        wanted = self.call("expert", env.expert)
        demand(
            wanted is None or isinstance(wanted, str),
            f"expert() returned {type(wanted).__name__}",
            "return the action's text, or None",
        )
        return wanted

    def start(self, env: Environment, task: Task) -> Episode:
        """An episode with the examination's own seed."""
        return Episode(self, env, task, self.seed)

    def play(self, env: Environment, task: Task, seed: int, turns: int = TURNS) -> list[Moment]:
        """What an episode shows; the actions depend on the seed and on what was shown only."""
        return Episode(self, env, task, seed).finish(turns).moments


class Episode:
    """One episode, a turn at a time."""

    def __init__(self, subject: Subject, env: Environment, task: Task, seed: int):
        self.subject, self.env, self.task, self.seed = subject, env, task, seed
        self.observation = subject.reset(env, task, seed)
        self.moments = [_moment(self.observation, None)]
        self.over = False
        self.action = Action("")  # the last one
        self._draw = random.Random(derive(seed, "check", task.id))

    def turn(self, *, scripted: bool = False) -> None:
        """Say the expert's action (`scripted`: whenever it has one), an admissible one, a tool call or a fixed word."""
        choices = list(self.observation.admissible or FALLBACK)
        if isinstance(self.env, ToolEnvironment) and not self.observation.admissible:
            choices = [
                *random_calls(self.env.schemas(), self.observation.text, self._draw),
                self._draw.choice(FALLBACK),
            ]
        wanted = self.subject.expert(self.env) if scripted or self._draw.random() < 0.6 else None
        text = wanted if wanted is not None else self._draw.choice(choices)
        where = f", task {self.task.id}, seed {self.seed}, turn {len(self.moments) - 1}"
        self.action = self.subject.parse(self.env, self.subject.call("format", lambda: self.env.format(text)))
        self.subject.tool_calls += self.action.tool_calls
        outcome = self.subject.step(self.env, self.action, where)
        self.observation = outcome.observation
        self.moments.append(_moment(outcome.observation, outcome))
        self.over = outcome.terminated or outcome.truncated

    def finish(self, turns: int | None = None, *, scripted: bool = False) -> Episode:
        """Play to the end, or for so many turns (none: max_turns)."""
        while not self.over and len(self.moments) <= (self.env.max_turns if turns is None else turns):
            self.turn(scripted=scripted)
        return self


def difference(first: Sequence[Moment], second: Sequence[Moment]) -> str:
    """The first thing that differs, in words; empty where nothing does."""
    for turn, (a, b) in enumerate(zip(first, second, strict=False)):
        for field in Moment._fields:
            x, y = getattr(a, field), getattr(b, field)
            if x != y:
                place = "the first observation" if turn == 0 else f"turn {turn - 1}"
                return f"{place}: {field} was {short(str(x), 60)} and then {short(str(y), 60)}"
    return (
        "" if len(first) == len(second) else f"one episode had {len(first) - 1} turns and the other {len(second) - 1}"
    )


def demand(holds: Any, seen: str, fix: str) -> None:
    """Raise BrokenRule unless the condition holds."""
    if not holds:
        raise BrokenRule(seen, fix)


def check_observation(observation: Any, source: str) -> None:
    """Raise BrokenRule unless it is an Observation whose parts have their types."""
    demand(
        isinstance(observation, Observation),
        f"{source} returned {type(observation).__name__}",
        "return spearrl.types.Observation(text)",
    )
    text, admissible, allowed, info = (
        observation.text,
        observation.admissible,
        observation.allowed_ids,
        observation.info,
    )
    demand(isinstance(text, str), f"the observation's text is {type(text).__name__}", "make it a str")
    clean = text.encode(errors="ignore").decode() == text
    demand(
        clean,
        "the observation's text holds characters that are not Unicode text",
        'clean it: text.encode(errors="replace").decode()',
    )
    sound = admissible is None or (isinstance(admissible, tuple) and all(isinstance(a, str) for a in admissible))
    demand(sound, f"admissible is {short(repr(admissible))}", "make it a tuple of str, or None")
    sound = allowed is None or (
        isinstance(allowed, tuple) and bool(allowed) and all(type(token) is int and token >= 0 for token in allowed)
    )
    demand(sound, f"allowed_ids is {short(repr(allowed))}", "make it a tuple of token ids, at least one, or None")
    demand(isinstance(info, Mapping), f"the observation's info is {type(info).__name__}", "make it a dict")


def check_outcome(outcome: Any) -> None:
    """Raise BrokenRule unless it is an Outcome that the collector can use."""
    demand(
        isinstance(outcome, Outcome),
        f"step() returned {type(outcome).__name__}",
        "return spearrl.types.Outcome(observation, reward, terminated)",
    )
    check_observation(outcome.observation, "step()'s observation")
    reward, info = outcome.reward, outcome.info
    sound = isinstance(reward, numbers.Real) and not isinstance(reward, bool) and math.isfinite(reward)
    demand(sound, f"the reward is {reward!r}", "return a finite float")
    for name, flag in (("terminated", outcome.terminated), ("truncated", outcome.truncated)):
        demand(isinstance(flag, bool), f"{name} is {flag!r}", "make it True or False")
    both = outcome.terminated and outcome.truncated
    demand(
        not both,
        "an outcome is terminated and truncated at once",
        "terminated: the task is over; truncated: a limit cut it short; set one",
    )
    demand(isinstance(info, Mapping), f"info is {type(info).__name__}", "make it a dict")
    told = not outcome.terminated or isinstance(info.get("success"), bool)
    demand(
        told,
        f'the episode ended with info["success"] = {info.get("success")!r}',
        'set info={"success": True} or False at the end',
    )


def check_messages(messages: Any, source: str) -> None:
    """Raise BrokenRule unless it is a list of chat messages with something in them."""
    sound = isinstance(messages, list) and messages and all(isinstance(message, Message) for message in messages)
    demand(sound, f"{source} returned {short(repr(messages))}", "return a list of spearrl.types.Message, at least one")
    demand(
        any(message.text or message.images for message in messages),
        f"{source} returned messages without content",
        "show the model something",
    )


def short(text: str, most: int = 40) -> str:
    """A text as it can be printed on part of a line."""
    shown = ascii(text) if not text.isprintable() else repr(text)
    return shown if len(shown) <= most else f"{shown[:most]}…'"


def place_of(error: BaseException) -> str:
    """file:line of the frame, outside this package's own checks, where it was raised."""
    own = ("envs/check/subject.py", "envs/check/rules.py", "envs/check/check.py", "envs/check/guards.py")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.endswith(own)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _moment(observation: Observation, outcome: Outcome | None) -> Moment:
    ended = (
        ""
        if outcome is None
        else "terminated"
        if outcome.terminated
        else "truncated"
        if outcome.truncated
        else "goes on"
    )
    paid = (float(outcome.reward), ended, repr(outcome.info.get("success"))) if outcome else (0.0, ended, "")
    return Moment(observation.text, stable(observation.anchor), repr(observation.admissible), *paid)


def stable(anchor: Any) -> str:
    """An anchor as the trainer compares it."""
    if anchor is None or isinstance(anchor, str):
        return repr(anchor)
    from spearrl.batching.anchors import canonical  # loads torch, which an anchor of text does not need

    return repr(canonical(anchor))
