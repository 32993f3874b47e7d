"""Covariance-aware regularisation against entropy collapse: Clip-Cov and KL-Cov (arXiv:2505.22617)."""

from __future__ import annotations

import torch
from torch import Tensor

from spearrl.errors import ContractError
from spearrl.losses.aggregate import aggregate, token_means, without
from spearrl.losses.policy import clipped_policy_loss, clipped_tokens

FLOAT32_LOG_LIMIT = 80.0  # KL-Cov's ratio is not clipped; this only keeps it finite in float32


@torch.no_grad()
def covariance_selection(
    logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    ratio: float,
    lower: float,
    upper: float,
    exclude: Tensor | None = None,
    generator: torch.Generator | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """bool [B, T]: up to max(int(ratio * tokens), 1) tokens drawn from those with lower < (A - mean A)(logprobs - mean logprobs) < upper.

    Args:
        logprobs, advantages, action_mask: [B, T].
        exclude: bool [B, T], tokens that may not be drawn (those PPO has clipped already).
        generator: draws by torch.randperm; depends on row order.
        keys: int64 [B, T] from `counter_keys`; the smallest keys win, so neither row order nor the number of processes matters.

    Raises:
        ContractError: both generator and keys are given.
    """
    if generator is not None and keys is not None:
        raise ContractError("covariance_selection got generator and keys", hint="pass keys for a draw that ignores row order, else a generator")
    mask = action_mask.bool()
    covariance = _covariance(logprobs, advantages, mask)
    eligible = mask & (covariance > lower) & (covariance < upper)
    if exclude is not None:
        eligible &= ~exclude
    candidates = eligible.flatten().nonzero()[:, 0]
    quota = max(int(ratio * int(mask.sum())), 1)
    drawn = torch.randperm(len(candidates), generator=generator).to(candidates.device) if keys is None else keys.flatten()[candidates].argsort(stable=True)
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
    lower: float = 1.0,
    upper: float = 5.0,
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
    drawn = covariance_selection(logprobs, advantages, action_mask, ratio=ratio, lower=lower, upper=upper, exclude=exclude, generator=generator, keys=keys)
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
) -> tuple[Tensor, dict[str, float]]:
    """KL-Cov (arXiv:2505.22617): -A r for every token, + kl_coef |log r| for the share `ratio` (at least one) of highest covariance; r is not clipped.

    Args (all [B, T]): see the package; metrics penalised_fraction, approx_kl, abs_log_ratio, dropped_fraction.
    """
    mask = action_mask.bool()
    advantages = torch.where(mask, advantages, 0.0)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    live = mask.flatten().nonzero()[:, 0]
    quota = max(int(ratio * len(live)), 1)
    highest = _covariance(logprobs, advantages, mask).flatten()[live].topk(min(quota, len(live))).indices
    selected = _at(live[highest], mask)
    loss = -advantages * log_ratio.clamp(-FLOAT32_LOG_LIMIT, FLOAT32_LOG_LIMIT).exp() + torch.where(selected, kl_coef * log_ratio.abs(), 0.0)
    metrics = {"penalised_fraction": selected, "approx_kl": -log_ratio, "abs_log_ratio": log_ratio.abs()}
    metrics["dropped_fraction"] = torch.zeros_like(mask) if drop is None else drop
    return aggregate(without(drop, loss), mask, aggregation, horizon=horizon, denominator=denominator), token_means(mask, metrics)


def counter_keys(seed: int, uids: Tensor, width: int) -> Tensor:
    """int64 [B, width]: a random-looking number for every token from (seed, row uid, position) alone (splitmix64, doi:10.1145/2660193.2660195).

    Args:
        uids: [B] integers that name rows across the run.
    """
    start = torch.tensor(_signed(seed), dtype=torch.int64, device=uids.device)
    position = torch.arange(width, dtype=torch.int64, device=uids.device)
    return _mix(_mix(_mix(start) + uids.to(torch.int64))[:, None] + position[None, :])


@torch.no_grad()
def _covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Centred product per token, float64 [B, T]; means over the mask, 0 outside."""
    count = mask.sum().clamp(min=1)
    product = mask.double()
    for values in (advantages, logprobs):
        values = torch.where(mask, values, 0.0).double()
        product = product * (values - values.sum() / count)
    return product


def _at(positions: Tensor, like: Tensor) -> Tensor:
    """bool of the shape of `like`, True at these row-major positions."""
    selected = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    selected[positions] = True
    return selected.view(like.shape)


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's shift of a signed integer copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the same low 64 bits."""
    return (x + 2**63) % 2**64 - 2**63
