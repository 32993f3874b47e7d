"""What passes between the controller and a rollout worker: pickled tuples.

The controller sends ("start", Start) once, then ("play", [pickled Assignment, ...]), ("cancel", numbers), ("call",
number, method, arguments) and ("close",). The worker sends ("ready", Hello), ("beat", Report), and for each episode and
call ("played", number, Trajectory, Report), ("failed", number or None, error), ("answer", number, value) or ("refused",
number, error).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spearrl.config import RunConfig
from spearrl.types import Task


@dataclass(slots=True, frozen=True)
class Start:
    """What a worker is built from.

    Args:
        model_dir: what it loads its model from.
        index: of the worker among those of the run.
        colocated: its engine shares GPUs with the learner, as the run's Placement has it.
        sleeps: its engine gives its memory back while the learner works.
    """

    config: RunConfig
    model_dir: str
    index: int = 0
    colocated: bool = False
    sleeps: bool = False


@dataclass(slots=True, frozen=True)
class Hello:
    """What a worker says when it can take episodes."""

    engine: str
    transports: tuple[str, ...]  # and shards: of sync.receivers.Receiver
    shards: int
    version: int
    host: str
    pid: int


@dataclass(slots=True, frozen=True)
class Assignment:
    """One episode to play.

    `seed`: (purpose, run seed, step, position of the task in its step); `number` is unique in the fleet.
    """

    number: int
    task: Task
    group: int
    sibling: int
    seed: tuple[int | str, ...]
    sampling: tuple[float, float]  # temperature, top_p


@dataclass(slots=True, frozen=True)
class Report:
    """How a worker is doing."""

    running: int = 0  # episodes under way
    tokens: int = 0  # that they hold: prompts and what was sampled
    late_s: float = 0.0  # seconds since its event loop turned
    healthy: bool = True  # its engine is
    counters: dict[str, float] = field(default_factory=dict)  # since it started
