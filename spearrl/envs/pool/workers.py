"""Workers that step environments off the event loop, each watched by a thread of its own: deadlines, replacement, back-off.

A lane is one worker and the queue of calls it works through. A process worker serves the slots that live in it; a thread worker takes any call.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from spearrl import errors
from spearrl.errors import ContractError, EnvironmentFault, SpearError, WorkerError
from spearrl.processes import Child

BUILD_FACTOR, BUILD_LEAST_S = 10, 60.0  # building an environment may take this many deadlines, at least so many seconds
BACK_OFF_S, BACK_OFF_MOST_S = (
    0.05,
    5.0,
)  # before a restart; doubles with each that follows without a sound call in between
GOODBYE_S = 2.0


class SlotLost(EnvironmentFault):
    """The worker went down through no fault of this slot: its episode is played again."""


class Overrun(EnvironmentFault):
    """A call gave no answer in time."""


class Died(EnvironmentFault):
    """The worker process ended in the middle of a call."""


class Budget:
    """How often workers may be replaced between two `refill`s, and what happened over the pool's life.

    Raises (spend): WorkerError when it is used up.
    """

    def __init__(self, restarts: int):
        self.limit = restarts
        self.restarts = self.deadlines = 0
        self._left = restarts
        self._lock = threading.Lock()

    def refill(self) -> None:
        self._left = self.limit

    def spend(self, reason: str) -> None:
        with self._lock:
            if self._left < 1:
                hint = "mend the environment (spearrl check-env finds most faults), or raise rollout.env_restarts"
                raise WorkerError(
                    f"environment workers were replaced {self.limit} times in one rollout; the last reason: {reason}",
                    where="env",
                    hint=hint,
                )
            self._left -= 1
            self.restarts += 1

    def overran(self) -> None:
        with self._lock:
            self.deadlines += 1


# What a lane drives: calls are sent together, answers are received one by one in the same order; Overrun and Died end a worker's life.


class ThreadWorker:
    """Runs calls in one daemon thread; a thread that hangs is left behind."""

    def __init__(self, name: str):
        self._work: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._results: deque[Future[Any]] = deque()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def send(self, payloads: list[Any]) -> None:
        for payload in payloads:
            self._results.append(Future())
            self._work.put((payload, self._results[-1]))

    def receive(self, deadline_s: float) -> Any:
        result = self._results.popleft()
        try:
            return result.result(deadline_s)
        except TimeoutError as error:
            if result.done():  # the environment's own TimeoutError
                raise
            raise Overrun(f"no answer within {deadline_s:g} s") from error

    def alive(self) -> bool:
        return True

    def kill(self) -> None:
        self._work.put(None)

    stop = interrupt = kill

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            function, result = item
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)


class ProcessWorker:
    """A process of `spearrl.envs.pool.serve` with the environment in it. Raises what building the environment raises, Overrun, Died."""

    def __init__(self, environment: tuple[str, dict[str, Any], str], deadline_s: float):
        # Results go to standard output; an environment that prints must not mix into them.
        self._child = Child(
            "spearrl.envs.pool.serve", {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}, output=2
        )
        self._connection, self.interrupt = (
            self._child.connection,
            self._child.kill,
        )  # interrupt: end a running call, from another thread
        try:
            self.send([environment])
            self.receive(max(BUILD_LEAST_S, BUILD_FACTOR * deadline_s))
        except BaseException:
            self.kill()
            raise

    def send(self, payloads: list[Any]) -> None:
        """One message: the worker has read all of it before it answers, so that the two never wait for each other."""
        try:
            self._connection.send(payloads)
        except OSError as error:
            raise Died(f"the worker process ended ({self._child.ending(GOODBYE_S)})") from error
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise _cannot_travel(error) from error

    def receive(self, deadline_s: float) -> Any:
        try:
            if not self._connection.poll(deadline_s):
                raise Overrun(f"no answer within {deadline_s:g} s")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise Died(f"the worker process ended ({self._child.ending(GOODBYE_S)})") from error
        except (pickle.UnpicklingError, AttributeError, ImportError, TypeError) as error:
            raise _cannot_travel(error) from error
        return _result(answer)

    def alive(self) -> bool:
        return self._child.process.poll() is None

    def kill(self) -> None:
        """End the process and everything it started."""
        self._child.kill()
        self._connection.close()

    def stop(self) -> None:
        """Let the process close its environments, for a moment."""
        self._connection.close()
        try:
            self._child.process.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            self.kill()


Worker = ThreadWorker | ProcessWorker


def _cannot_travel(error: Exception) -> ContractError:
    hint = "use plain values in Task.data, Observation.anchor and Outcome.info: numbers, text, tuples, dicts"
    return ContractError(f"a value cannot travel between processes: {error}", where="env", hint=hint)


def _result(answer: tuple[Any, ...]) -> Any:
    kind, *rest = answer
    if kind == "ok":
        return rest[0]
    if kind == "raised":
        raise EnvironmentFault(str(rest[0]).rstrip())
    name, message, where, hint = rest
    found = getattr(errors, name, SpearError)
    raise found(message, where=where, hint=hint)


@dataclass
class Job:
    """One call: `what` names it in error messages; `generation` is the worker the slot lives in (none: any)."""

    payload: Any
    what: str
    generation: int | None = None
    future: Future[Any] = field(default_factory=Future)


class Lane:
    """A worker, its queue and the thread that drives it. Every job's future is resolved, within the deadline of each job before it.

    Args:
        build: makes a worker.
        jobs: the queue; lanes whose workers take any call may share one.
        batch: calls sent to the worker at a time.
    """

    def __init__(
        self,
        build: Callable[[], Worker],
        jobs: SimpleQueue[Job | None],
        budget: Budget,
        *,
        deadline_s: float,
        name: str,
        batch: int = 1,
    ):
        self.jobs, self.slots, self._batch = jobs, 0, batch
        self._build, self._budget, self._deadline_s = build, budget, deadline_s
        self._generation, self._in_a_row, self._lost = 1, 0, ""
        self._worker: Worker | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{name}-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End after the call that runs now."""
        self._closing.set()
        self.jobs.put(None)

    def join(self) -> None:
        """Wait for `close`; a call that hangs is cut off."""
        self._thread.join(GOODBYE_S)
        worker = self._worker
        if self._thread.is_alive() and worker is not None:
            worker.interrupt()
            self._thread.join(2 * GOODBYE_S)

    def _run(self) -> None:
        open_ = True
        while open_:
            jobs = [self.jobs.get()]
            while len(jobs) < self._batch and not self.jobs.empty():
                jobs.append(self.jobs.get())
            open_ = None not in jobs
            self._work([job for job in jobs if job is not None and job.future.set_running_or_notify_cancel()])
        if self._worker is not None:
            self._worker.stop()

    def _work(self, jobs: list[Job]) -> None:
        """Resolve the jobs' futures. Of those a failing worker leaves unanswered, the first is to blame; slots of the others are lost."""
        while jobs := self._current(jobs):
            try:
                worker = self._worker = self._worker or self._begin(jobs[0])
                worker.send([job.payload for job in jobs])
            except Died:
                self._retire("a worker process ended between two calls")
                continue
            except BaseException as error:
                jobs.pop(0).future.set_exception(error)
                continue
            while jobs and self._worker is worker:
                self._receive(worker, jobs.pop(0))

    def _receive(self, worker: Worker, job: Job) -> None:
        try:
            result = worker.receive(self._deadline_s)
        except (Overrun, Died) as error:
            if isinstance(error, Overrun):
                self._budget.overran()
            self._retire(f"{job.what}: {error.message}")
            fault = EnvironmentFault(f"{self._lost}; its worker was replaced")
            fault.__cause__ = error
            job.future.set_exception(fault)
        except BaseException as error:
            job.future.set_exception(error)
        else:
            self._in_a_row = 0
            job.future.set_result((result, self._generation))

    def _current(self, jobs: list[Job]) -> list[Job]:
        """Those that need no slot of a worker that is gone; the others' futures are resolved."""
        if self._worker is not None and not self._worker.alive():
            self._retire("a worker process ended between two calls")
        for job in jobs:
            if job.generation not in (None, self._generation):
                job.future.set_exception(SlotLost(f"{job.what}: the worker it lived in was replaced"))
        return [job for job in jobs if not job.future.done()]

    def _retire(self, reason: str) -> None:
        """Give the worker up; its slots are lost."""
        if self._worker is not None:
            self._worker.kill()
        self._worker, self._lost = None, reason
        self._generation += 1

    def _begin(self, job: Job) -> Worker:
        """A worker; after a pause, where it takes the place of another."""
        if self._closing.is_set() and self._lost:
            raise WorkerError(f"{job.what}: the pool was closed")
        if self._lost:
            self._budget.spend(self._lost)
            self._closing.wait(min(BACK_OFF_MOST_S, BACK_OFF_S * 2**self._in_a_row))
            self._in_a_row += 1
        try:
            return self._build()
        except (Overrun, Died) as error:
            self._retire(f"building the environment: {error.message}")
            raise SlotLost(self._lost) from error
        except BaseException:
            self._retire("the environment could not be built")
            raise
