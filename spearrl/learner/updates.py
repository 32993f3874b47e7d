"""An update as a sequence of optimiser steps, and whatever else every learner does alike."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spearrl.batching import Batch, Rows
from spearrl.config.sections import LearnerSection
from spearrl.errors import ContractError
from spearrl.learner.lora import FOLDER, save_adapters
from spearrl.learner.loss_inputs import Share, Tally, split_objectives
from spearrl.learner.minibatches import plan
from spearrl.learner.optimizer import learning_rate
from spearrl.learner.protocol import Learner, UpdateResult
from spearrl.losses import Objective


class BaseLearner(Learner):
    """A learner without its passes and its parameters. Counts optimiser steps and gives each its rows and its rate.

    Args:
        total_steps: optimiser steps over which the rate falls to 0, by the schedule `decay`; None: it stays.
        joint: on-policy and replayed rows share optimiser steps.
    """

    model: Any  # transformers' model, with its config
    has_reference: bool
    has_critic: bool

    def __init__(self, settings: LearnerSection, *, total_steps: int | None, decay: str, joint: bool):
        self.settings, self.total_steps, self.decay, self.joint, self.steps = settings, total_steps, decay, joint, 0

    def logprobs(self, rows: Rows, *, reference: bool = False) -> torch.Tensor:
        if reference and not self.has_reference:
            hint = "build it with reference="
            raise ContractError("this learner has no reference model", where="Learner.logprobs", hint=hint)
        return self._predict(rows, reference=reference, values=False)

    def values(self, rows: Rows) -> torch.Tensor:
        if not self.has_critic:
            raise ContractError("this learner has no critic", where="Learner.values", hint="build it with critic=")
        return self._predict(rows, reference=False, values=True)

    def update(
        self, on_policy: Batch, replay: Batch | None, *, gamma: float, objectives: Sequence[Objective], seed: int
    ) -> UpdateResult:
        started, tally, skipped, before = time.monotonic(), Tally(), 0, self.steps
        on_objectives, replay_objectives = split_objectives(objectives, gamma)
        if not replay_objectives:
            replay = None
        parts = ((on_policy, on_objectives), (replay, replay_objectives))
        for shares in plan(*parts, self.settings, joint=self.joint, seed=seed):
            fresh = self.steps == before
            made = self._step([replace(share, current=share.current and fresh) for share in shares], tally)
            self.steps += made
            skipped += not made
        tokens = sum(len(batch.rows.token_ids) for batch in (on_policy, replay) if batch is not None)
        metrics = tally.means() | {
            "policy/updates": float(self.steps - before),
            "policy/lr": self._rate(max(0, self.steps - 1)),
            "update/tokens": float(tokens),
            "update/seconds": time.monotonic() - started,
        }
        return UpdateResult(metrics, skipped)

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._weights(adapters=False)

    def adapter_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every weight of the adapters, as named in peft's files; none without adapters."""
        return self._weights(adapters=True)

    def export_adapter(self, folder: str | Path) -> None:
        save_adapters(Path(folder), self.model, dict(self.adapter_parameters()))

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.export(folder)
        if self.settings.lora.rank:
            self.export_adapter(folder / FOLDER)
        self._save_training(folder)

    def _rate(self, step: int) -> float:
        return learning_rate(step, self.settings, self.total_steps, decay=self.decay)

    @abstractmethod
    def _predict(self, rows: Rows, *, reference: bool, values: bool) -> torch.Tensor:
        """[B, T] log-probabilities (or values) of action tokens, 0 elsewhere."""

    @abstractmethod
    def _step(self, shares: list[Share], tally: Tally) -> bool:
        """One optimiser step on these shares at the rate of step `self.steps`.

        Returns False where it was left out, because the loss or the gradient is not finite.
        """

    @abstractmethod
    def _weights(self, *, adapters: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight of the model directory (or of the adapters), under its name there."""

    @abstractmethod
    def _save_training(self, folder: Path) -> None:
        """Write the optimiser's state, the critic and the number of optimiser steps made."""
