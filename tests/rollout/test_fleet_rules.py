"""What the controller does with workers, shown on workers that only pretend: who gets which episode, what is refused,
played again or given up.
"""

from __future__ import annotations

import pickle
import socket
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest

from spearrl.errors import ConfigError, ContractError, EngineError, WorkerError, WorkerLost
from spearrl.launch.ray import actors
from spearrl.rollout.workers import fleet as fleets
from spearrl.rollout.workers import worker_proxy
from spearrl.rollout.workers.fleet import Fleet
from spearrl.rollout.workers.messages import Assignment, Hello, Report, Start
from spearrl.rollout.workers.rollout_worker import RolloutWorker
from spearrl.types import Action, Status, Task, Trajectory, Turn
from tests.support.gates import until
from tests.support.small_run import small_config


class Pretender:
    """A worker in threads: every episode takes `seconds` and holds `tokens` meanwhile."""

    def __init__(
        self,
        index: int,
        *,
        seconds: float = 0.01,
        tokens: int = 100,
        version: int = 0,
        transports=("shared_memory",),
        host: str = "",
    ):
        self.index, self.seconds, self.tokens, self.version = index, seconds, tokens, version
        self.out: SimpleQueue = SimpleQueue()
        self.running: dict[int, Assignment] = {}
        self.played: list[Assignment] = []
        self.cancelled: list[int] = []
        self.commands: list[tuple] = []
        self.most = 0
        self.silent = self.mute = self.unhealthy = False  # says nothing at all; answers no command; its engine broke
        self.status, self.error = Status.SUCCESS, None
        self.before_report = self.after_report = lambda: None  # of an episode
        self.over = threading.Event()
        self.say("ready", Hello("fake", transports, 1, version, host or socket.gethostname(), 0))
        threading.Thread(target=self._beat, daemon=True).start()

    def say(self, *message) -> None:
        if not self.silent and not self.over.is_set():
            self.out.put(pickle.dumps(message))

    def report(self) -> Report:
        return Report(
            len(self.running),
            self.tokens * len(self.running),
            0.0,
            not self.unhealthy,
            {"sampled_tokens": 10.0 * len(self.played)},
        )

    def send(self, data: bytes) -> None:
        if self.over.is_set():
            raise ConnectionError("gone")
        kind, *rest = pickle.loads(data)
        if kind == "play":
            for assignment in map(pickle.loads, rest[0]):
                self.running[assignment.number] = assignment
                self.most = max(self.most, len(self.running))
                timer = threading.Timer(self.seconds, self.finish, (assignment,))
                timer.daemon = True
                timer.start()
        elif kind == "cancel":
            self.cancelled += rest[0]
        elif kind == "call":
            self._call(*rest)
        elif kind == "close":
            self.kill()

    def finish(self, assignment: Assignment) -> None:
        if self.running.pop(assignment.number, None) is None:
            return
        self.played.append(assignment)
        self.before_report()
        turn = Turn((1,), (2,), (-1.0,), "stop", "", "", None, Action("x"), 1.0, self.version, self.version)
        trajectory = Trajectory(
            assignment.task,
            assignment.group,
            assignment.sibling,
            assignment.group * 4096 + assignment.sibling,
            [turn],
            self.status,
            error=self.error,
        )
        self.say("played", assignment.number, trajectory, self.report())
        self.after_report()

    def _call(self, number: int, method: str, arguments: tuple) -> None:
        self.commands.append((method, *arguments))
        if self.mute:
            return
        if method == "finish":
            self.version = arguments[0]
        if method == "begin" and arguments[0].get("bad"):
            self.say("refused", number, EngineError("no such transport"))
            return
        self.say("answer", number, [1, 2] if method == "finish" else None)

    def _beat(self) -> None:
        while not self.over.wait(0.02):
            self.say("beat", self.report())

    def receive(self) -> bytes:
        data = self.out.get()
        if data is None:
            raise ConnectionError("gone")
        return data

    def kill(self) -> None:
        if not self.over.is_set():
            self.over.set()
            self.running.clear()
            self.out.put(None)

    def ending(self) -> str:
        return "exit code 3; the end of the log"


