"""Playing ahead of the learner: what is taken is complete, in no doubt about its age, and nothing is lost or played
twice.
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spearrl.rollout.asynchronous import Ahead
from spearrl.rollout.player import Player, Seed
from spearrl.types import Task, Trajectory


class Players(Player):
    """Episodes that finish when told to; knows the version at which each was begun."""

    def __init__(self):
        self.version = 0
        self.running: list[tuple[Future, Trajectory]] = []
        self.begun: dict[tuple[int, int], tuple[int, Seed]] = {}  # (group, sibling) → (version, seed)

    def close(self):
        raise AssertionError("Ahead closes nothing")

    def _play(self, episodes):
        raise AssertionError("Ahead submits episodes")

    def submit(self, task, group, sibling, *, seed):
        future: Future = Future()
        assert (group, sibling) not in self.begun, "an episode was begun twice"
        self.begun[group, sibling] = (self.version, seed)
        self.running.append((future, Trajectory(task, group, sibling, group * 4096 + sibling)))
        return future

    def finish(self, which: int) -> None:
        future, trajectory = self.running.pop(which)
        future.set_result(trajectory)


def tasks_of(step: int) -> list[Task]:
    return [Task(f"{step}.{number}", "train") for number in range(3)]


def make(players: Players, staleness: int, last_step: int = 8) -> Ahead:
    settings = {"count": 3, "group_size": 2, "max_staleness": staleness, "last_step": last_step}
    return Ahead(players, tasks_of, run_seed=7, **settings)


def take(ahead: Ahead, players: Players, step: int, draw: random.Random):
    """Take a step's groups while episodes finish in any order."""
    groups: list = []
    thread = threading.Thread(target=lambda: groups.append(ahead.take(step, players.version)))
    thread.start()
    while thread.is_alive():
        if players.running:
            players.finish(draw.randrange(len(players.running)))
        thread.join(0.0005)
    return groups[0]


@settings(max_examples=25, deadline=None)
@given(staleness=st.integers(0, 3), seed=st.integers(0, 10_000), idle=st.integers(0, 6))
def test_no_group_is_older_than_allowed_and_each_is_taken_once(staleness, seed, idle):
    players, draw = Players(), random.Random(seed)
    ahead = make(players, staleness)
    ahead.start(1, 0)
    taken: list[int] = []
    for step in range(1, 9):
        groups = take(ahead, players, step, draw)
        assert len(groups) == 3
        for group in groups:
            version, (purpose, run_seed, own_step, position) = players.begun[group.id, 0]
            assert (purpose, run_seed) == ("rollout", 7)
            assert players.version - version <= staleness
            assert group.task.id == f"{own_step}.{position}" and [t.sibling for t in group.trajectories] == [0, 1]
        taken += [group.id for group in groups]
        players.version += 1
        for _ in range(min(idle, len(players.running))):
            players.finish(draw.randrange(len(players.running)))
    assert sorted(taken) == list(range(24)), "every group of the run is taken exactly once"


def test_without_staleness_a_step_takes_its_own_groups():
    players, ahead = Players(), None
    ahead = make(players, 0)
    ahead.start(1, 0)
    for step in (1, 2):
        groups = take(ahead, players, step, random.Random(step))
        assert [g.task.id for g in groups] == [t.id for t in tasks_of(step)]


def test_late_groups_carry_over_and_a_step_does_not_wait_for_them():
    players = Players()
    ahead = make(players, 1)
    ahead.start(1, 0)
    thread_result: list = []
    thread = threading.Thread(target=lambda: thread_result.append(ahead.take(1, 0)))
    thread.start()
    while len(players.running) < 12:
        thread.join(0.001)
    for future, trajectory in [pair for pair in players.running if pair[1].group != 1]:  # group 1 of step 1 is late
        future.set_result(trajectory)
    thread.join(10)
    assert not thread.is_alive() and [g.id for g in thread_result[0]] == [0, 2, 3]


def test_a_resumed_run_plays_what_was_under_way_again_with_the_same_seeds():
    players = Players()
    ahead = make(players, 2)
    ahead.start(1, 100)
    first = take(ahead, players, 1, random.Random(0))
    state, before = ahead.state_dict(), dict(players.begun)
    again = Players()
    again.version = 1
    resumed = make(again, 2)
    resumed.load_state_dict(state)
    rest = [g for step in range(2, 9) for g in take(resumed, again, step, random.Random(step))]
    assert sorted(g.id for g in [*first, *rest]) == list(range(100, 124))
    shared = before.keys() & again.begun.keys()
    assert shared and all(before[key][1] == again.begun[key][1] for key in shared)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_resumed_run_may_run_less_far_ahead(staleness):
    """What was under way is then more than the steps before the new limit can take: it is begun again bit by bit."""
    players = Players()
    ahead = make(players, 3)
    ahead.start(1, 0)
    first = take(ahead, players, 1, random.Random(0))
    again = Players()
    again.version = 1
    resumed = make(again, staleness)
    resumed.load_state_dict(ahead.state_dict())
    rest: list = []

    def play():
        for step in range(2, 9):
            groups = resumed.take(step, again.version)
            assert all(again.version - again.begun[group.id, 0][0] <= staleness for group in groups)
            rest.extend(groups)
            again.version += 1

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while thread.is_alive() and time.monotonic() < deadline:
        if again.running:
            again.finish(0)
        thread.join(0.0005)
    assert not thread.is_alive(), "it waits for ever"
    assert sorted(g.id for g in [*first, *rest]) == list(range(24))


def test_a_failed_episode_ends_the_step():
    players = Players()
    ahead = make(players, 0)
    ahead.start(1, 0)
    original = players.submit

    def failing(*args, **seed):
        future = original(*args, **seed)
        future.set_exception(RuntimeError("no worker left"))
        return future

    players.submit = failing
    with pytest.raises(RuntimeError, match="no worker left"):
        ahead.take(1, 0)
