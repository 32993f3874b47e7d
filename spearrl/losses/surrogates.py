"""Ratio-based policy losses: PPO's clipped surrogate, GSPO, CISPO."""

from __future__ import annotations

import torch
from torch import Tensor

from spearrl.losses.aggregate import reduced

# e^20 is finite in every float type, and so is its product with an advantage; stale replay can exceed it.
MAX_LOG_RATIO = 20.0


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
    """PPO's clipped surrogate (arXiv:1707.06347 eq. 7), with an upper clip of its own (DAPO, arXiv:2503.14476).

    l = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),   r = exp(logprobs - old_logprobs)
    With dual_clip (arXiv:1912.09729), where A < 0: l = min(l, -A dual_clip)

    Args (all [B, T]): see the package. Metrics clip_fraction, dual_clip_fraction, approx_kl (-log r).
        log_ratio_clamp: bound on |log r|, beyond which there is no gradient either; None: no bound.
    """
    mask, advantages, log_ratio = masked_log_ratio(logprobs, old_logprobs, advantages, action_mask)
    limit = torch.inf if log_ratio_clamp is None else log_ratio_clamp
    log_ratio = log_ratio.clamp(-limit, limit)
    unclipped, clipped = _surrogates(advantages, log_ratio.exp(), clip_low, clip_high)
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
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """bool [B, T]: tokens whose gradient PPO's clip has already removed. All arguments [B, T]."""
    _, advantages, log_ratio = masked_log_ratio(logprobs, old_logprobs, advantages, action_mask)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped, clipped = _surrogates(advantages, ratio, clip_low, clip_high)
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

    r_t = sg[s] p_t / sg[p_t],   s = exp(mean over the row's action tokens of logprobs - old_logprobs)
    sg: no gradient. With one advantage per row this is GSPO itself.

    Args (all [B, T]): see the package. Metrics clip_fraction, approx_kl (-log of the token's own ratio).
    """
    mask, advantages, log_ratio = masked_log_ratio(logprobs, old_logprobs, advantages, action_mask)
    row_mean = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = (row_mean.detach() + log_ratio - log_ratio.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped, clipped = _surrogates(advantages, ratio, clip_low, clip_high)
    loss = torch.maximum(unclipped, clipped)
    metrics = {"clip_fraction": clipped > unclipped, "approx_kl": -log_ratio}
    return reduced(loss, mask, metrics, drop=drop, aggregation=aggregation, horizon=horizon, denominator=denominator)


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

    l = -sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprobs,   r = exp(logprobs - old_logprobs);   sg: no gradient

    Args (all [B, T]): see the package; clip_low = 1: no lower bound. Metrics clip_fraction, approx_kl (-log r).
    """
    mask, advantages, log_ratio = masked_log_ratio(logprobs, old_logprobs, advantages, action_mask)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).detach()
    weight = log_ratio.exp().clamp(1 - clip_low, 1 + clip_high)
    loss = -weight * advantages * torch.where(mask, logprobs, 0.0)
    metrics = {"clip_fraction": weight != log_ratio.exp(), "approx_kl": -log_ratio}
    return reduced(loss, mask, metrics, drop=drop, aggregation=aggregation, horizon=horizon, denominator=denominator)


def masked_log_ratio(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, action_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, advantages, logprobs - old_logprobs), [B, T] each; the last two are 0 outside the mask."""
    mask = action_mask.bool()
    return mask, torch.where(mask, advantages, 0.0), torch.where(mask, logprobs - old_logprobs, 0.0)


def _surrogates(advantages: Tensor, ratio: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """(-A r, -A clip(r))."""
    return -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