class Crew:
    """Launches pretenders.

    `kinds` are the settings of the first workers by index, then of replacements in the order of their launch.
    """

    def __init__(self, *kinds: dict, workers: int = 2):
        self.kinds, self.workers = kinds, workers
        self._first: dict[int, Pretender] = {}
        self._later: list[Pretender] = []
        self._lock = threading.Lock()

    @property
    def launched(self) -> list[Pretender]:
        return [*(self._first[index] for index in sorted(self._first)), *self._later]

    def __call__(self, index: int) -> Pretender:
        with self._lock:
            slot = index if index not in self._first else self.workers + len(self._later)
            made = Pretender(index, **(self.kinds[slot] if slot < len(self.kinds) else {}))
            if index in self._first:
                self._later.append(made)
            else:
                self._first[index] = made
            return made


@pytest.fixture
def open_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[Fleet] = []
    monkeypatch.setattr(fleets, "TICK_S", 0.02)
    monkeypatch.setattr(fleets, "BACK_OFF_S", 0.001)

    def open_(crew: Crew, *changes: str, on_start=None) -> Fleet:
        config = small_config(tmp_path, "rollout.workers=2", "run.deterministic=false", *changes)
        opened.append(Fleet(config, crew, on_start=on_start))
        return opened[-1]

    yield open_
    for fleet in opened:
        fleet.close()


def tasks(count: int) -> list[Task]:
    return [Task(f"t{i}", "train") for i in range(count)]


def play(fleet: Fleet, count: int = 4, size: int = 2, **settings):
    collector = fleet.collector(1.0, 1.0)
    groups = collector.collect(tasks(count), size, run_seed=5, step=3, first_group_id=7, **settings)
    return groups, collector.measures


def names(groups) -> list[tuple[int, int, str]]:
    return [(t.group, t.sibling, t.task.id) for g in groups for t in g.trajectories]


WANTED = [(7 + position, sibling, f"t{position}") for position in range(4) for sibling in range(2)]


def wait_for(condition) -> None:
    until(condition, "it comes about")


@contextmanager
def meanwhile(condition, act):
    """In a thread beside the body: wait for the condition, then act."""
    faults = []

    def run() -> None:
        try:
            wait_for(condition)
            act()
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert not faults, faults


def test_groups_come_back_in_order_with_the_collectors_seeds(open_fleet):
    crew = Crew({"seconds": 0.03}, {"seconds": 0.001})
    groups, measures = play(open_fleet(crew), purpose="eval")
    assert names(groups) == WANTED and [g.id for g in groups] == [7, 8, 9, 10]
    dealt = [a for worker in crew.launched for a in worker.played]
    assert sorted((a.group, a.sibling, a.seed, a.sampling) for a in dealt) == [
        (7 + p, s, ("eval", 5, 3, p), (1.0, 1.0)) for p in range(4) for s in range(2)
    ]
    assert (
        measures["sampled_tokens"] == 80
        and measures["rollout/worker_deaths"] == measures["rollout/reissued"] == measures["rollout/stale"] == 0
    )


def test_the_faster_worker_gets_more_episodes_and_none_more_than_its_slots(open_fleet):
    crew = Crew({"seconds": 600}, {"seconds": 0.001})
    fleet = open_fleet(crew, "rollout.slots=2")
    slow, fast = crew.launched
    with meanwhile(lambda: len(fast.played) == 30, lambda: [slow.finish(one) for one in list(slow.running.values())]):
        play(fleet, count=16)
    assert (len(slow.played), len(fast.played)) == (2, 30)
    assert slow.most <= 2 and fast.most <= 2


def test_an_episode_goes_to_the_worker_with_the_fewest_tokens_in_flight(open_fleet):
    crew = Crew({"seconds": 600, "tokens": 1000}, {"seconds": 600, "tokens": 10})
    fleet = open_fleet(crew)
    collector = fleet.collector(1.0, 1.0)
    futures = []
    for number, task in enumerate(tasks(12)):
        futures.append(collector.submit(task, number, 0, seed=("rollout", 0, 1, number)))
        count = number + 1
        wait_for(lambda count=count: sum(m.report.running for m in fleet) == count)
    assert [len(worker.running) for worker in crew.launched] == [1, 11]
    for future in futures:
        future.cancel()
    wait_for(lambda: sum(len(worker.cancelled) for worker in crew.launched) == 12)


def test_a_deterministic_run_deals_in_a_fixed_way(open_fleet):
    crew = Crew({"seconds": 0.05}, {})
    play(open_fleet(crew, "run.deterministic=true", "rollout.slots=1"))
    assert [sorted((a.group, a.sibling) for a in worker.played) for worker in crew.launched] == [
        [(g, s) for g in range(7, 11)] for s in (0, 1)
    ]


