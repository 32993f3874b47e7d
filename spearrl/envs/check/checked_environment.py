"""An environment under examination: every call is bounded in time and named, so that a finding can say where it was."""

from __future__ import annotations

import math
import numbers
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from spearrl.envs.base import Environment
from spearrl.envs.check.guards import deadline
from spearrl.envs.check.samples import random_calls
from spearrl.envs.registry import instantiate, load
from spearrl.envs.tool import ToolEnvironment
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task

T = TypeVar("T")
Level = Literal["ok", "warn", "fail", "skip"]
TURNS = 12  # of an episode that is played to compare it
FALLBACK = ("look", "1", "help", "go on")  # said where there is neither an expert nor a list of actions


class BrokenRule(Exception):
    """What a rule found: what was seen, and how to mend it.

    `level` is "fail" where the contract is broken, "warn" where the environment runs and may disappoint, "skip" where
    the rule has nothing to look at.
    """

    def __init__(self, seen: str, fix: str = "", level: Level = "fail"):
        super().__init__(seen)
        self.seen, self.fix, self.level = seen, fix, level


def require(condition: Any, seen: str, fix: str, level: Level = "fail") -> None:
    """Raise BrokenRule unless the condition holds."""
    if not condition:
        raise BrokenRule(seen, fix, level)


def shortened(value: Any, most: int = 40) -> str:
    """A value as it can be printed on part of a line."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


# How to mend a field of a record; the others: "make it" what its type says.
FIXES = {"allowed_ids": "make it a tuple of token ids, at least one, or None"}
FIXES["text"] = 'make it a str of Unicode text: text.encode(errors="replace").decode()'


@cache
def _fields(kind: type) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    return {name: (hint, TypeAdapter(hint)) for name, hint in get_type_hints(kind).items() if name != "reward"}


def check_record(record: Any, kind: type, source: str) -> None:
    """Raise BrokenRule unless it is a record of this type, and its fields are of theirs."""
    fix = f"return a spearrl.types.{kind.__name__}"
    require(isinstance(record, kind), f"{source} returned {type(record).__name__}", fix)
    for name, (hint, adapter) in _fields(kind).items():
        value = getattr(record, name)
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError as error:
            seen = f"{source}: {name} is {shortened(value)}: {error.errors(include_url=False)[0]['msg']}"
            raise BrokenRule(seen, FIXES.get(name, f"make it {hint}")) from error
    if isinstance(record, Observation):
        text, ids = record.text, record.allowed_ids
        require(text.encode(errors="ignore").decode() == text, f"{source}: text is not Unicode text", FIXES["text"])
        sound = ids is None or (ids and min(ids) >= 0)
        require(sound, f"{source}: allowed_ids is {shortened(ids)}", FIXES["allowed_ids"])
    if isinstance(record, Outcome):
        reward, success = record.reward, record.info.get("success")
        sound = isinstance(reward, numbers.Real) and not isinstance(reward, bool) and math.isfinite(reward)
        require(sound, f"{source}: reward is {reward!r}", "return a finite float")
        check_record(record.observation, Observation, source)
        fix = "terminated: the task is over; truncated: a limit cut it short; set one"
        require(not (record.terminated and record.truncated), "an outcome is terminated and truncated at once", fix)
        seen, fix = f'the episode ended with info["success"] = {success!r}', 'set info={"success": True} or False there'
        require(not record.terminated or isinstance(success, bool), seen, fix)


def check_messages(messages: Any, source: str) -> None:
    """Raise BrokenRule unless it is a list of chat messages with something in them."""
    sound = isinstance(messages, list) and messages and all(isinstance(message, Message) for message in messages)
    fix = "return a list of spearrl.types.Message, at least one"
    require(sound, f"{source} returned {shortened(messages)}", fix)
    content = any(message.text or message.images for message in messages)
    require(content, f"{source} returned messages without content", "show the model something")


@dataclass
class CheckedEnvironment:
    """The environment `name` with its options, and what is known of it so far.

    Attributes:
        max_turns: the turn limit; 0: the environment's own.
        splits: whose tasks are looked at. all_splits: whether each of them must be there, or "train" alone.
        deadline_s: seconds a call may take.
        seed: of the episodes.
        last_call: what was called last, in words.
        played: the tasks to play; the rule `tasks` fills it.
        seconds: how long calls took, by method.
        tool_calls: valid tool calls that were made.
    """

    name: str
    options: Mapping[str, Any]
    max_turns: int
    splits: Sequence[str]
    deadline_s: float
    seed: int
    all_splits: bool = False
    last_call: str = ""
    tool_calls: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    played: list[Task] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cls = load(self.name)
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
        start = time.perf_counter()
        with deadline(self.deadline_s):
            result = function()
        self.seconds[what.partition(" ")[0].rstrip(",")].append(time.perf_counter() - start)
        return result

    def reset(self, env: Environment, task: Task, seed: int) -> Observation:
        """reset(), its result checked."""
        observation = self.call(f"reset, task {task.id}, seed {seed}", lambda: env.reset(task, seed))
        check_record(observation, Observation, "reset()")
        return observation

    def step(self, env: Environment, action: Action, where: str = "") -> Outcome:
        """step(), its result checked."""
        outcome = self.call(f"step{where}, action {shortened(action.text)}", lambda: env.step(action))
        check_record(outcome, Outcome, "step()")
        return outcome

    def parse(self, env: Environment, text: str) -> Action:
        """parse() of a reply, its result checked."""
        action = self.call(f"parse, reply {shortened(text)}", lambda: env.parse(Reply(text, (1,), "stop")))
        check_record(action, Action, "parse()")
        return action

    def expert(self, env: Environment) -> str | None:
        """expert(), its result checked."""
        text = self.call("expert", env.expert)
        seen = f"expert() returned {type(text).__name__}"
        require(text is None or isinstance(text, str), seen, "return the action's text, or None")
        return text

    def start(self, env: Environment, task: Task, seed: int | None = None) -> CheckedEpisode:
        """An episode, with the examination's own seed where none is named."""
        return CheckedEpisode(self, env, task, self.seed if seed is None else seed)

    def play(self, env: Environment, task: Task, seed: int | None = None) -> list[dict[str, str]]:
        """What an episode showed; its actions depend on the seed and on what was shown only."""
        return self.start(env, task, seed).finish(TURNS).records

    def play_all(self) -> None:
        """Play every task, each in a slot of its own."""
        for task in self.played:
            self.play(self.spawn(), task)

    def turns(self, env: Environment) -> Iterator[CheckedEpisode]:
        """The episodes of all tasks, before each of their turns."""
        for task in self.played:
            running = self.start(env, task)
            while running.goes_on():
                yield running
                running.turn()


