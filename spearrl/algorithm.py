"""From settings to mathematics: what a step's rewards become, and which objectives the learner gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spearrl.advantages import grpo_advantages, penalised_group_advantages
from spearrl.batching import Batch, Rows
from spearrl.config import AlgoSection
from spearrl.losses import ClipCov, Objective
from spearrl.schedules import schedule_value
from spearrl.shaping import filter_groups_by_std, overlong, penalise_invalid, repetitive, tool_bonus, unreadable, void_turn
from spearrl.types import Group, Status, Turn


@dataclass
class Shaped:
    """Rows that train, and what each of their N turns earned."""

    rows: Rows
    rewards: torch.Tensor  # [N] episode reward + bonus − penalty of the turn
    metrics: dict[str, float] = field(default_factory=dict)


def gamma(algo: AlgoSection, step: int) -> float:
    """Weight γ of self-imitation at a (1-based) step; 0 where it is off."""
    if not algo.sil.enabled:
        return 0.0
    schedule = algo.sil.gamma
    return schedule.peak * schedule_value(schedule.kind, step, schedule.steps, rising=True)


def mu(algo: AlgoSection, step: int) -> float:
    """Weight μ of the intrinsic reward at a (1-based) step; 0 where it is off."""
    if not algo.intrinsic.enabled:
        return 0.0
    schedule = algo.intrinsic.mu
    return schedule.peak * schedule_value(schedule.kind, step, schedule.steps, rising=False)


def objectives(algo: AlgoSection) -> list[Objective]:
    """The weighted objectives of an update: on-policy (weight 1) and, with self-imitation, replay (the learner multiplies by γ)."""
    policy, cov = algo.policy, algo.clip_cov
    shared: dict[str, Any] = {
        "aggregation": policy.aggregation,
        "horizon": policy.horizon,
        "clip_low": policy.clip_low,
        "clip_high": policy.clip_high,
        "dual_clip": policy.dual_clip,
        "entropy_coef": policy.entropy_coef,
    }
    on_policy = ClipCov(cov.ratio, cov.lower, cov.upper, cov.scope) if cov.enabled else None
    replay = ClipCov(cov.replay_ratio, cov.replay_lower, cov.replay_upper, cov.scope) if cov.enabled else None
    total = [Objective("policy", clip_cov=on_policy, **shared)]
    if algo.sil.enabled:
        total.append(Objective("sil", clip_cov=replay, **shared))
    return total


def trainable(groups: Sequence[Group], group_size: int) -> list[Group]:
    """Groups without their faulty siblings; one with fewer than two left says nothing and is dropped."""
    least = min(2, group_size)
    kept = (Group(g.id, g.task, g.valid) for g in groups)
    return [g for g in kept if len(g.trajectories) >= least]


def shape(rows: Rows, groups: Sequence[Group], algo: AlgoSection, *, mu: float, max_reply_tokens: int) -> Shaped:
    """Environment reward → + μ·bonus → quality flags → group filter → − invalid-action penalty (arXiv 2509.22601; design order).

    Args:
        rows: of exactly these groups, in their order.
        groups: trainable groups; their turns in order are the N turns of `rows`.
    """
    turns = rows.turns
    episode = _episode_rewards(rows) + mu * _bonuses(groups, algo)
    flagged, counts = _quality_flags(groups, algo, max_reply_tokens)
    if flagged.any():
        rows = rows.mask_turns(~flagged)
    metrics = {f"filter/{name}": count for name, count in counts.items()}
    rewards = penalise_invalid(episode, turns.penalties, coefficient=algo.invalid_penalty)
    if algo.filters.group_keep < 1:
        kept = filter_groups_by_std(episode, turns.group_ids, turns.trajectory_ids, keep=algo.filters.group_keep)
        kept_turns, kept_rows = torch.isin(turns.group_ids, kept), torch.isin(rows.group, kept)
        metrics["filter/groups_dropped"] = float(len(torch.unique(turns.group_ids)) - len(kept))
        rows, rewards = rows.select(kept_rows), rewards[kept_turns]
    return Shaped(rows, rewards, metrics)


def turn_advantages(shaped: Shaped, algo: AlgoSection) -> torch.Tensor:
    """[N] group-relative advantages of the shaped rewards (GRPO, arXiv 2402.03300)."""
    turns, settings = shaped.rows.turns, algo.groups
    options: dict[str, Any] = {"normalize_std": settings.normalize_std, "singleton": settings.singleton}
    if settings.statistics == "turn":
        return grpo_advantages(shaped.rewards, turns.group_ids, trajectory_ids=turns.trajectory_ids, statistics="turn", **options)
    return penalised_group_advantages(shaped.rewards, turns.group_ids, turns.trajectory_ids, **options)


def on_policy_batch(shaped: Shaped, advantages: torch.Tensor, old_logprobs: torch.Tensor) -> Batch:
    """The step's batch: turn advantages scattered to their action tokens."""
    rows = shaped.rows
    return Batch(rows, rows.scatter(advantages).float(), old_logprobs, rollout_logprobs=rows.pad(rows.rollout_logprobs))


