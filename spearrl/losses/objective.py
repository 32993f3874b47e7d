"""A loss and its settings as one value that can be sent to other processes. The total is a weighted list of them."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from spearrl.errors import ContractError
from spearrl.losses.aggregate import AGGREGATIONS, aggregate, token_means
from spearrl.losses.covariance import covariance_selection, kl_cov_loss, kl_cov_selection
from spearrl.losses.importance import importance_weights
from spearrl.losses.kl import kl_divergence
from spearrl.losses.surrogates import MAX_LOG_RATIO, cispo_loss, clipped_policy_loss, clipped_tokens, gspo_loss
from spearrl.losses.value import value_loss

KINDS = ("policy", "sil", "entropy", "kl", "value", "sft")
SURROGATES: dict[str, Callable[..., Any]] = {
    "clip": clipped_policy_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
    "kl_cov": kl_cov_loss,
}
# A user's loss: its positional arguments, keywords it must take, and keywords it gets where its signature names them.
LEADING = ("logprobs", "old_logprobs", "advantages", "action_mask")
REQUIRED = ("aggregation", "horizon", "denominator", "drop")
OFFERED = ("clip_low", "clip_high", "dual_clip", "rollout_logprobs", "ref_logprobs")


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
    """Settings of `covariance_selection`; the tokens that it draws are dropped.

    Args:
        scope: tokens that are drawn from: of the "mini_batch", or of each "micro_batch" (as released).
        log_ratio_clamp: of `clipped_policy_loss`.
    """

    ratio: float
    lower: float | str
    upper: float | str
    scope: str = "mini_batch"
    log_ratio_clamp: float | None = MAX_LOG_RATIO


@dataclass(frozen=True)
class KlCov:
    """Settings of surrogate "kl_cov"; scope as in `ClipCov`."""

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


_SETTINGS: dict[str, Any] = {"clip_cov": ClipCov, "kl_cov": KlCov, "correction": Correction}


@dataclass(frozen=True)
class Objective:
    """One term of the total. `dataclasses.asdict` and `from_dict` carry it to other processes.

    Args:
        kind: "policy" (the surrogate of the batch's advantages), "sil" (the same of max(advantage, 0), on replay),
            "entropy" (minus the mean entropy), "kl" (divergence from ref_logprobs), "value" (the critic's error),
            "sft" (log-likelihood, weighted by the batch's advantages).
        weight: factor in the total; the learner applies it, `loss` does not.
        surrogate: of "policy" and "sil": one of SURROGATES, or a function's import path "package.module:name", which
            `spearrl.algorithm.objectives` checks.
        replay: whether it is for replayed rows; "sil" always is.
        denominator: of the "mini_batch", or of each "micro_batch" (as released).
        token_weight: of a token by its current probability p: "none"; "confident", p^token_power; "unsure",
            (1 - p)^token_power.

    Raises:
        ContractError: unknown kind, surrogate or aggregation.
    """

    kind: str
    weight: float = 1.0
    surrogate: str = "clip"
    replay: bool = False
    aggregation: str = "token-mean"
    horizon: float = 512
    denominator: str = "mini_batch"
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
        for name, value, known, besides in (
            ("objective kind", self.kind, KINDS, ""),
            ("aggregation", self.aggregation, AGGREGATIONS, ""),
            ("surrogate", self.surrogate, tuple(SURROGATES), ", or package.module:function"),
        ):
            if value not in known and not (besides and ":" in value):
                raise ContractError(f"{name} {value!r} is not known", hint=f"use one of {', '.join(known)}{besides}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Objective:
        """The inverse of dataclasses.asdict."""
        settings = {name: part(**fields[name]) for name, part in _SETTINGS.items() if fields.get(name) is not None}
        return cls(**{**fields, **settings})

    @property
    def on_replay(self) -> bool:
        return self.replay or self.kind == "sil"

    @property
    def prefix(self) -> str:
        """Under which its metrics are reported."""
        return f"sil_{self.kind}" if self.replay and self.kind not in ("policy", "sil") else self.kind

    @property
    def scope(self) -> str | None:
        """Whose tokens `covariance_tokens` chooses from: "mini_batch", "micro_batch"; None: it chooses none."""
        rule: ClipCov | KlCov | None = self.kl_cov if self.surrogate == "kl_cov" else self.clip_cov
        return rule.scope if rule is not None and self.kind in ("policy", "sil") else None

    def covariance_tokens(self, batch: LossBatch, logprobs: Tensor, *, keys: Tensor | None = None) -> Tensor | None:
        """bool [B, T]: the tokens of these rows that Clip-Cov drops or KL-Cov penalises; None where neither is on.

        Args:
            batch: the whole mini-batch, unless the scope is "micro_batch".
            logprobs: [B, T] of the current policy.
            keys: of the draw, as in `covariance_selection`.
        """
        advantages, mask = self._advantages(batch), batch.action_mask
        if self.surrogate == "kl_cov":
            return kl_cov_selection(logprobs, advantages, mask, ratio=self.kl_cov.ratio, keys=keys)
        if self.clip_cov is None:
            return None
        rule: dict[str, Any] = {name: getattr(self.clip_cov, name) for name in ("ratio", "lower", "upper")}
        if self.surrogate == "clip":
            clips = {"clip_low": self.clip_low, "clip_high": self.clip_high}
            rule["exclude"] = clipped_tokens(logprobs, batch.old_logprobs, advantages, mask, **clips)
        return covariance_selection(logprobs, advantages, mask, **rule, keys=keys)

    def loss(
        self,
        batch: LossBatch,
        logprobs: Tensor,
        *,
        denominator: float | None,
        covariance_tokens: Tensor | None = None,
        entropy: Tensor | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss to minimise, not multiplied by `weight`, and its metrics.

        Args:
            batch: [B, T] each.
            logprobs: [B, T] of the current policy.
            denominator: of the mini-batch over all ranks; None: of this call.
            covariance_tokens: bool [B, T] from the method of that name; None: Clip-Cov drops nothing, KL-Cov
                penalises tokens of this call.
            entropy, values: [B, T], needed by kinds "entropy" and "value".

        Raises:
            ContractError: something its kind needs is missing, or a user's loss returned something else.
        """
        scale: dict[str, Any] = {"horizon": self.horizon, "denominator": denominator}
        if self.denominator == "micro_batch":
            scale["denominator"] = None
        if self.kind in ("policy", "sil"):
            return self._policy_loss(batch, logprobs, scale, covariance_tokens)
        mask = batch.action_mask.bool()
        if self.kind == "value":
            critic = (self._needs(values, "values"), self._needs(batch.values, "batch.values"))
            returns = self._needs(batch.returns, "batch.returns")
            return value_loss(*critic, returns, mask, clip=self.value_clip, aggregation=self.aggregation, **scale)
        if self.kind == "kl":
            reference = self._needs(batch.ref_logprobs, "batch.ref_logprobs")
            loss = kl_divergence(logprobs, reference, self.estimator)
            metrics = {"divergence": loss}
        elif self.kind == "entropy":
            entropy = self._needs(entropy, "entropy")
            loss, metrics = -entropy, {"entropy": entropy}
        else:
            weights, nll = torch.where(mask, batch.advantages, 0.0), torch.where(mask, -logprobs, 0.0)
            loss, metrics = weights * nll, {"nll": nll, "weight": weights}
        return aggregate(loss, mask, self.aggregation, **scale), token_means(mask, metrics)

    def _policy_loss(
        self, batch: LossBatch, logprobs: Tensor, scale: dict[str, Any], covariance_tokens: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        advantages, weights = self._advantages(batch), self._token_weights(batch, logprobs.detach())
        if weights is not None:
            advantages = advantages * weights
        keywords = {"aggregation": self.aggregation, "drop": covariance_tokens, **scale}
        keywords |= {name: getattr(self, name) for name in ("clip_low", "clip_high", "dual_clip")}
        keywords |= {"rollout_logprobs": batch.rollout_logprobs, "ref_logprobs": batch.ref_logprobs}
        if self.surrogate == "clip" and self.clip_cov is not None:
            keywords["log_ratio_clamp"] = self.clip_cov.log_ratio_clamp
        if self.surrogate == "kl_cov":
            keywords |= {"drop": None, "penalised": covariance_tokens}
            keywords |= {"ratio": self.kl_cov.ratio, "kl_coef": self.kl_cov.coef}
        function, accepted = _surrogate(self.surrogate)
        tokens = (logprobs, batch.old_logprobs, advantages, batch.action_mask)
        returned = function(*tokens, **{name: value for name, value in keywords.items() if name in accepted})
        loss, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
        if not (isinstance(loss, Tensor) and loss.ndim == 0 and isinstance(metrics, dict)):
            hint = "return (scalar tensor, dict of floats)"
            text = f"{self.surrogate} returned {type(returned).__name__}"
            raise ContractError(text, where="algo.loss", hint=hint)
        metrics = {k: float(v.detach() if isinstance(v, Tensor) else v) for k, v in metrics.items()}
        return loss, metrics if weights is None else metrics | token_means(batch.action_mask, {"token_weight": weights})

    def _advantages(self, batch: LossBatch) -> Tensor:
        """Self-imitation learns only from what beat the baseline (SIL, arXiv:1806.05635 eq. 2; arXiv:2509.22601)."""
        return batch.advantages.clamp(min=0) if self.kind == "sil" else batch.advantages

    def _token_weights(self, batch: LossBatch, logprobs: Tensor) -> Tensor | None:
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


@cache
def _surrogate(name: str) -> tuple[Callable[..., Any], frozenset[str]]:
    """A surrogate's function, and the keywords it is called with where there is a value for them."""
    function = SURROGATES.get(name)
    if function is None:
        if os.getcwd() not in sys.path:  # in a rank that a launcher started, nobody has checked the path, which adds it
            sys.path.append(os.getcwd())
        module, _, attribute = name.partition(":")
        function = getattr(import_module(module), attribute)
    return function, frozenset((*REQUIRED, *inspect.signature(function).parameters))
