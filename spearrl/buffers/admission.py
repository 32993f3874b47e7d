"""Who may enter the replay buffer, beside having a positive advantage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from spearrl.errors import ConfigError
from spearrl.types import Group, Trajectory


class Admission:
    """Refuses trajectories that a fault touched, and wins of tasks not yet won often enough.

    A fault ends a trajectory with an error status, or the environment survived it and said so in
    `Outcome.info["fault"]`. What such an episode earned says something about the machine, not about the policy.

    Args:
        min_wins: a win is stored once its task was won this often in the run, itself included: in a stochastic
            environment one win may be luck.
        require_tool_call: refuse trajectories without a tool call too (as released for mathematics).
    """

    def __init__(self, *, min_wins: int = 1, require_tool_call: bool = False):
        if min_wins < 1:
            raise ConfigError(f"min_wins={min_wins}; must be >= 1")
        self.min_wins, self.require_tool_call = min_wins, require_tool_call
        self.refused = 0  # of the last step
        self._wins: Counter[str] = Counter()

    def admit(self, groups: Sequence[Group]) -> list[int]:
        """Count the step's sound wins, then the ids of the trajectories that may be stored."""
        played = [t for g in groups for t in g.trajectories]
        self._wins.update(t.task.id for t in played if t.success and self._sound(t))
        admitted = [t.id for t in played if self._may_enter(t)]
        self.refused = len(played) - len(admitted)
        return admitted

    def state_dict(self) -> dict[str, Any]:
        """JSON values; `load_state_dict` restores them exactly."""
        return {"wins": dict(self._wins)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._wins = Counter(state["wins"])

    def _may_enter(self, trajectory: Trajectory) -> bool:
        if not self._sound(trajectory) or (self.require_tool_call and trajectory.tool_calls == 0):
            return False
        return not trajectory.success or self._wins[trajectory.task.id] >= self.min_wins

    @staticmethod
    def _sound(trajectory: Trajectory) -> bool:
        return not trajectory.status.is_error and trajectory.faults == 0
