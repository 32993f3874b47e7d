"""The error of the critic."""

from __future__ import annotations

import torch
from torch import Tensor

from spearrl.losses.aggregate import reduced


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

    Args (all [B, T]): see the package. Metrics clip_fraction, error (|v - R|).
    """
    mask = action_mask.bool()
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    bounded = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    free, limited = (values - returns).square(), (bounded - returns).square()
    metrics = {"clip_fraction": limited > free, "error": (values - returns).abs()}
    loss = torch.maximum(free, limited) / 2
    return reduced(loss, mask, metrics, drop=drop, aggregation=aggregation, horizon=horizon, denominator=denominator)
