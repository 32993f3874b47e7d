"""What a trainer asks of a learner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from spearrl.batching import Batch, Rows
from spearrl.losses import Objective


@dataclass(frozen=True)
class UpdateResult:
    """Metrics of an update, and how many of its optimiser steps were skipped for non-finite numbers."""

    metrics: dict[str, float]
    skipped: int


class Learner(Protocol):
    """Owns the trained parameters. Packing, padding and sharding are private to it: losses always see [B, T]."""

    def logprobs(self, rows: Rows, *, reference: bool = False) -> torch.Tensor:
        """[B, T] log-probabilities of action tokens, 0 elsewhere; no gradient. `reference`: under the frozen starting model."""
        ...

    def values(self, rows: Rows) -> torch.Tensor:
        """[B, T] the critic's values of the states before action tokens, 0 elsewhere; no gradient."""
        ...

    def update(
        self, on_policy: Batch, replay: Batch | None, *, gamma: float, objectives: Sequence[Objective], seed: int
    ) -> UpdateResult:
        """Optimiser steps on a batch, and on replayed rows with weight γ."""
        ...

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter once, under its name in a model directory."""
        ...

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of token_ids[1:] at temperature 1: what an engine with the same weights must find too."""
        ...

    def export(self, folder: str | Path) -> None:
        """Weights as a transformers model directory."""
        ...

    def save(self, folder: str | Path) -> None:
        """Weights and optimiser state."""
        ...

    def load(self, folder: str | Path) -> None:
        """Exactly what `save` wrote."""
        ...

    def export_adapter(self, folder: str | Path) -> None:
        """Write the adapters alone, in peft's format."""
        ...

    def release(self) -> None:
        """Give device memory that is not in use back, for engines on the same device."""
        ...

    def close(self) -> None:
        """Let go of processes and devices."""
        ...
