"""D_R: rewards' means and deviations of recent groups; their medians recalibrate replay (arXiv 2509.22601)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from spearrl.errors import ConfigError, ContractError
from spearrl.losses.covariance import value_at


@dataclass(frozen=True)
class BaselineEntry:
    """One step's groups: means, and deviations (none where there are none), float64."""

    step: int
    means: torch.Tensor
    stds: torch.Tensor


class BaselineBuffer:
    """Group means (and deviations) by step.

    Whole steps leave, oldest first, while more than `capacity` values are stored. That test comes before the new step
    is added, so the buffer may exceed `capacity` by one step.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ConfigError(f"baseline_capacity={capacity}; must be >= 1")
        self.capacity = capacity
        self._entries: list[BaselineEntry] = []

    def __len__(self) -> int:
        return sum(len(entry.means) for entry in self._entries)

    def add(self, step: int, means: Sequence[float], stds: Sequence[float] | None = None) -> None:
        """Store one value per group of this step.

        Raises:
            ContractError: a value is not finite, or there are not as many deviations as means.
        """
        where = f"BaselineBuffer.add, step {step}"
        entry = BaselineEntry(step, *(torch.tensor(list(v), dtype=torch.float64) for v in (means, stds or ())))
        if stds is not None and len(stds) != len(means):
            raise ContractError(f"{len(stds)} deviations for {len(means)} means", where=where)
        if not bool(torch.cat([entry.means, entry.stds]).isfinite().all()):
            raise ContractError("a group's reward mean or deviation is not finite", where=where)
        while len(self) > self.capacity:
            self._entries.pop(0)
        if len(entry.means):
            self._entries.append(entry)

    def percentile(self, q: float = 50, of: str = "mean") -> float:
        """The q-th percentile (linear interpolation) of all stored means, or deviations; NaN where none are stored.

        Args:
            of: "mean" or "std".
        """
        if of not in ("mean", "std"):
            raise ConfigError(f"of={of!r}; must be 'mean' or 'std'")
        values = [entry.means if of == "mean" else entry.stds for entry in self._entries]
        ordered = torch.cat([torch.zeros(0, dtype=torch.float64), *values]).sort().values
        return value_at(ordered, (len(ordered) - 1) * q / 100) if len(ordered) else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values; `load_state_dict` restores them exactly."""
        return {"entries": [asdict(entry) for entry in self._entries]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._entries = [BaselineEntry(**entry) for entry in state["entries"]]
