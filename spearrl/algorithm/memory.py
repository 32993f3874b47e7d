"""What self-imitation keeps from step to step: the replay buffer, the baselines D_R, and who may enter (arXiv 2509.22601)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spearrl.algorithm.credit import Credit
from spearrl.algorithm.rewards import Shaped
from spearrl.batching import Batch
from spearrl.buffers import Admission, BaselineBuffer, ReplayBuffer
from spearrl.config.algo import SilSection
from spearrl.seeds import derive
from spearrl.types import Group


class Memory:
    """Replay buffer, baselines and admission, built from algo.sil."""

    def __init__(self, settings: SilSection, seed: int):
        self.settings, self.seed = settings, seed
        self.baseline = BaselineBuffer(settings.baseline_capacity)
        self.admission = Admission(min_wins=settings.min_wins, require_tool_call=settings.require_tool_call)
        self.replay = ReplayBuffer(
            settings.capacity,
            max_age=settings.max_age,
            fill_factor=settings.fill_factor,
            recalibration=settings.recalibration,
            decay=settings.decay,
            normalize_std=settings.normalize_std,
            keep_zero=settings.keep_zero,
            age_reference=settings.age_reference,
            subset=settings.subset,
            min_rows=settings.min_rows,
            unit=settings.unit,
            reward_scale=settings.reward_scale,
        )

    def due(self, step: int) -> Batch | None:
        """The flushed buffer if it is due: tested before this step's rows go in, so nothing is replayed in its own step."""
        if not self.settings.enabled or not self.replay.ready(self.baseline, step):
            return None
        return self.replay.drain(step, self.baseline, torch.Generator().manual_seed(derive(self.seed, "replay", step)))

    def remember(
        self, step: int, groups: Sequence[Group], shaped: Shaped, credit: Credit, old_logprobs: torch.Tensor
    ) -> None:
        """Store the step's admitted trajectories, with the log-probabilities of their own step, and the baselines of its groups."""
        if not self.settings.enabled:
            return
        rows = shaped.rows
        chosen = torch.isin(rows.trajectory, torch.tensor(self.admission.admit(groups), dtype=torch.int64))
        turns = rows.turns_of(chosen)
        admitted = rows.select(chosen).mask_turns(~shaped.muted[turns])  # what a filter took out is not imitated either
        step_part = credit.step_part[turns] if self.settings.keep_step_part and credit.step_part is not None else None
        self.replay.add(
            step,
            admitted,
            shaped.rewards[turns],
            credit.turns[turns],
            old_logprobs[chosen][:, : admitted.width],
            step_part=step_part,
        )
        self.baseline.add(step, *baselines(shaped))

    def metrics(self) -> dict[str, float]:
        p50 = self.baseline.percentile(50) if len(self.baseline) else 0.0
        return {
            "replay/stored": float(len(self.replay)),
            "replay/p50": p50,
            "replay/refused": float(self.admission.refused),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "replay": self.replay.state_dict(),
            "baseline": self.baseline.state_dict(),
            "admission": self.admission.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.replay.load_state_dict(state["replay"])
        self.baseline.load_state_dict(state["baseline"])
        self.admission.load_state_dict(state["admission"])


def baselines(shaped: Shaped) -> tuple[list[float], list[float]]:
    """Mean and population deviation of each group's trajectory rewards, in order of group id: what D_R stores."""
    trajectories, owner = torch.unique(shaped.rows.turns.trajectory_ids, return_inverse=True)
    size = torch.zeros(len(trajectories), dtype=torch.float64)
    total = size.clone()
    size.index_add_(0, owner, torch.ones_like(shaped.rewards, dtype=torch.float64))
    total.index_add_(0, owner, shaped.rewards.double())
    group_of = torch.zeros(len(trajectories), dtype=torch.int64)
    group_of[owner] = shaped.blocks
    rewards = total / size
    means, stds = [], []
    for group in torch.unique(group_of):
        members = rewards[group_of == group]
        means.append(float(members.mean()))
        stds.append(float(members.std(unbiased=False)))
    return means, stds
