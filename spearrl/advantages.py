"""Advantages as pure functions: per turn, [N] in and [N] out; gae and reinforce_plus_plus per token, [B, T].

Statistics are computed in float64 and returned in the input's type. Turns of a trajectory stand in time order;
trajectories may be interleaved. All raise ContractError for an unknown option and for tensors of other shapes.
The sums and means by id that all of this is made of stand at the end, for other rooms as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spearrl.errors import ContractError

ROUNDING = 1e-14  # relative, of a mean in float64


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
    """Group-relative advantages: (r - mean) / (std + eps), std with ddof 1 (GRPO, arXiv:2402.03300).

    Args:
        rewards, group_ids, trajectory_ids: [N]; without trajectory_ids every turn is a trajectory of its own.
        normalize_std: divide by the group's standard deviation; not: Dr. GRPO, arXiv:2503.20783.
        statistics: "trajectory" counts each trajectory once, by its first turn; "turn" counts every turn; "balanced"
            lets every turn weigh 1 / turns of its trajectory, for turns that differ by a penalty (counted by first
            turns, a group that is equal but for it has deviation 0).
        singleton: advantage of a group with one member: "zero", or "raw" (its reward, as released).

    Returns:
        [N]; exactly 0 where a group's rewards are all equal, and at its mean.
    """
    deviation, std, _ = _group_statistics(rewards, group_ids, trajectory_ids, statistics, singleton)
    return (deviation / (std + eps) if normalize_std else deviation).to(_dtype(rewards))


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
    """GiGPO (arXiv:2505.10978): `grpo_advantages` of the episode + step_weight * `state_advantages` of the step.

    Args:
        episode_rewards, step_returns, group_ids, anchor_ids, trajectory_ids: [N]; step returns come from
            `discounted_returns`, equal anchor_ids mean the same state.
        statistics, singleton: of the episode part, as in `grpo_advantages`.
    """
    scale: dict[str, Any] = {"normalize_std": normalize_std, "eps": eps}
    members: dict[str, Any] = {"trajectory_ids": trajectory_ids, "statistics": statistics, "singleton": singleton}
    episode = grpo_advantages(episode_rewards.double(), group_ids, **members, **scale)
    _check_sizes(episode_rewards, step_returns, anchor_ids)
    step = state_advantages(step_returns.double(), group_ids, anchor_ids, **scale)
    return (episode + step_weight * step).to(_dtype(episode_rewards))


def state_advantages(
    step_returns: Tensor, group_ids: Tensor, anchor_ids: Tensor, *, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """GiGPO's step part (arXiv:2505.10978 eq. 7): a turn's return against the group's other turns in the same state.

    All [N]; 0 for a turn whose state no other turn of the group saw.
    """
    states = pair_ids(group_ids, anchor_ids)
    return grpo_advantages(step_returns, states, normalize_std=normalize_std, statistics="turn", eps=eps)


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
    """Reward minus the mean of the others: (r - mean) * n / (n - 1) (RLOO, arXiv:2402.14740).

    Arguments and result as in `grpo_advantages`.
    """
    deviation, _, count = _group_statistics(rewards, group_ids, trajectory_ids, statistics, singleton)
    return (deviation * count / (count - 1).clamp(min=1)).to(_dtype(rewards))


def recalibrated_advantages(
    rewards: Tensor, baseline: float | Tensor, std: float | Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Replayed rewards against a recent baseline: (r - baseline) [/ (std + eps)] (SPEAR, arXiv:2509.22601).

    Rewards and result are [N]; baseline and std are numbers or [N].
    """
    advantages = rewards.double() - baseline
    if std is not None:
        advantages = advantages / (std + eps)
    return advantages.to(_dtype(rewards))


