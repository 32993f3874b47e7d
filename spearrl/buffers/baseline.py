"""D_R: mean and deviation of recent groups' rewards, whose median recalibrates replayed advantages (arXiv 2509.22601)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spearrl.errors import ConfigError, ContractError


@dataclass(frozen=True)
class _Entry:
    step: int
    means: torch.Tensor  # float64
    stds: torch.Tensor  # float64; empty where none were given


class BaselineBuffer:
    """Group means (and deviations) by step. Whole steps leave, oldest first, while more than `capacity` values are stored.

    That test comes before the new step is added, so the buffer may exceed `capacity` by one step.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ConfigError(f"baseline_capacity={capacity}; must be >= 1")
        self.capacity = capacity
        self._entries: list[_Entry] = []

    def __len__(self) -> int:
        return sum(len(entry.means) for entry in self._entries)

    @property
    def steps(self) -> list[int]:
        """Steps with stored values, oldest first."""
        return [entry.step for entry in self._entries]

    def add(self, step: int, means: Sequence[float], stds: Sequence[float] | None = None) -> None:
        """Store one value per group of this step. Raises ContractError for non-finite values or another number of deviations."""
        entry = _Entry(
            step, torch.tensor(list(means), dtype=torch.float64), torch.tensor(list(stds or ()), dtype=torch.float64)
        )
        if stds is not None and len(entry.stds) != len(entry.means):
            raise ContractError(
                f"{len(entry.stds)} deviations for {len(entry.means)} means", where=f"BaselineBuffer.add, step {step}"
            )
        if not (bool(entry.means.isfinite().all()) and bool(entry.stds.isfinite().all())):
            raise ContractError(
                "a group's reward mean or deviation is not finite", where=f"BaselineBuffer.add, step {step}"
            )
        while len(self) > self.capacity:
            self._entries.pop(0)
        if len(entry.means):
            self._entries.append(entry)

    def percentile(self, q: float = 50, of: str = "mean") -> float:
        """The q-th percentile (linear interpolation) of all stored means, or of the deviations (of="std"); NaN where none are stored."""
        if of not in ("mean", "std"):
            raise ConfigError(f"of={of!r}; must be 'mean' or 'std'")
        values = [entry.means if of == "mean" else entry.stds for entry in self._entries]
        joined = torch.cat(values) if values else torch.zeros(0)
        if not len(joined):
            return math.nan
        return _percentile(joined.sort().values, q)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values; `load_state_dict` restores them exactly."""
        return {"entries": [{"step": entry.step, "means": entry.means, "stds": entry.stds} for entry in self._entries]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._entries = [_Entry(int(entry["step"]), entry["means"], entry["stds"]) for entry in state["entries"]]


def _percentile(ordered: torch.Tensor, q: float) -> float:
    """torch.quantile refuses large inputs; this has no limit."""
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
