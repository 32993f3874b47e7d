"""An environment under examination: every call is bounded in time and named, so that a finding can say where it was."""

from __future__ import annotations

import math
import numbers
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from spearrl.envs.base import Environment
from spearrl.envs.check.guards import deadline
from spearrl.envs.check.samples import random_calls
from spearrl.envs.registry import instantiate, load
from spearrl.envs.tool import ToolEnvironment
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task

T = TypeVar("T")
TURNS = 12  # of an episode that is played to compare it
FALLBACK = ("look", "1", "help", "go on")  # said where there is neither an expert nor a list of actions


class BrokenRule(Exception):
    """The environment broke its contract: what was seen, and how to mend it."""

    def __init__(self, seen: str, fix: str):
        super().__init__(seen)
        self.seen, self.fix = seen, fix


def require(condition: Any, seen: str, fix: str) -> None:
    """Raise BrokenRule unless the condition holds."""
    if not condition:
        raise BrokenRule(seen, fix)


class CheckedEnvironment:
    """The environment `name` with its options, and what is known of it so far.

    Args:
        max_turns: the turn limit; 0: the environment's own.
        splits: whose tasks are looked at. all_splits: whether each of them must be there, or "train" alone.
        deadline_s: seconds a call may take.
        seed: of the episodes.
    Attributes:
        last_call: what was called last, in words.
        played: the tasks to play; the rule `tasks` fills it.
        step_seconds, reset_seconds: how long each step and reset took.
        tool_calls: valid tool calls that were made.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        max_turns: int = 0,
        splits: Sequence[str],
        deadline_s: float,
        seed: int,
        all_splits: bool = False,
    ):
        self.name, self.options, self.splits, self.all_splits = name, dict(options), list(splits), all_splits
        self.max_turns, self.deadline_s, self.seed = max_turns, deadline_s, seed
        self.cls = load(name)
        self.last_call, self.tool_calls = "", 0
        self.step_seconds: list[float] = []
        self.reset_seconds: list[float] = []
        self.played: list[Task] = []
        self.root = self.build()

    def build(self) -> Environment:
        """A fresh instance."""
        return self.call("__init__", lambda: instantiate(self.name, self.options, self.max_turns))

    def spawn(self) -> Environment:
        """Another slot of the first instance."""
        return self.call("spawn", self.root.spawn)

    def call(self, what: str, function: Callable[[], T]) -> T:
        """Call a function within the deadline; `what` is how findings name it. Raises TooSlow."""
        self.last_call = f"{self.cls.__name__}.{what}"
        with deadline(self.deadline_s):
            return function()

    def reset(self, env: Environment, task: Task, seed: int) -> Observation:
        """reset(), its result checked."""
        start = time.perf_counter()
        observation = self.call(f"reset, task {task.id}, seed {seed}", lambda: env.reset(task, seed))
        self.reset_seconds.append(time.perf_counter() - start)
        check_observation(observation, "reset()")
        return observation

    def step(self, env: Environment, action: Action, where: str = "") -> Outcome:
        """step(), its result checked."""
        start = time.perf_counter()
        outcome = self.call(f"step{where}, action {shortened(action.text)}", lambda: env.step(action))
        self.step_seconds.append(time.perf_counter() - start)
        check_outcome(outcome)
        return outcome

    def parse(self, env: Environment, text: str) -> Action:
        """parse() of a reply, its result checked."""
        action = self.call(f"parse, reply {shortened(text)}", lambda: env.parse(Reply(text, (1,), "stop")))
        sound = isinstance(action, Action) and isinstance(action.text, str)
        require(sound, f"parse() returned {action!r}", "return Action(text, valid=…)")
        return action

    def expert(self, env: Environment) -> str | None:
        """expert(), its result checked."""
        text = self.call("expert", env.expert)
        sound = text is None or isinstance(text, str)
        require(sound, f"expert() returned {type(text).__name__}", "return the action's text, or None")
        return text

    def start(self, env: Environment, task: Task) -> CheckedEpisode:
        """An episode with the examination's own seed."""
        return CheckedEpisode(self, env, task, self.seed)

    def play(self, env: Environment, task: Task, seed: int, turns: int = TURNS) -> list[StepRecord]:
        """What an episode showed; its actions depend on the seed and on what was shown only."""
        return CheckedEpisode(self, env, task, seed).finish(turns).records


class StepRecord(NamedTuple):
    """What one step showed, in values that compare and print."""

    text: str
    anchor: str
    admissible: str
    reward: float
    ended: str
    success: str

    @classmethod
    def of(cls, observation: Observation, outcome: Outcome | None = None) -> StepRecord:
        """The record of an outcome; of the first observation, where there is none yet."""
        shown = (observation.text, stable_anchor(observation.anchor), repr(observation.admissible))
        if outcome is None:
            return cls(*shown, 0.0, "", "")
        ended = "terminated" if outcome.terminated else "truncated" if outcome.truncated else "goes on"
        return cls(*shown, float(outcome.reward), ended, repr(outcome.info.get("success")))


