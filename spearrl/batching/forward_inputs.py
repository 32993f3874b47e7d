"""One forward pass over rows: what goes into the model, and which outputs predict which action tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spearrl.batching.prefix_tree import PrefixTree, prefix_tree
from spearrl.batching.rows import Rows


@dataclass(frozen=True)
class ForwardInputs:
    """One forward pass over b rows: what goes in, and which outputs predict which action tokens.

    Args:
        token_ids: int64 [b, L], right-padded, nothing behind the last prediction; packed: [1, L], the tree's tokens.
        source: int64 [n], position in the flattened output that predicts the action token.
        target: int64 [n], the action token.
        padded: int64 [n], where its number belongs in the flattened [b, T].
        tree: packed: how the tokens attend to each other; padded: None.
        allowed: set of each target [n], then owner and ids of the sets (`AllowedIds`); empty: no target is restricted.
    """

    token_ids: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    padded: torch.Tensor
    tree: PrefixTree | None = None
    allowed: tuple[torch.Tensor, ...] = ()


def forward_inputs(rows: Rows, *, tree: bool = False) -> ForwardInputs:
    """The one place where tokens are shifted: the output at position t - 1 predicts the token at t.

    Args:
        tree: rows are packed, beginnings that they share stand there once.
    """
    tokens = rows.action_mask.nonzero().flatten()
    row, position = rows.row_index[tokens], rows.positions[tokens]
    target, padded = rows.token_ids[tokens], row * rows.width + position
    sets = None if rows.allowed is None else rows.allowed.select(rows.turn_index[tokens])
    allowed = () if sets is None else tuple(sets.tensors().values())
    if not tree:
        length = int(position.max()) if len(tokens) else 1
        length = rows.width if rows.pictures else length  # no picture is cut in two
        token_ids = rows.pad(rows.token_ids)[:, :length]
        return ForwardInputs(token_ids, row * length + position - 1, target, padded, allowed=allowed)
    parts = sequences(rows)
    if not len(tokens):  # every process runs a pass, whatever there is to predict
        parts[:1] = [rows.token_ids[:1].numpy()] if len(rows) else [np.zeros(1, dtype=np.int64)]
    made, index = prefix_tree(parts)
    flat = torch.from_numpy(np.concatenate(parts))
    distinct = torch.zeros(made.bounds[-1], dtype=torch.int64).index_copy(0, index, flat)
    starts = torch.tensor([0, *map(len, parts)]).cumsum(0)
    return ForwardInputs(distinct.unsqueeze(0), index[starts[row] + position - 1], target, padded, made, allowed)


def sequences(rows: Rows) -> list[np.ndarray]:
    """The tokens of each row that its predictions need: all before its last action token."""
    tokens = rows.action_mask.nonzero().flatten()
    last = torch.zeros(len(rows), dtype=torch.int64)
    needed = last.scatter_reduce(0, rows.row_index[tokens], rows.positions[tokens], "amax").tolist()
    ids, begins = rows.token_ids.numpy(), rows.offsets.tolist()
    return [ids[begin : begin + length] for begin, length in zip(begins, needed, strict=False)]
