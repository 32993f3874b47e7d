"""The token ids that replies were restricted to: engine and learner renormalise over the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from spearrl.batching.turn_table import check_tensor
from spearrl.errors import ContractError


@dataclass(frozen=True)
class AllowedIds:
    """Sets of token ids, and the set of each of N turns.

    Args:
        index: int64 [N], the turn's set; -1: any id was allowed.
        owner: int64 [K], the set that an id belongs to, in ascending order.
        ids: int64 [K].

    Raises:
        ContractError: a tensor has another shape or type, or a turn's set is not there.
    """

    index: torch.Tensor
    owner: torch.Tensor
    ids: torch.Tensor

    def __post_init__(self) -> None:
        for name, length in (("index", len(self.index)), ("owner", len(self.ids)), ("ids", len(self.ids))):
            check_tensor(getattr(self, name), f"allowed.{name}", torch.int64, length)
        if len(self.index) and not -1 <= int(self.index.min()) <= int(self.index.max()) < self.sets:
            raise ContractError(f"allowed.index is outside -1 .. {self.sets - 1}", where="Rows")

    @property
    def sets(self) -> int:
        return int(self.owner[-1]) + 1 if len(self.owner) else 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name."""
        return dict(vars(self))

    def select(self, turns: torch.Tensor) -> AllowedIds | None:
        """The sets of these turns alone; None where none of them is restricted.

        Args:
            turns: indices, repeated or not; -1: no turn.
        """
        index = torch.where(turns < 0, -1, self.index[turns])
        sets = torch.unique(index[index >= 0])
        if not len(sets):
            return None
        inside = torch.isin(self.owner, sets)
        owner = torch.searchsorted(sets, self.owner[inside])
        return AllowedIds(torch.where(index < 0, -1, torch.searchsorted(sets, index)), owner, self.ids[inside])

    @staticmethod
    def concat(tables: Sequence[AllowedIds | None], turns: Sequence[int]) -> AllowedIds | None:
        """One after the other; `turns`: the number of turns of each, restricted or not."""
        if all(table is None for table in tables):
            return None
        none = torch.zeros(0, dtype=torch.int64)
        every = [t or AllowedIds(torch.full((n,), -1), none, none) for t, n in zip(tables, turns, strict=True)]
        first = list(accumulate((table.sets for table in every), initial=0))[:-1]
        index = [torch.where(t.index < 0, -1, t.index + start) for t, start in zip(every, first, strict=True)]
        owner = [table.owner + start for table, start in zip(every, first, strict=True)]
        return AllowedIds(torch.cat(index), torch.cat(owner), torch.cat([table.ids for table in every]))
