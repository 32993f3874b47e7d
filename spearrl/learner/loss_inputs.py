"""One optimiser step's rows: their denominators, the tokens that covariance rules choose, their metrics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from spearrl.batching import Batch, denominator
from spearrl.batching.token_hashes import counter_keys
from spearrl.losses import Objective
from spearrl.seeds import derive

Weighted = Sequence[tuple[Objective, float]]  # objectives with the factor of each in the total


@dataclass
class LossInputs:
    """What an objective reads of a batch: [B, T] each (uid: [B]), on the learner's device."""

    action_mask: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor
    uid: torch.Tensor
    ref_logprobs: torch.Tensor | None = None
    rollout_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, device: torch.device, logprobs: torch.Tensor | None = None) -> LossInputs:
        """Those of a batch.

        Args:
            logprobs: [B, T] of the current policy, which are the old ones where those are not a number.
        """
        tensors = {name: tensor.to(device) for name, tensor in batch.tensors().items()}
        if logprobs is not None:
            old = tensors["old_logprobs"]
            tensors["old_logprobs"] = torch.where(old.isnan(), logprobs.to(device, old.dtype), old)
        return cls(action_mask=batch.action_mask.to(device), uid=batch.rows.uid, **tensors)


@dataclass(frozen=True)
class Share:
    """A batch's part in one optimiser step. On several processes, each has a share with its own rows of the batch.

    Args:
        seed: of the tokens that a covariance rule draws.
        denominators: of each objective, over the rows of all processes.
        rows: number of rows on all processes.
        current: no optimiser step was made yet, so old_logprobs are the current ones; where they are not a number, they
            are found in the share's own pass.
        index: int64 [b], which rows of the update's on-policy batch these are; None: replayed ones.
        covariance: `covariance_tokens` of the whole mini-batch, where `batch` is a part of it.
        whole: the whole mini-batch, and which of its rows are in `batch`, where its covariance tokens wait for the
            log-probabilities of the pass, and of one without gradient over `others`.
    """

    batch: Batch
    objectives: Weighted
    seed: int
    denominators: tuple[float, ...]
    rows: int
    current: bool
    index: torch.Tensor | None = None
    covariance: Mapping[int, torch.Tensor] | None = None
    whole: tuple[Batch, torch.Tensor] | None = None

    @classmethod
    def of(cls, batch: Batch, objectives: Weighted, seed: int, *, current: bool, index: torch.Tensor) -> Share:
        """The share of all rows of a mini-batch, the rows `index` of the batch that it was cut from."""
        denominators = [denominator(batch.action_mask, o.aggregation, o.horizon) for o, _ in objectives]
        return cls(batch, objectives, seed, tuple(denominators), len(batch), current, index if current else None)

    @property
    def signal(self) -> torch.Tensor:
        """bool [b], rows whose pass is made: those that can have a gradient.

        All or none where means are those of micro-batches.
        """
        rows = torch.stack([_signal(objective, self.batch) for objective, _ in self.objectives]).any(0)
        released = any("micro_batch" in (o.denominator, o.scope) for o, _ in self.objectives)
        return rows.any().expand(len(rows)) if released else rows

    def with_signal(self) -> Share:
        """The share of the rows with a signal; the others still count in denominators and covariances."""
        rows, part = self.signal, self
        kept = rows.nonzero()[:, 0]
        if not rows.all():
            index = None if self.index is None else self.index[kept]
            part = replace(self, batch=self.batch.select(kept), index=index)
        if not self.has_mini_batch_rule or not len(kept):
            return part
        inputs = LossInputs.of(self.batch, torch.device("cpu"))
        if not self.current or inputs.old_logprobs[inputs.action_mask].isnan().any():
            return replace(part, whole=(self.batch, kept))
        covariance = self.covariance_tokens(inputs, inputs.old_logprobs)
        return replace(part, covariance={i: chosen[kept] for i, chosen in covariance.items()})

    @property
    def has_mini_batch_rule(self) -> bool:
        """Whether a covariance rule has yet to look at the tokens of the whole mini-batch."""
        return self.covariance is None and any(o.scope == "mini_batch" for o, _ in self.objectives)

    def covariance_tokens(self, inputs: LossInputs, logprobs: torch.Tensor) -> dict[int, torch.Tensor]:
        """bool [B, T] by index of the objective: tokens of the covariance rules over the whole mini-batch.

        Args:
            inputs: of the whole mini-batch.
            logprobs: [B, T] of the current policy.
        """
        by_objective = {
            index: covariance_tokens(objective, inputs, logprobs, self.seed)
            for index, (objective, _) in enumerate(self.objectives)
            if objective.scope == "mini_batch"
        }
        return {index: tokens for index, tokens in by_objective.items() if tokens is not None}

    @property
    def others(self) -> torch.Tensor:
        """int64 [n], rows of `whole` whose current log-probabilities only a pass of their own can find."""
        if self.whole is None or self.current:
            return torch.zeros(0, dtype=torch.int64)
        batch, kept = self.whole
        return (~torch.isin(torch.arange(len(batch)), kept)).nonzero()[:, 0]

    def covariance_of_whole(self, logprobs: torch.Tensor, others: torch.Tensor) -> dict[int, torch.Tensor]:
        """`covariance_tokens` of the rows of this share, chosen among all tokens of `whole`.

        Args:
            logprobs: [b, W] of the current policy.
            others: [n, W] of the rows `others`.
        """
        if self.whole is None:
            return {}
        (batch, kept), device = self.whole, logprobs.device
        current = logprobs.new_full((len(batch), batch.rows.width), math.nan)
        for index, found in ((kept, logprobs), (self.others, others.to(logprobs))):
            current[index.to(device), : found.shape[1]] = found
        inputs = LossInputs.of(batch, device, current)
        tokens = self.covariance_tokens(inputs, inputs.old_logprobs if self.current else current)
        return {i: chosen[kept.to(device), : logprobs.shape[1]] for i, chosen in tokens.items()}

    def total(self, losses: Sequence[float], tally: Tally) -> float:
        """The weighted sum of the objectives' losses, which are reported too."""
        total = 0.0
        for (objective, factor), loss in zip(self.objectives, losses, strict=True):
            tally.add(objective.prefix, {"loss": loss}, 1.0)
            total += factor * loss
        return total


