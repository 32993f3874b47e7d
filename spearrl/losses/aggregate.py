"""The one place where token losses become a scalar."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spearrl.errors import ContractError

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def aggregate(
    values: Tensor, mask: Tensor, mode: str, *, horizon: float | None = None, denominator: float | None = None
) -> Tensor:
    """Sum of token values over a divisor, by mode (numerator / divisor when `denominator` is None, R rows):

    token-mean: sum / (tokens + 1e-8) · seq-mean-token-sum: sum / R · seq-mean-token-mean: sum of row means / R (a row without tokens adds 0)
    · seq-mean-token-sum-norm: sum / horizon (Dr. GRPO, arXiv:2503.20783)

    Args:
        values, mask: [B, T].
        horizon: divisor of seq-mean-token-sum-norm; the longest response, not the width of this tensor.
        denominator: the full divisor instead (that of the mini-batch over all ranks; for seq-mean-token-sum-norm rows * horizon).

    Returns:
        Scalar; 0 with a gradient path where the mask is empty.

    Raises:
        ContractError: unknown mode, or seq-mean-token-sum-norm without horizon and denominator.
    """
    if mode not in AGGREGATIONS:
        raise ContractError(f"aggregation {mode!r} is not known", hint=f"use one of {', '.join(AGGREGATIONS)}")
    mask = mask.bool()
    values = torch.where(mask, values, 0.0)
    numerator = (values.sum(-1) / mask.sum(-1).clamp(min=1)).sum() if mode == "seq-mean-token-mean" else values.sum()
    if denominator is not None:
        return numerator / (denominator or 1.0)  # 0: a mini-batch without tokens, whose numerator is 0
    if mode == "token-mean":
        return numerator / (mask.sum().to(values.dtype) + 1e-8)
    if mode != "seq-mean-token-sum-norm":
        return numerator / max(len(mask), 1)
    if not horizon:
        raise ContractError(
            f"aggregation {mode!r} with horizon={horizon}", hint="pass horizon=, the longest response in tokens"
        )
    return numerator / horizon


def reduced(
    values: Tensor,
    mask: Tensor,
    metrics: Mapping[str, Tensor],
    *,
    drop: Tensor | None,
    aggregation: str,
    horizon: float | None,
    denominator: float | None,
) -> tuple[Tensor, dict[str, float]]:
    """(loss, metrics) of token losses and token metrics, [B, T] each; dropped tokens have no loss and no gradient but stay in the divisor."""
    kept = values if drop is None else torch.where(drop, 0.0, values)
    dropped = torch.zeros_like(mask) if drop is None else drop
    loss = aggregate(kept, mask, aggregation, horizon=horizon, denominator=denominator)
    return loss, token_means(mask, {**metrics, "dropped_fraction": dropped})


@torch.no_grad()
def token_means(mask: Tensor, values: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the mask as floats, with one transfer from the device."""
    live = mask.bool()
    sums = torch.stack([torch.where(live, value.double(), 0.0).sum() for value in values.values()])
    return dict(zip(values, (sums / (live.sum().double() + 1e-8)).tolist(), strict=True))
