"""A loss and its settings as one value that can be sent to other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spearrl.errors import ContractError
from spearrl.losses.aggregate import AGGREGATIONS, aggregate, token_means, without
from spearrl.losses.covariance import covariance_selection
from spearrl.losses.policy import clipped_policy_loss, clipped_tokens
from spearrl.losses.sil import sil_loss

KINDS = ("policy", "sil", "sft")


class LossBatch(Protocol):
    """What an objective reads of a batch, all [B, T]."""

    action_mask: Tensor
    advantages: Tensor
    old_logprobs: Tensor


@dataclass(frozen=True)
class ClipCov:
    """Covariance clipping: at most `ratio` of the tokens, of covariance in (lower, upper); scope "mini_batch" or "micro_batch" (as released)."""

    ratio: float
    lower: float
    upper: float
    scope: str = "mini_batch"


@dataclass(frozen=True)
class Objective:
    """One term of the total. `dataclasses.asdict` and `from_dict` carry it to other processes.

    Args:
        kind: "policy" (clipped surrogate), "sil" (the same on replayed tokens of positive advantage), "sft" (weighted log-likelihood).
        weight: factor in the total; the learner applies it, `loss` does not.
    """

    kind: str
    weight: float = 1.0
    aggregation: str = "token-mean"
    horizon: float = 512
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    clip_cov: ClipCov | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ContractError(f"objective kind {self.kind!r} is not known", hint=f"use one of {', '.join(KINDS)}")
        if self.aggregation not in AGGREGATIONS:
            raise ContractError(f"aggregation {self.aggregation!r} is not known", hint=f"use one of {', '.join(AGGREGATIONS)}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Objective:
        """The inverse of dataclasses.asdict."""
        values = dict(fields)
        if values.get("clip_cov") is not None:
            values["clip_cov"] = ClipCov(**values["clip_cov"])
        return cls(**values)

    @property
    def needs_entropy(self) -> bool:
        """Whether `loss` wants the policy's entropy at every token."""
        return self.entropy_coef != 0

    def selection(self, batch: LossBatch, logprobs: Tensor, *, generator: torch.Generator | None = None, keys: Tensor | None = None) -> Tensor | None:
        """bool [B, T], what covariance clipping drops from these rows (of the whole mini-batch, unless scope is "micro_batch"); None where it is off."""
        if self.clip_cov is None:
            return None
        exclude = clipped_tokens(logprobs, batch.old_logprobs, batch.advantages, batch.action_mask, clip_low=self.clip_low, clip_high=self.clip_high)
        rule = self.clip_cov
        return covariance_selection(
            logprobs,
            batch.advantages,
            batch.action_mask,
            ratio=rule.ratio,
            lower=rule.lower,
            upper=rule.upper,
            exclude=exclude,
            generator=generator,
            keys=keys,
        )

    def loss(
        self, batch: LossBatch, logprobs: Tensor, *, denominator: float | None, drop: Tensor | None = None, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss to minimise, not multiplied by `weight`, and its metrics.

        Args:
            batch: action_mask, advantages, old_logprobs, all [B, T]; for "sft" advantages are token weights.
            logprobs: [B, T] of the current policy.
            denominator: full divisor of the mini-batch over all ranks; None: of this call.
            drop: bool [B, T] from `selection`.
            entropy: [B, T], needed where `needs_entropy`.

        Raises:
            ContractError: entropy is needed and missing.
        """
        if self.kind == "sft":
            loss, metrics = self._likelihood(batch, logprobs, denominator, drop)
        else:
            surrogate = sil_loss if self.kind == "sil" else clipped_policy_loss
            loss, metrics = surrogate(
                logprobs,
                batch.old_logprobs,
                batch.advantages,
                batch.action_mask,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                dual_clip=self.dual_clip,
                aggregation=self.aggregation,
                horizon=self.horizon,
                denominator=denominator,
                drop=drop,
            )
        if not self.needs_entropy:
            return loss, metrics
        if entropy is None:
            raise ContractError(f"objective {self.kind!r} has entropy_coef={self.entropy_coef} but got no entropy", hint="pass entropy=, [B, T]")
        bonus = aggregate(entropy, batch.action_mask, self.aggregation, horizon=self.horizon, denominator=denominator)
        return loss - self.entropy_coef * bonus, metrics | token_means(batch.action_mask, {"entropy": entropy})

    def _likelihood(self, batch: LossBatch, logprobs: Tensor, denominator: float | None, drop: Tensor | None) -> tuple[Tensor, dict[str, float]]:
        mask = batch.action_mask.bool()
        weights, logprobs = torch.where(mask, batch.advantages, 0.0), torch.where(mask, logprobs, 0.0)
        loss = aggregate(without(drop, -weights * logprobs), mask, self.aggregation, horizon=self.horizon, denominator=denominator)
        return loss, token_means(mask, {"nll": -logprobs, "weight": weights})
