"""What a loss sees: rows with their per-token numbers, all [B, T]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from spearrl.batching.rows import Rows, row_indices
from spearrl.errors import ConfigError, ContractError


@dataclass
class Batch:
    """Rows and per-token numbers [B, T], action-aligned. Raises ContractError for another shape."""

    rows: Rows
    advantages: torch.Tensor
    old_logprobs: torch.Tensor
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
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "rows"}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def select(self, rows: torch.Tensor | Sequence[int]) -> Batch:
        """The given rows (bool [B] or distinct indices), cut to the longest of them."""
        chosen = self.rows.select(rows)
        index = row_indices(rows)
        return Batch(chosen, **{name: tensor[index][:, : chosen.width] for name, tensor in self.tensors().items()})


def denominator(action_mask: torch.Tensor, mode: str, horizon: float) -> float:
    """The divisor of a whole mini-batch [B, T] for `aggregate`: action tokens, rows, or rows x horizon; at least 1.

    Raises:
        ConfigError: unknown mode.
    """
    rows = max(len(action_mask), 1)
    if mode == "token-mean":
        return float(max(int(action_mask.sum()), 1))
    if mode in ("seq-mean-token-sum", "seq-mean-token-mean"):
        return float(rows)
    if mode == "seq-mean-token-sum-norm":
        return float(rows * horizon)
    raise ConfigError(
        f"aggregation={mode!r} is unknown",
        hint="token-mean, seq-mean-token-sum, seq-mean-token-mean or seq-mean-token-sum-norm",
    )
