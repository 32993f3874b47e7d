"""Covariance-aware regularisation against entropy collapse: Clip-Cov and KL-Cov (arXiv:2505.22617)."""

from __future__ import annotations

import torch
from torch import Tensor

from spearrl.errors import ContractError
from spearrl.losses.aggregate import reduced
from spearrl.losses.surrogates import clipped_policy_loss, clipped_tokens

FLOAT32_LOG_LIMIT = (
    80.0  # KL-Cov's ratio is not clipped (the golden values hold that beyond ±20); this only keeps it finite in float32
)


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
    """bool [B, T]: up to max(int(ratio * tokens), 1) tokens drawn from those with lower < (A - mean A)(logprobs - mean logprobs) < upper.

    Args:
        logprobs, advantages, action_mask: [B, T].
        lower, upper: numbers, or "quantile:0.8": that quantile of the covariances of all action tokens.
        exclude: bool [B, T], tokens that may not be drawn (those PPO has clipped already).
        generator: draws by torch.randperm; depends on row order.
        keys: int64 [B, T] from `counter_keys`; the smallest keys win, so neither row order nor the number of processes matters.

    Raises:
        ContractError: both generator and keys are given; a bound that is no number and no quantile.
    """
    if generator is not None and keys is not None:
        raise ContractError(
            "covariance_selection got generator and keys",
            hint="pass keys for a draw that ignores row order, else a generator",
        )
    mask = action_mask.bool()
    covariance = _covariance(logprobs, advantages, mask)
    ordered = covariance[mask].sort().values if isinstance(lower, str) or isinstance(upper, str) else covariance
    eligible = mask & (covariance > _bound(lower, ordered)) & (covariance < _bound(upper, ordered))
    if exclude is not None:
        eligible &= ~exclude
    candidates = eligible.flatten().nonzero()[:, 0]
    quota = max(int(ratio * int(mask.sum())), 1)
    drawn = (
        torch.randperm(len(candidates), generator=generator).to(candidates.device)
        if keys is None
        else keys.flatten()[candidates].argsort(stable=True)
    )
    return _at(candidates[drawn[:quota]], mask)


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
    """Clip-Cov (arXiv:2505.22617): the clipped surrogate without a few high-covariance tokens, drawn from this call's.

    Args (all [B, T]): as `clipped_policy_loss` and `covariance_selection`; dropped_fraction is the share of tokens drawn or in `drop`.
    """
    exclude = clipped_tokens(logprobs, old_logprobs, advantages, action_mask, clip_low=clip_low, clip_high=clip_high)
    drawn = covariance_selection(
        logprobs,
        advantages,
        action_mask,
        ratio=ratio,
        lower=lower,
        upper=upper,
        exclude=exclude,
        generator=generator,
        keys=keys,
    )
    return clipped_policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        action_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        aggregation=aggregation,
        horizon=horizon,
        denominator=denominator,
        drop=drawn if drop is None else drawn | drop,
    )


@torch.no_grad()
def kl_cov_selection(
    logprobs: Tensor, advantages: Tensor, action_mask: Tensor, *, ratio: float, keys: Tensor | None = None
) -> Tensor:
    """bool [B, T]: the max(int(ratio * tokens), 1) tokens of highest covariance (arXiv:2505.22617). All arguments [B, T].

    Args:
        keys: from `counter_keys`, decide between equal covariances; without them torch.topk does.
    """
    mask = action_mask.bool()
    live = mask.flatten().nonzero()[:, 0]
    covariance, quota = (
        _covariance(logprobs, advantages, mask).flatten(),
        min(max(int(ratio * len(live)), 1), len(live)),
    )
    if keys is None:
        return _at(live[covariance[live].topk(quota).indices], mask)
    live = live[keys.flatten()[live].argsort(stable=True)]
    return _at(live[covariance[live].argsort(descending=True, stable=True)[:quota]], mask)


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
    selected: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """KL-Cov (arXiv:2505.22617): -A r for every token, + kl_coef |log r| for the share `ratio` (at least one) of highest covariance; r is not clipped.

    Args (all [B, T]): see the package; metrics penalised_fraction, approx_kl, abs_log_ratio, dropped_fraction.
        selected: bool [B, T], the penalised tokens, chosen over a mini-batch; None: chosen from this call's.
    """
    mask = action_mask.bool()
    advantages = torch.where(mask, advantages, 0.0)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    if selected is None:
        selected = kl_cov_selection(logprobs, advantages, mask, ratio=ratio)
    loss = -advantages * log_ratio.clamp(-FLOAT32_LOG_LIMIT, FLOAT32_LOG_LIMIT).exp() + torch.where(
        selected, kl_coef * log_ratio.abs(), 0.0
    )
    metrics = {"penalised_fraction": selected, "approx_kl": -log_ratio, "abs_log_ratio": log_ratio.abs()}
    return reduced(loss, mask, metrics, drop=drop, aggregation=aggregation, horizon=horizon, denominator=denominator)


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
    """A threshold as a number; a quantile with linear interpolation (torch.quantile refuses large inputs)."""
    if not isinstance(value, str):
        return value
    kind, _, share = value.partition(":")
    q = float(share) if kind == "quantile" and share.replace(".", "", 1).isdigit() else -1.0
    if not 0 <= q <= 1:
        raise ContractError(f"threshold {value!r} is not known", hint='use a number or "quantile:0.8"')
    if not len(ordered):
        return 0.0
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def _at(positions: Tensor, like: Tensor) -> Tensor:
    """bool of the shape of `like`, True at these row-major positions."""
    selected = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    selected[positions] = True
    return selected.view(like.shape)
