"""Who plays episodes: a Collector in this process, or a fleet of workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future

from spearrl.errors import ConfigError
from spearrl.types import Group, Task, Trajectory

Seed = tuple[int | str, ...]  # what the random draws of an episode derive from
Episode = tuple[Task, int, int, Seed]  # task, group, sibling; (purpose, run seed, step, position of the task in it)


class Player(ABC):
    """Plays tasks.

    measures: of the last `collect`: seconds, engine_seconds, MEASURES, env/…; of a fleet also rollout/….
    """

    measures: dict[str, float]

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
        """Play each task `group_size` times. Every random draw derives from (run_seed, step, group, sibling, turn).

        Siblings share the environment's seed and differ in the sampling seed.

        Raises:
            ContractError, ConfigError: the environment is at fault: it paid a reward that is not a finite number.
            WorkerError: workers had to be replaced more often than allowed.
            EngineError: the engine is gone, or answers nothing but errors.
        """
        groups = [Group(first_group_id + position, task) for position, task in enumerate(tasks)]
        trajectories = self._play(
            [
                (group.task, group.id, sibling, (purpose, run_seed, step, position))
                for position, group in enumerate(groups)
                for sibling in range(group_size)
            ]
        )
        for index, group in enumerate(groups):
            group.trajectories = trajectories[index * group_size : (index + 1) * group_size]
        return groups

    def submit(self, task: Task, group: int, sibling: int, *, seed: Seed) -> Future[Trajectory]:
        """Have one episode played while other things are done. Raises ConfigError where that needs workers."""
        text, hint = "episodes cannot be played ahead in the trainer's own process", "set rollout.workers=1 or more"
        raise ConfigError(text, where="rollout.max_staleness", hint=hint)

    def poll(self) -> None:  # noqa: B027 (a player without workers has nothing to do)
        """To be called now and then by whoever waits for submitted episodes, from the thread that owns the learner."""

    def measure(self) -> None:  # noqa: B027
        """Set `measures` to those of what was submitted: since the last `measure` or `collect`."""

    @abstractmethod
    def close(self) -> None:
        """End what plays."""

    @abstractmethod
    def _play(self, episodes: Sequence[Episode]) -> list[Trajectory]:
        """Play them all; sets `measures`."""