def baselines(shaped: Shaped) -> tuple[list[float], list[float]]:
    """Mean and population deviation of each group's trajectory rewards, in order of group id: what D_R stores."""
    turns = shaped.rows.turns
    trajectories, owner = torch.unique(turns.trajectory_ids, return_inverse=True)
    size = torch.zeros(len(trajectories), dtype=torch.float64)
    total = size.clone()
    size.index_add_(0, owner, torch.ones_like(shaped.rewards, dtype=torch.float64))
    total.index_add_(0, owner, shaped.rewards.double())
    group_of = torch.zeros(len(trajectories), dtype=torch.int64)
    group_of[owner] = turns.group_ids
    rewards = total / size
    means, stds = [], []
    for group in torch.unique(group_of):
        members = rewards[group_of == group]
        means.append(float(members.mean()))
        stds.append(float(members.std(unbiased=False)))
    return means, stds


def _episode_rewards(rows: Rows) -> torch.Tensor:
    """[N] the episode's reward, on each of its turns."""
    _, owner = torch.unique(rows.turns.trajectory_ids, return_inverse=True)
    total = torch.zeros(int(owner.max()) + 1 if len(owner) else 0, dtype=torch.float64)
    return total.index_add_(0, owner, rows.turns.rewards)[owner]


def _bonuses(groups: Sequence[Group], algo: AlgoSection) -> torch.Tensor:
    """[N] intrinsic bonus of each turn's episode, before μ."""
    settings, values = algo.intrinsic, []
    for trajectory in (t for g in groups for t in g.trajectories):
        count = trajectory.tool_calls if settings.count == "tool_calls" else len(trajectory.turns)
        paid = settings.enabled and (settings.condition == "always" or trajectory.status is Status.SUCCESS)
        bonus = tool_bonus(count, per_call=settings.per_call, cap=settings.cap) if paid else 0.0
        values += [bonus] * len(trajectory.turns)
    return torch.tensor(values, dtype=torch.float64)


def _is_void(turn: Turn) -> bool:
    """No action in the reply: by the tag rule where the reply has tags, else by what the environment could parse."""
    tagged = "<action>" in turn.reply or "</think>" in turn.reply
    return void_turn(turn.reply) if tagged else not turn.action.valid


def _quality_flags(groups: Sequence[Group], algo: AlgoSection, max_reply_tokens: int) -> tuple[torch.Tensor, dict[str, float]]:
    """[N] turns a filter masks, and how many each filter caught."""
    filters = algo.filters
    turns = [turn for g in groups for t in g.trajectories for turn in t.turns]
    flags = {
        "overlong": [filters.overlong and overlong(len(t.token_ids), max_reply_tokens) for t in turns],
        "void_turn": [filters.void_turn and _is_void(t) for t in turns],
        "repetitive": [filters.repetitive and repetitive(t.token_ids) for t in turns],
        "unreadable": [filters.unreadable and unreadable(t.reply) for t in turns],
    }
    flagged = torch.zeros(len(turns), dtype=torch.bool)
    for values in flags.values():
        flagged |= torch.tensor(values, dtype=torch.bool)
    return flagged, {name: float(sum(values)) for name, values in flags.items() if getattr(filters, name)}