class CheckedEpisode:
    """One episode, a turn at a time. `records` begins with the first observation; `action` is the last one played."""

    def __init__(self, checked: CheckedEnvironment, env: Environment, task: Task, seed: int):
        self.checked, self.env, self.task, self.seed = checked, env, task, seed
        self.observation = checked.reset(env, task, seed)
        self.records = [StepRecord.of(self.observation)]
        self.over, self.action = False, Action("")
        self._draw = random.Random(derive(seed, "check", task.id))

    def turn(self, *, scripted: bool = False) -> None:
        """Play the expert's action (`scripted`: whenever it has one), an admissible one, a tool call or a word."""
        choices = list(self.observation.admissible or FALLBACK)
        if isinstance(self.env, ToolEnvironment) and not self.observation.admissible:
            calls = random_calls(self.env.schemas(), self.observation.text, self._draw)
            choices = [*calls, self._draw.choice(FALLBACK)]
        text = self.checked.expert(self.env) if scripted or self._draw.random() < 0.6 else None
        if text is None:
            text = self._draw.choice(choices)
        where = f", task {self.task.id}, seed {self.seed}, turn {len(self.records) - 1}"
        self.action = self.checked.parse(self.env, self.checked.call("format", lambda: self.env.format(text)))
        self.checked.tool_calls += self.action.tool_calls
        outcome = self.checked.step(self.env, self.action, where)
        self.observation = outcome.observation
        self.records.append(StepRecord.of(outcome.observation, outcome))
        self.over = outcome.terminated or outcome.truncated

    def goes_on(self, turns: int | None = None) -> bool:
        """Whether the episode has not ended, and has had fewer than so many turns (None: max_turns)."""
        return not self.over and len(self.records) <= (self.env.max_turns if turns is None else turns)

    def finish(self, turns: int | None = None, *, scripted: bool = False) -> CheckedEpisode:
        """Play while it `goes_on`."""
        while self.goes_on(turns):
            self.turn(scripted=scripted)
        return self


def first_difference(first: Sequence[StepRecord], second: Sequence[StepRecord]) -> str:
    """Where two episodes differ first, in words; empty where they do not."""
    for turn, records in enumerate(zip(first, second, strict=False)):
        for field, a, b in zip(StepRecord._fields, *records, strict=True):
            if a != b:
                where = "the first observation" if turn == 0 else f"turn {turn - 1}"
                return f"{where}: {field} was {shortened(str(a), 60)} and then {shortened(str(b), 60)}"
    if len(first) != len(second):
        return f"one episode had {len(first) - 1} turns and the other {len(second) - 1}"
    return ""


def check_observation(observation: Any, source: str) -> None:
    """Raise BrokenRule unless it is an Observation whose parts have their types."""
    kind = type(observation).__name__
    require(isinstance(observation, Observation), f"{source} returned {kind}", "return spearrl.types.Observation(text)")
    text, admissible, allowed = observation.text, observation.admissible, observation.allowed_ids
    require(isinstance(text, str), f"the observation's text is {type(text).__name__}", "make it a str")
    require(
        text.encode(errors="ignore").decode() == text,
        "the observation's text holds characters that are not Unicode text",
        'clean it: text.encode(errors="replace").decode()',
    )
    sound = admissible is None or (isinstance(admissible, tuple) and all(isinstance(a, str) for a in admissible))
    require(sound, f"admissible is {shortened(repr(admissible))}", "make it a tuple of str, or None")
    sound = allowed is None or (
        isinstance(allowed, tuple) and bool(allowed) and all(type(token) is int and token >= 0 for token in allowed)
    )
    fix = "make it a tuple of token ids, at least one, or None"
    require(sound, f"allowed_ids is {shortened(repr(allowed))}", fix)
    kind = type(observation.info).__name__
    require(isinstance(observation.info, Mapping), f"the observation's info is {kind}", "make it a dict")


def check_outcome(outcome: Any) -> None:
    """Raise BrokenRule unless it is an Outcome that the collector can use."""
    fix = "return spearrl.types.Outcome(observation, reward, terminated)"
    require(isinstance(outcome, Outcome), f"step() returned {type(outcome).__name__}", fix)
    check_observation(outcome.observation, "step()'s observation")
    reward, info = outcome.reward, outcome.info
    sound = isinstance(reward, numbers.Real) and not isinstance(reward, bool) and math.isfinite(reward)
    require(sound, f"the reward is {reward!r}", "return a finite float")
    for name, flag in (("terminated", outcome.terminated), ("truncated", outcome.truncated)):
        require(isinstance(flag, bool), f"{name} is {flag!r}", "make it True or False")
    fix = "terminated: the task is over; truncated: a limit cut it short; set one"
    require(not (outcome.terminated and outcome.truncated), "an outcome is terminated and truncated at once", fix)
    require(isinstance(info, Mapping), f"info is {type(info).__name__}", "make it a dict")
    success = info.get("success")
    sound = not outcome.terminated or isinstance(success, bool)
    fix = 'set info={"success": True} or False at the end'
    require(sound, f'the episode ended with info["success"] = {success!r}', fix)


def check_messages(messages: Any, source: str) -> None:
    """Raise BrokenRule unless it is a list of chat messages with something in them."""
    sound = isinstance(messages, list) and messages and all(isinstance(message, Message) for message in messages)
    fix = "return a list of spearrl.types.Message, at least one"
    require(sound, f"{source} returned {shortened(repr(messages))}", fix)
    sound = any(message.text or message.images for message in messages)
    require(sound, f"{source} returned messages without content", "show the model something")


def shortened(text: str, most: int = 40) -> str:
    """A text as it can be printed on part of a line."""
    printable = repr(text) if text.isprintable() else ascii(text)
    return printable if len(printable) <= most else f"{printable[:most]}…'"


def stable_anchor(anchor: Any) -> str:
    """An anchor as the trainer compares it. Raises ContractError where it cannot."""
    if anchor is None or isinstance(anchor, str):
        return repr(anchor)
    from spearrl.batching.anchors import canonical  # loads torch, which an anchor of text does not need

    return repr(canonical(anchor))
