"""Metrics of a step's time and episodes; docs/metrics.md lists them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from spearrl.algorithm import episode_bonuses
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


def rollout_metrics(groups: list[Group], trained: list[Group]) -> dict[str, float]:
    """How a step's episodes went, over the sound ones.

    Args:
        groups: as they were played.
        trained: those of them that are trained on.
    """
    sound = [t for g in groups for t in g.valid]
    turns = [turn for t in sound for turn in t.turns]
    tokens = [len(turn.token_ids) for turn in turns]
    statuses = Counter(t.status.value for g in groups for t in g.trajectories)
    metrics = {
        "rollout/turns": mean([len(t.turns) for t in sound]),
        "rollout/reply_tokens": mean(tokens),
        "rollout/tokens": float(sum(tokens)),
        "rollout/invalid": mean([not turn.action.valid for turn in turns]),
        "rollout/tool_calls": mean([t.tool_calls for t in sound]),
        "rollout/groups_lost": float(len(groups) - len(trained)),
        "rollout/errors": float(sum(len(g.trajectories) - len(g.valid) for g in groups)),
        "rollout/faults": mean([t.faults > 0 for t in sound]),
        "rollout/rewrites": float(sum(t.rewrites for t in sound)),
    }
    if sound:  # no number for a step without a sound episode: 0 would be a statement about the policy
        metrics |= {
            "rollout/success": mean([t.success for t in sound]),
            "rollout/reward": mean([t.reward for t in sound]),
        }
    if any(len(g.trajectories) > 1 for g in trained):
        metrics["rollout/mixed_groups"] = mean([g.mixed for g in trained])
    metrics |= {f"status/{name}": float(count) for name, count in sorted(statuses.items())}
    return metrics | {f"env/{name}": value for name, value in numeric_means(sound).items()}


def numeric_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean of every numeric measure in the trajectories' info; an episode without the measure counts 0."""
    infos = [t.info for t in trajectories]
    names = {k for info in infos for k, v in info.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {name: mean([float(info.get(name, 0.0)) for info in infos]) for name in sorted(names)}


def mean(values: Sequence[float]) -> float:
    """0 for no values."""
    return float(sum(values) / len(values)) if values else 0.0


def sampler_gap(batch: Batch) -> dict[str, float]:
    """|learner − engine| log-probability of the sampled tokens, mean and largest: 0 where both agree.

    Over the tokens whose log-probabilities the learner had a reason to find.
    """
    if batch.rollout_logprobs is None or batch.old_logprobs is None:
        return {}
    mask = batch.action_mask & ~batch.old_logprobs.isnan()
    if not bool(mask.any()):
        return {}
    gap = (batch.old_logprobs.double() - batch.rollout_logprobs.double()).abs()[mask]
    return {"policy/sampler_gap": float(gap.mean()), "policy/sampler_gap_max": float(gap.max())}


def staleness(rows: Rows, version: int) -> dict[str, float]:
    """By how many versions the weights that sampled a token were older than the learner's: mean and largest."""
    ages = (version - rows.policy_version[rows.action_mask]).double()
    return {"policy/staleness": float(ages.mean()), "policy/staleness_max": float(ages.max())} if len(ages) else {}


def nothing_trained(step: int, groups: list[Group]) -> str:
    """What is said of a step without two sound siblings, with the last line of the first fault among its episodes."""
    faults = [t.error.strip().split("\n")[-1] for g in groups for t in g.trajectories if t.error]
    remark = f" (first fault: {faults[0]})" if faults else ""
    return f"step {step}: no group has two sound siblings; nothing was trained{remark}"


def states_met(groups: list[Group]) -> list[int]:
    """Ids of the anchor states of all turns of the sound episodes."""
    turns = [turn for g in groups for t in g.valid for turn in t.turns]
    return [anchor_id(turn.observation if turn.anchor is None else turn.anchor) for turn in turns]


def bonus_of(groups: list[Group], algo: AlgoSection) -> float:
    """Mean intrinsic bonus of the sound episodes, before μ."""
    sound = [Group(g.id, g.task, [t]) for g in groups for t in g.valid if t.turns]
    return sum(float(episode_bonuses([g], algo)[0]) for g in sound) / max(1, len(sound))
