"""What a step reports about its time and its episodes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from spearrl.algorithm import episode_bonuses, mixed
from spearrl.batching import Batch, Rows, anchor_id
from spearrl.config import AlgoSection
from spearrl.types import Group, Trajectory


class Clock:
    """Seconds spent in each part of a step."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name], self._last = now - self._last, now

    def metrics(self, tokens: float = 0.0) -> dict[str, float]:
        total = time.monotonic() - self._start
        return {
            **{f"time/{name}": seconds for name, seconds in self._laps.items()},
            "time/step": total,
            "time/tokens_per_s": tokens / max(total, 1e-9),
        }


def rollout_metrics(groups: list[Group], kept: list[Group]) -> dict[str, float]:
    """What the step's episodes were like, over the sound ones."""
    played = [t for g in groups for t in g.valid]
    turns = [turn for t in played for turn in t.turns]
    number, said = max(1, len(played)), max(1, len(turns))
    metrics = {
        "rollout/turns": len(turns) / number,
        "rollout/reply_tokens": sum(len(turn.token_ids) for turn in turns) / said,
        "rollout/tokens": float(sum(len(turn.token_ids) for turn in turns)),
        "rollout/invalid": sum(not turn.action.valid for turn in turns) / said,
        "rollout/tool_calls": sum(t.tool_calls for t in played) / number,
        "rollout/groups_lost": float(len(groups) - len(kept)),
        "rollout/errors": float(sum(len(g.trajectories) - len(g.valid) for g in groups)),
        "rollout/faults": sum(t.faults > 0 for t in played) / number,
        "rollout/rewrites": float(sum(t.rewrites for t in played)),
    }
    if played:  # no number for a step without a sound episode: 0 would be a statement about the policy
        metrics["rollout/success"] = sum(t.success for t in played) / number
        metrics["rollout/reward"] = sum(t.reward for t in played) / number
    if any(len(g.trajectories) > 1 for g in kept):
        metrics["rollout/mixed_groups"] = sum(mixed(g) for g in kept) / len(kept)
    statuses = [t.status.value for g in groups for t in g.trajectories]
    metrics |= {f"status/{name}": float(statuses.count(name)) for name in sorted(set(statuses))}
    return metrics | {f"env/{key}": value for key, value in numeric_means(played).items()}


def numeric_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean of every numeric measure in the trajectories' info; an episode without the measure counts 0."""
    infos = [t.info for t in trajectories]
    names = {k for info in infos for k, v in info.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {name: mean([float(info.get(name, 0.0)) for info in infos]) for name in sorted(names)}


def mean(values: Sequence[float]) -> float:
    """0 for no values."""
    return float(sum(values) / len(values)) if values else 0.0


def sampler_gap(batch: Batch) -> dict[str, float]:
    """|learner − engine| log-probability of the action tokens, mean and largest: what the engine sampled against what the learner would have."""
    mask = batch.action_mask
    if batch.rollout_logprobs is None or not bool(mask.any()):
        return {}
    gap = (batch.old_logprobs.double() - batch.rollout_logprobs.double()).abs()[mask]
    return {"policy/sampler_gap": float(gap.mean()), "policy/sampler_gap_max": float(gap.max())}


def staleness(rows: Rows, version: int) -> dict[str, float]:
    """How many versions older than the learner's the weights were that sampled the action tokens."""
    ages = (version - rows.policy_version[rows.action_mask]).double()
    return {"policy/staleness": float(ages.mean()), "policy/staleness_max": float(ages.max())} if len(ages) else {}


def first_fault(groups: list[Group]) -> str:
    """The last line of the first fault among the episodes, as a remark; "" where there was none."""
    faults = [t.error.strip().splitlines()[-1] for g in groups for t in g.trajectories if t.error]
    return f" (first fault: {faults[0]})" if faults else ""


def states_met(groups: list[Group]) -> list[int]:
    """Ids of the anchor states of all turns of the sound episodes."""
    turns = [turn for g in groups for t in g.valid for turn in t.turns]
    return [anchor_id(turn.observation if turn.anchor is None else turn.anchor) for turn in turns]


def bonus_of(groups: list[Group], algo: AlgoSection) -> float:
    """Mean intrinsic bonus of the sound episodes, before μ."""
    sound = [Group(g.id, g.task, [t]) for g in groups for t in g.valid if t.turns]
    return sum(float(episode_bonuses([g], algo)[0]) for g in sound) / max(1, len(sound))
