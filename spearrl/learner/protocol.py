"""The contract of a learner: what a trainer, a weight sync and a checkpoint ask of whoever owns the trained parameters.

`LocalLearner` keeps one model in this process; `DeepSpeedLearner` shards it over several. How rows are packed, padded,
cut into micro-batches and dealt to processes is private to a learner: callers and losses always see [B, T], with B rows
padded to the T tokens of the longest, and position t holding the value of (not: after) token t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from spearrl.batching import Batch, Rows
from spearrl.losses import Objective


@dataclass(frozen=True)
class UpdateResult:
    """What an update did.

    Args:
        metrics: means over the update, by name (docs/metrics.md): those of each objective, "policy/grad_norm",
            "policy/updates" (optimiser steps made), "policy/lr" (rate of the last one), "update/tokens",
            "update/seconds".
        skipped: optimiser steps that were left out because a loss or a gradient was not finite.
    """

    metrics: dict[str, float]
    skipped: int


class Learner(Protocol):
    """Owns the trained parameters, their optimiser state, and the critic and the reference model if there are any."""

    def logprobs(self, rows: Rows, *, reference: bool = False) -> torch.Tensor:
        """Log-probabilities in nats of action tokens, [B, T] on the CPU, float32 or wider; 0 elsewhere, no gradient.

        They are of the softmax of logits / temperature, as the tokens were sampled, over the token ids that the turn
        allowed (`Rows.allowed`).

        Args:
            reference: under the frozen model that training began with, instead of the trained one.
        Raises:
            ContractError: the learner has no reference model, or the rows hold images that the model does not take.
        """
        ...

    def values(self, rows: Rows) -> torch.Tensor:
        """The critic's values, in units of reward, [B, T] on the CPU; 0 where there is no action token, no gradient.

        The value at position t is of the state before token t.

        Raises:
            ContractError: the learner has no critic.
        """
        ...

    def update(
        self, on_policy: Batch, replay: Batch | None, *, gamma: float, objectives: Sequence[Objective], seed: int
    ) -> UpdateResult:
        """Make optimiser steps on the on-policy rows, then on the replayed ones.

        A learner built with `joint` makes steps on both at once: J + γ J_SIL, as the paper of SPEAR writes it
        (arXiv 2509.22601); otherwise replayed rows have steps of their own, as SPEAR was released. The gradient of a
        step does not depend on micro-batches, padding, the order of rows or the number of processes. A step whose loss
        or gradient is not finite is left out and counted.

        Args:
            on_policy: rows with advantages and old_logprobs, [B, T] each; whatever else the objectives read.
            replay: rows of earlier steps with recalibrated advantages; None: there are none.
            gamma: weight of the objectives on replayed rows, beside each one's own weight; 0: they are left out.
            objectives: terms of the total loss, each for on-policy or for replayed rows.
            seed: of the mini-batches, and of the tokens that a covariance rule draws.
        Raises:
            ContractError: an objective needs a tensor that its batch lacks.
            WorkerError: a process of the learner died, failed or did not answer; no call is accepted afterwards.
        """
        ...

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every weight once: tied ones under their first name, adapters merged, none of the critic.

        Names and shapes are those of a transformers model directory; tensors are whole and without gradient. They stay
        valid after the next one was taken, until the next update. All processes of the learner take part.
        """
        ...

    def probe(self, token_ids: Sequence[int], dtype: torch.dtype | None = None) -> list[float]:
        """Log-probabilities in nats of token_ids[1:], each given the tokens before it, at temperature 1.

        An engine with the same weights must find the same up to rounding: a weight sync compares the two.

        Args:
            dtype: to compute in (autocast), as an engine of that type does; None: in that of the weights.
        """
        ...

    def export(self, folder: str | Path) -> None:
        """Write the weights as a transformers model directory, without the tokenizer."""
        ...

    def export_adapter(self, folder: str | Path) -> None:
        """Write the adapters alone, as a directory of peft's format (`learner.lora.rank` above 0)."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write everything an update depends on into an existing folder, as safetensors and JSON.

        That is the weights (as `export`), the adapters below `adapter`, and below `training` the optimiser's state, the
        critic, and the number of optimiser steps made.
        """
        ...

    def load(self, folder: str | Path) -> None:
        """Restore exactly what `save` wrote: the next update is the one that would have followed.

        Raises:
            CheckpointError: files are missing or damaged, or belong to another model or other settings.
        """
        ...

    def release(self) -> None:
        """Give device memory that is not in use back to the driver, for engines on the same device."""
        ...

    def close(self) -> None:
        """End the learner's other processes. Nothing may be called afterwards."""
        ...
