"""One forward pass over rows: what goes into the model, and which outputs predict which action tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spearrl.batching.rows import Rows


@dataclass(frozen=True)
class ForwardInputs:
    """One forward pass over b rows: what goes in, and which outputs predict which action tokens.

    Args:
        token_ids: int64 [b, L], right-padded, nothing behind the last prediction; packed: [1, L], rows end to end.
        source: int64 [n], position in the flattened output that predicts the action token.
        target: int64 [n], the action token.
        padded: int64 [n], where its number belongs in the flattened [b, T].
        lengths: packed: tokens of each row that is there; padded: empty.
        allowed: set of each target [n], then owner and ids of the sets (`AllowedIds`); empty: no target is restricted.
    """

    token_ids: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    padded: torch.Tensor
    lengths: tuple[int, ...] = ()
    allowed: tuple[torch.Tensor, ...] = ()


def forward_inputs(rows: Rows, *, packed: bool = False) -> ForwardInputs:
    """The one place where tokens are shifted: the output at position t - 1 predicts the token at t."""
    tokens = rows.action_mask.nonzero().flatten()
    row, position = rows.row_index[tokens], rows.positions[tokens]
    target, padded = rows.token_ids[tokens], row * rows.width + position
    sets = None if rows.allowed is None else rows.allowed.select(rows.turn_index[tokens])
    allowed = () if sets is None else tuple(sets.tensors().values())
    if not packed:
        length = int(position.max()) if len(tokens) else 1
        length = rows.width if rows.pictures else length  # no picture is cut in two
        token_ids = rows.pad(rows.token_ids)[:, :length]
        return ForwardInputs(token_ids, row * length + position - 1, target, padded, allowed=allowed)
    needed = torch.zeros(len(rows), dtype=torch.int64).scatter_reduce(0, row, position, "amax")
    if not len(tokens):  # every process runs a pass, whatever there is to predict
        needed[:1] = 1
    starts = needed.cumsum(0) - needed
    token_ids = rows.token_ids[rows.positions < needed[rows.row_index]].unsqueeze(0)
    lengths = tuple(needed[needed > 0].tolist())
    return ForwardInputs(token_ids, starts[row] + position - 1, target, padded, lengths, allowed)
