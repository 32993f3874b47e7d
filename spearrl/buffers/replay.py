"""The replay buffer of self-imitation: good trajectories, drawn once and then forgotten (arXiv 2509.22601)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spearrl.advantages import recalibrated_advantages
from spearrl.batching import Batch, Rows
from spearrl.buffers.baseline import BaselineBuffer
from spearrl.errors import ConfigError, ContractError
from spearrl.types import Status

SMALLEST_DEVIATION = 1e-6
CHOICES = {
    "recalibration": ("median", "decay"),
    "age_reference": ("current", "newest"),
    "subset": ("all", "power_of_two"),
    "unit": ("trajectory", "row"),
}


@dataclass(frozen=True)
class _Entry:
    """What one step stored: rows, and their turns' numbers."""

    step: int
    rows: Rows
    rewards: torch.Tensor  # float64 [N], after shaping
    advantages: torch.Tensor  # float64 [N], of the step that made them
    old_logprobs: torch.Tensor  # [S], of the step that made them
    step_part: torch.Tensor  # float64 [N], added to recalibrated advantages (GiGPO's, of its own time); 0: none


class ReplayBuffer:
    """Units (whole trajectories, or single rows) whose advantage was positive when they were made.

    A unit's reward and advantage are the means over its turns that train. A flush draws at most `capacity` units, gives them the
    advantage reward - P50 of `baseline` (or the old one x decay), keeps what is still positive, and empties the buffer.

    Args:
        capacity: units drawn at most.
        max_age: steps a unit stays usable, counted from the current step or from the newest stored entry (`age_reference`).
        fill_factor: a flush is due when more than fill_factor x capacity units beat the baseline.
        keep_zero: keep units whose recalibrated advantage is exactly 0.
        subset: draw up to capacity units, or the largest power of two of them.
        min_rows: a draw of fewer rows is dropped.
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
            raise ConfigError(
                f"capacity={capacity}, max_age={max_age}, min_rows={min_rows}, fill_factor={fill_factor}; must be >= 1, >= 0, >= 1, > 0"
            )
        for name, value in (
            ("recalibration", recalibration),
            ("age_reference", age_reference),
            ("subset", subset),
            ("unit", unit),
        ):
            if value not in CHOICES[name]:
                raise ConfigError(f"{name}={value!r}; must be one of {', '.join(CHOICES[name])}")
        self.capacity, self.max_age, self.fill_factor, self.min_rows = capacity, max_age, fill_factor, min_rows
        self.recalibration, self.decay, self.normalize_std, self.keep_zero = (
            recalibration,
            decay,
            normalize_std,
            keep_zero,
        )
        self.age_reference, self.subset, self.unit, self.reward_scale = age_reference, subset, unit, reward_scale
        self._entries: list[_Entry] = []
        self._last_step = 0

    def __len__(self) -> int:
        """Stored units."""
        return sum(len(self._units(entry.rows)[0]) for entry in self._entries)

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
            step_part: [N], kept and added to the advantages at a flush with recalibration="median"; not part of the test for > 0.
        Raises:
            ContractError: shapes that do not fit `rows`.
        """
        if tuple(rewards.shape) != (len(rows.turns),) or tuple(advantages.shape) != (len(rows.turns),):
            raise ContractError(
                f"rewards {list(rewards.shape)}, advantages {list(advantages.shape)}; expected [{len(rows.turns)}]",
                where="ReplayBuffer.add",
            )
        if tuple(old_logprobs.shape) != (len(rows), rows.width):
            raise ContractError(
                f"old_logprobs {list(old_logprobs.shape)}; expected [{len(rows)}, {rows.width}]",
                where="ReplayBuffer.add",
            )
        self._forget(step)
        self._last_step = step
        ids, owner = self._units(rows)
        good = (
            self._unit_means(rows, advantages.double(), owner, len(ids)) > 0
        )  # NaN, a unit without trained tokens, is not
        faulty = torch.tensor([Status.from_code(code).is_error for code in range(len(Status))])[rows.turns.status]
        good[owner[rows.turns.row[faulty]]] = False
        chosen = good[owner]
        if bool(chosen.any()):
            turns, kept = rows.turns_of(chosen), rows.select(chosen)
            flat = kept.unpad(old_logprobs[chosen][:, : kept.width]).detach().cpu()
            part = torch.zeros_like(rewards) if step_part is None else step_part
            self._entries.append(
                _Entry(step, kept, rewards[turns].double(), advantages[turns].double(), flat, part[turns].double())
            )

    def ready(self, baseline: BaselineBuffer, step: int | None = None) -> bool:
        """Whether a flush is due at `step` (None: the one after the last `add`): more than fill_factor x capacity usable units beat the P50
        (decay: units alone)."""
        return self.size(baseline, step) > self.fill_factor * self.capacity

    def size(self, baseline: BaselineBuffer, step: int | None = None) -> int:
        """Usable units that beat the P50 of `baseline`; while it is empty, the mean of their own entry."""
        count = 0
        for entry in self._usable(self._last_step + 1 if step is None else step):
            ids, owner = self._units(entry.rows)
            if self.recalibration == "decay":
                count += len(ids)
                continue
            rewards = self._unit_means(entry.rows, entry.rewards, owner, len(ids))
            level = baseline.percentile(50)
            count += int((rewards > (float(rewards.mean()) if math.isnan(level) else level)).sum())
        return count

    def drain(self, step: int, baseline: BaselineBuffer, generator: torch.Generator | None) -> Batch | None:
        """Draw a replay batch and empty the buffer; None where too little is left after recalibration.

        Returns:
            advantages [B, T]: each turn's reward - P50 (over P50 of the deviations with normalize_std) plus its step part, or old advantage x decay.
        """
        entries, self._entries = self._usable(step), []
        if not entries:
            return None
        advantages = torch.cat([self._recalibrated(entry, baseline) for entry in entries])
        rows = Rows.concat([entry.rows for entry in entries])
        flat = torch.cat([entry.old_logprobs for entry in entries])
        ids, owner = self._units(rows)
        means = self._unit_means(rows, advantages, owner, len(ids))
        kept = torch.ones_like(means, dtype=torch.bool)
        if self.recalibration == "median":
            kept = means >= 0 if self.keep_zero else means > 0
        units = self._draw(kept.nonzero().flatten(), generator)
        chosen = torch.isin(owner, units)
        if int(chosen.sum()) < self.min_rows:
            return None
        turns, old_logprobs, drawn = rows.turns_of(chosen), rows.pad(flat)[chosen], rows.select(chosen)
        if self.recalibration == "median":
            advantages = advantages + torch.cat([entry.step_part for entry in entries])
        return Batch(
            drawn,
            drawn.scatter(advantages[turns]).float(),
            old_logprobs[:, : drawn.width],
            rollout_logprobs=drawn.pad(drawn.rollout_logprobs),
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values; `load_state_dict` restores them exactly."""
        tensors = ("rewards", "advantages", "old_logprobs", "step_part")
        entries = [
            {"step": e.step, "rows": e.rows.state_dict(), **{name: getattr(e, name) for name in tensors}}
            for e in self._entries
        ]
        return {"last_step": self._last_step, "entries": entries}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last_step = int(state["last_step"])
        self._entries = [
            _Entry(
                int(entry["step"]),
                Rows.from_state(entry["rows"]),
                entry["rewards"],
                entry["advantages"],
                entry["old_logprobs"],
                entry["step_part"],
            )
            for entry in state["entries"]
        ]

    def _usable(self, step: int) -> list[_Entry]:
        """Entries young enough at this step. Counted from the newest entry, age is only looked at in `add`, as released."""
        if self.age_reference == "newest":
            return list(self._entries)
        return [entry for entry in self._entries if step - entry.step <= self.max_age]

    def _forget(self, step: int) -> None:
        if not self._entries:
            return
        reference = step if self.age_reference == "current" else self._entries[-1].step
        self._entries = [entry for entry in self._entries if reference - entry.step <= self.max_age]

    def _units(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of the units in order of appearance, and the unit each row [B] belongs to."""
        if self.unit == "row":
            return rows.uid, torch.arange(len(rows))
        ids, inverse = torch.unique(rows.trajectory, return_inverse=True)
        first = torch.full((len(ids),), len(rows)).scatter_reduce(0, inverse, torch.arange(len(rows)), "amin")
        order = first.argsort()
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        return ids[order], rank[inverse]

    def _unit_means(self, rows: Rows, turn_values: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
        """Mean over each unit's turns that train; NaN where a unit has none."""
        trained = rows.trained_turns()
        unit = owner[rows.turns.row[trained]]
        total = torch.zeros(count, dtype=torch.float64).index_add_(0, unit, turn_values[trained])
        return total / torch.bincount(unit, minlength=count)

    def _recalibrated(self, entry: _Entry, baseline: BaselineBuffer) -> torch.Tensor:
        """[N] advantages of an entry's turns at a flush."""
        if self.recalibration == "decay":
            return entry.advantages * self.decay
        level = baseline.percentile(50)
        if math.isnan(level):
            ids, owner = self._units(entry.rows)
            level = float(self._unit_means(entry.rows, entry.rewards, owner, len(ids)).mean())
        deviation = baseline.percentile(50, of="std") if self.normalize_std else math.nan
        if (
            not deviation > SMALLEST_DEVIATION
        ):  # NaN: none asked for or none known. 0: most groups were all equal, and dividing by it says nothing
            return recalibrated_advantages(entry.rewards, level) / self.reward_scale
        return recalibrated_advantages(entry.rewards, level, deviation)

    def _draw(self, units: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """At most `capacity` of the units, uniformly, in their stored order."""
        count = len(units)
        power_of_two = 1 << (count.bit_length() - 1) if count > 1 else 0
        wanted = power_of_two if self.subset == "power_of_two" else count
        chosen = torch.randperm(count, generator=generator)[: min(wanted, self.capacity)]
        return units[chosen.sort().values]
