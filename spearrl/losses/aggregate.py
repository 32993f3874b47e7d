"""Where token losses become a scalar: the one home of the aggregation modes and of what each divides by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spearrl.errors import ContractError

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def denominator(action_mask: Tensor, mode: str, horizon: float) -> float:
    """What a whole mini-batch is divided by: its action tokens, its rows, or rows × horizon; at least 1.

    Args:
        action_mask: [B, T], all rows of the mini-batch.
        mode: one of AGGREGATIONS.
        horizon: tokens of the longest response; read by "seq-mean-token-sum-norm" alone.

    Raises:
        ContractError: unknown mode.
    """
    _check(mode)
    if mode == "token-mean":
        return float(max(int(action_mask.sum()), 1))
    return max(len(action_mask), 1) * float(horizon if mode == "seq-mean-token-sum-norm" else 1)


def aggregate(
    values: Tensor, mask: Tensor, mode: str, *, horizon: float | None = None, denominator: float | None = None
) -> Tensor:
    """Token values over a denominator. Without `denominator`, that of this call, R rows:

    token-mean: sum / (tokens + 1e-8)           seq-mean-token-sum: sum / R
    seq-mean-token-mean: sum of row means / R   seq-mean-token-sum-norm: sum / horizon (Dr. GRPO, arXiv:2503.20783)

    A row without tokens adds 0.

    Args:
        values, mask: [B, T].
        horizon: tokens of the longest response, not the width of this tensor.
        denominator: of the mini-batch over all ranks, as the function `denominator` gives it.

    Returns:
        Scalar; 0 with a gradient path where the mask is empty.

    Raises:
        ContractError: unknown mode, or seq-mean-token-sum-norm without horizon and denominator.
    """
    _check(mode)
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
        hint = "pass horizon=, the longest response in tokens"
        raise ContractError(f"aggregation {mode!r} with horizon={horizon}", hint=hint)
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
    """(loss, metrics) of token losses and token metrics, [B, T] each, the tokens in `drop` left out of the loss."""
    dropped = torch.zeros_like(mask) if drop is None else drop
    if drop is not None:
        values = torch.where(drop, 0.0, values)
    loss = aggregate(values, mask, aggregation, horizon=horizon, denominator=denominator)
    return loss, token_means(mask, {**metrics, "dropped_fraction": dropped})


@torch.no_grad()
def token_means(mask: Tensor, values: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of [B, T] tensors over the mask as floats, with one transfer from the device."""
    mask = mask.bool()
    sums = torch.stack([torch.where(mask, value.double(), 0.0).sum() for value in values.values()])
    return dict(zip(values, (sums / (mask.sum().double() + 1e-8)).tolist(), strict=True))


def _check(mode: str) -> None:
    if mode not in AGGREGATIONS:
        raise ContractError(f"aggregation {mode!r} is not known", hint=f"use one of {', '.join(AGGREGATIONS)}")
