"""The turn table: what is known of each of the N turns that rows are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from spearrl.errors import ContractError


@dataclass(frozen=True)
class TurnTable:
    """N turns, in time order inside a trajectory; every field is a tensor [N].

    Raises:
        ContractError: a field has another shape or type.
    """

    group_ids: torch.Tensor  # int64
    trajectory_ids: torch.Tensor  # int64
    anchor_ids: torch.Tensor  # int64, stable 63-bit hash of the canonical anchor
    rewards: torch.Tensor  # float64, what the environment paid for the turn
    penalties: torch.Tensor  # float64, 1 where the action was invalid
    tool_calls: torch.Tensor  # int64
    status: torch.Tensor  # int64, Status.code of its trajectory
    row: torch.Tensor  # int64, the row the turn lies in

    def __post_init__(self) -> None:
        count = len(self.group_ids)
        for name, tensor in self.tensors().items():
            check_tensor(tensor, f"turns.{name}", turn_dtype(name), count)

    def __len__(self) -> int:
        return len(self.group_ids)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name."""
        return dict(vars(self))

    def select(self, keep: torch.Tensor, row: torch.Tensor) -> TurnTable:
        """The turns where `keep` [N] is True; `row`: their new row numbers."""
        return TurnTable(**{name: tensor[keep] for name, tensor in self.tensors().items()} | {"row": row})

    @staticmethod
    def concat(tables: Sequence[TurnTable], first_rows: Sequence[int]) -> TurnTable:
        """One table after the other; `first_rows`: the number that row 0 of each gets."""
        moved = [replace(table, row=table.row + first) for table, first in zip(tables, first_rows, strict=True)]
        empty = {field.name: torch.zeros(0, dtype=turn_dtype(field.name)) for field in fields(TurnTable)}
        return TurnTable(
            **{name: torch.cat([none, *(getattr(t, name) for t in moved)]) for name, none in empty.items()}
        )


def turn_dtype(name: str) -> torch.dtype:
    """Element type of a field of the turn table."""
    return torch.float64 if name in ("rewards", "penalties") else torch.int64


def check_tensor(value: object, name: str, dtype: torch.dtype, length: int) -> None:
    """Raises ContractError unless `value` is a tensor of this type and shape [length]."""
    if not isinstance(value, torch.Tensor):
        raise ContractError(f"{name} is a {type(value).__name__}; expected a tensor", where="Rows")
    if value.dtype != dtype or tuple(value.shape) != (length,):
        raise ContractError(f"{name} is {value.dtype} {list(value.shape)}; expected {dtype} [{length}]", where="Rows")
