"""Where environments step: on the event loop, in threads, or in a few processes that serve many slots each.

An environment that hangs, raises or dies costs its own episode only. In a process pool its worker goes down with it;
the other episodes that lived there raise SlotLost and are played again.
"""

from __future__ import annotations

import asyncio
import os
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import count
from queue import SimpleQueue
from typing import Any

from spearrl.envs.base import Environment
from spearrl.envs.pool.slot import TEXT_CHARS, EpisodeStart, Slot, StepResult
from spearrl.envs.pool.supervision import (
    PoolCall,
    ProcessWorker,
    RestartBudget,
    SlotLost,
    SupervisedWorker,
    ThreadWorker,
)
from spearrl.envs.registry import import_path
from spearrl.errors import ConfigError
from spearrl.types import Reply, Task


@dataclass(slots=True, eq=False)
class PooledSlot:
    """A slot of a pool. It lives in this process (`slot`), or under a number in the process of a worker.

    `generation` says in which of the worker's processes; 0: no episode has begun in it yet. `task_id` is for error
    messages.
    """

    slot: Any = None
    worker: Any = None
    number: int = 0
    generation: int = 0
    task_id: str = ""


class Pool:
    """Slots of one environment, stepped on the event loop.

    `open_pool` opens the kind of pool that the environment declares.

    Args:
        style: of the prompts, "chat" or "windowed".
        restarts: workers that may be replaced between two `budget.refill()`.
        episode_seed: the environment's seed in every episode, in place of the one that `start` is given.
        text_chars: characters of one text that an environment shows; of a longer one head and tail are kept.
        deadline_s: seconds a call may take. On the event loop a later one cannot be ended, and is only told.
    """

    def __init__(
        self,
        environment: Environment,
        *,
        style: str,
        restarts: int = 0,
        episode_seed: int | None = None,
        text_chars: int = TEXT_CHARS,
        deadline_s: float = 60.0,
    ):
        self.environment, self.style, self._text_chars = environment, style, text_chars
        self.busy = ""  # the call that runs on the event loop now
        self.deadline_s = deadline_s
        self.budget = RestartBudget(restarts)
        self._episode_seed = episode_seed
        self._free: list[PooledSlot] = []

    def acquire(self) -> PooledSlot:
        """A free slot, spawned where there is none."""
        return self._free.pop() if self._free else self._new()

    def release(self, slot: PooledSlot) -> None:
        """Take a sound slot back for other episodes."""
        self._free.append(slot)

    async def start(self, slot: PooledSlot, task: Task, seed: int) -> EpisodeStart:
        """Begin an episode.

        Raises (this and `act`):
            EnvironmentFault: no answer in time, the worker died, or the environment raised in another process.
            SlotLost: the worker went down through no fault of this slot.
            WorkerError: workers were replaced more often than the budget allows.
        """
        slot.task_id = task.id
        seed = seed if self._episode_seed is None else self._episode_seed
        return await self._call(slot, "start", (task, seed), f"reset of task {task.id}")

    async def act(self, slot: PooledSlot, reply: Reply, last: bool) -> StepResult:
        """Parse and step a reply; `last`: no further prompt is needed."""
        return await self._call(slot, "act", (reply, last), f"step of task {slot.task_id}")

    def discard(self, slot: PooledSlot) -> None:
        """Close a slot that is not trusted any more."""
        slot.slot.close()

    def close(self) -> None:
        """Close every free slot and end the workers. May be called twice."""
        free, self._free = self._free, []
        for slot in free:
            self.discard(slot)

    def _new(self) -> PooledSlot:
        return PooledSlot(Slot(self.environment.spawn(), self.style, self._text_chars))

    async def _call(self, slot: PooledSlot, method: str, arguments: tuple[Any, ...], what: str) -> Any:
        self.busy = what
        try:
            return getattr(slot.slot, method)(*arguments)
        finally:
            self.busy = ""


