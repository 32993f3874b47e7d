"""The rollout workers of a run: episodes are dealt to those with the fewest tokens in flight, and a dead worker's are played by others with the same seeds."""

from __future__ import annotations

import pickle
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, InvalidStateError, wait
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from spearrl.config import RunConfig
from spearrl.errors import ContractError, SpearError, WorkerError, WorkerLost
from spearrl.rollout.workers.link import Launcher
from spearrl.rollout.workers.member import Member, Pending
from spearrl.rollout.workers.messages import Assignment
from spearrl.types import Group, Status, Task, Trajectory

TICK_S = 0.2  # between two looks at the workers
BACK_OFF_S, BACK_OFF_MOST_S = 0.1, 10.0  # before a replacement; doubles while nothing is played in between
ERRORS = 8  # episodes in a row that end in engine errors: the engine is at fault, not they
REFUSALS = 3  # times an episode may come back too old
LOST = ("rollout/worker_deaths", "rollout/reissued", "rollout/stale")  # what is counted of lost work


class Fleet:
    """Starts rollout.workers workers in parallel and keeps that many going, at most rollout.worker_restarts replacements long. Thread-safe.

    Args:
        launch: starts the worker of an index.
        on_start: called with a replacement that does not have the current weights, from the thread that calls `poll`: has to bring them
            (the bridge's catch_up). Until then the worker gets no episodes.
        report: told of what is noteworthy, from that thread too; default: standard error.
    Raises:
        SpearError: what kept a worker from starting: its error, or a WorkerError with its exit status and last log lines.
    """

    def __init__(
        self,
        config: RunConfig,
        launch: Launcher,
        *,
        on_start: Callable[[Member], None] | None = None,
        report: Callable[[str], None] | None = None,
    ):
        settings = config.rollout
        self.config, self.version = config, 0
        self._on_start, self._report = on_start, report or partial(print, file=sys.stderr)
        self._notes: deque[str] = deque()
        self._launch, self._slots, self._left = launch, settings.slots, settings.worker_restarts
        self._start_s, self._late_s = (
            config.vllm.start_timeout_s,
            max(settings.reply_deadline_s, settings.env_deadline_s),
        )
        # Only the local engine repeats itself bit by bit, where each worker meets the same episodes at once.
        self._fixed = config.run.deterministic and settings.engine == "local" and not settings.max_staleness
        self._lock = threading.RLock()
        self._queue: deque[Pending] = deque()
        self._numbers = count()
        self._counts = Counter[str](dict.fromkeys(LOST, 0))
        self._in_a_row = 0
        self._failed: SpearError | None = None
        self._started, self._closed = False, threading.Event()
        with self._lock:
            self._members = [Member(index, launch, self._hear) for index in range(settings.workers)]
        threading.Thread(target=self._watch, name="fleet-watch", daemon=True).start()
        try:
            self._await_all()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Member]:
        """The workers that are up now: what the bridge sends weights to, asked anew at every sync."""
        with self._lock:
            return iter([member for member in self._members if member.ready])

    def announce(self, version: int) -> None:
        """The learner's weights have this version now; workers that do not have it yet get no new episodes."""
        with self._lock:
            self.version = max(self.version, version)

    def submit(self, assignments: Sequence[Assignment]) -> list[Future[Trajectory]]:
        """Have episodes played; each future gives the trajectory. Cancelling one stops its episode. Callbacks run in a thread of the fleet: keep them short.

        Args:
            assignments: their numbers are given here.
        Raises:
            ContractError: a task's data cannot travel to another process.
            WorkerError: the fleet came to its end; so do futures that wait then.
        """
        with self._lock:
            self._check()
            batch = [self._pending(assignment, place) for place, assignment in enumerate(assignments)]
            self._queue.extend(batch)
        for pending in batch:
            pending.future.add_done_callback(partial(self._dropped, pending.assignment.number))
        self._deal()
        return [pending.future for pending in batch]

    def poll(self) -> None:
        """Bring replacements to the current weights. To be called by whoever waits for episodes, from the thread that owns the learner.

        Raises:
            WorkerError: the fleet came to its end.
        """
        self.report_notes()
        self._check()
        behind = [member for member in self if member.version != self.version]
        for member in behind:
            if self._on_start is None:
                raise WorkerError(
                    f"it has weights of version {member.version}, not {self.version}, and nothing brings them",
                    where=member.name,
                )
            try:
                self._on_start(member)
            except WorkerLost as error:
                self._notes.append(f"{error}, while it was given its first weights")

    def report_notes(self) -> None:
        """Report what happened since the last time."""
        while self._notes:
            self._report(self._notes.popleft())

    def totals(self) -> dict[str, float]:
        """What all workers did since the start, and what was lost. "engine_seconds" is the mean over workers."""
        with self._lock:
            total = Counter(self._counts)
            for member in self._members:
                total.update(member.report.counters)
        return {name: value / (len(self._members) if name == "engine_seconds" else 1) for name, value in total.items()}

    def collector(self, temperature: float, top_p: float) -> FleetCollector:
        """Plays tasks on the fleet, with this sampling."""
        return FleetCollector(self, (temperature, top_p))

    def close(self) -> None:
        """End every worker, within seconds. May be called twice."""
        with self._lock:  # no replacement starts from now on
            self._closed.set()
            members = list(self._members)
        for member in members:
            member.close()
        for member in members:
            member.join()
        self._fail(WorkerError("the workers were closed", where="rollout"))

    def _await_all(self) -> None:
        while not all(member.ready for member in self._members):
            self._check()
            time.sleep(0.01)
        self._started = True

    def _pending(self, assignment: Assignment, place: int) -> Pending:
        numbered = replace(assignment, number=next(self._numbers))
        try:
            return Pending(numbered, pickle.dumps(numbered), self.version, place % len(self._members))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            hint = "use plain values in Task.data: numbers, text, tuples, dicts"
            raise ContractError(
                f"task {assignment.task.id} cannot travel to a worker: {error}", where="env", hint=hint
            ) from error

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _deal(self) -> None:
        """Hand out what waits, as far as workers have room."""
        batches: dict[Member, list[Pending]] = {}
        with self._lock:
            while self._queue and (member := self._choose(self._queue[0])) is not None:
                pending = self._queue.popleft()
                if not pending.future.cancelled():
                    member.jobs[pending.assignment.number] = pending
                    batches.setdefault(member, []).append(pending)
        for member, batch in batches.items():
            member.play(batch)

    def _choose(self, pending: Pending) -> Member | None:
        """The worker for an episode. Dealt in a fixed way, a worker gets all of its episodes at once and its engine orders them."""
        able = [
            member
            for member in self._members
            if member.ready and member.report.healthy and member.version == self.version
        ]
        if self._fixed and (home := self._members[pending.home]) in able:
            return home
        free = [member for member in able if len(member.jobs) < self._slots]
        typical = max(1.0, sum(m.report.tokens for m in able) / max(1, sum(m.report.running for m in able)))

        def load(member: Member) -> tuple[float, int]:
            """Tokens in flight; episodes that the worker had not begun at its last report count as much as a begun one."""
            unseen = max(0, len(member.jobs) - member.report.running)
            return member.report.tokens + unseen * typical, member.index

        return min(free, key=load, default=None)

    def _hear(self, member: Member, kind: str, values: tuple[Any, ...]) -> None:
        """What members tell, each from its own thread."""
        if kind == "version":
            with self._lock:
                member.version = values[0]
                self.announce(values[0])
        elif kind == "played":
            self._played(member, *values[:2])
        elif kind == "failed":
            self._resolve(member.jobs.pop(values[0], None), error=values[1])
        elif kind == "lost":
            self._lost(member, values[0])
        self._deal()

    def _played(self, member: Member, number: int, trajectory: Trajectory) -> None:
        with self._lock:
            pending = member.jobs.pop(number, None)
            self._in_a_row = 0
            if pending is None:
                return
            failed, stale = (
                trajectory.status is Status.ENGINE_ERROR,
                any(turn.min_version < pending.version for turn in trajectory.turns),
            )
            member.errors = member.errors + 1 if failed else 0
            if stale:
                self._counts["rollout/stale"] += 1
                pending.refused += 1
            broken = failed and (member.errors >= ERRORS or not member.report.healthy)
            if pending.refused < REFUSALS and (stale or broken):
                self._again([pending])
                if member.errors >= ERRORS:
                    member.give_up(
                        f"its last {ERRORS} episodes ended in engine errors; the last: {(trajectory.error or '?').splitlines()[-1]}"
                    )
                return
        if stale:
            text = f"it plays with weights older than version {pending.version}, although it took them"
            self._resolve(
                pending, error=WorkerError(text, where=member.name, hint="this is a fault of the engine or of the sync")
            )
        else:
            self._resolve(pending, trajectory)

    def _again(self, episodes: list[Pending]) -> None:
        """Play episodes again, before all others."""
        self._counts["rollout/reissued"] += len(episodes)
        self._queue.extendleft(reversed(episodes))

    def _lost(self, member: Member, error: SpearError) -> None:
        with self._lock:
            orphans = [pending for pending in member.jobs.values() if not pending.future.cancelled()]
            member.jobs.clear()
            if not self._started or self._closed.is_set():
                self._fail(error)
                return
            self._counts.update(member.report.counters)
            self._counts["rollout/worker_deaths"] += 1
            self._again(orphans)
            if self._left:
                self._left -= 1
                delay = min(BACK_OFF_MOST_S, BACK_OFF_S * 2**self._in_a_row)
                self._in_a_row += 1
                self._members[member.index] = Member(member.index, self._launch, self._hear, delay_s=delay)
                self._notes.append(f"{error}\n  {len(orphans)} episodes are played again; a replacement starts")
                return
            used = f"rollout.worker_restarts={self.config.rollout.worker_restarts} replacements are used up; the last to end: {error.message}"
            self._fail(
                WorkerError(
                    used,
                    where=member.name,
                    hint="see the worker's log; raise rollout.worker_restarts where the machine is at fault",
                )
            )

    def _fail(self, error: SpearError) -> None:
        """Nothing is played any more; who waits is told."""
        with self._lock:
            self._failed = self._failed or error
            waiting = [*self._queue, *(pending for member in self._members for pending in member.jobs.values())]
            self._queue.clear()
        for pending in waiting:
            self._resolve(pending, error=error)

    def _resolve(
        self, pending: Pending | None, trajectory: Trajectory | None = None, error: BaseException | None = None
    ) -> None:
        try:
            if pending is not None and error is not None:
                pending.future.set_exception(error)
            elif pending is not None and trajectory is not None:
                pending.future.set_result(trajectory)
        except InvalidStateError:
            return  # it was cancelled

    def _dropped(self, number: int, future: Future[Trajectory]) -> None:
        """Where a future was cancelled its worker need not go on with the episode."""
        if not future.cancelled():
            return
        with self._lock:
            players = [member for member in self._members if member.jobs.pop(number, None) is not None]
        for member in players:
            member.cancel([number])

    def _watch(self) -> None:
        """Give up workers that hang; their end is then heard like any other."""
        while not self._closed.wait(TICK_S):
            for member in list(self._members):
                if reason := member.problem(start_s=self._start_s, late_s=self._late_s):
                    member.give_up(reason)


