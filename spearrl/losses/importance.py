"""Importance weights between the engine that sampled and the learner."""

from __future__ import annotations

import torch
from torch import Tensor

from spearrl.errors import ContractError
from spearrl.losses.surrogates import MAX_LOG_RATIO


@torch.no_grad()
def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    action_mask: Tensor,
    *,
    mode: str,
    level: str = "token",
    cap: float = 2.0,
    floor: float = 0.5,
) -> Tensor:
    """Factors of the advantages, for engines whose log-probabilities differ: w = exp(old_logprobs - rollout_logprobs).

    Args:
        old_logprobs, rollout_logprobs, action_mask: [B, T]; where rollout_logprobs is not finite, the weight is 0.
        mode: "tis": min(w, cap), truncated importance sampling (IMPALA's ρ, arXiv:1802.01561 eq. 1); "mis": w where
            floor <= w <= cap, else 0.
        level: "token", or "sequence" (one weight per row, the product over its action tokens).

    Returns:
        [B, T], 0 outside the mask, without gradient.

    Raises:
        ContractError: unknown mode or level.
    """
    if mode not in ("tis", "mis") or level not in ("token", "sequence"):
        hint = "mode 'tis' or 'mis', level 'token' or 'sequence'"
        raise ContractError(f"importance_weights(mode={mode!r}, level={level!r})", hint=hint)
    mask = action_mask.bool() & torch.isfinite(rollout_logprobs)
    log_ratio = torch.where(mask, old_logprobs - rollout_logprobs, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if mode == "tis":
        weights = weights.clamp(max=cap)
    else:
        mask = mask & (weights >= floor) & (weights <= cap)
    return torch.where(mask, weights, 0.0)
