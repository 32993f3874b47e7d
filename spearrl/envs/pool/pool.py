"""Where environments step: on the event loop, in threads, or in a few processes that serve many slots each.

An environment that hangs, raises or dies costs its own episode only. In a process pool its worker goes down with it; the other episodes that
lived there raise SlotLost and are played again.
"""

from __future__ import annotations

import asyncio
import os
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from typing import Any

from spearrl.envs.base import Environment, import_path
from spearrl.envs.pool.slot import Played, Seat, Shown
from spearrl.envs.pool.workers import Budget, Job, Lane, ProcessWorker, SlotLost, ThreadWorker, Worker
from spearrl.errors import ConfigError
from spearrl.types import Reply, Task

__all__ = ["Pool", "Place", "SlotLost", "open_pool"]
BATCH = 32  # calls that go to a process in one message


@dataclass(slots=True, eq=False)
class Place:
    """A slot of a pool: a `Seat` in this process, or the number of one in another and the `Lane` that leads there."""

    seat: Any = None
    lane: Any = None
    number: int = 0
    generation: int = 0
    task: str = ""


class Pool:
    """Slots of one environment, stepped on the event loop. `open_pool` chooses the kind that the environment declares."""

    def __init__(self, environment: Environment, *, style: str, restarts: int = 0):
        self.environment, self.style = environment, style
        self.budget = Budget(restarts)
        self._free: list[Place] = []

    def take(self) -> Place:
        """A free slot, spawned where there is none."""
        return self._free.pop() if self._free else self._new()

    def give(self, place: Place) -> None:
        """Hand a sound slot back."""
        self._free.append(place)

    async def start(self, place: Place, task: Task, seed: int) -> Shown:
        """Begin an episode.

        Raises (this and `act`):
            EnvironmentFault: no answer in time, the worker died, or the environment raised in another process.
            SlotLost: the worker went down through no fault of this slot.
            WorkerError: workers were replaced more often than the budget allows.
        """
        return place.seat.start(task, seed)

    async def act(self, place: Place, reply: Reply, last: bool) -> Played:
        """Parse and step a reply; `last`: no further prompt is wanted."""
        return place.seat.act(reply, last)

    def discard(self, place: Place) -> None:
        """Close a slot that is not trusted any more."""
        place.seat.close()

    def close(self) -> None:
        """Close every free slot and end the workers. May be called twice."""
        places, self._free = self._free, []
        for place in places:
            self.discard(place)

    def _new(self) -> Place:
        return Place(Seat(self.environment.spawn(), self.style))


