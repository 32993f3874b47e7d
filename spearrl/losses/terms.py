"""What stands beside the policy's surrogate: KL divergence, the critic's error, importance weights."""

from __future__ import annotations

import torch
from torch import Tensor

from spearrl.errors import ContractError
from spearrl.losses.aggregate import reduced
from spearrl.losses.surrogates import MAX_LOG_RATIO

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
