"""The turn table: what is known of each of the N turns that rows are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

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
        for field in fields(self):
            check_tensor(getattr(self, field.name), f"turns.{field.name}", turn_dtype(field.name), count)

    def __len__(self) -> int:
        return len(self.group_ids)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def select(self, keep: torch.Tensor, row: torch.Tensor) -> TurnTable:
        """The turns where `keep` [N] is True; `row`: their new row numbers."""
        return TurnTable(**{**{name: tensor[keep] for name, tensor in self.tensors().items()}, "row": row})

    @staticmethod
    def concat(tables: Sequence[TurnTable], first_rows: Sequence[int]) -> TurnTable:
        """One table after the other; `first_rows`: the number that row 0 of each gets."""
        joined = {}
        for field in fields(TurnTable):
            shift = first_rows if field.name == "row" else [0] * len(tables)
            parts = [getattr(table, field.name) + offset for table, offset in zip(tables, shift, strict=True)]
            joined[field.name] = torch.cat(parts) if parts else torch.zeros(0, dtype=turn_dtype(field.name))
        return TurnTable(**joined)


def turn_dtype(name: str) -> torch.dtype:
    """Element type of a field of the turn table."""
    return torch.float64 if name in ("rewards", "penalties") else torch.int64


def check_tensor(value: object, name: str, dtype: torch.dtype, length: int) -> None:
    """Raises ContractError unless `value` is a tensor of this type and shape [length]."""
    if not isinstance(value, torch.Tensor):
        raise ContractError(f"{name} is a {type(value).__name__}; expected a tensor", where="Rows")
    if value.dtype != dtype or tuple(value.shape) != (length,):
        raise ContractError(f"{name} is {value.dtype} {list(value.shape)}; expected {dtype} [{length}]", where="Rows")
