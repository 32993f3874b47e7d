"""Ratio-based policy losses: PPO's clipped surrogate, GSPO, CISPO."""

from __future__ import annotations

import torch
from torch import Tensor

from spearrl.losses.aggregate import reduced

MAX_LOG_RATIO = (
    20.0  # e^20 is finite in every float type and so is its product with an advantage; stale replay can exceed it
)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token-mean",
    horizon: float | None = None,
    denominator: float | None = None,
    drop: Tensor | None = None,
    log_ratio_clamp: float | None = MAX_LOG_RATIO,
) -> tuple[Tensor, dict[str, float]]:
    """PPO's clipped surrogate (arXiv:1707.06347 eq. 7), upper clip apart (DAPO, arXiv:2503.14476), dual clip (arXiv:1912.09729).

    l = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),   r = exp(logprobs - old_logprobs);   where A < 0: l = min(l, -A dual_clip)

    Args (all [B, T]): see the package; metrics clip_fraction, dual_clip_fraction, approx_kl = mean(old_logprobs - logprobs), dropped_fraction.
        log_ratio_clamp: bound on |log r|, beyond which there is no gradient either; None: no bound.
    """
    mask = action_mask.bool()
    advantages = torch.where(mask, advantages, 0.0)
    limit = torch.inf if log_ratio_clamp is None else log_ratio_clamp
    log_ratio, unclipped, clipped = _surrogates(
        logprobs, old_logprobs, advantages, mask, (1 - clip_low, 1 + clip_high), limit=limit
    )
    loss = torch.maximum(unclipped, clipped)
    bounded = torch.zeros_like(mask)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(bounded, bound, loss)
    metrics = {"clip_fraction": clipped > unclipped, "dual_clip_fraction": bounded, "approx_kl": -log_ratio}
    return reduced(loss, mask, metrics, drop=drop, aggregation=aggregation, horizon=horizon, denominator=denominator)


@torch.no_grad()
def clipped_tokens(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """bool [B, T]: tokens whose gradient PPO's clip has already removed. All arguments [B, T]."""
    mask = action_mask.bool()
    _, unclipped, clipped = _surrogates(
        logprobs, old_logprobs, torch.where(mask, advantages, 0.0), mask, (1 - clip_low, 1 + clip_high)
    )
    return clipped > unclipped


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    aggregation: str = "seq-mean-token-mean",
    horizon: float | None = None,
    denominator: float | None = None,
    drop: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Clipped surrogate of the row's length-normalised ratio, in its token form (GSPO, arXiv:2507.18071 section 4.3).

    r_t = sg[s] p_t / sg[p_t],   s = exp(mean over the row's action tokens of logprobs - old_logprobs);   sg: no gradient

    With one advantage per row this is GSPO itself. Args (all [B, T]): see the package; metrics clip_fraction, approx_kl, dropped_fraction.
    """
    mask = action_mask.bool()
    advantages = torch.where(mask, advantages, 0.0)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    row_mean = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = (row_mean.detach() + log_ratio - log_ratio.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    metrics = {"clip_fraction": clipped > unclipped, "approx_kl": -log_ratio}
    return reduced(
        torch.maximum(unclipped, clipped),
        mask,
        metrics,
        drop=drop,
        aggregation=aggregation,
        horizon=horizon,
        denominator=denominator,
    )


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 0.2,
    aggregation: str = "token-mean",
    horizon: float | None = None,
    denominator: float | None = None,
    drop: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """REINFORCE with a clipped importance weight: no token loses its gradient (CISPO, arXiv:2506.13585 eq. 4).

    l = -sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprobs,   r = exp(logprobs - old_logprobs);   clip_low = 1: no lower bound

    Args (all [B, T]): see the package; metrics clip_fraction, approx_kl, dropped_fraction.
    """
    mask = action_mask.bool()
    advantages = torch.where(mask, advantages, 0.0)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).detach()
    weight = log_ratio.exp().clamp(1 - clip_low, 1 + clip_high)
    loss = -weight * advantages * torch.where(mask, logprobs, 0.0)
    metrics = {"clip_fraction": weight != log_ratio.exp(), "approx_kl": -log_ratio}
    return reduced(loss, mask, metrics, drop=drop, aggregation=aggregation, horizon=horizon, denominator=denominator)


def _surrogates(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    bounds: tuple[float, float],
    *,
    limit: float = MAX_LOG_RATIO,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log ratio, -A r, -A clip(r)); log ratio 0 outside the mask."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-limit, limit)
    ratio = log_ratio.exp()
    return log_ratio, -advantages * ratio, -advantages * ratio.clamp(*bounds)
