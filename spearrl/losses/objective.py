"""A loss and its settings as one value that can be sent to other processes. The total is a weighted list of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spearrl.config.plugins import accepted, load_function
from spearrl.errors import ContractError
from spearrl.losses.aggregate import AGGREGATIONS, aggregate, token_means
from spearrl.losses.covariance import covariance_selection, kl_cov_loss, kl_cov_selection
from spearrl.losses.surrogates import MAX_LOG_RATIO, cispo_loss, clipped_policy_loss, clipped_tokens, gspo_loss
from spearrl.losses.terms import importance_weights, kl_divergence, value_loss

POLICY_KINDS = ("policy", "grpo", "gigpo", "ppo")  # the same surrogate; what differs is the advantage
KINDS = (*POLICY_KINDS, "sil", "entropy", "kl", "value", "sft")
LEADING = ("logprobs", "old_logprobs", "advantages", "action_mask")
REQUIRED = ("aggregation", "horizon", "denominator", "drop")
OFFERED = ("clip_low", "clip_high", "dual_clip", "rollout_logprobs", "ref_logprobs")
_TABLE: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "clip": (clipped_policy_loss, (*REQUIRED, "clip_low", "clip_high", "dual_clip", "log_ratio_clamp")),
    "gspo": (gspo_loss, (*REQUIRED, "clip_low", "clip_high")),
    "cispo": (cispo_loss, (*REQUIRED, "clip_low", "clip_high")),
    "kl_cov": (kl_cov_loss, (*REQUIRED[:-1], "ratio", "kl_coef", "selected")),
}
SURROGATES = tuple(_TABLE)


class LossBatch(Protocol):
    """What an objective reads of a batch, all [B, T]; the optional ones only where its kind needs them."""

    action_mask: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    values: Tensor | None
    returns: Tensor | None


@dataclass(frozen=True)
class ClipCov:
    """Covariance clipping: at most `ratio` of the tokens, of covariance in (lower, upper); scope "mini_batch" or "micro_batch" (as released)."""

    ratio: float
    lower: float | str
    upper: float | str
    scope: str = "mini_batch"
    log_ratio_clamp: float | None = MAX_LOG_RATIO


@dataclass(frozen=True)
class KlCov:
    """Settings of surrogate "kl_cov"."""

    ratio: float = 2e-4
    coef: float = 0.1
    scope: str = "mini_batch"


@dataclass(frozen=True)
class Correction:
    """Settings of `importance_weights`."""

    mode: str
    level: str = "token"
    cap: float = 2.0
    floor: float = 0.5


_PARTS: dict[str, Any] = {"clip_cov": ClipCov, "kl_cov": KlCov, "correction": Correction}


@dataclass(frozen=True)
class Objective:
    """One term of the total. `dataclasses.asdict` and `from_dict` carry it to other processes.

    Args:
        kind: "policy" (also "grpo", "gigpo", "ppo": the surrogate of the batch's advantages), "sil" (the same of max(advantage, 0) on replayed tokens),
            "entropy" (minus the mean entropy), "kl" (divergence from ref_logprobs), "value" (the critic's error), "sft" (weighted log-likelihood).
        weight: factor in the total; the learner applies it, `loss` does not.
        surrogate: of "policy" and "sil": "clip", "gspo", "cispo", "kl_cov", or a function's import path "package.module:name".
        replay: whether it is for replayed rows; "sil" always is.
        token_weight: of a token by its current probability p: "confident", p^token_power; "unsure", (1 - p)^token_power.
        divisor: "mini_batch", or "micro_batch" (as released): `loss` then ignores the denominator.

    Raises:
        ContractError: unknown kind, surrogate or aggregation. ConfigError: a function of another signature.
    """

    kind: str
    weight: float = 1.0
    surrogate: str = "clip"
    replay: bool = False
    aggregation: str = "token-mean"
    horizon: float = 512
    divisor: str = "mini_batch"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    estimator: str = "k3"
    value_clip: float = 0.5
    clip_cov: ClipCov | None = None
    kl_cov: KlCov = KlCov()
    correction: Correction | None = None
    token_weight: str = "none"
    token_power: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ContractError(f"objective kind {self.kind!r} is not known", hint=f"use one of {', '.join(KINDS)}")
        if self.aggregation not in AGGREGATIONS:
            raise ContractError(
                f"aggregation {self.aggregation!r} is not known", hint=f"use one of {', '.join(AGGREGATIONS)}"
            )
        if ":" in self.surrogate:
            _own(self.surrogate)
        elif self.surrogate not in SURROGATES:
            raise ContractError(
                f"surrogate {self.surrogate!r} is not known",
                hint=f"use one of {', '.join(SURROGATES)}, or package.module:function",
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Objective:
        """The inverse of dataclasses.asdict."""
        values = dict(fields)
        return cls(
            **values | {name: part(**values[name]) for name, part in _PARTS.items() if values.get(name) is not None}
        )

    @property
    def on_replay(self) -> bool:
        return self.replay or self.kind == "sil"

    @property
    def prefix(self) -> str:
        """Under which its metrics are reported."""
        if self.kind in POLICY_KINDS:
            return "policy"
        return f"sil_{self.kind}" if self.replay and self.kind != "sil" else self.kind

    @property
    def scope(self) -> str | None:
        """Over which tokens `selection` chooses: "mini_batch", "micro_batch"; None: it chooses nothing."""
        rule: ClipCov | KlCov | None = self.kl_cov if self.surrogate == "kl_cov" else self.clip_cov
        return rule.scope if rule is not None and self.kind in (*POLICY_KINDS, "sil") else None

    def selection(
        self,
        batch: LossBatch,
        logprobs: Tensor,
        *,
        generator: torch.Generator | None = None,
        keys: Tensor | None = None,
    ) -> Tensor | None:
        """bool [B, T]: what covariance clipping drops of these rows (of the whole mini-batch, unless the scope is "micro_batch"), or what KL-Cov penalises;
        None where neither is on."""
        advantages = self._advantages(batch)
        if self.surrogate == "kl_cov":
            return kl_cov_selection(logprobs, advantages, batch.action_mask, ratio=self.kl_cov.ratio, keys=keys)
        rule = self.clip_cov
        if rule is None:
            return None
        exclude = None
        if self.surrogate == "clip":
            exclude = clipped_tokens(
                logprobs,
                batch.old_logprobs,
                advantages,
                batch.action_mask,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
            )
        bounds: dict[str, Any] = {"ratio": rule.ratio, "lower": rule.lower, "upper": rule.upper}
        return covariance_selection(
            logprobs, advantages, batch.action_mask, **bounds, exclude=exclude, generator=generator, keys=keys
        )

    def loss(
        self,
        batch: LossBatch,
        logprobs: Tensor,
        *,
        denominator: float | None,
        selection: Tensor | None = None,
        entropy: Tensor | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss to minimise, not multiplied by `weight`, and its metrics.

        Args:
            batch: [B, T] each; for "sft" advantages are token weights.
            logprobs: [B, T] of the current policy.
            denominator: full divisor of the mini-batch over all ranks; None: of this call.
            selection: bool [B, T] from `selection`; None: clip_cov drops nothing, kl_cov chooses from this call's tokens.
            entropy, values: [B, T], needed by kinds "entropy" and "value".

        Raises:
            ContractError: something its kind needs is missing.
        """
        divisor: dict[str, Any] = {
            "horizon": self.horizon,
            "denominator": None if self.divisor == "micro_batch" else denominator,
        }
        if self.kind in POLICY_KINDS or self.kind == "sil":
            return self._surrogate(batch, logprobs, divisor, selection)
        mask = batch.action_mask.bool()
        if self.kind == "value":
            predicted, old, returns = (
                self._needs(values, "values"),
                self._needs(batch.values, "batch.values"),
                self._needs(batch.returns, "batch.returns"),
            )
            return value_loss(
                predicted, old, returns, mask, clip=self.value_clip, aggregation=self.aggregation, **divisor
            )
        if self.kind == "kl":
            kl = kl_divergence(logprobs, self._needs(batch.ref_logprobs, "batch.ref_logprobs"), self.estimator)
            return aggregate(kl, mask, self.aggregation, **divisor), token_means(mask, {"divergence": kl})
        if self.kind == "entropy":
            found = self._needs(entropy, "entropy")
            return -aggregate(found, mask, self.aggregation, **divisor), token_means(mask, {"entropy": found})
        weights, nll = torch.where(mask, batch.advantages, 0.0), torch.where(mask, -logprobs, 0.0)
        return aggregate(weights * nll, mask, self.aggregation, **divisor), token_means(
            mask, {"nll": nll, "weight": weights}
        )

    def _surrogate(
        self, batch: LossBatch, logprobs: Tensor, divisor: dict[str, Any], selection: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        weights = self._weights(batch, logprobs.detach())
        advantages = self._advantages(batch) if weights is None else self._advantages(batch) * weights
        options = {
            name: getattr(self, name) for name in ("aggregation", "clip_low", "clip_high", "dual_clip")
        } | divisor
        options |= {"drop": selection, "selected": selection, "ratio": self.kl_cov.ratio, "kl_coef": self.kl_cov.coef}
        options |= {"log_ratio_clamp": MAX_LOG_RATIO if self.clip_cov is None else self.clip_cov.log_ratio_clamp}
        options |= {"rollout_logprobs": batch.rollout_logprobs, "ref_logprobs": batch.ref_logprobs}
        function, names = _TABLE.get(self.surrogate) or _own(self.surrogate)
        found = function(
            logprobs, batch.old_logprobs, advantages, batch.action_mask, **{name: options[name] for name in names}
        )
        if not (
            isinstance(found, tuple)
            and len(found) == 2
            and isinstance(found[0], Tensor)
            and found[0].ndim == 0
            and isinstance(found[1], dict)
        ):
            raise ContractError(
                f"{self.surrogate} returned {type(found).__name__}",
                where="algo.loss",
                hint="return (scalar tensor, dict of floats)",
            )
        metrics = {
            name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in found[1].items()
        }
        return found[0], metrics if weights is None else metrics | token_means(
            batch.action_mask, {"token_weight": weights}
        )

    def _advantages(self, batch: LossBatch) -> Tensor:
        """Self-imitation learns from what beat the baseline only (SIL, arXiv:1806.05635 eq. 2; SPEAR, arXiv:2509.22601)."""
        return batch.advantages.clamp(min=0) if self.kind == "sil" else batch.advantages

    def _weights(self, batch: LossBatch, logprobs: Tensor) -> Tensor | None:
        """[B, T] factors of the advantages, without gradient; None: all 1."""
        weights = None
        if self.correction is not None:
            rollout = self._needs(batch.rollout_logprobs, "batch.rollout_logprobs")
            weights = importance_weights(batch.old_logprobs, rollout, batch.action_mask, **asdict(self.correction))
        if self.token_weight != "none":
            probability = torch.where(batch.action_mask.bool(), logprobs, 0.0).exp().clamp(max=1.0)
            base = probability if self.token_weight == "confident" else 1 - probability
            weights = base**self.token_power * (1.0 if weights is None else weights)
        return weights

    def _needs(self, tensor: Tensor | None, name: str) -> Tensor:
        if tensor is None:
            raise ContractError(f"objective {self.kind!r} needs {name}", hint=f"pass {name}, [B, T]")
        return tensor


def _own(path: str) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """A user's loss, and the keyword arguments it takes. Raises ConfigError for another signature."""
    return load_function(path, "algo.loss"), accepted(
        path, "algo.loss", leading=LEADING, required=REQUIRED, offered=OFFERED
    )
