"""Workers that step environments beside the event loop: threads or processes, each supervised by a thread of its own.

A `SupervisedWorker` is a queue of calls, the worker that carries them out, and the thread that drives it: that thread
keeps every call's deadline, and replaces a worker that hangs or dies, after a pause. A process worker serves the slots
that live in it; a thread worker takes any call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from spearrl.errors import EnvironmentFault, WorkerError
from spearrl.processes import Child, pickled, unpickled

# Building an environment may take this many deadlines, and at least so many seconds.
BUILD_FACTOR, BUILD_LEAST_S = 10, 60.0
# The pause before a restart; it doubles with each restart that follows without a sound call in between.
BACK_OFF_S, BACK_OFF_MOST_S = 0.05, 5.0
CLOSE_S = 2.0


class SlotLost(EnvironmentFault):
    """The worker went down through no fault of this slot: its episode is played again."""


class CallTimeout(EnvironmentFault):
    """A call gave no answer in time."""


class WorkerDied(EnvironmentFault):
    """The worker process ended in the middle of a call."""


class RestartBudget:
    """How often workers may be replaced between two `refill`s.

    `restarts` and `deadlines` count over the pool's life.
    """

    def __init__(self, restarts: int):
        self.limit = restarts
        self.restarts = self.deadlines = 0
        self._left = restarts
        self._lock = threading.Lock()

    def refill(self) -> None:
        """Allow `limit` restarts from here."""
        self._left = self.limit

    def spend(self, reason: str) -> None:
        """Count a restart. Raises WorkerError where none is left."""
        with self._lock:
            if self._left < 1:
                raise WorkerError(
                    f"environment workers were replaced {self.limit} times in one rollout; the last reason: {reason}",
                    where="env",
                    hint="mend the environment (spearrl check-env finds most faults), or raise rollout.env_restarts",
                )
            self._left -= 1
            self.restarts += 1

    def count_timeout(self) -> None:
        """Count a call that passed its deadline."""
        with self._lock:
            self.deadlines += 1


# Calls are sent to a worker together; their results are received one by one, in the same order. CallTimeout and
# WorkerDied end its life.


class ThreadWorker:
    """Runs each call (a function without arguments) in a daemon thread; one that hangs is left behind."""

    def send(self, payloads: list[Any]) -> None:
        (function,) = payloads  # a thread has one call at a time
        self._result: Future[Any] = Future()
        threading.Thread(target=_resolve, args=(function, self._result), name="env-step", daemon=True).start()

    def receive(self, deadline_s: float) -> Any:
        try:
            return self._result.result(deadline_s)
        except TimeoutError as error:
            if self._result.done():  # the environment's own TimeoutError
                raise
            raise CallTimeout(f"no answer within {deadline_s:g} s") from error

    def alive(self) -> bool:
        return True

    def kill(self) -> None:
        """A thread cannot be ended."""

    stop = interrupt = kill


def _resolve(function: Callable[[], Any], result: Future[Any]) -> None:
    try:
        result.set_result(function())
    except BaseException as error:
        result.set_exception(error)


class ProcessWorker:
    """A process of `spearrl.envs.pool.serve` with the environment in it.

    Args:
        environment: (import path, options, style, characters of a text).
    Raises:
        CallTimeout, WorkerDied, and whatever building the environment raises.
    """

    def __init__(self, environment: tuple[str, dict[str, Any], str, int], deadline_s: float):
        variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self._child = Child("spearrl.envs.pool.serve", variables)
        self.interrupt = self._child.kill  # ends a running call, from another thread
        try:
            self.send([environment])
            self.receive(max(BUILD_LEAST_S, BUILD_FACTOR * deadline_s))
        except BaseException:
            self.kill()
            raise

    def send(self, payloads: list[Any]) -> None:
        """Send calls as one message.

        The process reads all of it before it answers, so the two never wait for each other.
        """
        data = pickled(payloads)
        try:
            self._child.send(data)
        except ConnectionError as error:
            raise self._died() from error

    def receive(self, deadline_s: float) -> Any:
        try:
            data = self._child.receive(deadline_s)
        except TimeoutError as error:
            raise CallTimeout(str(error)) from error
        except ConnectionError as error:
            raise self._died() from error
        value, problem = unpickled(data)
        if problem is not None:
            raise problem
        return value

    def alive(self) -> bool:
        return self._child.process.poll() is None

    def kill(self) -> None:
        """End the process and everything it started."""
        self._child.kill()
        self._child.connection.close()

    def stop(self) -> None:
        """Give the process a moment to close its environments."""
        self._child.connection.close()
        self._child.end(CLOSE_S)

    def _died(self) -> WorkerDied:
        return WorkerDied(f"the worker process ended ({self._child.ending(CLOSE_S)})")


Worker = ThreadWorker | ProcessWorker


@dataclass
class PoolCall:
    """One call: `what` names it in error messages.

    `generation` is the worker its slot lives in (None: any worker will do).
    """

    payload: Any
    what: str
    generation: int | None = None
    future: Future[Any] = field(default_factory=Future)


class SupervisedWorker:
    """A worker, its queue and the thread that drives it.

    Every call's future is resolved, within the deadline of each call before it.

    A result is (value, generation): the generation counts the workers that took each other's place here, from 1.

    Args:
        build: makes a worker.
        calls: the queue; several whose workers take any call may share one. None ends them.
        batch: calls sent to the worker at a time.
    """

    def __init__(
        self,
        build: Callable[[], Worker],
        calls: SimpleQueue[PoolCall | None],
        budget: RestartBudget,
        *,
        deadline_s: float,
        name: str,
        batch: int = 1,
    ):
        self.calls, self.slots = calls, 0  # slots: how many live in it
        self._build, self._budget, self._deadline_s, self._batch = build, budget, deadline_s, batch
        self._worker: Worker | None = None
        self._generation, self._restarts_in_a_row = 1, 0
        self._fault = ""  # why the last worker was given up
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{name}-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End after the call that runs now."""
        self._closing.set()
        self.calls.put(None)

    def join(self) -> None:
        """Wait for `close`; a call that hangs is cut off."""
        self._thread.join(CLOSE_S)
        worker = self._worker
        if self._thread.is_alive() and worker is not None:
            worker.interrupt()
            self._thread.join(2 * CLOSE_S)

    def _run(self) -> None:
        closed = False
        while not closed:
            calls = [self.calls.get()]
            while len(calls) < self._batch and not self.calls.empty():
                calls.append(self.calls.get())
            closed = None in calls
            self._work([call for call in calls if call is not None and call.future.set_running_or_notify_cancel()])
        if self._worker is not None:
            self._worker.stop()

    def _work(self, calls: list[PoolCall]) -> None:
        """Resolve the futures. Of the calls that a failing worker leaves unanswered, the first is to blame.

        The others' slots are lost.
        """
        while calls := self._without_lost_slots(calls):
            try:
                worker = self._worker = self._worker or self._replacement(calls[0])
                worker.send([call.payload for call in calls])
            except WorkerDied:
                self._give_up("a worker process ended between two calls")
                continue
            except BaseException as error:
                calls.pop(0).future.set_exception(error)
                continue
            while calls and self._worker is worker:
                self._receive(worker, calls.pop(0))

    def _receive(self, worker: Worker, call: PoolCall) -> None:
        try:
            value = worker.receive(self._deadline_s)
        except (CallTimeout, WorkerDied) as error:
            if isinstance(error, CallTimeout):
                self._budget.count_timeout()
            self._give_up(f"{call.what}: {error.message}")
            fault = EnvironmentFault(f"{self._fault}; its worker was replaced")
            fault.__cause__ = error
            call.future.set_exception(fault)
        except BaseException as error:
            call.future.set_exception(error)
        else:
            self._restarts_in_a_row = 0
            call.future.set_result((value, self._generation))

    def _without_lost_slots(self, calls: list[PoolCall]) -> list[PoolCall]:
        """The calls whose slot lives in the present worker, or that need none; the others fail with SlotLost."""
        if self._worker is not None and not self._worker.alive():
            self._give_up("a worker process ended between two calls")
        for call in calls:
            if call.generation not in (None, self._generation):
                call.future.set_exception(SlotLost(f"{call.what}: the worker it lived in was replaced"))
        return [call for call in calls if not call.future.done()]

    def _give_up(self, reason: str) -> None:
        """Kill the worker; its slots are lost."""
        if self._worker is not None:
            self._worker.kill()
        self._worker, self._fault = None, reason
        self._generation += 1

    def _replacement(self, call: PoolCall) -> Worker:
        """A new worker; after a pause, where it takes the place of another."""
        if self._fault:
            if self._closing.is_set():
                raise WorkerError(f"{call.what}: the pool was closed")
            self._budget.spend(self._fault)
            self._closing.wait(min(BACK_OFF_MOST_S, BACK_OFF_S * 2**self._restarts_in_a_row))
            self._restarts_in_a_row += 1
        try:
            return self._build()
        except (CallTimeout, WorkerDied) as error:
            self._give_up(f"building the environment: {error.message}")
            raise SlotLost(self._fault) from error
        except BaseException:
            self._give_up("the environment could not be built")
            raise
