"""One optimiser step's rows: their denominators, the tokens covariance clipping drops, and the metrics they add up to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from spearrl.batching import Batch, denominator
from spearrl.errors import ConfigError
from spearrl.losses import Objective, counter_keys
from spearrl.seeds import derive

Weighted = Sequence[tuple[Objective, float]]  # objectives with the factor of each in the total
TRAINED_ON = {"policy": "on_policy", "sft": "on_policy", "sil": "replay"}


@dataclass
class LossInputs:
    """What an objective reads: [B, T], on the learner's device."""

    action_mask: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor
    uid: torch.Tensor  # [B]

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> LossInputs:
        return cls(batch.action_mask.to(device), batch.advantages.to(device), batch.old_logprobs.to(device), batch.rows.uid)


@dataclass(frozen=True)
class Share:
    """A batch's part in one optimiser step. `current`: no step ran since old_logprobs were computed, so they are the current ones."""

    batch: Batch
    objectives: Weighted
    seed: int
    current: bool = False

    def denominators(self) -> list[float]:
        """Of the whole mini-batch, one per objective."""
        return [denominator(self.batch.action_mask, o.aggregation, o.horizon) for o, _ in self.objectives]

    def scope(self, name: str) -> list[int]:
        """Objectives whose covariance clipping selects over this scope."""
        return [i for i, (o, _) in enumerate(self.objectives) if o.clip_cov is not None and o.clip_cov.scope == name]


def split_objectives(objectives: Sequence[Objective], gamma: float) -> tuple[Weighted, Weighted]:
    """(on-policy, replay) objectives with their factors: weight, times γ on replay. Raises ConfigError for an unknown kind."""
    split: dict[str, list[tuple[Objective, float]]] = {"on_policy": [], "replay": []}
    for objective in objectives:
        if objective.kind not in TRAINED_ON:
            raise ConfigError(f"an objective of kind {objective.kind!r}; must be one of {', '.join(TRAINED_ON)}")
        factor = objective.weight * (gamma if objective.kind == "sil" else 1.0)
        if factor:
            split[TRAINED_ON[objective.kind]].append((objective, factor))
    return split["on_policy"], split["replay"]


def row_keys(uid: torch.Tensor, seed: int) -> torch.Tensor:
    """[B] hash by which rows are dealt to optimiser steps, whatever their order."""
    return counter_keys(derive(seed, "mini-batch"), uid, 1).flatten()


def dropped_tokens(objective: Objective, inputs: LossInputs, logprobs: torch.Tensor, seed: int) -> torch.Tensor | None:
    """bool [B, T], what covariance clipping takes out of the loss; the draw is a hash of seed, row and position, so order and padding do not matter."""
    keys = counter_keys(derive(seed, "clip-cov", objective.kind), inputs.uid.to(logprobs.device), logprobs.shape[1])
    return objective.selection(inputs, logprobs, keys=keys)


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
