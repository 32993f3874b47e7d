"""Advantages as pure functions: turns in, one number per turn out ([N]); gae and reinforce_plus_plus work on tokens ([B, T]).

Statistics are computed in float64 and returned in the input's type. Turns of a trajectory stand in time order; trajectories may be interleaved. All raise
ContractError for an unknown option and for tensors of other shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spearrl.errors import ContractError


def grpo_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    trajectory_ids: Tensor | None = None,
    normalize_std: bool = True,
    statistics: str = "trajectory",
    singleton: str = "zero",
    eps: float = 1e-6,
) -> Tensor:
    """Group-relative advantages: (r - mean) / (std + eps), std with ddof 1 (GRPO, arXiv:2402.03300; without std: Dr. GRPO, arXiv:2503.20783).

    Args:
        rewards, group_ids, trajectory_ids: [N]; without trajectory_ids every turn is a trajectory of its own.
        normalize_std: divide by the group's standard deviation.
        statistics: "trajectory" counts each trajectory once, by its first turn; "turn" counts every turn; "balanced" lets every turn weigh
            1 / turns of its trajectory, for turns that differ by a penalty (counted by first turns, a group that is equal but for it has deviation 0).
        singleton: advantage of a group with one member: "zero", or "raw" (its reward, as released).

    Returns:
        [N]; exactly 0 where a group's rewards are all equal.
    """
    stats = _group_stats(rewards, group_ids, trajectory_ids, statistics)
    return _normalised(stats, rewards, normalize_std=normalize_std, singleton=singleton, eps=eps).to(_dtype(rewards))


def gigpo_advantages(
    episode_rewards: Tensor,
    step_returns: Tensor,
    group_ids: Tensor,
    anchor_ids: Tensor,
    *,
    trajectory_ids: Tensor | None = None,
    step_weight: float = 1.0,
    normalize_std: bool = True,
    statistics: str = "trajectory",
    singleton: str = "zero",
    eps: float = 1e-6,
) -> Tensor:
    """Episode part within the group plus step_weight times the step part among turns of a group that saw the same state (GiGPO, arXiv:2505.10978).

    Args:
        episode_rewards, step_returns, group_ids, anchor_ids, trajectory_ids: [N]; step returns come from `discounted_returns`,
            equal anchor_ids mean the same state.
        statistics, singleton: of the episode part, as in `grpo_advantages`. A state seen once has step part 0.
    """
    episode = grpo_advantages(
        episode_rewards.double(),
        group_ids,
        trajectory_ids=trajectory_ids,
        normalize_std=normalize_std,
        statistics=statistics,
        singleton=singleton,
        eps=eps,
    )
    _check_sizes(episode_rewards, step_returns, anchor_ids)
    step = state_advantages(step_returns.double(), group_ids, anchor_ids, normalize_std=normalize_std, eps=eps)
    return (episode + step_weight * step).to(_dtype(episode_rewards))


def state_advantages(
    step_returns: Tensor, group_ids: Tensor, anchor_ids: Tensor, *, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """GiGPO's step part alone (arXiv:2505.10978 eq. 7): a turn's return against the group's other turns in the same state. All [N]; 0 for a lone one."""
    return grpo_advantages(
        step_returns,
        _pair_ids(group_ids, anchor_ids),
        normalize_std=normalize_std,
        statistics="turn",
        singleton="zero",
        eps=eps,
    )