def gae(rewards: Tensor, values: Tensor, action_mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over action tokens (arXiv:1506.02438), not whitened.

    A_t = d_t + gamma lam A_{t+1},  d_t = r_t + gamma V_{t+1} - V_t
    t+1 is the row's next action token; after its last V = 0.

    Args (all [B, T]):
        rewards, values: read at action tokens only. To bootstrap a cut-off row, add gamma * V(next state) to its last
            reward.

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
        gaps: "skip" carries the return over tool outputs to earlier turns; "reset" ends it there (as released).

    Returns:
        [B, T], 0 outside the mask.
    """
    _check_option("gaps", gaps, ("skip", "reset"), "'skip' credits every turn of a conversation")
    mask = action_mask.bool()
    stretch = mask.nonzero()[:, 0]
    if gaps == "reset":
        stretch = pair_ids(stretch, (~mask).flatten().cumsum(0)[mask.flatten()])
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
        token_counts: [N] action tokens of each turn: its weight in the whitening. The others: `grpo_advantages`.

    Returns:
        [N], 0 for turns without action tokens.
    """
    _check_sizes(rewards, token_counts)
    deviation, _, _ = _group_statistics(rewards, group_ids, trajectory_ids, statistics, singleton)
    return whiten(deviation, token_counts).to(_dtype(rewards))


def whiten(values: Tensor, weights: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8); 0 where the weight is 0. Arguments as in `masked_moments`."""
    mean, variance = masked_moments(values, weights)
    return torch.where(weights > 0, (values - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def masked_moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, both scalars; 0 where nothing has weight.

    Args:
        weights: of the shape of values: a mask, or how often each value counts.
    """
    weights = weights.to(values.dtype)
    total = weights.sum() + 1e-8
    mean = torch.where(weights > 0, values * weights, 0.0).sum() / total
    spread = torch.where(weights > 0, (values - mean) ** 2 * weights, 0.0).sum() / total
    return mean, spread * weights.sum() / (weights.sum() - 1).clamp(min=1)


def _group_statistics(
    rewards: Tensor, group_ids: Tensor, trajectory_ids: Tensor | None, statistics: str, singleton: str
) -> tuple[Tensor, Tensor, Tensor]:
    """[N] each: distance from the group's mean, the group's deviation (ddof 1), entries in the group.

    In a group with a single entry the distance is what `singleton` says, and the deviation 1.
    """
    _check_option(
        "statistics", statistics, ("trajectory", "turn", "balanced"), "'trajectory' counts each trajectory once"
    )
    _check_option("singleton", singleton, ("zero", "raw"), "'zero': a group of one says nothing about relative merit")
    _check_sizes(rewards, group_ids, *(() if trajectory_ids is None else (trajectory_ids,)))
    values = rewards.double()
    groups, index = torch.unique(group_ids, return_inverse=True)
    entries = torch.ones_like(values)
    if statistics != "turn" and trajectory_ids is not None:
        trajectories, trajectory = torch.unique(pair_ids(group_ids, trajectory_ids), return_inverse=True)
        if statistics == "balanced":
            entries = 1 / torch.bincount(trajectory).double()[trajectory]
        else:
            entries = torch.zeros_like(values).index_fill(0, first_positions(trajectory, len(trajectories)), 1.0)
    count = sums_by_index(entries, index, len(groups))
    count = count.round() if statistics == "balanced" else count
    shifted = above_minimum(values, index, len(groups))
    deviation = shifted - (sums_by_index(shifted * entries, index, len(groups)) / count)[index]
    deviation = torch.where(deviation.abs() <= ROUNDING * shifted, 0.0, deviation)  # at the mean: neither good nor bad
    variance = sums_by_index(deviation.square() * entries, index, len(groups)) / (count - 1).clamp(min=1)
    alone = count[index] <= 1
    deviation = torch.where(alone, values if singleton == "raw" else 0.0, deviation)
    return deviation, torch.where(alone, 1.0, variance.sqrt()[index]), count[index]


def sums_by_index(values: Tensor, index: Tensor, count: int) -> Tensor:
    """[count]: the sum of the values [N] of each index, 0 .. count - 1, added in their order; 0 where there are none.

    `index` [N] comes from torch.unique(ids, return_inverse=True) or from `numbered_by_appearance`.
    """
    return values.new_zeros(count).index_add(0, index, values)


def means_by_index(values: Tensor, index: Tensor, count: int) -> Tensor:
    """[count]: the mean of the values [N] of each index; NaN where there are none."""
    return sums_by_index(values, index, count) / torch.bincount(index, minlength=count)


def sums_by_id(values: Tensor, ids: Tensor) -> Tensor:
    """[N]: for each entry the sum of the values [N] of all entries with its id."""
    distinct, index = torch.unique(ids, return_inverse=True)
    return sums_by_index(values, index, len(distinct))[index]


def above_minimum(values: Tensor, index: Tensor, count: int) -> Tensor:
    """[N]: each value's distance from the smallest of its index.

    Equal values then differ from their mean by exactly 0, not by rounding that 1 / (std + eps) would blow up.
    """
    return values - values.new_full((count,), torch.inf).scatter_reduce(0, index, values, "amin")[index]


def first_positions(index: Tensor, count: int) -> Tensor:
    """int64 [count]: where each index appears first in `index` [N]."""
    positions = torch.arange(len(index), device=index.device)
    unseen = torch.full((count,), len(index), device=index.device)
    return unseen.scatter_reduce(0, index, positions, "amin")


def numbered_by_appearance(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ids in order of first appearance, and each entry's index [N] among them."""
    distinct, index = torch.unique(ids, return_inverse=True)
    order = first_positions(index, len(distinct)).argsort()
    return distinct[order], order.argsort()[index]


def pair_ids(first: Tensor, second: Tensor) -> Tensor:
    """[N]: one id for each distinct pair; ids may be 63-bit hashes."""
    _, a = torch.unique(first, return_inverse=True)
    distinct, b = torch.unique(second, return_inverse=True)
    return a * len(distinct) + b  # type: ignore[no-any-return]


def _reverse_scan(values: Tensor, ids: Tensor, factor: float) -> Tensor:
    """G_t = x_t + factor * G_{t+1} inside stretches of equal ids; after k vector steps G_t covers 2^k terms."""
    total, shift = values, 1
    while shift < len(ids):
        same = ids[shift:] == ids[:-shift]
        if not same.any():
            break
        total = torch.cat([total[:-shift] + torch.where(same, factor * total[shift:], 0.0), total[-shift:]])
        factor, shift = factor * factor, shift * 2
    return total


def _spread(values: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """The values of the action tokens, in order, at their places [B, T]; 0 elsewhere; in the type of `like`."""
    return (
        torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values).to(_dtype(like))
    )


def _dtype(like: Tensor) -> torch.dtype:
    return like.dtype if like.is_floating_point() else torch.get_default_dtype()


def _check_option(name: str, value: str, known: tuple[str, ...], hint: str) -> None:
    if value not in known:
        options = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        raise ContractError(f"{name}={value!r}; must be {options}", hint=hint)


def _check_sizes(first: Tensor, *others: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (first, *others)]
    if first.ndim != 1 or any(shape != shapes[0] for shape in shapes):
        raise ContractError(f"per-turn tensors must all be [N]; got shapes {shapes}", hint="pass one value per turn")
