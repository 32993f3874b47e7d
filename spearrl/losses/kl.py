"""KL divergence between two policies, a number a token."""

from __future__ import annotations

import torch
from torch import Tensor

from spearrl.errors import ContractError

K3_LIMIT = 10.0


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """KL divergence per token, estimated from samples of the current policy (http://joschu.net/blog/kl-approx.html).

    k1: d   abs: |d|   k2: d² / 2   k3: exp(-d) + d - 1, clamped to ±10 (no gradient beyond)
    d = logprobs - ref_logprobs

    Returns:
        [B, T]; aggregate it under the action mask. Non-finite inputs give NaN with gradient 0: garbage outside the mask
        stays there.

    Raises:
        ContractError: unknown estimator.
    """
    if estimator not in ("k1", "k2", "k3", "abs"):
        raise ContractError(f"KL estimator {estimator!r} is not known", hint="use 'k1', 'k2', 'k3' or 'abs'")
    difference = logprobs - ref_logprobs
    finite = torch.isfinite(difference)
    kl = d = torch.where(finite, difference, 0.0)
    if estimator == "abs":
        kl = d.abs()
    elif estimator == "k2":
        kl = d.square() / 2
    elif estimator == "k3":  # clamped before exp as well: 0 * inf in the backward pass is NaN
        kl = ((-d).clamp(max=2 * K3_LIMIT).exp() + d - 1).clamp(-K3_LIMIT, K3_LIMIT)
    return torch.where(finite, kl, torch.nan)