def test_a_dead_workers_episodes_are_played_by_others_with_the_same_seeds(open_fleet, capsys):
    crew = Crew({"seconds": 600}, {"seconds": 0.05})
    fleet = open_fleet(crew)
    victim = crew.launched[0]
    with meanwhile(lambda: len(victim.running) == 4, victim.kill):
        groups, measures = play(fleet)
    assert names(groups) == WANTED
    assert (measures["rollout/worker_deaths"], measures["rollout/reissued"]) == (1, 4)
    dealt = [(a.group, a.sibling, a.seed) for worker in crew.launched for a in worker.played]
    assert Counter(dealt) == Counter((7 + p, s, ("rollout", 5, 3, p)) for p in range(4) for s in range(2)), (
        "none lost, none twice"
    )
    assert "worker 0 (fake): the worker ended: exit code 3; the end of the log" in capsys.readouterr().err
    wait_for(lambda: len(list(fleet)) == 2)
    assert len(crew.launched) == 3 and crew.launched[2].index == 0


def test_a_worker_that_dies_between_two_rollouts_is_told_by_the_next(open_fleet):
    crew = Crew()
    fleet = open_fleet(crew)
    collector = fleet.collector(1.0, 1.0)

    def deaths() -> float:
        collector.collect(tasks(2), 1, run_seed=5, step=3, first_group_id=7)
        return collector.measures["rollout/worker_deaths"]

    assert deaths() == 0
    crew.launched[0].kill()
    wait_for(lambda: fleet.totals()["rollout/worker_deaths"] == 1)
    assert deaths() == 1 and deaths() == 0


def test_all_workers_at_once_may_die(open_fleet):
    crew = Crew({"seconds": 600}, {"seconds": 600})
    fleet = open_fleet(crew)
    victims = crew.launched
    with meanwhile(lambda: all(len(one.running) == 4 for one in victims), lambda: [one.kill() for one in victims]):
        groups, measures = play(fleet)
    assert names(groups) == WANTED and measures["rollout/worker_deaths"] == 2
    assert 8 <= measures["rollout/reissued"] <= 12, "those of the first may have been dealt to the second"


def test_used_up_restarts_end_the_run_and_name_the_worker(open_fleet):
    crew = Crew(*({"seconds": 600} for _ in range(4)))
    fleet = open_fleet(crew, "rollout.worker_restarts=2")
    stop = threading.Event()

    def killer():
        while not stop.wait(0.02):
            for worker in crew.launched:
                if worker.running:
                    worker.kill()

    threading.Thread(target=killer).start()
    try:
        with pytest.raises(
            WorkerError,
            match=r"worker \d \(fake\): rollout.worker_restarts=2 replacements are used up; .*exit code 3; the end of "
            r"the log",
        ):
            play(fleet)
        with pytest.raises(WorkerError, match="used up"):
            play(fleet)
    finally:
        stop.set()
    assert len(crew.launched) == 4


@pytest.mark.parametrize(
    "fault, reason", [("silent", "no sign of life for 2 s"), ("unhealthy", "its engine is not healthy")]
)
def test_a_worker_that_hangs_or_whose_engine_broke_is_replaced(
    open_fleet, capsys, monkeypatch, fault: str, reason: str
):
    monkeypatch.setattr(worker_proxy, "SILENCE_S", 2.0)
    crew = Crew({"seconds": 600}, {"seconds": 0.01})
    fleet = open_fleet(crew)
    victim = crew.launched[0]
    with meanwhile(lambda: victim.running, lambda: setattr(victim, fault, True)):
        groups, measures = play(fleet)
    assert names(groups) == WANTED and measures["rollout/worker_deaths"] == 1 and crew.launched[0].over.is_set()
    assert reason in capsys.readouterr().err


def test_an_engine_error_of_a_broken_engine_is_played_elsewhere(open_fleet):
    crew = Crew({"seconds": 0.05}, {"seconds": 0.05})
    fleet = open_fleet(crew)
    broken = crew.launched[0]
    broken.status = Status.ENGINE_ERROR
    broken.before_report = lambda: setattr(broken, "unhealthy", True)  # at its first episode
    groups, measures = play(fleet)
    assert {t.status for g in groups for t in g.trajectories} == {Status.SUCCESS} and measures["rollout/reissued"] == 4


def test_an_engine_error_of_a_sound_engine_is_the_episodes_own(open_fleet):
    crew = Crew({}, {})
    fleet = open_fleet(crew)
    for worker in crew.launched:
        worker.status = Status.ENGINE_ERROR
    groups, measures = play(fleet)
    assert {t.status for g in groups for t in g.trajectories} == {Status.ENGINE_ERROR} and measures[
        "rollout/reissued"
    ] == 0


