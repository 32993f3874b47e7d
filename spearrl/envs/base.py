"""What a user subclasses to add an environment. No torch here."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from spearrl.config.plugins import imported
from spearrl.errors import ConfigError
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task, Text

BUILTIN = {
    "alfworld": "spearrl.envs.alfworld:ALFWorld",
    "math": "spearrl.envs.math:Math",
    "search": "spearrl.envs.search:Search",
    "sokoban": "spearrl.envs.sokoban:Sokoban",
    "webshop": "spearrl.envs.webshop:WebShop",
}


class Environment:
    """One episode slot. A user writes `tasks`, `reset` and `step`; the rest has working defaults.

    An instance plays one episode at a time; `spawn()` gives further slots that share read-only data.
    `max_turns` is enforced by the collector.
    """

    max_turns: int = 10
    execution: str = "inline"  # where step() runs: "inline" on the event loop, "thread" (it waits for something), "process" (it may hang or crash)
    threads: int = 32  # that step it, where execution is "thread"; a step's deadline runs while it waits for something that lets fewer in

    cut_reward: float = 0.0  # what an episode earns besides where its turns, reply tokens or context run out

    expert_noise: float = 0.0  # how imperfect expert() is: 0 perfect, 1 random; set per slot by the cold start

    class Options(BaseModel):
        """The environment's own settings (`env.options.<key>`); unknown ones are refused."""

        model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **options: Any):
        try:
            self.options = self.Options(**options)
        except ValidationError as error:
            complaints = [_complaint(type(self), item) for item in error.errors()]
            raise ConfigError(
                "; ".join(text for _, text, _ in complaints), hint="; ".join(fix for _, _, fix in complaints)
            ) from error

    def tasks(self, split: str) -> Sequence[Task]:
        """Tasks of a split: stable ids, the same order on every machine. Raises ConfigError for an unknown split."""
        raise NotImplementedError

    def reset(self, task: Task, seed: int) -> Observation:
        """Start an episode. All randomness of the episode comes from `seed`."""
        raise NotImplementedError

    def step(self, action: Action) -> Outcome:
        """Play one action; an impossible or invalid action is a normal outcome, never an exception."""
        raise NotImplementedError

    def close(self) -> None:
        """Release what this slot holds. May be called twice."""

    def spawn(self) -> Environment:
        """Another episode slot that shares this one's read-only data. Default: a fresh instance with the same options."""
        return type(self)(**self.options.model_dump())

    def messages(self, observation: Observation, turn: int) -> list[Message]:
        """Chat style: only what is new this turn (turn counts from 0)."""
        if observation.images:
            return [Message("user", (Text(observation.text), *observation.images))]
        return [Message("user", observation.text)]

    def window(
        self, history: Sequence[tuple[Observation, Action]], observation: Observation, task: Task
    ) -> list[Message] | None:
        """Windowed style: the whole prompt of this turn. None: this environment does not offer it.

        `history` holds every earlier (observation, action) pair of the episode, oldest first.
        """
        return None

    def parse(self, reply: Reply) -> Action:
        """The action in a reply; `Action.valid=False` where the format is broken. Never raises."""
        return Action(reply.text.strip(), valid=bool(reply.text.strip()))

    def format(self, text: str) -> str:
        """The reply that `parse` turns into the action `text`."""
        return text

    def tools(self) -> list[dict[str, Any]]:
        """Function schemas for the chat template."""
        return []

    def expert(self) -> str | None:
        """The next action of a scripted expert in the running episode; None where there is none. Never shown in a prompt."""
        return None


def load(name_or_import_path: str) -> type[Environment]:
    """The class behind a built-in name or "my_pkg.mod:Class"; modules below the current directory are found too. Raises ConfigError."""
    path = BUILTIN.get(name_or_import_path, name_or_import_path)
    if ":" not in path:
        known = ", ".join(sorted(BUILTIN))
        raise ConfigError(
            f"environment {name_or_import_path!r} is not built in (built in: {known})",
            hint='use a built-in name, or the import path "my_pkg.my_module:MyEnvironment" of your own class',
        )
    found = imported(path, "environment")
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ConfigError(f"{path!r} is not a subclass of spearrl.envs.Environment", hint="subclass Environment")
    return found


def make(name_or_import_path: str, **options: Any) -> Environment:
    """Build an environment from its name or import path. Raises ConfigError for unknown options.

    The turn limit is no option: assign `environment.max_turns` where the class's own is not wanted (a run does, from `env.max_turns`).
    """
    return load(name_or_import_path)(**options)


def tasks_of(environment: Environment, split: str, *, setting: str) -> Sequence[Task]:
    """The tasks of a split. Raises ConfigError, naming the setting that chose the split, where there are none."""
    tasks = environment.tasks(split)
    if not tasks:
        raise ConfigError(f"split {split!r} has no tasks", where=setting, hint="name a split the environment has")
    return tasks


def import_path(cls: type[Environment]) -> str:
    """The "my_pkg.mod:Class" by which another process finds a class. Raises ConfigError where there is none."""
    module, name = cls.__module__, cls.__qualname__
    if module == "__main__" or "." in name or getattr(sys.modules.get(module), name, None) is not cls:
        where = f"class {name} in module {module}"
        raise ConfigError(
            "another process cannot import this environment",
            where=where,
            hint="move the class to the top level of a module of its own",
        )
    return f"{module}:{name}"


def option_errors(cls: type[Environment], options: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What is wrong with options: (key, complaint, fix) each; empty where they are fine."""
    try:
        cls.Options(**options)
    except ValidationError as error:
        return [_complaint(cls, item) for item in error.errors()]
    return []


def _complaint(cls: type[Environment], item: Mapping[str, Any]) -> tuple[str, str, str]:
    path = ["env.options", *map(str, item["loc"])]
    key, name, message = ".".join(path[1:]), ".".join(path), item["msg"].removeprefix("Value error, ")
    if not key:  # settings that are fine one by one
        return key, f"{name}: {message}", "change one of these settings"
    if item["type"] != "extra_forbidden":
        return key, f"{name}={item['input']!r}: {message}", f"use a value that {cls.__name__} takes"
    if key == "max_turns":
        return key, f"{name} is not a setting of {cls.__name__}", "use env.max_turns"
    known: Any = cls.Options.model_fields
    for part in item["loc"][:-1]:
        known = getattr(getattr(known.get(part), "annotation", None), "model_fields", {})
    near = difflib.get_close_matches(path[-1], known, n=1)
    fix = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"use one of: {', '.join(known) or 'none'}"
    return key, f"{name} is not a setting of {cls.__name__}", fix
