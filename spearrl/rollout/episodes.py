"""The episodes a training step learns from: played for it, or ahead of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spearrl import algorithm
from spearrl.config import RunConfig
from spearrl.rollout import Ahead, Player
from spearrl.rollout.tasks import tasks_of_step
from spearrl.rollout.workers.fleet import LOST
from spearrl.run.metrics import rollout_metrics
from spearrl.seeds import derive
from spearrl.types import Group, Task

MEASURES = ("env/restarts", "env/deadline")


class Episodes:
    """Groups by training step. With rollout.max_staleness they are played ahead, while the learner works.

    Args:
        tasks: of the training split.
    """

    def __init__(self, config: RunConfig, player: Player, tasks: Sequence[Task]):
        self.config, self.player, self.tasks = config, player, tasks
        self.groups_played = 0  # numbers groups and trajectories, so that no two of a run are the same
        self.ahead = self._ahead() if config.rollout.max_staleness else None

    def play(self, step: int, version: int) -> tuple[list[Group], dict[str, float]]:
        """The step's groups, and what their episodes were like. `version`: of the learner's weights."""
        played: list[Group] = []
        measured = {
            "engine_seconds": 0.0,
            "env_seconds": 0.0,
            **dict.fromkeys((*MEASURES, *(LOST if self.config.rollout.workers else ())), 0.0),
        }
        dynamic, size = self.config.algo.dynamic, self.config.rollout.group_size

        def play_round(number: int) -> list[Group]:
            groups = self._round(step, version, number)
            played.extend(groups)
            for name in measured:
                measured[name] += self.player.measures.get(name, 0.0)
            return groups

        rounds = dynamic.rounds if dynamic.enabled else 1
        groups, sampling = algorithm.play_rounds(play_round, wanted=self.config.rollout.groups_per_step, rounds=rounds)
        metrics = rollout_metrics(played, algorithm.trainable(played, size))
        metrics |= {"time/engine": measured.pop("engine_seconds"), "time/env": measured.pop("env_seconds"), **measured}
        return groups, {**metrics, **(sampling if dynamic.enabled else {})}

    def state_dict(self) -> dict[str, Any]:
        return {"groups_played": self.groups_played, "ahead": self.ahead.state_dict() if self.ahead else None}

    def load_state_dict(self, state: dict[str, Any], *, step: int) -> None:
        """Go on after `step`; a run may change rollout.max_staleness when it is resumed. With other groups_per_step nothing under way is gone on with."""
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
        rollout, run = self.config.rollout, self.config.run
        return Ahead(
            lambda task, group, sibling, place: self.player.submit(
                task, group, sibling, seed=("rollout", run.seed, *place)
            ),
            lambda step: tasks_of_step(self.tasks, step, rollout.groups_per_step, run.seed),
            count=rollout.groups_per_step,
            group_size=rollout.group_size,
            max_staleness=rollout.max_staleness,
            last_step=run.steps,
            tend=self.player.tend,
        )
