"""The replay buffer of self-imitation: good trajectories, drawn once and then forgotten (arXiv 2509.22601)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spearrl.advantages import means_by_index, numbered_by_appearance, recalibrated_advantages
from spearrl.batching import Batch, Rows
from spearrl.buffers.baseline import BaselineBuffer
from spearrl.errors import ConfigError, ContractError
from spearrl.types import Status

SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True)
class ReplayEntry:
    """What one step stored: rows, and numbers of their N turns and S tokens, all from that step."""

    step: int
    rows: Rows
    rewards: torch.Tensor  # float64 [N], after shaping
    advantages: torch.Tensor  # float64 [N]
    old_logprobs: torch.Tensor  # [S]
    step_part: torch.Tensor  # float64 [N], added to recalibrated advantages (GiGPO's step part); 0: none


class ReplayBuffer:
    """Units (whole trajectories, or single rows) whose advantage was positive when they were made.

    A unit's reward and advantage are the means over its turns that train. A flush gives units the advantage
    reward - P50 of the baseline (or the old one x decay), draws at most `capacity` of those still positive, and empties
    the buffer.

    Args:
        capacity: units drawn at most.
        max_age: steps a unit stays usable, counted from the current step or from the newest stored entry
            (`age_reference`).
        fill_factor: a flush is due when more than fill_factor x capacity units beat the baseline.
        recalibration: "median" (reward - P50) or "decay" (old advantage x decay).
        normalize_std: divide by the P50 of the deviations.
        keep_zero: keep units whose recalibrated advantage is exactly 0.
        age_reference: "current" or "newest".
        subset: draw up to capacity units ("all"), or the largest power of two of them ("power_of_two").
        min_rows: a draw of fewer rows is dropped.
        unit: "trajectory" or "row".
        reward_scale: recalibrated advantages are divided by this, unless normalize_std already gives them a scale.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        capacity: int,
        *,
        max_age: int,
        fill_factor: float = 1.5,
        recalibration: str = "median",
        decay: float = 1.0,
        normalize_std: bool = False,
        keep_zero: bool = False,
        age_reference: str = "current",
        subset: str = "all",
        min_rows: int = 1,
        unit: str = "trajectory",
        reward_scale: float = 1.0,
    ):
        if capacity < 1 or max_age < 0 or min_rows < 1 or not fill_factor > 0:
            values = f"capacity={capacity}, max_age={max_age}, min_rows={min_rows}, fill_factor={fill_factor}"
            raise ConfigError(f"{values}; must be >= 1, >= 0, >= 1, > 0")
        for name, value, known in (
            ("recalibration", recalibration, ("median", "decay")),
            ("age_reference", age_reference, ("current", "newest")),
            ("subset", subset, ("all", "power_of_two")),
            ("unit", unit, ("trajectory", "row")),
        ):
            if value not in known:
                raise ConfigError(f"{name}={value!r}; must be one of {', '.join(known)}")
        self.capacity, self.max_age, self.fill_factor, self.min_rows = capacity, max_age, fill_factor, min_rows
        self.recalibration, self.decay, self.normalize_std = recalibration, decay, normalize_std
        self.keep_zero, self.age_reference, self.subset = keep_zero, age_reference, subset
        self.unit, self.reward_scale = unit, reward_scale
        self._entries: list[ReplayEntry] = []
        self._last_step = 0

    def __len__(self) -> int:
        """Stored units."""
        return sum(len(torch.unique(self._units(entry.rows))) for entry in self._entries)

    @property
    def entries(self) -> list[tuple[int, Rows]]:
        """(step, rows) of what is stored, oldest first."""
        return [(entry.step, entry.rows) for entry in self._entries]

    def add(
        self,
        step: int,
        rows: Rows,
        rewards: torch.Tensor,
        advantages: torch.Tensor,
        old_logprobs: torch.Tensor,
        *,
        step_part: torch.Tensor | None = None,
    ) -> None:
        """Forget what is too old, then store the units with a positive advantage.

        Args:
            rewards, advantages: [N], of the turns of `rows`, after shaping.
            old_logprobs: [B, T], the learner's at the start of this step's update.
            step_part: [N], added to the advantages at a flush with recalibration="median", after the test for > 0.

        Raises:
            ContractError: shapes that do not fit `rows`.
        """
        turns, tokens, where = [len(rows.turns)], [len(rows), rows.width], "ReplayBuffer.add"
        if list(rewards.shape) != turns or list(advantages.shape) != turns:
            shapes = f"rewards {list(rewards.shape)}, advantages {list(advantages.shape)}"
            raise ContractError(f"{shapes}; expected {turns}", where=where)
        if list(old_logprobs.shape) != tokens:
            raise ContractError(f"old_logprobs {list(old_logprobs.shape)}; expected {tokens}", where=where)
        if self._entries:
            newest = step if self.age_reference == "current" else self._entries[-1].step
            self._entries = [entry for entry in self._entries if newest - entry.step <= self.max_age]
        self._last_step = step
        unit = self._units(rows)
        good = self._unit_means(rows, unit, advantages.double()) > 0  # NaN, a unit without trained tokens, is not
        faulty = torch.tensor([status.is_error for status in Status])[rows.turns.status]
        good[unit[rows.turns.row[faulty]]] = False
        stored = good[unit]
        if bool(stored.any()):
            inside, part = rows.turns_of(stored), rows.select(stored)
            logprobs = part.unpad(old_logprobs[stored][:, : part.width]).detach().cpu()
            step_part = torch.zeros_like(rewards) if step_part is None else step_part
            rewards, advantages, step_part = (v[inside].double() for v in (rewards, advantages, step_part))
            self._entries.append(ReplayEntry(step, part, rewards, advantages, logprobs, step_part))

    def ready(self, baseline: BaselineBuffer, step: int | None = None) -> bool:
        """Whether a flush is due: more than fill_factor x capacity usable units beat the P50 (decay: units alone).

        Args:
            step: of the flush; None: the one after the last `add`.
        """
        return self.size(baseline, step) > self.fill_factor * self.capacity

    def size(self, baseline: BaselineBuffer, step: int | None = None) -> int:
        """Usable units that beat the P50 of `baseline`; while it is empty, the mean of their own entry."""
        count, median = 0, baseline.percentile(50)
        for entry in self._usable(self._last_step + 1 if step is None else step):
            rewards = self._unit_means(entry.rows, self._units(entry.rows), entry.rewards)
            level = float(rewards.mean()) if math.isnan(median) else median
            count += len(rewards) if self.recalibration == "decay" else int((rewards > level).sum())
        return count

    def drain(self, step: int, baseline: BaselineBuffer, generator: torch.Generator | None) -> Batch | None:
        """Draw a replay batch and empty the buffer; None where too little is left after recalibration.

        Returns:
            advantages [B, T]: each turn's reward - P50 (over P50 of the deviations with normalize_std) plus its step
            part, or old advantage x decay.
        """
        entries, self._entries = self._usable(step), []
        if not entries:
            return None
        advantages = torch.cat([self._recalibrated(entry, baseline) for entry in entries])
        rows = Rows.concat([entry.rows for entry in entries])
        logprobs = rows.pad(torch.cat([entry.old_logprobs for entry in entries]))
        unit = self._units(rows)
        means = self._unit_means(rows, unit, advantages)
        good = torch.ones_like(means, dtype=torch.bool)
        if self.recalibration == "median":
            good = means >= 0 if self.keep_zero else means > 0
            advantages = advantages + torch.cat([entry.step_part for entry in entries])
        drawn = torch.isin(unit, self._draw(good.nonzero().flatten(), generator))
        if int(drawn.sum()) < self.min_rows:
            return None
        part, turns, old_logprobs = rows.select(drawn), rows.turns_of(drawn), logprobs[drawn]
        return Batch(
            part,
            part.scatter(advantages[turns]).float(),
            old_logprobs[:, : part.width],
            rollout_logprobs=part.pad(part.rollout_logprobs),
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values; `load_state_dict` restores them exactly."""
        entries = [{**vars(entry), "rows": entry.rows.state_dict()} for entry in self._entries]
        return {"last_step": self._last_step, "entries": entries}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last_step = state["last_step"]
        self._entries = [ReplayEntry(**{**e, "rows": Rows.from_state(e["rows"])}) for e in state["entries"]]

    def _usable(self, step: int) -> list[ReplayEntry]:
        """Entries young enough at this step. From the newest entry, age is counted in `add` alone, as released."""
        if self.age_reference == "newest":
            return list(self._entries)
        return [entry for entry in self._entries if step - entry.step <= self.max_age]

    def _units(self, rows: Rows) -> torch.Tensor:
        """int64 [B]: the unit that each row belongs to, numbered in order of appearance."""
        return torch.arange(len(rows)) if self.unit == "row" else numbered_by_appearance(rows.trajectory)[1]

    def _unit_means(self, rows: Rows, unit: torch.Tensor, turn_values: torch.Tensor) -> torch.Tensor:
        """Mean over each unit's turns that train; NaN where a unit has none."""
        trained = rows.trained_turns()
        return means_by_index(turn_values[trained], unit[rows.turns.row[trained]], len(torch.unique(unit)))

    def _recalibrated(self, entry: ReplayEntry, baseline: BaselineBuffer) -> torch.Tensor:
        """[N] advantages of an entry's turns at a flush."""
        if self.recalibration == "decay":
            return entry.advantages * self.decay
        level = baseline.percentile(50)
        if math.isnan(level):
            level = float(self._unit_means(entry.rows, self._units(entry.rows), entry.rewards).mean())
        deviation = baseline.percentile(50, of="std") if self.normalize_std else math.nan
        if deviation > SMALLEST_DEVIATION:
            return recalibrated_advantages(entry.rewards, level, deviation)
        # NaN: no scale was asked for, or none is known. 0: most groups were all equal, and dividing by it says nothing.
        return recalibrated_advantages(entry.rewards, level) / self.reward_scale

    def _draw(self, units: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """At most `capacity` of the units, uniformly, in their stored order."""
        count = len(units)
        power_of_two = 1 << (count.bit_length() - 1) if count > 1 else 0
        size = min(power_of_two if self.subset == "power_of_two" else count, self.capacity)
        return units[torch.randperm(count, generator=generator)[:size].sort().values]