class FleetCollector:
    """What a Collector is to one process, on a fleet: rollout.collector.Player."""

    def __init__(self, fleet: Fleet, sampling: tuple[float, float]):
        self.fleet, self.sampling = fleet, sampling
        self.measures: dict[str, float] = {}
        self._before, self._since = fleet.totals(), time.monotonic()

    def collect(
        self,
        tasks: Sequence[Task],
        group_size: int,
        *,
        run_seed: int,
        step: int,
        first_group_id: int,
        purpose: str = "rollout",
    ) -> list[Group]:
        """Play each task `group_size` times, with the seeds Collector.collect would use.

        Raises:
            ContractError, ConfigError: the environment is at fault.
            WorkerError: workers had to be replaced more often than allowed.
        """
        lost = {name: self._before[name] for name in LOST}  # also what was lost while nobody played is told
        self.measure()
        self._before |= lost
        groups = [Group(first_group_id + place, task) for place, task in enumerate(tasks)]
        seeds = [(purpose, run_seed, step, place) for place in range(len(groups))]
        batch = [
            self._assignment(g.task, g.id, sibling, seed)
            for g, seed in zip(groups, seeds, strict=True)
            for sibling in range(group_size)
        ]
        futures = self.fleet.submit(batch)
        try:
            waiting: set[Future[Trajectory]] = set(futures)
            while waiting:
                self.fleet.poll()
                done, waiting = wait(waiting, timeout=TICK_S, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
        finally:
            self.fleet.report_notes()
            for future in futures:
                future.cancel()
        for place, group in enumerate(groups):
            group.trajectories = [future.result() for future in futures[place * group_size : (place + 1) * group_size]]
        self.measure()
        return groups

    def submit(self, task: Task, group: int, sibling: int, *, seed: tuple[int | str, ...]) -> Future[Trajectory]:
        """Have one episode played while other things are done; see Fleet.submit. Whoever waits for it calls `poll` now and then."""
        return self.fleet.submit([self._assignment(task, group, sibling, seed)])[0]

    def measure(self) -> None:
        """Set `measures` to what the fleet did since it was last called."""
        totals, now = self.fleet.totals(), time.monotonic()
        self.measures = {name: value - self._before.get(name, 0.0) for name, value in totals.items()} | {
            "seconds": now - self._since
        }
        self._before, self._since = totals, now

    def poll(self) -> None:
        """See Fleet.poll."""
        self.fleet.poll()

    def close(self) -> None:
        """End the fleet, which other collectors may share."""
        self.fleet.close()

    def _assignment(self, task: Task, group: int, sibling: int, seed: tuple[int | str, ...]) -> Assignment:
        return Assignment(0, task, group, sibling, seed, self.sampling)
