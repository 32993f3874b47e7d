"""Covariance-aware regularisation against entropy collapse: Clip-Cov and KL-Cov (arXiv:2505.22617)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spearrl.errors import ContractError
from spearrl.losses.aggregate import reduced
from spearrl.losses.surrogates import clipped_policy_loss, clipped_tokens, masked_log_ratio

# KL-Cov's ratio is not clipped (the golden values hold that beyond ±20); this only keeps it finite in float32.
FLOAT32_LOG_LIMIT = 80.0


@torch.no_grad()
def covariance_selection(
    logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    ratio: float,
    lower: float | str,
    upper: float | str,
    exclude: Tensor | None = None,
    generator: torch.Generator | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """The tokens that Clip-Cov drops: a few of those whose covariance lies between two bounds.

    The covariance of a token is (A - mean A)(logprobs - mean logprobs), means over the action tokens.

    Args:
        logprobs, advantages, action_mask: [B, T].
        ratio: share of the action tokens; max(int(ratio * tokens), 1) are drawn where so many lie between the bounds.
        lower, upper: numbers, or "quantile:0.8": that quantile of the covariances of all action tokens.
        exclude: bool [B, T], tokens that may not be drawn (those PPO has clipped already).
        generator: draws by torch.randperm; depends on row order.
        keys: int64 [B, T] from `counter_keys`; the smallest keys win, so that neither row order nor the number of
            processes matters.

    Returns:
        bool [B, T].

    Raises:
        ContractError: both generator and keys are there; a bound that is no number and no quantile.
    """
    if generator is not None and keys is not None:
        hint = "pass keys for a draw that ignores row order, else a generator"
        raise ContractError("covariance_selection got generator and keys", hint=hint)
    mask = action_mask.bool()
    covariance = _covariance(logprobs, advantages, mask)
    ordered = covariance[mask].sort().values if isinstance(lower, str) or isinstance(upper, str) else covariance
    eligible = mask & (covariance > _bound(lower, ordered)) & (covariance < _bound(upper, ordered))
    if exclude is not None:
        eligible &= ~exclude
    candidates = eligible.flatten().nonzero()[:, 0]
    quota = max(int(ratio * int(mask.sum())), 1)
    if keys is None:
        order = torch.randperm(len(candidates), generator=generator).to(candidates.device)
    else:
        order = keys.flatten()[candidates].argsort(stable=True)
    return _true_at(candidates[order[:quota]], mask)


def clip_cov_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio: float = 2e-4,
    lower: float | str = 1.0,
    upper: float | str = 5.0,
    aggregation: str = "token-mean",
    horizon: float | None = None,
    denominator: float | None = None,
    generator: torch.Generator | None = None,
    keys: Tensor | None = None,
    drop: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Clip-Cov (arXiv:2505.22617): the clipped surrogate without the tokens that `covariance_selection` draws here.

    Args (all [B, T]): as `clipped_policy_loss` and `covariance_selection`. Tokens in `drop` are left out besides.
    """
    tokens = (logprobs, old_logprobs, advantages, action_mask)
    exclude = clipped_tokens(*tokens, clip_low=clip_low, clip_high=clip_high)
    rule: dict[str, Any] = {"ratio": ratio, "lower": lower, "upper": upper, "exclude": exclude}
    drawn = covariance_selection(logprobs, advantages, action_mask, **rule, generator=generator, keys=keys)
    rest: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "aggregation": aggregation}
    rest |= {"horizon": horizon, "denominator": denominator}
    return clipped_policy_loss(*tokens, **rest, drop=drawn if drop is None else drawn | drop)


@torch.no_grad()
def kl_cov_selection(
    logprobs: Tensor, advantages: Tensor, action_mask: Tensor, *, ratio: float, keys: Tensor | None = None
) -> Tensor:
    """The tokens that KL-Cov penalises: the max(int(ratio * tokens), 1) of highest covariance (arXiv:2505.22617).

    Args (all [B, T]):
        keys: from `counter_keys`, decide between equal covariances; without them torch.topk does.

    Returns:
        bool [B, T].
    """
    mask = action_mask.bool()
    tokens = mask.flatten().nonzero()[:, 0]
    covariance = _covariance(logprobs, advantages, mask).flatten()
    quota = min(max(int(ratio * len(tokens)), 1), len(tokens))
    if keys is None:
        return _true_at(tokens[covariance[tokens].topk(quota).indices], mask)
    tokens = tokens[keys.flatten()[tokens].argsort(stable=True)]
    return _true_at(tokens[covariance[tokens].argsort(descending=True, stable=True)[:quota]], mask)


def kl_cov_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    ratio: float = 2e-4,
    kl_coef: float = 0.1,
    aggregation: str = "token-mean",
    horizon: float | None = None,
    denominator: float | None = None,
    drop: Tensor | None = None,
    penalised: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """KL-Cov (arXiv:2505.22617): -A r for every token, + kl_coef |log r| for those of highest covariance.

    r = exp(logprobs - old_logprobs) is not clipped.

    Args (all [B, T]): see the package. Metrics penalised_fraction, approx_kl (-log r), abs_log_ratio.
        ratio: share of the action tokens that is penalised, one at least.
        penalised: bool [B, T], these tokens, from `kl_cov_selection` over a mini-batch; None: of this call.
    """
    mask, advantages, log_ratio = masked_log_ratio(logprobs, old_logprobs, advantages, action_mask)
    if penalised is None:
        penalised = kl_cov_selection(logprobs, advantages, mask, ratio=ratio)
    penalty = torch.where(penalised, kl_coef * log_ratio.abs(), 0.0)
    loss = -advantages * log_ratio.clamp(-FLOAT32_LOG_LIMIT, FLOAT32_LOG_LIMIT).exp() + penalty
    metrics = {"penalised_fraction": penalised, "approx_kl": -log_ratio, "abs_log_ratio": log_ratio.abs()}
    return reduced(loss, mask, metrics, drop=drop, aggregation=aggregation, horizon=horizon, denominator=denominator)


def value_at(ordered: Tensor, position: float) -> float:
    """Between two neighbours of a sorted [K], linearly: a quantile (torch.quantile refuses large inputs)."""
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (position - low))


@torch.no_grad()
def _covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Centred product per token, float64 [B, T]; means over the mask, 0 outside."""
    count = mask.sum().clamp(min=1)
    product = mask.double()
    for values in (advantages, logprobs):
        values = torch.where(mask, values, 0.0).double()
        product = product * (values - values.sum() / count)
    return product


def _bound(value: float | str, ordered: Tensor) -> float:
    """A bound as a number; `ordered` are all covariances."""
    if not isinstance(value, str):
        return value
    kind, _, share = value.partition(":")
    q = float(share) if kind == "quantile" and share.replace(".", "", 1).isdigit() else -1.0
    if not 0 <= q <= 1:
        raise ContractError(f"threshold {value!r} is not known", hint='use a number or "quantile:0.8"')
    return value_at(ordered, q * (len(ordered) - 1)) if len(ordered) else 0.0


def _true_at(positions: Tensor, mask: Tensor) -> Tensor:
    """bool of the mask's shape, True at these row-major positions."""
    tokens = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    tokens[positions] = True
    return tokens.view(mask.shape)
