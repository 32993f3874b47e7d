"""Generation ahead of the learner: groups are begun early, taken as they finish, and never used older than allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

from spearrl.rollout.player import Player
from spearrl.types import Group, Task, Trajectory

TICK_S = 0.1  # between two looks at who plays


@dataclass
class _Begun:
    """A group under way, and the weights it was begun with."""

    group: Group
    version: int
    episodes: list[Future[Trajectory]]

    @property
    def done(self) -> bool:
        return all(future.done() for future in self.episodes)


class Ahead:
    """Plays the groups of coming steps while the learner works on earlier ones.

    At step t those of the steps up to t + max_staleness are under way. A step takes the oldest that have finished and
    waits only for those that later steps could not take in time; the others carry over. What is taken was therefore
    begun with weights at most `max_staleness` versions old, and its tokens are no older.

    Args:
        player: plays the episodes. It is polled while they are waited for, which brings workers that were replaced to
            the current weights.
        tasks_of: tasks of a (1-based) step, `count` of them; group number n belongs to step n // count + 1, whose seeds
            it has.
        last_step: no group is begun for a later step.
    """

    def __init__(
        self,
        player: Player,
        tasks_of: Callable[[int], Sequence[Task]],
        *,
        run_seed: int,
        count: int,
        group_size: int,
        max_staleness: int,
        last_step: int,
    ):
        self._player, self._tasks_of, self._run_seed = player, tasks_of, run_seed
        self._count, self._size, self._staleness, self._last_step = count, group_size, max_staleness, last_step
        self._begun: dict[int, _Begun] = {}
        self._waiting: list[int] = []  # of a resumed run: begun before, not taken
        self._next = 0
        self._first_id = 0

    def start(self, step: int, first_id: int) -> None:
        """Begin with the groups of `step`, numbering groups from `first_id`; for a run that has no state to load."""
        self._next = (step - 1) * self._count
        self._first_id = first_id - self._next

    def take(self, step: int, version: int) -> list[Group]:
        """The groups of a training step, in order of their numbers.

        Args:
            version: of the weights the learner has now.
        Raises:
            WorkerError: of a worker that cannot be replaced.
        """
        # A resumed run may run less far ahead than before.
        room = self._count * (self._staleness + 1) - len(self._begun)
        for number in self._waiting[:room]:
            self._begin(number, version)
        self._waiting = self._waiting[room:]
        while self._next < min(step + self._staleness, self._last_step) * self._count:
            self._begin(self._next, version)
            self._next += 1
        self._player.poll()
        while (numbers := self._finished(version)) is None:
            playing = [f for begun in self._begun.values() for f in begun.episodes if not f.done()]
            wait(playing, timeout=TICK_S, return_when=FIRST_COMPLETED)
            self._player.poll()
        taken = {number: self._begun.pop(number) for number in numbers}
        for begun in taken.values():
            begun.group.trajectories = [future.result() for future in begun.episodes]
        return [begun.group for begun in taken.values()]

    @property
    def next_id(self) -> int:
        """A group id that is still free."""
        return self._first_id + self._next

    def state_dict(self) -> dict[str, Any]:
        """Which groups were begun but not taken; their episodes are played again, with the same seeds."""
        waiting = sorted([*self._waiting, *self._begun])
        return {"count": self._count, "next": self._next, "first_id": self._first_id, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next, self._first_id, self._waiting = state["next"], state["first_id"], list(state["waiting"])

    def close(self) -> None:
        """Give up what is under way."""
        for begun in self._begun.values():
            for future in begun.episodes:
                future.cancel()
        self._begun.clear()

    def _finished(self, version: int) -> list[int] | None:
        """The oldest finished groups, as many as a step takes; None while they leave more old ones behind than the
        steps before their limit can take.
        """
        needed = min(self._count, len(self._begun))
        numbers = [number for number, begun in self._begun.items() if begun.done][:needed]
        for limit in {begun.version for begun in self._begun.values()}:
            old = {number for number, begun in self._begun.items() if begun.version <= limit}
            if len(old.difference(numbers)) > self._count * (limit + self._staleness - version):
                return None
        return numbers if len(numbers) == needed else None

    def _begin(self, number: int, version: int) -> None:
        step, position = number // self._count + 1, number % self._count
        task = self._tasks_of(step)[position]
        group = Group(self._first_id + number, task)
        seed = ("rollout", self._run_seed, step, position)
        episodes = [self._player.submit(task, group.id, sibling, seed=seed) for sibling in range(self._size)]
        self._begun[number] = _Begun(group, version, episodes)