def discounted_returns(rewards: Tensor, trajectory_ids: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma * G_{t+1} within each trajectory. All [N]."""
    _check_sizes(rewards, trajectory_ids)
    order = torch.argsort(trajectory_ids, stable=True)
    returns = torch.empty(len(rewards), dtype=torch.float64, device=rewards.device)
    returns[order] = _reverse_scan(rewards[order].double(), trajectory_ids[order], gamma)
    return returns.to(_dtype(rewards))


def rloo_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    trajectory_ids: Tensor | None = None,
    statistics: str = "trajectory",
    singleton: str = "zero",
) -> Tensor:
    """Reward minus the mean of the others: (r - mean) * n / (n - 1) (RLOO, arXiv:2402.14740). Arguments as in `grpo_advantages`; [N]."""
    stats = _group_stats(rewards, group_ids, trajectory_ids, statistics)
    others = (stats.count - 1).clamp(min=1)
    return torch.where(stats.count > 1, stats.deviation * stats.count / others, _singleton(singleton, rewards)).to(
        _dtype(rewards)
    )


def recalibrated_advantages(
    rewards: Tensor, baseline: float | Tensor, std: float | Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Replayed rewards against a recent baseline: (r - baseline) [/ (std + eps)] (SPEAR, arXiv:2509.22601). [N]; baseline and std are numbers or [N]."""
    advantages = rewards.double() - baseline
    if std is not None:
        advantages = advantages / (std + eps)
    return advantages.to(_dtype(rewards))


def gae(rewards: Tensor, values: Tensor, action_mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over action tokens (arXiv:1506.02438), not whitened.

    A_t = d_t + gamma lam A_{t+1},  d_t = r_t + gamma V_{t+1} - V_t,  t+1 being the row's next action token (V = 0 after its last).

    Args (all [B, T]):
        rewards, values: read at action tokens only. To bootstrap a cut-off row, add gamma * V(next state) to its last reward.

    Returns:
        (advantages, returns = A + V), both [B, T], 0 outside the mask.
    """
    mask = action_mask.bool()
    row = mask.nonzero()[:, 0]
    reward, value = rewards[mask].double(), values[mask].double()
    following = torch.zeros_like(value)
    following[:-1] = torch.where(row[1:] == row[:-1], value[1:], 0.0)
    advantage = _reverse_scan(reward + gamma * following - value, row, gamma * lam)
    return _spread(advantage, mask, values), _spread(advantage + value, mask, values)


def reinforce_plus_plus(rewards: Tensor, action_mask: Tensor, *, gamma: float = 1.0, gaps: str = "skip") -> Tensor:
    """Discounted token returns, whitened over all action tokens (REINFORCE++, arXiv:2501.03262).

    Args:
        rewards, action_mask: [B, T].
        gaps: "skip" carries the return over tool outputs to earlier turns; "reset" drops it there (as released).

    Returns:
        [B, T], 0 outside the mask.

    Raises:
        ContractError: unknown `gaps`.
    """
    if gaps not in ("skip", "reset"):
        raise ContractError(
            f"gaps={gaps!r}; must be 'skip' or 'reset'", hint="'skip' credits every turn of a conversation"
        )
    mask = action_mask.bool()
    stretch = mask.nonzero()[:, 0]
    if gaps == "reset":
        stretch = _pair_ids(stretch, (~mask).flatten().cumsum(0)[mask.flatten()])
    returns = _spread(_reverse_scan(rewards[mask].double(), stretch, gamma), mask, rewards)
    return whiten(returns, mask)


def reinforce_plus_plus_baseline(
    rewards: Tensor,
    group_ids: Tensor,
    token_counts: Tensor,
    *,
    trajectory_ids: Tensor | None = None,
    statistics: str = "trajectory",
    singleton: str = "zero",
) -> Tensor:
    """Reward minus the group's mean, whitened over all action tokens (REINFORCE++-baseline, arXiv:2501.03262).

    Args:
        rewards, group_ids, trajectory_ids: [N], as in `grpo_advantages`.
        token_counts: [N] action tokens of each turn: its weight in the whitening.

    Returns:
        [N], 0 for turns without action tokens.
    """
    _check_sizes(rewards, token_counts)
    stats = _group_stats(rewards, group_ids, trajectory_ids, statistics)
    centred = torch.where(stats.count > 1, stats.deviation, _singleton(singleton, rewards))
    return whiten(centred, token_counts).to(_dtype(rewards))


def whiten(values: Tensor, weights: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) with unbiased variance; `weights` is a mask or counts of the same shape. 0 where the weight is 0."""
    mean, variance = masked_moments(values, weights)
    return torch.where(weights > 0, (values - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def masked_moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance (scalars) of `values` weighted by a mask or by counts; both 0 where nothing has weight."""
    weights = weights.to(values.dtype)
    total = weights.sum() + 1e-8
    mean = torch.where(weights > 0, values * weights, 0.0).sum() / total
    spread = torch.where(weights > 0, (values - mean) ** 2 * weights, 0.0).sum() / total
    return mean, spread * weights.sum() / (weights.sum() - 1).clamp(min=1)


@dataclass(frozen=True)
class _GroupStats:
    """Per turn [N]: entries in its group, its distance from the group's mean, the group's deviation (ddof 1; 0 for a single entry)."""

    count: Tensor
    deviation: Tensor
    std: Tensor


def _group_stats(rewards: Tensor, group_ids: Tensor, trajectory_ids: Tensor | None, statistics: str) -> _GroupStats:
    if statistics not in ("trajectory", "turn", "balanced"):
        raise ContractError(
            f"statistics={statistics!r}; must be 'trajectory', 'turn' or 'balanced'",
            hint="'trajectory' counts each trajectory once",
        )
    _check_sizes(rewards, group_ids, *(() if trajectory_ids is None else (trajectory_ids,)))
    values = rewards.double()
    groups, index = torch.unique(group_ids, return_inverse=True)
    entries = torch.ones_like(values)
    if statistics != "turn" and trajectory_ids is not None:
        members = _pair_ids(group_ids, trajectory_ids)
        entries = _first_turns(members).double() if statistics == "trajectory" else 1 / _sizes(members)
    zeros = values.new_zeros(len(groups))
    # Distances from a member, not from 0: equal rewards then differ from their mean by exactly 0, not by rounding that 1/(std + eps) would blow up.
    floor = values.new_full((len(groups),), torch.inf).scatter_reduce(0, index, values, "amin")
    shifted = values - floor[index]
    count = zeros.index_add(0, index, entries)
    count = count.round() if statistics == "balanced" else count
    deviation = shifted - (zeros.index_add(0, index, shifted * entries) / count)[index]
    variance = zeros.index_add(0, index, deviation.square() * entries) / (count - 1).clamp(min=1)
    return _GroupStats(count[index], deviation, variance.sqrt()[index])


def _normalised(stats: _GroupStats, rewards: Tensor, *, normalize_std: bool, singleton: str, eps: float) -> Tensor:
    deviation = torch.where(stats.count > 1, stats.deviation, _singleton(singleton, rewards))
    if not normalize_std:
        return deviation
    return deviation / (torch.where(stats.count > 1, stats.std, 1.0) + eps)


def _singleton(mode: str, rewards: Tensor) -> Tensor:
    if mode not in ("zero", "raw"):
        raise ContractError(
            f"singleton={mode!r}; must be 'zero' or 'raw'",
            hint="'zero': a group of one says nothing about relative merit",
        )
    return rewards.double() if mode == "raw" else torch.zeros_like(rewards, dtype=torch.float64)


def _first_turns(ids: Tensor) -> Tensor:
    """[N] bool: the first turn of each id."""
    unique, index = torch.unique(ids, return_inverse=True)
    position = torch.arange(len(ids), device=ids.device)
    first = torch.full((len(unique),), len(ids), device=ids.device).scatter_reduce(0, index, position, "amin")
    return first[index] == position


def _sizes(ids: Tensor) -> Tensor:
    """[N] how often each entry's id occurs, float64."""
    _, index, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    return counts.double()[index]


def _pair_ids(first: Tensor, second: Tensor) -> Tensor:
    """One id per distinct pair; 63-bit hashes do not overflow."""
    _, a = torch.unique(first, return_inverse=True)
    distinct, b = torch.unique(second, return_inverse=True)
    return a * len(distinct) + b


def _reverse_scan(values: Tensor, ids: Tensor, factor: float) -> Tensor:
    """G_t = x_t + factor * G_{t+1} inside stretches of equal ids, in log2(longest stretch) vector steps: after k of them G_t covers 2^k terms."""
    total, shift = values, 1
    while shift < len(ids):
        same = ids[shift:] == ids[:-shift]
        if not same.any():
            break
        total = torch.cat([total[:-shift] + torch.where(same, factor * total[shift:], 0.0), total[-shift:]])
        factor, shift = factor * factor, shift * 2
    return total


def _spread(flat: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    padded = torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device)
    padded[mask] = flat
    return padded.to(_dtype(like))


def _dtype(like: Tensor) -> torch.dtype:
    return like.dtype if like.is_floating_point() else torch.get_default_dtype()


def _check_sizes(first: Tensor, *others: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (first, *others)]
    if first.ndim != 1 or any(shape != shapes[0] for shape in shapes):
        raise ContractError(f"per-turn tensors must all be [N]; got shapes {shapes}", hint="pass one value per turn")
