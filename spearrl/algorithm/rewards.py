"""What a step's rewards become: bonus, quality flags, group filter, penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from spearrl import shaping
from spearrl.advantages import discounted_returns, numbered_by_appearance, sums_by_id
from spearrl.batching import Rows
from spearrl.config import AlgoSection
from spearrl.shaping import penalise_invalid
from spearrl.types import Group, Status, Turn

CUT = (Status.CONTEXT_LIMIT, Status.OVERLONG)


@dataclass
class Shaped:
    """Rows that train, and what each of their N turns earned."""

    rows: Rows
    rewards: torch.Tensor  # [N] episode reward + bonus − penalty of the turn
    bonuses: torch.Tensor  # [N] μ · bonus of the turn's episode, already in `rewards`
    muted: torch.Tensor  # bool [N], filtered turns that stay in the mask, at advantage 0 (policy.mask="attention")
    blocks: torch.Tensor  # [N] what baselines take for the turn's group
    step_returns: torch.Tensor  # [N] discounted environment rewards from the turn on, − its penalty (GiGPO)
    metrics: dict[str, float] = field(default_factory=dict)


def trainable(groups: Sequence[Group], group_size: int) -> list[Group]:
    """Groups without their faulty siblings; one with fewer than two left says nothing and is dropped."""
    sound = (Group(g.id, g.task, g.valid) for g in groups)
    return [g for g in sound if len(g.trajectories) >= min(2, group_size)]


def shape(
    rows: Rows,
    groups: Sequence[Group],
    algo: AlgoSection,
    *,
    mu: float,
    max_reply_tokens: int,
    group_size: int,
    seed: int,
) -> Shaped:
    """Environment reward → + μ·bonus → quality flags → group filter → − invalid-action penalty (arXiv 2509.22601).

    Args:
        rows: of exactly these groups, in their order.
        groups: trainable groups; their turns in order are the N turns of `rows`.
        seed: of the random power of two of rows, where filters.subsample asks for it.
    """
    turns = rows.turns
    bonuses = mu * episode_bonuses(groups, algo)
    episode = sums_by_id(turns.rewards, turns.trajectory_ids) + bonuses
    flagged, counts = _quality_flags(groups, algo, max_reply_tokens)
    metrics = {f"filter/{name}": count for name, count in counts.items()}
    rows, metrics["guard/nonfinite_rollout_logprobs"] = _without_broken_tokens(rows)
    muted = flagged if algo.policy.mask == "attention" else torch.zeros_like(flagged)
    if algo.policy.mask == "action" and flagged.any():
        rows = rows.mask_turns(~flagged)
    rewards = penalise_invalid(episode, turns.penalties, coefficient=algo.invalid_penalty)
    blocks = turns.group_ids
    if algo.groups.blocks == "consecutive":  # as released: these are the groups, until one loses a sibling
        blocks = numbered_by_appearance(turns.trajectory_ids)[1] // group_size
    # Before any row is left out: a return counts all that its trajectory earned later.
    returns = discounted_returns(turns.rewards, turns.trajectory_ids, algo.gigpo.discount)
    returns = penalise_invalid(returns, turns.penalties, coefficient=algo.invalid_penalty)
    shaped = Shaped(rows, rewards, bonuses, muted, blocks, returns, metrics)
    if algo.filters.group_keep >= 1:
        return shaped
    kept_groups = shaping.filter_groups_by_std(episode, blocks, turns.trajectory_ids, keep=algo.filters.group_keep)
    metrics["filter/groups_dropped"] = float(len(torch.unique(blocks)) - len(kept_groups))
    trajectories = turns.trajectory_ids[torch.isin(blocks, kept_groups)]
    shaped = select(shaped, torch.isin(rows.trajectory, trajectories))
    return _power_of_two(shaped, seed) if algo.filters.subsample == "power_of_two" else shaped


def select(shaped: Shaped, rows: torch.Tensor) -> Shaped:
    """The part of a shaped step that lies in these rows (bool [B])."""
    turns = shaped.rows.turns_of(rows)
    names = ("rewards", "bonuses", "muted", "blocks", "step_returns")
    parts = {name: getattr(shaped, name)[turns] for name in names}
    return Shaped(shaped.rows.select(rows), metrics=shaped.metrics, **parts)


def episode_bonuses(groups: Sequence[Group], algo: AlgoSection) -> torch.Tensor:
    """[N] intrinsic bonus of each turn's episode, before μ."""
    settings, values = algo.intrinsic, []
    for trajectory in (t for g in groups for t in g.trajectories):
        count = trajectory.tool_calls if settings.count == "tool_calls" else len(trajectory.turns)
        paid = settings.enabled and (settings.condition == "always" or trajectory.status is Status.SUCCESS)
        bonus = shaping.tool_bonus(count, per_call=settings.per_call, cap=settings.cap) if paid else 0.0
        if paid and count and settings.flat_when_right and trajectory.status is Status.SUCCESS:
            bonus = settings.cap
        values += [bonus] * len(trajectory.turns)
    return torch.tensor(values, dtype=torch.float64)


def _without_broken_tokens(rows: Rows) -> tuple[Rows, float]:
    """Rows without the action tokens whose engine reported no finite log-probability, and how many those were."""
    broken = rows.action_mask & ~torch.isfinite(rows.rollout_logprobs)
    count = int(broken.sum())
    return (rows.with_action_mask(rows.action_mask & ~broken) if count else rows), float(count)


def _power_of_two(shaped: Shaped, seed: int) -> Shaped:
    """A random 2^k of the rows, in their order (as released; it takes trajectories apart)."""
    count = len(shaped.rows)
    size = 1 << (count.bit_length() - 1) if count else 0
    drawn = torch.zeros(count, dtype=torch.bool)
    drawn[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size]] = True
    return select(shaped, drawn)


def _is_void(turn: Turn) -> bool:
    """No action in the reply: by the tag rule where the reply has the tag, else by what the environment could parse."""
    return shaping.void_turn(turn.reply) if "<action>" in turn.reply else not turn.action.valid


def _quality_flags(groups: Sequence[Group], algo: AlgoSection, limit: int) -> tuple[torch.Tensor, dict[str, float]]:
    """[N] turns that a filter masks, and how many each filter caught.

    An episode that was cut off counts as overlong in all its turns.
    """
    filters = algo.filters
    turns = [(turn, t.status in CUT) for g in groups for t in g.trajectories for turn in t.turns]
    fires = filters.void_rule != "never"
    flags = {
        "overlong": [filters.overlong and (cut or shaping.overlong(len(t.token_ids), limit)) for t, cut in turns],
        "void_turn": [filters.void_turn and fires and _is_void(t) for t, _ in turns],
        "repetitive": [filters.repetitive and shaping.repetitive(t.token_ids) for t, _ in turns],
        "unreadable": [filters.unreadable and shaping.unreadable(t.reply) for t, _ in turns],
    }
    flagged = torch.zeros(len(turns), dtype=torch.bool)
    for values in flags.values():
        flagged |= torch.tensor(values, dtype=torch.bool)
    return flagged, {name: float(sum(values)) for name, values in flags.items() if getattr(filters, name)}