def test_an_engine_that_gives_nothing_but_errors_is_replaced(open_fleet, capsys):
    crew = Crew({"seconds": 0.01}, {"seconds": 0.01})
    fleet = open_fleet(crew)
    crew.launched[0].status, crew.launched[0].error = (
        Status.ENGINE_ERROR,
        "Traceback\nEngineError: no reply within 600 s",
    )
    groups, measures = play(fleet, count=16)
    assert (
        sum(t.status is Status.ENGINE_ERROR for g in groups for t in g.trajectories) == 7
        and measures["rollout/worker_deaths"] == 1
    )
    assert (
        "its last 8 episodes ended in engine errors; the last: EngineError: no reply within 600 s"
        in capsys.readouterr().err
    )


def sync(receiver, version: int) -> None:
    receiver.pause(5.0)
    receiver.begin({"version": version}, 5.0)
    receiver.finish(version, 5.0)
    receiver.resume(5.0)


def test_a_replacement_gets_no_episode_before_it_has_the_current_weights(open_fleet):
    crew = Crew({"seconds": 0.05}, {"seconds": 0.05})
    caught: list[tuple[str, str]] = []

    def catch_up(receiver) -> None:
        assert not receiver.episodes
        caught.append((receiver.name, threading.current_thread().name))
        sync(receiver, fleet.version)

    fleet = open_fleet(crew, on_start=catch_up)
    for version in (1, 2):
        fleet.announce(version)
        for receiver in fleet:
            sync(receiver, version)
    assert play(fleet)[1]["rollout/stale"] == 0 and caught == []
    for worker in crew.launched[:2]:
        worker.seconds = 600
    victims = crew.launched
    with meanwhile(lambda: all(one.running for one in victims), lambda: [one.kill() for one in victims]):
        groups, measures = play(fleet)
    assert {turn.min_version for g in groups for t in g.trajectories for turn in t.turns} == {2} and measures[
        "rollout/stale"
    ] == 0
    wait_for(lambda: len(list(fleet)) == 2)
    fleet.poll()
    assert {name for name, _ in caught} == {"worker 0 (fake)", "worker 1 (fake)"}
    assert {thread for _, thread in caught} == {threading.current_thread().name}, (
        "the learner is driven by its own thread only"
    )


def test_workers_that_missed_a_sync_wait_even_if_none_took_part_in_it(open_fleet):
    fleet = open_fleet(Crew())
    fleet.announce(1)
    with pytest.raises(WorkerError, match="it has weights of version 0, not 1"):
        play(fleet)
    fleet = open_fleet(Crew(), on_start=lambda receiver: sync(receiver, 1))
    fleet.announce(1)
    assert names(play(fleet)[0]) == WANTED


def test_a_stale_trajectory_is_refused_and_played_again(open_fleet):
    crew = Crew({"seconds": 0.01}, {"seconds": 0.1})
    fleet = open_fleet(crew)
    for receiver in fleet:
        sync(receiver, 3)
    late = crew.launched[0]
    late.version = 2  # it goes on with what it had
    late.after_report = lambda: setattr(late, "version", 3)  # for an episode
    groups, measures = play(fleet)
    assert {turn.min_version for g in groups for t in g.trajectories for turn in t.turns} == {3} and names(
        groups
    ) == WANTED
    assert measures["rollout/stale"] == measures["rollout/reissued"] >= 1


def test_a_worker_that_never_takes_weights_stops_the_run(open_fleet):
    crew = Crew({"seconds": 0.01}, {"seconds": 0.01})
    fleet = open_fleet(crew)
    for receiver in fleet:
        sync(receiver, 3)
    for worker in crew.launched:
        worker.version = 2
    with pytest.raises(WorkerError, match=r"worker \d \(fake\): it plays with weights older than version 3"):
        play(fleet)


def test_episodes_begun_before_a_sync_stay_good(open_fleet):
    """Playing ahead: what counts is the version at which an episode was asked for."""
    crew = Crew({"seconds": 0.3}, {"seconds": 0.3})
    fleet = open_fleet(crew, "rollout.max_staleness=1")
    future = fleet.collector(1.0, 1.0).submit(Task("t", "train"), 1, 0, seed=("rollout", 0, 1, 0))
    fleet.announce(1)
    assert future.result(5).turns[0].min_version == 0
    assert fleet.totals()["rollout/stale"] == 0


