"""The episodes a training step learns from: which tasks it plays, and whether they are played for it or ahead of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from spearrl.config import RunConfig
from spearrl.rollout.asynchronous import Ahead
from spearrl.rollout.player import Player
from spearrl.rollout.workers.fleet import LOST
from spearrl.seeds import derive
from spearrl.types import Group, Task

ENV_FAULTS = ("env/restarts", "env/deadline")


@dataclass(frozen=True)
class StepEpisodes:
    """What was played for a step: `groups` to learn from, and `played`, all groups (dynamic sampling leaves some out).

    measures: time/engine and time/env (seconds), env/…, with workers rollout/…, with dynamic sampling dynamic/….
    """

    groups: list[Group]
    played: list[Group]
    measures: dict[str, float]


class Episodes:
    """Groups by training step. With rollout.max_staleness they are played ahead, while the learner works.

    Args:
        tasks: of the training split.
    """

    def __init__(self, config: RunConfig, player: Player, tasks: Sequence[Task]):
        self.config, self.player, self.tasks = config, player, tasks
        self.groups_played = 0  # numbers groups and trajectories, so that no two of a run are the same
        self.ahead = self._ahead() if config.rollout.max_staleness else None

    def play(self, step: int, version: int) -> StepEpisodes:
        """The step's groups. `version`: of the learner's weights.

        With dynamic sampling (DAPO, arXiv 2503.14476 eq. 11) groups whose episodes all earn the same, which teach
        nothing, are left out and further tasks played, until there are rollout.groups_per_step others; the last
        permitted round is taken whole.
        """
        dynamic = self.config.algo.dynamic
        rounds = dynamic.rounds if dynamic.enabled else 1
        lost = LOST if self.config.rollout.workers else ()
        measures = dict.fromkeys(("engine_seconds", "env_seconds", *ENV_FAULTS, *lost), 0.0)
        groups: list[Group] = []
        played: list[Group] = []
        for number in range(rounds):
            latest = self._round(step, version, number)
            for name in measures:
                measures[name] += self.player.measures.get(name, 0.0)
            played += latest
            groups += latest if number == rounds - 1 else [group for group in latest if group.mixed]
            if len(groups) >= self.config.rollout.groups_per_step:
                break
        times = {"time/engine": measures.pop("engine_seconds"), "time/env": measures.pop("env_seconds")}
        if dynamic.enabled:
            measures |= {"dynamic/rounds": number + 1.0, "dynamic/groups_dropped": float(len(played) - len(groups))}
        return StepEpisodes(groups, played, times | measures)

    def state_dict(self) -> dict[str, Any]:
        return {"groups_played": self.groups_played, "ahead": self.ahead.state_dict() if self.ahead else None}

    def load_state_dict(self, state: dict[str, Any], *, step: int) -> None:
        """Go on after `step`.

        A run may change rollout.max_staleness when it is resumed; with other groups_per_step, groups under way are
        given up.
        """
        self.groups_played = state["groups_played"]
        if self.ahead and state["ahead"] and state["ahead"]["count"] == self.config.rollout.groups_per_step:
            self.ahead.load_state_dict(state["ahead"])
        else:
            self.begin(step)

    def begin(self, step: int = 0) -> None:
        """Go on after `step` with nothing under way."""
        if self.ahead:
            self.ahead.start(step + 1, self.groups_played)

    def close(self) -> None:
        """Give up what was played ahead."""
        if self.ahead:
            self.ahead.close()

    def _round(self, step: int, version: int, number: int) -> list[Group]:
        """As many groups as a step needs."""
        if self.ahead:
            groups = self.ahead.take(step, version)
            self.player.measure()
            self.groups_played = self.ahead.next_id
            return groups
        rollout, run = self.config.rollout, self.config.run
        seed = derive(run.seed, "dynamic", number) if number else run.seed
        tasks = tasks_of_step(self.tasks, step, rollout.groups_per_step, seed)
        groups = self.player.collect(
            tasks, rollout.group_size, run_seed=seed, step=step, first_group_id=self.groups_played
        )
        self.groups_played += len(groups)
        return groups

    def _ahead(self) -> Ahead:
        rollout, seed = self.config.rollout, self.config.run.seed
        return Ahead(
            self.player,
            lambda step: tasks_of_step(self.tasks, step, rollout.groups_per_step, seed),
            run_seed=seed,
            count=rollout.groups_per_step,
            group_size=rollout.group_size,
            max_staleness=rollout.max_staleness,
            last_step=self.config.run.steps,
        )


def tasks_of_step(tasks: Sequence[Task], step: int, count: int, seed: int) -> list[Task]:
    """The `count` tasks of a (1-based) step: shuffled epochs, a function of (seed, step) alone, so that resuming needs
    no cursor.
    """
    epochs = (divmod(number, len(tasks)) for number in range((step - 1) * count, step * count))
    return [tasks[_shuffled(len(tasks), seed, epoch)[index]] for epoch, index in epochs]


@lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def _shuffled(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(derive(seed, "tasks", epoch)).shuffle(order)
    return order