class WorkerPool(Pool):
    """Slots stepped by workers beside the event loop; they start with the first call.

    Args:
        workers: how many.
        deadline_s: seconds a call may take.
        deterministic: the loop waits for the calls submitted so far and delivers their results in the order of
            submission, so that what the engine receives does not depend on how fast an environment is.
    """

    batch = 1  # calls that go to a worker at a time

    def __init__(
        self, environment: Environment, *, workers: int, deadline_s: float, deterministic: bool, **settings: Any
    ):
        super().__init__(environment, deadline_s=deadline_s, **settings)
        self.deterministic = deterministic
        self.workers: list[SupervisedWorker] = []
        self.count = workers
        self._pending: list[tuple[Future[Any], asyncio.Future[Any]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def close(self) -> None:
        super().close()
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.close()
        for worker in workers:
            worker.join()

    def _started(self, build: Callable[[], Any], calls: Any = None) -> list[SupervisedWorker]:
        """The workers, begun where there are none: made by `build`, with one queue for all (`calls`) or one each."""
        if not self.workers:
            settings: dict[str, Any] = {"deadline_s": self.deadline_s, "batch": self.batch}
            self.workers = [
                SupervisedWorker(build, calls or SimpleQueue(), self.budget, name=f"env-{i}", **settings)
                for i in range(self.count)
            ]
        return self.workers

    @staticmethod
    def _submit_and_forget(worker: SupervisedWorker, call: PoolCall) -> None:
        """Submit a call that nobody waits for; what it raises is printed."""
        call.future.add_done_callback(_print_error)
        worker.calls.put(call)

    async def _submit(self, worker: SupervisedWorker, call: PoolCall) -> tuple[Any, int]:
        """The call's result, and the generation of the worker it came from."""
        worker.calls.put(call)
        if not self.deterministic:
            return await asyncio.wrap_future(call.future)
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Any] = loop.create_future()
        if self._loop is not loop:  # another rollout; what an aborted one left is of no use
            self._loop, self._pending = loop, []
        if not self._pending:
            loop.call_soon(self._deliver)
        self._pending.append((call.future, waiter))
        return await waiter

    def _deliver(self) -> None:
        pending, self._pending = self._pending, []
        for future, waiter in pending:
            wait([future])  # every worker resolves its calls within their deadlines
            if waiter.done():  # its episode was cancelled
                continue
            error = future.exception()
            if error is not None:
                waiter.set_exception(error)
            else:
                waiter.set_result(future.result())


class ThreadPool(WorkerPool):
    """Threads of this process, for environments that wait (for a server, a subprocess). Any thread takes any call."""

    def __init__(self, environment: Environment, **settings: Any):
        super().__init__(environment, **settings)
        self._calls: SimpleQueue[PoolCall | None] = SimpleQueue()  # one queue for all

    def discard(self, slot: PooledSlot) -> None:
        """Close a slot, in a worker: closing may block, and wait for a call that hangs."""
        if self.workers:
            self._submit_and_forget(self.workers[0], PoolCall(slot.slot.close, f"close after task {slot.task_id}"))
        else:
            slot.slot.close()

    async def _call(self, slot: PooledSlot, method: str, arguments: tuple[Any, ...], what: str) -> Any:
        call = PoolCall(partial(getattr(slot.slot, method), *arguments), what)
        workers = self._started(ThreadWorker, self._calls)
        return (await self._submit(workers[0], call))[0]


class ProcessPool(WorkerPool):
    """A few processes that build the environment by its import path and options; a slot lives in one of them.

    Raises:
        ConfigError: the environment's class cannot be imported by another process.
    """

    batch = 32

    def __init__(self, environment: Environment, **settings: Any):
        super().__init__(environment, **settings)
        self._recipe = (import_path(type(environment)), environment.options.model_dump(), self.style, self._text_chars)
        self._numbers = count()

    def discard(self, slot: PooledSlot) -> None:
        slot.worker.slots -= 1
        if slot.generation:
            what = f"close after task {slot.task_id}"
            self._submit_and_forget(slot.worker, PoolCall(("close", slot.number, ()), what, slot.generation))

    async def _call(self, slot: PooledSlot, method: str, arguments: tuple[Any, ...], what: str) -> Any:
        generation = None if method == "start" else slot.generation
        call = PoolCall((method, slot.number, arguments), what, generation)
        value, slot.generation = await self._submit(slot.worker, call)
        return value

    def _new(self) -> PooledSlot:
        workers = self._started(lambda: ProcessWorker(self._recipe, self.deadline_s))
        worker = min(workers, key=lambda candidate: candidate.slots)
        worker.slots += 1
        return PooledSlot(worker=worker, number=next(self._numbers))


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
    episode_seed: int | None = None,
    text_chars: int = TEXT_CHARS,
) -> Pool:
    """The pool for what the environment declares in `execution`.

    Args:
        style, restarts, episode_seed, text_chars: as of Pool.
        workers: processes or threads; 0: a process for each core, `environment.threads` threads.
        deadline_s: seconds a call may take; a pool on the event loop can only tell of it.
        deterministic: as of WorkerPool.
    Raises:
        ConfigError: unknown `execution`, or a class that other processes cannot import.
    """
    common: dict[str, Any] = {"style": style, "restarts": restarts, "episode_seed": episode_seed}
    common["text_chars"] = text_chars
    kind = environment.execution
    common["deadline_s"] = deadline_s
    if kind == "inline":
        return Pool(environment, **common)
    common["deterministic"] = deterministic
    if kind == "thread":
        return ThreadPool(environment, workers=workers or environment.threads, **common)
    if kind == "process":
        return ProcessPool(environment, workers=workers or os.cpu_count() or 1, **common)
    hint = 'use "inline", "thread" or "process"'
    raise ConfigError(f"execution={kind!r} is not known", where=type(environment).__name__, hint=hint)
