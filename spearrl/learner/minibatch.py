"""One optimiser step's rows: their denominators, the tokens covariance clipping drops, and the metrics they add up to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from spearrl.batching import Batch, denominator
from spearrl.batching.keys import counter_keys
from spearrl.losses import Objective
from spearrl.seeds import derive

Weighted = Sequence[tuple[Objective, float]]  # objectives with the factor of each in the total


@dataclass
class LossInputs:
    """What an objective reads: [B, T], on the learner's device."""

    action_mask: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor
    uid: torch.Tensor  # [B]
    ref_logprobs: torch.Tensor | None = None
    rollout_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> LossInputs:
        tensors = {name: tensor.to(device) for name, tensor in batch.tensors().items()}
        return cls(action_mask=batch.action_mask.to(device), uid=batch.rows.uid, **tensors)


@dataclass(frozen=True)
class Share:
    """A batch's part in one optimiser step. `current`: no step ran since old_logprobs were computed, so they are the current ones.

    Where the batch is one process's part of the mini-batch, `divisors` and `rows` are those of the whole of it.
    """

    batch: Batch
    objectives: Weighted
    seed: int
    current: bool = False
    divisors: tuple[float, ...] = ()
    rows: int = 0

    def denominators(self) -> list[float]:
        """Of the whole mini-batch, one per objective."""
        return list(self.divisors) or [
            denominator(self.batch.action_mask, o.aggregation, o.horizon) for o, _ in self.objectives
        ]

    def whole_scope(self) -> list[int]:
        """Objectives, by place, whose covariance rule chooses among the tokens of the whole mini-batch."""
        return [i for i, (objective, _) in enumerate(self.objectives) if objective.scope == "mini_batch"]

    def selections(
        self, inputs: LossInputs, logprobs: torch.Tensor, objectives: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """bool [B, T] by place: what these objectives' rules choose at these current log-probabilities of the whole mini-batch."""
        found = {i: selected_tokens(self.objectives[i][0], inputs, logprobs, self.seed) for i in objectives}
        return {i: selection for i, selection in found.items() if selection is not None}

    def total(self, losses: Sequence[float], tally: Tally) -> float:
        """The weighted sum of the objectives' losses, which are reported too."""
        for (objective, _), value in zip(self.objectives, losses, strict=True):
            tally.add(objective.prefix, {"loss": value}, 1.0)
        return sum(factor * value for (_, factor), value in zip(self.objectives, losses, strict=True))

    def part(self, objective: Objective, rows: int) -> float:
        """Factor of a micro-batch's loss: 1, or its share of the rows where each micro-batch is averaged by itself (as released)."""
        return rows / (self.rows or len(self.batch)) if objective.denominator == "micro_batch" else 1.0


def split_objectives(objectives: Sequence[Objective], gamma: float) -> tuple[Weighted, Weighted]:
    """(on-policy, replay) objectives with their factors: weight, times γ on replay."""
    weighted = [(objective, objective.weight * (gamma if objective.on_replay else 1.0)) for objective in objectives]
    live = [(objective, factor) for objective, factor in weighted if factor]
    return [item for item in live if not item[0].on_replay], [item for item in live if item[0].on_replay]


def row_keys(uid: torch.Tensor, seed: int) -> torch.Tensor:
    """[B] hash by which rows are dealt to optimiser steps, whatever their order."""
    return counter_keys(derive(seed, "mini-batch"), uid, 1).flatten()


def selected_tokens(objective: Objective, inputs: LossInputs, logprobs: torch.Tensor, seed: int) -> torch.Tensor | None:
    """bool [B, T], what a covariance rule selects, None where there is none; the draw is a hash of seed, row and position, whatever the order."""
    if objective.scope is None:
        return None
    keys = counter_keys(derive(seed, "clip-cov", objective.kind), inputs.uid.to(logprobs.device), logprobs.shape[1])
    return objective.covariance_tokens(inputs, logprobs, keys=keys)


@dataclass
class Tally:
    """Means over tokens and optimiser steps, added up piece by piece."""

    _sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, prefix: str, metrics: Mapping[str, float], weight: float) -> None:
        """Count metrics with a weight, such as the tokens they are a mean over. Non-finite values count too: they must be seen."""
        for name, value in metrics.items():
            self._sums[f"{prefix}/{name}"] += value * weight if weight else 0.0
            self._weights[f"{prefix}/{name}"] += weight

    def means(self) -> dict[str, float]:
        return {name: self._sums[name] / weight if weight else math.nan for name, weight in self._weights.items()}

    def state(self) -> list[dict[str, float]]:
        """For another process's `merge`."""
        return [self._sums, self._weights]

    def merge(self, state: Sequence[Mapping[str, float]]) -> None:
        """Count what another process counted."""
        for own, other in zip((self._sums, self._weights), state, strict=True):
            for name, value in other.items():
                own[name] += value