class LanePool(Pool):
    """Slots stepped by workers beside the event loop.

    `deterministic`: the loop waits for the calls submitted so far and delivers their results in the order of submission, so that what the engine
    sees does not depend on how fast an environment is.
    """

    def __init__(self, environment: Environment, *, style: str, restarts: int, deadline_s: float, deterministic: bool):
        super().__init__(environment, style=style, restarts=restarts)
        self.deadline_s, self.deterministic = deadline_s, deterministic
        self.lanes: list[Lane] = []
        self._pending: list[tuple[Future[Any], asyncio.Future[Any]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def close(self) -> None:
        super().close()
        lanes, self.lanes = self.lanes, []
        for lane in lanes:
            lane.close()
        for lane in lanes:
            lane.join()

    @staticmethod
    def _forget(lane: Lane, job: Job) -> None:
        """Submit a call that nobody waits for; what it raises is printed."""
        job.future.add_done_callback(_print_error)
        lane.jobs.put(job)

    async def _call(self, lane: Lane, job: Job) -> tuple[Any, int]:
        """The job's result, and the generation of the worker it came from."""
        lane.jobs.put(job)
        if not self.deterministic:
            return await asyncio.wrap_future(job.future)  # type: ignore[no-any-return]
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Any] = loop.create_future()
        if self._loop is not loop:  # another rollout; what an aborted one left is of no use
            self._loop, self._pending = loop, []
        if not self._pending:
            loop.call_soon(self._drain)
        self._pending.append((job.future, waiter))
        return await waiter  # type: ignore[no-any-return]

    def _drain(self) -> None:
        pending, self._pending = self._pending, []
        for future, waiter in pending:
            wait([future])  # every lane resolves its jobs within their deadlines
            if waiter.done():  # its episode was cancelled
                continue
            error = future.exception()
            if error is not None:
                waiter.set_exception(error)
            else:
                waiter.set_result(future.result())


class ThreadPool(LanePool):
    """Threads of this process, for environments that wait (for a server, a subprocess)."""

    def __init__(self, environment: Environment, *, threads: int, **settings: Any):
        super().__init__(environment, **settings)
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads = threads
        self._names = count()

    async def start(self, place: Place, task: Task, seed: int) -> Shown:
        place.task = task.id
        return await self._run(lambda: place.seat.start(task, seed), f"reset of task {task.id}")

    async def act(self, place: Place, reply: Reply, last: bool) -> Played:
        return await self._run(lambda: place.seat.act(reply, last), f"step of task {place.task}")

    def discard(self, place: Place) -> None:
        """Closing may block, and wait for a call that hangs: that is done by a worker."""
        if self.lanes:
            self._forget(self.lanes[0], Job(place.seat.close, f"close after task {place.task}"))
        else:
            place.seat.close()

    async def _run(self, function: Callable[[], Any], what: str) -> Any:
        if not self.lanes:
            self.lanes = [
                Lane(self._worker, self._jobs, self.budget, deadline_s=self.deadline_s, name=f"env-{i}")
                for i in range(self._threads)
            ]
        result, _ = await self._call(self.lanes[0], Job(function, what))
        return result

    def _worker(self) -> Worker:
        return ThreadWorker(f"env-{next(self._names)}")


class ProcessPool(LanePool):
    """A few processes that build the environment by its import path and options; a slot lives in one of them.

    Raises:
        ConfigError: the environment's class cannot be imported by another process.
    """

    def __init__(self, environment: Environment, *, processes: int, **settings: Any):
        super().__init__(environment, **settings)
        self._recipe = (import_path(type(environment)), environment.options.model_dump(), self.style)
        self._processes = processes
        self._numbers = count()

    async def start(self, place: Place, task: Task, seed: int) -> Shown:
        place.task = task.id
        job = Job(("start", place.number, (task, seed)), f"reset of task {task.id}")
        shown, place.generation = await self._call(place.lane, job)
        return shown  # type: ignore[no-any-return]

    async def act(self, place: Place, reply: Reply, last: bool) -> Played:
        job = Job(("act", place.number, (reply, last)), f"step of task {place.task}", place.generation)
        played, _ = await self._call(place.lane, job)
        return played  # type: ignore[no-any-return]

    def discard(self, place: Place) -> None:
        place.lane.slots -= 1
        if place.generation:
            self._forget(
                place.lane, Job(("close", place.number, ()), f"close after task {place.task}", place.generation)
            )

    def _new(self) -> Place:
        if not self.lanes:
            settings: dict[str, Any] = {"deadline_s": self.deadline_s, "batch": BATCH}
            self.lanes = [
                Lane(self._worker, SimpleQueue(), self.budget, name=f"env-{i}", **settings)
                for i in range(self._processes)
            ]
        lane = min(self.lanes, key=lambda candidate: candidate.slots)
        lane.slots += 1
        return Place(lane=lane, number=next(self._numbers))

    def _worker(self) -> Worker:
        return ProcessWorker(self._recipe, self.deadline_s)


def _print_error(future: Future[Any]) -> None:
    error = None if future.cancelled() else future.exception()
    if error is not None and not isinstance(error, SlotLost):  # a lost slot is closed
        traceback.print_exception(error)


def open_pool(
    environment: Environment,
    *,
    style: str,
    workers: int = 0,
    deadline_s: float = 60.0,
    restarts: int = 32,
    deterministic: bool = False,
) -> Pool:
    """The pool for what the environment declares in `execution`.

    Args:
        workers: processes or threads; 0: a process for each core, `environment.threads` threads.
        deadline_s: seconds a call may take; a pool on the event loop cannot hold to it.
        restarts: workers that may be replaced between two `budget.refill()`.
        deterministic: see LanePool.
    Raises:
        ConfigError: unknown `execution`, or a class that other processes cannot import.
    """
    settings: dict[str, Any] = {
        "style": style,
        "restarts": restarts,
        "deadline_s": deadline_s,
        "deterministic": deterministic,
    }
    kind = environment.execution
    if kind == "inline":
        return Pool(environment, style=style, restarts=restarts)
    if kind == "thread":
        return ThreadPool(environment, threads=workers or environment.threads, **settings)
    if kind == "process":
        return ProcessPool(environment, processes=workers or os.cpu_count() or 1, **settings)
    raise ConfigError(
        f"execution={kind!r} is not known", where=type(environment).__name__, hint='use "inline", "thread" or "process"'
    )
