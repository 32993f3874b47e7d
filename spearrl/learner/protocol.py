"""The contract of a learner: what a trainer, a weight sync and a checkpoint ask of whoever owns the trained parameters.

`LocalLearner` keeps one model in this process; `DeepSpeedLearner` shards it over several. How rows are packed, padded,
cut into micro-batches and dealt to processes is private to a learner: callers and losses always see [B, T], with B rows
padded to the T tokens of the longest, and position t holding the value of (not: after) token t.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spearrl.batching import Batch, Rows, distinct_tokens, sequences
from spearrl.config.sections import LearnerSection
from spearrl.errors import ContractError
from spearrl.learner.lora import FOLDER, save_adapters
from spearrl.learner.loss_inputs import Share, Tally, split_objectives
from spearrl.learner.minibatches import plan
from spearrl.learner.old_logprobs import OldLogprobs
from spearrl.learner.optimizer import learning_rate
from spearrl.losses import Objective


@dataclass(frozen=True)
class UpdateResult:
    """What an update did.

    Args:
        metrics: means over the update, by name (docs/metrics.md): those of each objective, "policy/grad_norm",
            "policy/updates" (optimiser steps made), "policy/lr" (rate of the last one), "update/tokens",
            "update/unique_tokens" (what rows begin with in common counted once), "update/seconds".
        skipped: optimiser steps that were left out because a loss or a gradient was not finite.
        old_logprobs: [B, T] of the on-policy batch: its own, or those that the update found, before its first optimiser
            step; then not a number at action tokens of rows that had no pass.
        offending: the shares of the first optimiser step that was left out.
    """

    metrics: dict[str, float]
    skipped: int
    old_logprobs: torch.Tensor
    offending: Sequence[Share] = ()


class Learner(ABC):
    """Owns the trained parameters, their optimiser state, and the critic and the reference model if there are any.

    Counts optimiser steps and gives each its rows and its rate; passes and parameters are a subclass's.

    Args:
        total_steps: optimiser steps over which the rate falls to 0, by the schedule `decay`; None: it stays.
        joint: on-policy and replayed rows share optimiser steps.
    """

    model: Any  # transformers' model, with its config
    has_reference: bool
    has_critic: bool
    why_padded: str  # what keeps rows from being packed into prefix trees; "": they are

    def __init__(self, settings: LearnerSection, *, total_steps: int | None, decay: str, joint: bool):
        self.settings, self.total_steps, self.decay, self.joint, self.steps = settings, total_steps, decay, joint, 0

    def logprobs(self, rows: Rows, *, reference: bool = False) -> torch.Tensor:
        """Log-probabilities in nats of action tokens, [B, T] on the CPU, float32 or wider; 0 elsewhere, no gradient.

        They are of the softmax of logits / temperature, as the tokens were sampled, over the token ids that the turn
        allowed (`Rows.allowed`).

        Args:
            reference: under the frozen model that training began with, instead of the trained one.
        Raises:
            ContractError: the learner has no reference model, or the rows hold images that the model does not take.
        """
        if reference and not self.has_reference:
            hint = "build it with reference="
            raise ContractError("this learner has no reference model", where="Learner.logprobs", hint=hint)
        return self._predict(rows, reference=reference, values=False)

    def values(self, rows: Rows) -> torch.Tensor:
        """The critic's values, in units of reward, [B, T] on the CPU; 0 where there is no action token, no gradient.

        The value at position t is of the state before token t.

        Raises:
            ContractError: the learner has no critic.
        """
        if not self.has_critic:
            raise ContractError("this learner has no critic", where="Learner.values", hint="build it with critic=")
        return self._predict(rows, reference=False, values=True)

    def update(
        self, on_policy: Batch, replay: Batch | None, *, gamma: float, objectives: Sequence[Objective], seed: int
    ) -> UpdateResult:
        """Make optimiser steps on the on-policy rows, then on the replayed ones.

        A learner built with `joint` makes steps on both at once: J + γ J_SIL, as the paper of SPEAR writes it
        (arXiv 2509.22601); otherwise replayed rows have steps of their own, as SPEAR was released. The gradient of a
        step does not depend on micro-batches, padding, the order of rows or the number of processes. A step whose loss
        or gradient is not finite is left out and counted.

        Args:
            on_policy: rows with advantages, [B, T]; old_logprobs, or None: those of the update's own first passes;
                whatever else the objectives read.
            replay: rows of earlier steps with recalibrated advantages; None: there are none.
            gamma: weight of the objectives on replayed rows, beside each one's own weight; 0: they are left out.
            objectives: terms of the total loss, each for on-policy or for replayed rows.
            seed: of the mini-batches, and of the tokens that a covariance rule draws.
        Raises:
            ContractError: an objective needs a tensor that its batch lacks; a token id is outside the vocabulary.
            WorkerError: a process of the learner died, failed or did not answer; no call is accepted afterwards.
        """
        started, tally, before = time.monotonic(), Tally(), self.steps
        skipped, left_out = 0, Counter({"policy/without_signal": 0})
        on_objectives, replay_objectives = split_objectives(objectives, gamma)
        if not replay_objectives:
            replay = None
        old, offending = OldLogprobs(on_policy), list[Share]()
        self._check_ids(*(batch.rows for batch in (on_policy, replay) if batch is not None))

        def planned() -> list[list[Share]]:
            parts = ((old.batch, on_objectives), (replay, replay_objectives))
            return plan(*parts, self.settings, joint=self.joint, seed=seed)

        steps = planned()
        if len(needed := old.needed_before(steps, self._one_pass)):
            old.record(needed, self.logprobs(on_policy.rows.select(needed)))
            steps = planned()
        for shares in steps:
            fresh = self.steps == before
            trained = [replace(share, current=share.current and fresh).with_signal() for share in shares]
            left_out.update(_size(shares))
            left_out.subtract(_size(trained))
            trained = [share for share in trained if len(share.batch)]
            if not trained:  # a step would only decay weights and follow old moments
                left_out["policy/without_signal"] += 1
                continue
            made = self._step(trained, tally, old)
            self.steps += made
            skipped += not made
            offending = offending if made else offending or shares
        rows = [batch.rows for batch in (on_policy, replay) if batch is not None]
        metrics = tally.means() | {name: float(count) for name, count in left_out.items()}
        metrics |= {
            "policy/updates": float(self.steps - before),
            "policy/lr": self._rate(max(0, self.steps - 1)),
            "update/tokens": float(sum(len(part.token_ids) for part in rows)),
            "update/unique_tokens": float(sum(distinct_tokens(sequences(part)) for part in rows)),
            "update/seconds": time.monotonic() - started,
        }
        return UpdateResult(metrics, skipped, old.result(), offending)

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every weight once: tied ones under their first name, adapters merged, none of the critic.

        Names and shapes are those of a transformers model directory; tensors are whole and without gradient. They stay
        valid after the next one was taken, until the next update. All processes of the learner take part.
        """
        return self._weights(adapters=False)

    def adapter_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every weight of the adapters, as named in peft's files; none without adapters."""
        return self._weights(adapters=True)

    @abstractmethod
    def probe(self, token_ids: Sequence[int], dtype: torch.dtype | None = None) -> list[float]:
        """Log-probabilities in nats of token_ids[1:], each given the tokens before it, at temperature 1.

        An engine with the same weights must find the same up to rounding: a weight sync compares the two.

        Args:
            dtype: to compute in (autocast), as an engine of that type does; None: in that of the weights.
        """

    @abstractmethod
    def export(self, folder: str | Path) -> None:
        """Write the weights as a transformers model directory, without the tokenizer."""

    def export_adapter(self, folder: str | Path) -> None:
        """Write the adapters alone, as a directory of peft's format (`learner.lora.rank` above 0)."""
        save_adapters(Path(folder), self.model, dict(self.adapter_parameters()))

    def save(self, folder: str | Path) -> None:
        """Write everything an update depends on into an existing folder, as safetensors and JSON.

        That is the weights (as `export`), the adapters below `adapter`, and below `training` the optimiser's state, the
        critic, and the number of optimiser steps made.
        """
        folder = Path(folder)
        self.export(folder)
        if self.settings.lora.rank:
            self.export_adapter(folder / FOLDER)
        self._save_training(folder)

    @abstractmethod
    def load(self, folder: str | Path) -> None:
        """Restore exactly what `save` wrote: the next update is the one that would have followed.

        Raises:
            CheckpointError: files are missing or damaged, or belong to another model or other settings.
        """

    @abstractmethod
    def release(self) -> None:
        """Give device memory that is not in use back to the driver, for engines on the same device."""

    @abstractmethod
    def close(self) -> None:
        """End the learner's other processes. Nothing may be called afterwards."""

    def _check_ids(self, *parts: Rows) -> None:
        """Raise ContractError for ids without an embedding: those of another model's engine or tokenizer."""
        size = self.model.config.get_text_config().vocab_size
        for rows in parts:
            if not len(wrong := ((rows.token_ids < 0) | (rows.token_ids >= size)).nonzero()[:, 0]):
                continue
            row, token = int(rows.row_index[wrong[0]]), int(rows.token_ids[wrong[0]])
            text = f"token id {token} in trajectory {int(rows.trajectory[row])}; the model's vocabulary has {size}"
            hint = "engine, tokenizer and model must belong together: see model.path and vllm.servers"
            raise ContractError(text, where="Learner.update", hint=hint)

    def _rate(self, step: int) -> float:
        return learning_rate(step, self.settings, self.total_steps, decay=self.decay)

    @abstractmethod
    def _predict(self, rows: Rows, *, reference: bool, values: bool) -> torch.Tensor:
        """[B, T] log-probabilities (or values) of action tokens, 0 elsewhere."""

    @abstractmethod
    def _one_pass(self, rows: Rows) -> bool:
        """Whether these rows of a step are computed in one pass, in which a rule over the mini-batch sees them all."""

    @abstractmethod
    def _step(self, shares: list[Share], tally: Tally, old: OldLogprobs) -> bool:
        """One optimiser step on these shares at the rate of step `self.steps`.

        Args:
            old: records what passes of current shares find.
        Returns:
            False where it was left out, because the loss or the gradient is not finite.
        """

    @abstractmethod
    def _weights(self, *, adapters: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight of the model directory (or of the adapters), under its name there."""

    @abstractmethod
    def _save_training(self, folder: Path) -> None:
        """Write the optimiser's state, the critic and the number of optimiser steps made."""


def _size(shares: Sequence[Share]) -> dict[str, int]:
    rows, tokens = (sum(f(share.batch.rows) for share in shares) for f in (len, lambda part: len(part.token_ids)))
    return {"update/rows_without_signal": rows, "update/tokens_without_signal": tokens}
