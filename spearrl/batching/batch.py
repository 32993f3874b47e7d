"""What a loss sees: rows with their per-token numbers, all [B, T]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spearrl.batching.rows import Rows, row_indices
from spearrl.errors import ContractError


@dataclass
class Batch:
    """Rows and per-token numbers [B, T], action-aligned. Raises ContractError for another shape.

    Args:
        old_logprobs: the learner's at the start of the update; None: it finds them on the way.
    """

    rows: Rows
    advantages: torch.Tensor
    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    rollout_logprobs: torch.Tensor | None = None

    def __post_init__(self) -> None:
        expected = (len(self.rows), self.rows.width)
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != expected:
                raise ContractError(f"{name} is {list(tensor.shape)}; expected {list(expected)}", where="Batch")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def action_mask(self) -> torch.Tensor:
        """bool [B, T]."""
        return self.rows.padded_mask

    def tensors(self) -> dict[str, torch.Tensor]:
        """The [B, T] fields that are there, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def select(self, rows: torch.Tensor | Sequence[int]) -> Batch:
        """The given rows (bool [B] or distinct indices), cut to the longest of them."""
        index = row_indices(rows)
        part = self.rows.select(index)
        return Batch(part, **{name: tensor[index][:, : part.width] for name, tensor in self.tensors().items()})
