"""Rows: token sequences as flat tensors, and the turns that their action tokens belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from spearrl.batching.allowed_tokens import AllowedIds
from spearrl.batching.nested_tensors import fill, strip
from spearrl.batching.turn_table import TurnTable, check_tensor
from spearrl.errors import ContractError

FORMAT = "spearrl.rows/2"
TOKENS = {
    "token_ids": torch.int64,
    "action_mask": torch.bool,
    "turn_index": torch.int64,
    "rollout_logprobs": torch.float32,
    "policy_version": torch.int64,
}
ROWS = ("group", "trajectory", "uid")
FLAT = (*TOKENS, "offsets", *ROWS)


@dataclass
class Rows:
    """B rows of S tokens in all. Padded to [B, T], T is the longest row and position t holds the value *of* token t.

    Args:
        token_ids: int64 [S].
        action_mask: bool [S], True where the token is in the loss: the policy chose it, and no filter took it out.
        turn_index: int64 [S], index into `turns`, also of tokens that a filter took out; -1 where the policy did not
            choose the token.
        rollout_logprobs: float32 [S], as the engine reported; 0 where the policy did not choose the token.
        policy_version: int64 [S], weights that sampled the token; -1 where the policy did not choose it.
        offsets: int64 [B + 1]; row b holds the tokens offsets[b] .. offsets[b + 1].
        group, trajectory: int64 [B].
        uid: int64 [B], unique in the run.
        images: content hashes of each row's pictures.
        allowed: by turn; None: no reply was restricted.
        pictures: encoded pictures by content hash, uint8 [bytes].

    Raises:
        ContractError: a tensor has another shape or type, offsets do not fit, or a row begins with an action token.
    """

    token_ids: torch.Tensor
    action_mask: torch.Tensor
    turn_index: torch.Tensor
    rollout_logprobs: torch.Tensor
    policy_version: torch.Tensor
    offsets: torch.Tensor
    group: torch.Tensor
    trajectory: torch.Tensor
    uid: torch.Tensor
    turns: TurnTable
    images: tuple[tuple[str, ...], ...] = ()
    allowed: AllowedIds | None = None
    pictures: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count, size = len(self.offsets) - 1, len(self.token_ids)
        check_tensor(self.offsets, "offsets", torch.int64, count + 1)
        for name, dtype in TOKENS.items():
            check_tensor(getattr(self, name), name, dtype, size)
        for name in ROWS:
            check_tensor(getattr(self, name), name, torch.int64, count)
        if count < 0 or int(self.offsets[0]) != 0 or int(self.offsets[-1]) != size or bool((self.lengths < 1).any()):
            text = f"offsets {self.offsets.tolist()[:8]} do not cut {size} tokens into rows of one token or more"
            raise ContractError(text, where="Rows")
        if not self.images:
            self.images = ((),) * count
        if len(self.images) != count:
            raise ContractError(f"images of {len(self.images)} rows; expected {count}", where="Rows")
        self._check_turns()

    def _check_turns(self) -> None:
        if bool(self.action_mask[self.offsets[:-1]].any()):
            hint = "a prompt must hold at least one token"
            raise ContractError("a row begins with an action token", where="Rows", hint=hint)
        count = len(self.turns)
        if not bool(((self.turn_index >= -1) & (self.turn_index < count)).all()):
            raise ContractError(f"turn_index is outside -1 .. {count - 1}", where="Rows")
        if not bool(((self.turns.row >= 0) & (self.turns.row < len(self))).all()):
            raise ContractError(f"turns.row is outside the {len(self)} rows", where="Rows")
        if self.allowed is not None and len(self.allowed.index) != count:
            text = f"allowed ids of {len(self.allowed.index)} turns; expected {count}"
            raise ContractError(text, where="Rows")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> torch.Tensor:
        """int64 [B], tokens of each row."""
        return self.offsets.diff()

    @cached_property
    def width(self) -> int:
        """T, the longest row."""
        return int(self.lengths.max()) if len(self) else 0

    @cached_property
    def row_index(self) -> torch.Tensor:
        """int64 [S], the row of each token."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 [S], each token's position in its row."""
        return torch.arange(len(self.token_ids)) - self.offsets[:-1][self.row_index]

    @cached_property
    def _padded_positions(self) -> torch.Tensor:
        """int64 [S], each token's position in the flattened [B, T]."""
        return self.row_index * self.width + self.positions

    @cached_property
    def padded_mask(self) -> torch.Tensor:
        """bool [B, T], the action mask."""
        return self.pad(self.action_mask, False)

    def pad(self, flat: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """[S] → [B, T], right-padded with `fill`."""
        check_tensor(flat, "flat", flat.dtype, len(self.token_ids))
        empty = flat.new_full((len(self) * self.width,), fill)
        return empty.index_copy(0, self._padded_positions, flat).view(len(self), self.width)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """[B, T] → [S], the values that are not padding."""
        if tuple(padded.shape) != (len(self), self.width):
            raise ContractError(f"shape {list(padded.shape)}; expected [{len(self)}, {self.width}]", where="Rows.unpad")
        return padded.reshape(-1)[self._padded_positions]

    def scatter(self, turn_values: torch.Tensor) -> torch.Tensor:
        """[N] → [B, T]: the value of each action token's turn, 0 elsewhere."""
        check_tensor(turn_values, "turn_values", turn_values.dtype, len(self.turns))
        if not len(self.turns):
            return turn_values.new_zeros(len(self), self.width)
        inside = self.action_mask & (self.turn_index >= 0)
        return self.pad(torch.where(inside, turn_values[self.turn_index.clamp(min=0)], turn_values.new_zeros(())))

    def mask_turns(self, keep: torch.Tensor) -> Rows:
        """Rows whose action mask is cleared on turns where `keep` [N] is False."""
        check_tensor(keep, "keep", torch.bool, len(self.turns))
        if not len(self.turns):
            return self
        return self.with_action_mask(self.action_mask & (keep[self.turn_index.clamp(min=0)] | (self.turn_index < 0)))

    def with_action_mask(self, action_mask: torch.Tensor) -> Rows:
        """The same tokens, others of which [S] are in the loss (the cold start also imitates some observed ones)."""
        return replace(self, action_mask=action_mask)

    def trained_turns(self) -> torch.Tensor:
        """bool [N], turns that have an action token in the loss."""
        trained = torch.zeros(len(self.turns), dtype=torch.bool)
        index = self.turn_index[self.action_mask]
        trained[index[index >= 0]] = True
        return trained

    def turns_of(self, rows: torch.Tensor) -> torch.Tensor:
        """bool [N], turns that lie in the given rows (bool [B] or indices): those of `select(rows)`, in its order."""
        inside = torch.zeros(len(self), dtype=torch.bool)
        inside[rows] = True
        return inside[self.turns.row]

    def select(self, rows: torch.Tensor | Sequence[int]) -> Rows:
        """The given rows (bool [B] or distinct indices) in the given order, with their turns, which keep theirs."""
        index = row_indices(rows)
        new_row = torch.full((len(self),), -1, dtype=torch.int64)
        new_row[index] = torch.arange(len(index))
        if int((new_row >= 0).sum()) != len(index):
            raise ContractError("a row is selected twice", where="Rows.select")
        lengths = self.lengths[index]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        moved = self.offsets[:-1][index] - offsets[:-1]
        tokens = torch.arange(int(offsets[-1])) + torch.repeat_interleave(moved, lengths)
        inside = new_row[self.turns.row] >= 0
        new_turn = torch.cat([inside.long().cumsum(0) - 1, torch.full((1,), -1)])  # index -1, no turn, stays -1
        flat = {name: getattr(self, name)[tokens] for name in TOKENS}
        flat["turn_index"] = new_turn[flat["turn_index"]]
        images = tuple(self.images[i] for i in index.tolist())
        return Rows(
            **flat,
            offsets=offsets,
            **{name: getattr(self, name)[index] for name in ROWS},
            turns=self.turns.select(inside, new_row[self.turns.row[inside]]),
            images=images,
            allowed=None if self.allowed is None else self.allowed.select(inside.nonzero().flatten()),
            pictures={d: self.pictures[d] for digests in images for d in digests if d in self.pictures},
        )

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        """One after the other; turns too."""
        none = torch.zeros(0, dtype=torch.int64)
        counts = ([len(p) for p in parts], [len(p.turns) for p in parts], [len(p.token_ids) for p in parts])
        first_row, first_turn, first_token = (list(accumulate(sizes, initial=0))[:-1] for sizes in counts)
        flat = {name: torch.cat([none.to(dtype), *(getattr(p, name) for p in parts)]) for name, dtype in TOKENS.items()}
        # Where there is no turn, the index stays -1.
        index = [p.turn_index + (p.turn_index >= 0) * first for p, first in zip(parts, first_turn, strict=True)]
        ends = [p.offsets[1:] + first for p, first in zip(parts, first_token, strict=True)]
        return Rows(
            **{**flat, "turn_index": torch.cat([none, *index])},
            **{name: torch.cat([none, *(getattr(p, name) for p in parts)]) for name in ROWS},
            offsets=torch.cat([torch.zeros(1, dtype=torch.int64), *ends]),
            turns=TurnTable.concat([p.turns for p in parts], first_row),
            images=tuple(images for p in parts for images in p.images),
            allowed=AllowedIds.concat([p.allowed for p in parts], [len(p.turns) for p in parts]),
            pictures={digest: data for p in parts for digest, data in p.pictures.items()},
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name and the image hashes; `from_state` is the inverse.

        "allowed" is there where a reply was restricted, "pictures" where there are some.
        """
        state: dict[str, Any] = {name: getattr(self, name) for name in FLAT}
        state |= {"turns": self.turns.tensors(), "images": [list(images) for images in self.images]}
        if self.allowed is not None:
            state["allowed"] = self.allowed.tensors()
        return {**state, "pictures": dict(self.pictures)} if self.pictures else state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Rows:
        """Rows from `state_dict()`. Raises ContractError for missing or malformed tensors."""
        missing = {*FLAT, "turns", "images"} - set(state)
        if missing:
            raise ContractError(f"rows without {sorted(missing)}", where="Rows")
        tables: dict[str, Any] = {
            "turns": TurnTable(**state["turns"]),
            "images": tuple(tuple(images) for images in state["images"]),
            "allowed": AllowedIds(**state["allowed"]) if "allowed" in state else None,
        }
        return cls(**{name: state[name] for name in FLAT}, **tables, pictures=state.get("pictures", {}))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        text, tensors = strip(self.state_dict(), "rows")
        save_file(tensors, path, metadata={"format": FORMAT, "rows": text})

    @classmethod
    def load(cls, path: str | Path) -> Rows:
        """Read what `save` wrote. Raises ContractError where the file is not a file of rows."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ContractError(f"format {metadata.get('format')!r}; expected {FORMAT!r}", where=str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        return cls.from_state(fill(metadata["rows"], tensors))


def row_indices(rows: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """int64 indices of a bool mask or of indices."""
    index = torch.as_tensor(rows)
    return index.nonzero().flatten() if index.dtype == torch.bool else index.long()