def step_record(observation: Observation, outcome: Outcome | None = None) -> dict[str, str]:
    """What one step showed (None: the first observation), in texts that compare and print."""
    shown = {"text": observation.text, "anchor": repr(observation.anchor), "admissible": repr(observation.admissible)}
    if outcome is None:
        return shown
    ended = "terminated" if outcome.terminated else "truncated" if outcome.truncated else "goes on"
    return shown | {"reward": str(outcome.reward), "ended": ended, "success": repr(outcome.info.get("success"))}


class CheckedEpisode:
    """One episode, a turn at a time. `records` begins with the first observation; `action` is the last one played."""

    def __init__(self, checked: CheckedEnvironment, env: Environment, task: Task, seed: int):
        self.checked, self.env, self.task, self.seed = checked, env, task, seed
        self.observation = checked.reset(env, task, seed)
        self.records = [step_record(self.observation)]
        self.over, self.action = False, Action("")
        self._draw = random.Random(derive(seed, "check", task.id))

    def turn(self, *, scripted: bool = False) -> None:
        """Play the expert's action (`scripted`: whenever it has one), an admissible one, a tool call or a word."""
        choices = list(self.observation.admissible or FALLBACK)
        if isinstance(self.env, ToolEnvironment) and not self.observation.admissible:
            calls = random_calls(self.env.schemas(), self.observation.text, self._draw)
            choices = [*calls, self._draw.choice(FALLBACK)]
        text = self.checked.expert(self.env) if scripted or self._draw.random() < 0.6 else None
        self.play(self._draw.choice(choices) if text is None else text)

    def play(self, text: str) -> None:
        """Write, read and carry out an action."""
        where = f", task {self.task.id}, seed {self.seed}, turn {len(self.records) - 1}"
        self.action = self.checked.parse(self.env, self.checked.call("format", lambda: self.env.format(text)))
        self.checked.tool_calls += self.action.tool_calls
        outcome = self.checked.step(self.env, self.action, where)
        self.observation = outcome.observation
        self.records.append(step_record(outcome.observation, outcome))
        self.over = outcome.terminated or outcome.truncated

    def goes_on(self, turns: int | None = None) -> bool:
        """Whether the episode has not ended, and has had fewer than so many turns (None: max_turns)."""
        return not self.over and len(self.records) <= (self.env.max_turns if turns is None else turns)

    def finish(self, turns: int | None = None, *, scripted: bool = False) -> CheckedEpisode:
        """Play while it `goes_on`."""
        while self.goes_on(turns):
            self.turn(scripted=scripted)
        return self


def first_difference(first: Sequence[dict[str, str]], second: Sequence[dict[str, str]]) -> str:
    """Where two episodes differ first, in words; empty where they do not."""
    for turn, (one, other) in enumerate(zip(first, second, strict=False)):
        for name in (name for name in one if one[name] != other[name]):
            where = "the first observation" if turn == 0 else f"turn {turn - 1}"
            return f"{where}: {name} was {shortened(one[name], 60)} and then {shortened(other[name], 60)}"
    if len(first) != len(second):
        return f"one episode had {len(first) - 1} turns and the other {len(second) - 1}"
    return ""
