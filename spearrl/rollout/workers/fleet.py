"""The rollout workers of a run: who plays which episode, and what happens to the episodes of a worker that dies.

Episodes go to the worker with the fewest tokens in flight; those of a dead worker are played again by others, with the
same seeds.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, InvalidStateError, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from spearrl.config import RunConfig
from spearrl.errors import SpearError, WorkerError, WorkerLost
from spearrl.processes import pickled
from spearrl.rollout.player import Episode, Player, Seed
from spearrl.rollout.workers.link import Launcher
from spearrl.rollout.workers.messages import Assignment
from spearrl.rollout.workers.worker_proxy import PendingEpisode, WorkerProxy
from spearrl.types import Status, Task, Trajectory

LOG = logging.getLogger(__name__)
TICK_S = 0.2  # between two looks at the workers
BACK_OFF_S, BACK_OFF_MOST_S = 0.1, 10.0  # before a replacement; doubles while nothing is played in between
MAX_ENGINE_ERRORS = 8  # episodes in a row that end in engine errors: the engine is at fault, not they
MAX_STALE = 3  # times an episode may come back from weights that are too old
LOST = ("rollout/worker_deaths", "rollout/reissued", "rollout/stale")  # what is counted of lost work


class Fleet:
    """Starts rollout.workers workers in parallel and keeps that many going. Thread-safe.

    At most rollout.worker_restarts workers are replaced.

    Args:
        launch: starts the worker of an index.
        on_start: called with a replacement that does not have the current weights, from the thread that calls `poll`:
            has to bring them (the bridge's catch_up). Until then the worker gets no episodes.
        report: told of what is noteworthy, from any thread; default: standard error.
    Raises:
        SpearError: what kept a worker from starting: its error, or a WorkerError with its exit status and last log
            lines.
    """

    def __init__(
        self,
        config: RunConfig,
        launch: Launcher,
        *,
        on_start: Callable[[WorkerProxy], None] | None = None,
        report: Callable[[str], None] | None = None,
    ):
        settings = config.rollout
        self.config, self.version = config, 0
        self._on_start, self._report = on_start, report or partial(print, file=sys.stderr)
        self._notes: deque[str] = deque()
        self._launch, self._slots, self._restarts_left = launch, settings.slots, settings.worker_restarts
        # Only the local engine repeats itself bit by bit, where each worker meets the same episodes at once.
        self._fixed = config.run.deterministic and settings.engine == "local" and not settings.max_staleness
        self._lock = threading.RLock()
        self._queue: deque[PendingEpisode] = deque()
        self._numbers = count()
        self._counts = Counter[str](dict.fromkeys(LOST, 0))
        self._deaths_in_a_row = 0
        self._error: SpearError | None = None  # what brought the fleet to its end
        self._started, self._closed = False, threading.Event()
        with self._lock:
            self._workers = [WorkerProxy(index, launch, self._receive) for index in range(settings.workers)]
        threading.Thread(target=self._watch, name="fleet-watch", daemon=True).start()
        try:
            while not all(worker.ready for worker in self._workers):
                self._check()
                time.sleep(0.01)
        except BaseException:
            self.close()
            raise
        self._started = True

    def __iter__(self) -> Iterator[WorkerProxy]:
        """The workers that are up now: what the bridge sends weights to, asked anew at every sync."""
        with self._lock:
            return iter([worker for worker in self._workers if worker.ready])

    def announce(self, version: int) -> None:
        """The learner's weights have this version now; workers that do not have it yet get no new episodes."""
        with self._lock:
            self.version = max(self.version, version)

    def submit(self, assignments: Sequence[Assignment]) -> list[Future[Trajectory]]:
        """Have episodes played; each future gives the trajectory.

        Cancelling a future stops its episode. Callbacks of futures run in a thread of the fleet: keep them short.

        Args:
            assignments: their numbers are given here.
        Raises:
            ContractError: a task's data cannot travel to another process.
            WorkerError: the fleet came to its end; so do futures that wait then.
        """
        with self._lock:
            self._check()
            batch = [self._pending(assignment, index) for index, assignment in enumerate(assignments)]
            self._queue.extend(batch)
        for pending in batch:
            pending.future.add_done_callback(partial(self._stop_cancelled, pending.assignment.number))
        self._assign()
        return [pending.future for pending in batch]

    def poll(self) -> None:
        """Bring replacements to the current weights.

        To be called by whoever waits for episodes, from the thread that owns the learner.

        Raises:
            WorkerError: the fleet came to its end.
        """
        self.report_notes()
        self._check()
        for worker in [worker for worker in self if worker.version != self.version]:
            if self._on_start is None:
                text = f"it has weights of version {worker.version}, not {self.version}, and nothing brings them"
                raise WorkerError(text, where=worker.name)
            try:
                self._on_start(worker)
            except WorkerLost as error:
                self._notes.append(f"{error}, while it was given its first weights")

    def report_notes(self) -> None:
        """Report what happened since the last time."""
        while True:
            with self._lock:
                if not self._notes:
                    return
                note = self._notes.popleft()
            self._report(note)

    def totals(self) -> dict[str, float]:
        """What all workers did since the start, and what was lost. "engine_seconds" is the mean over workers."""
        with self._lock:
            total = Counter(self._counts)
            for worker in self._workers:
                total.update(worker.report.counters)
        return {name: value / (len(self._workers) if name == "engine_seconds" else 1) for name, value in total.items()}

    def collector(self, temperature: float, top_p: float) -> FleetCollector:
        """Plays tasks on the fleet, with this sampling."""
        return FleetCollector(self, (temperature, top_p))

    def close(self) -> None:
        """End every worker, within seconds. May be called twice."""
        with self._lock:  # no replacement starts from now on
            self._closed.set()
            workers = list(self._workers)
        for worker in workers:
            worker.close()
        for worker in workers:
            worker.join()
        self._fail(WorkerError("the workers were closed", where="rollout"))

    def _pending(self, assignment: Assignment, index: int) -> PendingEpisode:
        numbered = replace(assignment, number=next(self._numbers))
        data = pickled(numbered, f"task {assignment.task.id}")
        return PendingEpisode(numbered, data, self.version, index % len(self._workers))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _assign(self) -> None:
        """Hand out what waits, as far as workers have room."""
        batches: dict[WorkerProxy, list[PendingEpisode]] = {}
        with self._lock:
            while self._queue and (worker := self._worker_for(self._queue[0])) is not None:
                pending = self._queue.popleft()
                if not pending.future.cancelled():
                    worker.episodes[pending.assignment.number] = pending
                    batches.setdefault(worker, []).append(pending)
        for worker, batch in batches.items():
            worker.play(batch)

    def _worker_for(self, pending: PendingEpisode) -> WorkerProxy | None:
        """The worker for an episode.

        In a deterministic run a worker gets all of its episodes at once and its engine orders them.
        """
        able = [w for w in self._workers if w.ready and w.report.healthy and w.version == self.version]
        if self._fixed and (fixed := self._workers[pending.fixed_worker]) in able:
            return fixed
        free = [worker for worker in able if len(worker.episodes) < self._slots]
        typical = max(1.0, sum(w.report.tokens for w in able) / max(1, sum(w.report.running for w in able)))

        def load(worker: WorkerProxy) -> tuple[float, int]:
            """Tokens in flight; an episode that was not begun at the worker's last report counts as a begun one."""
            not_begun = max(0, len(worker.episodes) - worker.report.running)
            return worker.report.tokens + not_begun * typical, worker.index

        return min(free, key=load, default=None)

    def _receive(self, worker: WorkerProxy, kind: str, values: tuple[Any, ...]) -> None:
        """What proxies report, each from its own thread."""
        if kind == "version":
            with self._lock:
                worker.version = values[0]
                self.announce(values[0])
        elif kind == "played":
            self._played(worker, *values[:2])
        elif kind == "failed":
            if pending := worker.episodes.pop(values[0], None):
                _resolve(pending.future, values[1])
        elif kind == "lost":
            self._lost(worker, values[0])
        self._assign()

    def _played(self, worker: WorkerProxy, number: int, trajectory: Trajectory) -> None:
        with self._lock:
            pending = worker.episodes.pop(number, None)
            self._deaths_in_a_row = 0
            if pending is None:
                return
            failed = trajectory.status is Status.ENGINE_ERROR
            stale = any(turn.min_version < pending.version for turn in trajectory.turns)
            worker.engine_errors = worker.engine_errors + 1 if failed else 0
            if stale:
                self._counts["rollout/stale"] += 1
                pending.stale += 1
            faulty = worker.engine_errors >= MAX_ENGINE_ERRORS
            if pending.stale < MAX_STALE and (stale or (failed and (faulty or not worker.report.healthy))):
                self._requeue([pending])
                if faulty:
                    last = (trajectory.error or "?").splitlines()[-1]
                    worker.give_up(f"its last {MAX_ENGINE_ERRORS} episodes ended in engine errors; the last: {last}")
                return
        if stale:
            text = f"it plays with weights older than version {pending.version}, although it took them"
            hint = "this is a fault of the engine or of the sync"
            _resolve(pending.future, WorkerError(text, where=worker.name, hint=hint))
        else:
            _resolve(pending.future, trajectory)

    def _requeue(self, episodes: list[PendingEpisode]) -> None:
        """Play episodes again, before all others."""
        self._counts["rollout/reissued"] += len(episodes)
        self._queue.extendleft(reversed(episodes))

    def _lost(self, worker: WorkerProxy, error: SpearError) -> None:
        with self._lock:
            orphans = [pending for pending in worker.episodes.values() if not pending.future.cancelled()]
            worker.episodes.clear()
            if not self._started or self._closed.is_set():
                self._fail(error)
                return
            self._counts.update(worker.report.counters)
            self._counts["rollout/worker_deaths"] += 1
            self._requeue(orphans)
            if self._restarts_left:
                self._restarts_left -= 1
                delay = min(BACK_OFF_MOST_S, BACK_OFF_S * 2**self._deaths_in_a_row)
                self._deaths_in_a_row += 1
                self._workers[worker.index] = WorkerProxy(worker.index, self._launch, self._receive, delay_s=delay)
                self._notes.append(f"{error}\n  {len(orphans)} episodes are played again; a replacement starts")
                return
            text = (
                f"rollout.worker_restarts={self.config.rollout.worker_restarts} replacements are used up; "
                f"the last to end: {error.message}"
            )
            hint = "see the worker's log; raise rollout.worker_restarts where the machine is at fault"
            self._fail(WorkerError(text, where=worker.name, hint=hint))

    def _fail(self, error: SpearError) -> None:
        """Nothing is played any more; whoever waits gets the error."""
        with self._lock:
            self._error = self._error or error
            waiting = [*self._queue, *(pending for worker in self._workers for pending in worker.episodes.values())]
            self._queue.clear()
        for pending in waiting:
            _resolve(pending.future, error)

    def _stop_cancelled(self, number: int, future: Future[Trajectory]) -> None:
        """Where a future was cancelled its worker need not go on with the episode."""
        if not future.cancelled():
            return
        with self._lock:
            players = [worker for worker in self._workers if worker.episodes.pop(number, None) is not None]
        for worker in players:
            worker.cancel([number])

    def _watch(self) -> None:
        """Give up workers that hang; their end is then received like any other."""
        rollout = self.config.rollout
        start_s, late_s = self.config.vllm.start_timeout_s, max(rollout.reply_deadline_s, rollout.env_deadline_s)
        while not self._closed.wait(TICK_S):
            self.report_notes()  # at once, also while nobody waits for episodes
            for worker in list(self._workers):
                if reason := worker.problem(start_s=start_s, late_s=late_s):
                    worker.give_up(reason)


def _resolve(future: Future[Trajectory], outcome: Trajectory | BaseException) -> None:
    with suppress(InvalidStateError):  # it was cancelled
        future.set_exception(outcome) if isinstance(outcome, BaseException) else future.set_result(outcome)


class FleetCollector(Player):
    """What a Collector is to one process, on a fleet, with the same seeds."""

    def __init__(self, fleet: Fleet, sampling: tuple[float, float]):
        self.fleet, self.sampling = fleet, sampling
        self.measures: dict[str, float] = {}
        self._before, self._since = fleet.totals(), time.monotonic()

    def submit(self, task: Task, group: int, sibling: int, *, seed: Seed) -> Future[Trajectory]:
        """See Fleet.submit; whoever waits for it calls `poll` now and then."""
        return self.fleet.submit([Assignment(0, task, group, sibling, seed, self.sampling)])[0]

    def poll(self) -> None:
        """See Fleet.poll."""
        self.fleet.poll()

    def measure(self) -> None:
        """Set `measures` to what the fleet did since it was last called."""
        totals, now = self.fleet.totals(), time.monotonic()
        done = {name: value - self._before.get(name, 0.0) for name, value in totals.items()}
        self.measures = {**done, "seconds": now - self._since}
        self._before, self._since = totals, now

    def close(self) -> None:
        """End the fleet, which other collectors may share."""
        self.fleet.close()

    def _play(self, episodes: Sequence[Episode]) -> list[Trajectory]:
        lost = {name: self._before[name] for name in LOST}  # what was lost while nobody played is measured too
        self.measure()
        self._before |= lost
        futures = self.fleet.submit([Assignment(0, *episode, self.sampling) for episode in episodes])
        try:
            waiting: set[Future[Trajectory]] = set(futures)
            while waiting:
                self.fleet.poll()
                done, waiting = wait(waiting, timeout=TICK_S, return_when=FIRST_EXCEPTION)
                LOG.info("%s: %d of %d episodes", episodes[0][3][0], len(futures) - len(waiting), len(futures))
                for future in done:
                    future.result()
        finally:
            self.fleet.report_notes()
            for future in futures:
                future.cancel()
        self.measure()
        return [future.result() for future in futures]
