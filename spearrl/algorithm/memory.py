"""What self-imitation keeps from step to step: replay buffer, baselines D_R, who may enter (arXiv 2509.22601)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch

from spearrl.advantages import means_by_index
from spearrl.algorithm.credit import Credit
from spearrl.algorithm.rewards import Shaped
from spearrl.batching import Batch
from spearrl.buffers import Admission, BaselineBuffer, ReplayBuffer
from spearrl.config.algo import SilSection
from spearrl.seeds import derive
from spearrl.types import Group

PARTS = ("replay", "baseline", "admission")


class Memory:
    """Replay buffer, baselines and admission, built from algo.sil."""

    def __init__(self, settings: SilSection, seed: int):
        self.settings, self.seed = settings, seed
        self.baseline = BaselineBuffer(settings.baseline_capacity)
        self.admission = Admission(min_wins=settings.min_wins, require_tool_call=settings.require_tool_call)
        # algo.sil has a field for each of the buffer's settings, by the same name.
        self.replay = ReplayBuffer(**{name: getattr(settings, name) for name in signature(ReplayBuffer).parameters})

    def due(self, step: int) -> Batch | None:
        """The flushed buffer, if it is due. Called before this step's rows go in: none is replayed in its own step."""
        if not self.settings.enabled or not self.replay.ready(self.baseline, step):
            return None
        return self.replay.drain(step, self.baseline, torch.Generator().manual_seed(derive(self.seed, "replay", step)))

    def remember(
        self, step: int, groups: Sequence[Group], shaped: Shaped, credit: Credit, old_logprobs: torch.Tensor
    ) -> None:
        """Store the admitted trajectories, with the log-probabilities of their own step, and the groups' baselines."""
        if not self.settings.enabled:
            return
        rows = shaped.rows
        admitted = torch.isin(rows.trajectory, torch.tensor(self.admission.admit(groups), dtype=torch.int64))
        turns = rows.turns_of(admitted)
        part = rows.select(admitted).mask_turns(~shaped.muted[turns])  # what a filter took out is not imitated either
        step_part = credit.step_part[turns] if self.settings.keep_step_part and credit.step_part is not None else None
        rewards, advantages = shaped.rewards[turns], credit.turns[turns]
        logprobs = old_logprobs[admitted][:, : part.width]
        self.replay.add(step, part, rewards, advantages, logprobs, step_part=step_part)
        self.baseline.add(step, *baselines(shaped))

    def metrics(self) -> dict[str, float]:
        return {
            "replay/stored": float(len(self.replay)),
            "replay/p50": self.baseline.percentile(50) if len(self.baseline) else 0.0,
            "replay/refused": float(self.admission.refused),
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in PARTS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])


def baselines(shaped: Shaped) -> tuple[list[float], list[float]]:
    """Mean and population deviation of each group's trajectory rewards, in order of group id: what D_R stores."""
    trajectories, trajectory = torch.unique(shaped.rows.turns.trajectory_ids, return_inverse=True)
    rewards = means_by_index(shaped.rewards.double(), trajectory, len(trajectories))
    group_of_trajectory = torch.zeros(len(trajectories), dtype=torch.int64)
    group_of_trajectory[trajectory] = shaped.blocks
    groups = [rewards[group_of_trajectory == group] for group in torch.unique(group_of_trajectory)]
    return [float(group.mean()) for group in groups], [float(group.std(unbiased=False)) for group in groups]
