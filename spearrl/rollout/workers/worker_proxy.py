"""A rollout worker as the controller sees it: what it plays, what it sends, and how weights get into it."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from spearrl.errors import EngineError, SpearError, WorkerError, WorkerLost
from spearrl.rollout.workers.link import Launcher, Link
from spearrl.rollout.workers.messages import Assignment, Hello, Report
from spearrl.types import Trajectory

GOODBYE_S = 5.0
SILENCE_S, SILENCE_LEAST_S = 60.0, 5.0  # a worker sends something every second
CALL_SLACK_S = 5.0  # over a command's own time limit: the worker's error says more than ours


@dataclass(slots=True, eq=False)
class PendingEpisode:
    """An episode that somebody waits for."""

    assignment: Assignment
    data: bytes  # the assignment, pickled
    version: int  # of the fleet when it was submitted: no token may be of older weights
    fixed_worker: int  # the one that plays it in a deterministic run
    future: Future[Trajectory] = field(default_factory=Future)
    stale: int = 0  # times it came back from older weights


class WorkerProxy:
    """One worker, from its launch to its end; a replacement is another WorkerProxy. It is a Receiver of weights.

    Args:
        delay_s: before it is launched.
        receive: called with (proxy, kind, values): from this proxy's thread for "ready", "played", "failed" and at last
            "lost", from the thread that sends weights for "version".
    """

    def __init__(
        self,
        index: int,
        launch: Launcher,
        receive: Callable[[WorkerProxy, str, tuple[Any, ...]], None],
        *,
        delay_s: float = 0.0,
    ):
        self.index, self.name = index, f"worker {index}"
        self.transports: tuple[str, ...] = ()
        self.shards, self.lost, self.pid = 1, False, 0
        self.ready, self.version = False, -1
        self.episodes: dict[int, PendingEpisode] = {}
        self.report, self.engine_errors = Report(), 0  # errors: episodes in a row that ended in one
        self._last_message = self._launched = time.monotonic()
        self._launch, self._receive, self._delay_s = launch, receive, delay_s
        self._link: Link | None = None
        self._elsewhere = False  # on another machine
        self._closing, self._reason = threading.Event(), ""
        self._numbers, self._calls = count(), dict[int, Future[Any]]()
        self._thread = threading.Thread(target=self._run, name=f"worker-{index}-watch", daemon=True)
        self._thread.start()

    def play(self, batch: list[PendingEpisode]) -> None:
        """Hand over episodes; of a worker that is gone "lost" is received."""
        self._send("play", [pending.data for pending in batch])

    def cancel(self, numbers: list[int]) -> None:
        self._send("cancel", numbers)

    def problem(self, *, start_s: float, late_s: float) -> str | None:
        """Why this worker should not be waited for any longer."""
        now = time.monotonic()
        if not self.ready:
            late = now - self._launched - self._delay_s > start_s
            return f"it did not start within {start_s:g} s" if late else None
        if now - self._last_message > (silence := min(SILENCE_S, max(SILENCE_LEAST_S, late_s))):
            return f"it gave no sign of life for {silence:g} s"
        if self.report.late_s > late_s:
            blocked = f"its event loop stood still for {self.report.late_s:.0f} s"
            return f"{blocked}: the engine or a step of an environment blocks it"
        return None if self.report.healthy else "its engine is not healthy"

    def give_up(self, reason: str) -> None:
        """End the worker; "lost" follows."""
        self._reason = self._reason or reason
        if self._link is not None:
            self._link.kill()

    def close(self) -> None:
        """Ask the worker to end."""
        self._closing.set()
        self._send("close")

    def join(self) -> None:
        """Wait for `close`; one that does not end is killed."""
        self._thread.join(GOODBYE_S)
        if self._thread.is_alive():
            self.give_up("closed")
            self._thread.join(GOODBYE_S)

    def pause(self, timeout_s: float) -> None:
        self._call("pause", timeout_s)

    def begin(self, plan: dict[str, Any], timeout_s: float) -> None:
        self._call("begin", timeout_s, plan)

    def take(self, bucket: dict[str, Any], timeout_s: float) -> dict[str, int]:
        """One bucket; its file travels along where the worker is on another machine."""
        if self._elsewhere and "path" in bucket:
            bucket = {**bucket, "data": Path(bucket["path"]).read_bytes()}
        return self._call("take", timeout_s, bucket)

    def finish(self, version: int, timeout_s: float) -> list[int]:
        """The weights are live: from now on the worker gets episodes again."""
        digests: list[int] = self._call("finish", timeout_s, version)
        self._receive(self, "version", (version,))
        return digests

    def probe(self, token_ids: list[int], timeout_s: float) -> list[float]:
        return self._call("probe", timeout_s, token_ids)

    def resume(self, timeout_s: float) -> None:
        self._call("resume", timeout_s)

    def sleep(self) -> None:
        self._call("sleep", None)

    def wake(self) -> None:
        self._call("wake", None)

    def _call(self, method: str, timeout_s: float | None, *arguments: Any) -> Any:
        """Have the worker's receiver do something.

        Raises:
            WorkerLost: the worker is gone, or goes meanwhile; the fleet replaces it.
            EngineError: no answer in time, or what the engine raised.
        """
        number, answer = next(self._numbers), Future[Any]()
        self._calls[number] = answer
        limit = timeout_s if timeout_s is not None else SILENCE_S
        self._send("call", number, method, arguments if timeout_s is None else (*arguments, timeout_s))
        if self.lost:
            answer.cancel()
        try:
            return answer.result(limit + CALL_SLACK_S)
        except TimeoutError as error:
            text, hint = f"did not answer {method} within {limit:g} s", "see its log; sync.timeout_s bounds the wait"
            raise EngineError(text, where=self.name, hint=hint) from error
        except BaseException as error:
            if answer.cancelled():
                text = f"ended before it answered {method}"
                raise WorkerLost(text, where=self.name, hint="the fleet replaces it") from error
            raise
        finally:
            del self._calls[number]

    def _send(self, *message: Any) -> None:
        try:
            if self._link is not None:
                self._link.send(pickle.dumps(message))
        except ConnectionError:
            return  # this proxy's thread notices too, and reports "lost"

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            if self._closing.wait(self._delay_s):
                return
            self._link = self._launch(self.index)
            while not self._closing.is_set():
                self._handle(*pickle.loads(self._link.receive()))
        except ConnectionError:
            error = None
        except BaseException as problem:
            error = problem
        finally:
            self._end(error)

    def _handle(self, kind: str, *values: Any) -> None:
        """One message of the worker; see messages."""
        self._last_message = time.monotonic()
        if kind in ("beat", "played"):
            self.report = values[-1]
        if kind == "ready":
            hello: Hello = values[0]
            self.name, self.version = f"worker {self.index} ({hello.engine})", hello.version
            self.transports, self.shards, self.pid = hello.transports, hello.shards, hello.pid
            self._elsewhere = hello.host != socket.gethostname()
            self.ready = True
        elif kind == "failed" and values[0] is None:
            raise values[1]
        elif kind in ("answer", "refused"):
            self._answer(kind, *values)
            return
        self._receive(self, kind, values)

    def _answer(self, kind: str, number: int, value: Any) -> None:
        answer = self._calls.get(number)
        if answer is None or answer.done():  # nobody waits any more
            return
        if kind == "answer":
            answer.set_result(value)
            return
        value.where = f"{self.name}, {value.where}" if value.where else self.name
        answer.set_exception(value)

    def _end(self, error: BaseException | None) -> None:
        self.ready, self.lost = False, True
        ending = "it was not launched"
        if self._link is not None:
            self._link.kill()
            ending = self._link.ending()
        for answer in list(self._calls.values()):
            answer.cancel()
        if self._closing.is_set():
            return
        if error is None:
            text = f"the worker ended: {f'{self._reason}; ' if self._reason else ''}{ending}"
            error = WorkerError(text, where=self.name, hint="its log says more")
        elif not isinstance(error, SpearError):
            hint = "this is a fault of spearrl or of what its worker sent"
            error = WorkerError(f"{type(error).__name__}: {error}", where=self.name, hint=hint)
        self._receive(self, "lost", (error,))