def test_commands_are_bounded_and_name_the_worker(open_fleet, monkeypatch):
    monkeypatch.setattr(worker_proxy, "CALL_SLACK_S", 0.05)
    crew = Crew()
    fleet = open_fleet(crew)
    first, second = fleet
    assert (
        first.finish(4, 60.0) == [1, 2]
        and first.transports == ("shared_memory",)
        and crew.launched[0].commands == [("finish", 4, 60.0)]
    )
    with pytest.raises(EngineError, match=r"worker 1 \(fake\): no such transport"):
        second.begin({"bad": True}, 60.0)
    crew.launched[1].mute = True
    with pytest.raises(EngineError, match=r"worker 1 \(fake\): did not answer take within 0.2 s"):
        second.take({}, 0.2)
    assert not second.lost
    silent = crew.launched[1]
    with (
        pytest.raises(WorkerLost, match=r"worker 1 \(fake\): ended before it answered resume"),
        meanwhile(lambda: silent.commands[-1][0] == "resume", silent.kill),
    ):
        second.resume(600.0)
    with pytest.raises(WorkerLost):
        second.pause(600.0)
    assert second.lost


def test_a_bucket_travels_to_another_machine(open_fleet, tmp_path: Path):
    crew = Crew({"host": "elsewhere"}, {})
    far, near = open_fleet(crew)
    path = tmp_path / "bucket.safetensors"
    path.write_bytes(b"weights")
    for worker in (far, near):
        worker.take({"path": str(path), "names": ["a"]}, 1.0)
    assert crew.launched[0].commands == [("take", {"path": str(path), "names": ["a"], "data": b"weights"}, 1.0)]
    assert crew.launched[1].commands == [("take", {"path": str(path), "names": ["a"]}, 1.0)]


def test_an_error_of_the_environment_ends_the_rollout_and_the_fleet_goes_on(open_fleet):
    crew = Crew({"seconds": 600}, {"seconds": 600})
    fleet = open_fleet(crew)
    first = crew.launched[0]

    def break_one() -> None:
        first.say(
            "failed",
            next(iter(first.running)),
            ContractError("reward nan is not a finite number", where="Env, task t0"),
        )

    with pytest.raises(ContractError, match="reward nan"), meanwhile(lambda: first.running, break_one):
        play(fleet)
    wait_for(lambda: sum(len(worker.cancelled) for worker in crew.launched) == 7)
    for worker in crew.launched:
        worker.seconds = 0.01
    assert names(play(fleet)[0]) == WANTED


def test_a_task_that_cannot_travel_is_refused(open_fleet):
    fleet = open_fleet(Crew())
    with pytest.raises(ContractError, match="task odd cannot travel between processes"):
        fleet.collector(1.0, 1.0).collect(
            [Task("odd", "train", {"f": lambda: 0})], 1, run_seed=0, step=1, first_group_id=0
        )


def test_what_cannot_leave_a_worker_is_said():
    worker, sent = RolloutWorker.__new__(RolloutWorker), []
    worker._send_bytes = sent.append
    worker._send("played", 4, Trajectory(Task("t", "train"), 0, 0, 0, info={"f": lambda: 0}), Report())
    kind, number, error = pickle.loads(sent[0])
    assert (kind, number, type(error)) == ("failed", 4, ContractError) and "Outcome.info" in error.hint


def test_a_worker_that_does_not_start_is_given_up_in_time(tmp_path: Path, monkeypatch):
    class Never(Pretender):
        def say(self, *message) -> None:
            return

    monkeypatch.setattr(fleets, "TICK_S", 0.02)
    with pytest.raises(WorkerError, match="worker 0: the worker ended: it did not start within 0.2 s"):
        Fleet(small_config(tmp_path, "rollout.workers=1", "vllm.start_timeout_s=0.2"), Never)


def test_ray_that_is_not_installed_is_an_error_with_the_fix(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="Ray is not installed") as caught:
        actors(Start(small_config(tmp_path, "rollout.workers=2"), "model"), tmp_path)
    assert "spearrl[ray]" in caught.value.hint


def test_closing_fails_what_waits(open_fleet):
    crew = Crew({"seconds": 600}, {"seconds": 600})
    fleet = open_fleet(crew)
    future = fleet.collector(1.0, 1.0).submit(Task("t", "train"), 1, 0, seed=("rollout", 0, 1, 0))
    fleet.close()
    assert all(worker.over.is_set() for worker in crew.launched)
    with pytest.raises(WorkerError, match="closed"):
        future.result(1)
