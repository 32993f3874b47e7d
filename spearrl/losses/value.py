"""The critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from spearrl.losses.aggregate import aggregate, token_means, without


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor,
    *,
    clip: float = 0.5,
    aggregation: str = "token-mean",
    horizon: float | None = None,
    denominator: float | None = None,
    drop: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Clipped squared error of the value head (PPO's reference implementation, arXiv:1707.06347; halved).

    l = max((v - R)², (clip(v, v_old - clip, v_old + clip) - R)²) / 2

    Args (all [B, T]): see the package; metrics clip_fraction, error (mean |v - R|), dropped_fraction.
    """
    mask = action_mask.bool()
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    bounded = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    free, limited = (values - returns).square(), (bounded - returns).square()
    loss = aggregate(without(drop, torch.maximum(free, limited) / 2), mask, aggregation, horizon=horizon, denominator=denominator)
    metrics = {"clip_fraction": limited > free, "error": (values - returns).abs(), "dropped_fraction": torch.zeros_like(mask) if drop is None else drop}
    return loss, token_means(mask, metrics)