def split_objectives(objectives: Sequence[Objective], gamma: float) -> tuple[Weighted, Weighted]:
    """(on-policy, replay) objectives with their factors: weight, times γ on replay. Those of factor 0 are left out."""
    weighted = [(objective, objective.weight * (gamma if objective.on_replay else 1.0)) for objective in objectives]
    live = [(objective, factor) for objective, factor in weighted if factor]
    return [item for item in live if not item[0].on_replay], [item for item in live if item[0].on_replay]


def _signal(objective: Objective, batch: Batch) -> torch.Tensor:
    """bool [B], rows that can have a gradient: of a built-in surrogate where an advantage is not 0 (of "sil": above 0).

    KL, entropy and value have one of their own, KL-Cov's penalty too; what a user's loss has, nobody knows.
    """
    tokens = batch.action_mask
    if objective.kind in ("policy", "sil", "sft") and objective.surrogate in ("clip", "gspo", "cispo"):
        tokens = tokens & ((batch.advantages > 0) if objective.kind == "sil" else (batch.advantages != 0))
    return tokens.any(1)


def covariance_tokens(
    objective: Objective, inputs: LossInputs, logprobs: torch.Tensor, seed: int
) -> torch.Tensor | None:
    """bool [B, T], the tokens that an objective's rule drops (Clip-Cov) or penalises (KL-Cov); None: it has no rule.

    The draw is a hash of seed, row and position: it does not depend on the order of rows.
    """
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
        """Count metrics with a weight, such as the tokens they are a mean over; also values that are not finite."""
        for name, value in metrics.items():
            self._sums[f"{prefix}/{name}"] += value * weight if weight else 0.0
            self._weights[f"{prefix}/{name}"] += weight

    def means(self) -> dict[str, float]:
        """The mean of each metric by name; not a number where its weights are 0."""
        return {name: self._sums[name] / weight if weight else math.nan for name, weight in self._weights.items()}

    def state(self) -> list[dict[str, float]]:
        """For another process's `merge`."""
        return [self._sums, self._weights]

    def merge(self, state: Sequence[Mapping[str, float]]) -> None:
        """Count what another process counted."""
        for own, other in zip((self._sums, self._weights), state, strict=True):
            for name, value in other.items():
                own[name] += value
