"""Groups of trajectories → rows, by one rule.

A turn whose prompt begins with the running row's ids (and pictures) extends that row, any other starts a new one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from spearrl.batching.allowed_tokens import AllowedIds
from spearrl.batching.anchors import anchor_id
from spearrl.batching.rows import Rows
from spearrl.batching.turn_table import TurnTable, turn_dtype
from spearrl.errors import ContractError
from spearrl.types import Group, Trajectory, Turn

ROWS_PER_TRAJECTORY = 4096  # uid = trajectory * this + ordinal of the row


class _Played(NamedTuple):
    """A turn in its row, which holds the first `known` tokens of its prompt already."""

    trajectory: Trajectory
    turn: Turn
    row: int
    known: int


def rows_from_groups(groups: Sequence[Group]) -> Rows:
    """Rows of all valid trajectories, in order; trajectories that ended in an error are left out.

    Only sampled tokens are action tokens: prompts, observations and template tokens never train.

    Raises:
        ContractError: an empty prompt, log-probabilities that do not match the sampled tokens, or a sampled token that
            was not allowed.
    """
    turns: list[_Played] = []
    rows: list[tuple[int, int, int]] = []  # group, trajectory, uid
    images: list[tuple[str, ...]] = []
    for trajectory in (t for group in groups for t in group.valid):
        running: tuple[int, ...] = ()
        first = len(rows)
        for number, turn in enumerate(trajectory.turns):
            _check(turn, f"trajectory {trajectory.id}, turn {number}")
            digests = tuple(image.digest for image in turn.images)
            extends = number > 0 and turn.prompt_ids[: len(running)] == running
            if not extends or digests[: len(images[-1])] != images[-1]:
                running = ()
                uid = trajectory.id * ROWS_PER_TRAJECTORY + len(rows) - first
                rows.append((trajectory.group, trajectory.id, uid))
                images.append(())
            images[-1] = digests
            turns.append(_Played(trajectory, turn, len(rows) - 1, len(running)))
            running = turn.prompt_ids + turn.token_ids
        if len(rows) - first > ROWS_PER_TRAJECTORY:
            text = f"{len(rows) - first} rows; at most {ROWS_PER_TRAJECTORY} are numbered apart"
            raise ContractError(text, where=f"trajectory {trajectory.id}")
    return _rows(turns, rows, images)


def _rows(turns: Sequence[_Played], rows: Sequence[tuple[int, int, int]], images: Sequence[tuple[str, ...]]) -> Rows:
    """Rows of these turns: of each, the prompt's new tokens, then the sampled ones."""
    table = _turn_table(turns)
    sizes = [(len(played.turn.prompt_ids) - played.known, len(played.turn.token_ids)) for played in turns]
    counts = torch.tensor(sizes, dtype=torch.int64).view(-1, 2)

    def by_token(values: Iterable[int]) -> torch.Tensor:
        """int64 [S]: each turn's own value on its sampled tokens, -1 on the prompt's."""
        pairs = torch.tensor([(-1, value) for value in values], dtype=torch.int64)
        return pairs.flatten().repeat_interleave(counts.flatten())

    pieces = chain.from_iterable((p.turn.prompt_ids[p.known :], p.turn.token_ids) for p in turns)
    turn_index = by_token(range(len(turns)))
    reported = torch.from_numpy(np.array(array("f", chain.from_iterable(p.turn.logprobs for p in turns))))
    lengths = torch.zeros(len(rows), dtype=torch.int64).index_add(0, table.row, counts.sum(1))
    group, trajectory, uid = torch.tensor(rows, dtype=torch.int64).view(-1, 3).unbind(1)
    pictures = {image.digest: image.data for played in turns for image in played.turn.images}
    return Rows(
        token_ids=torch.from_numpy(np.array(array("q", chain.from_iterable(pieces)))),
        action_mask=turn_index >= 0,
        turn_index=turn_index,
        rollout_logprobs=torch.zeros(len(turn_index)).masked_scatter(turn_index >= 0, reported),
        policy_version=by_token(played.turn.min_version for played in turns),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        group=group,
        trajectory=trajectory,
        uid=uid,
        turns=table,
        images=tuple(images),
        allowed=_allowed(turns),
        pictures={name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in pictures.items()},
    )


def _turn_table(turns: Sequence[_Played]) -> TurnTable:
    text_id = cache(anchor_id)  # siblings meet the same states
    states = [p.turn.observation if p.turn.anchor is None else p.turn.anchor for p in turns]
    columns = {
        "group_ids": [played.trajectory.group for played in turns],
        "trajectory_ids": [played.trajectory.id for played in turns],
        "anchor_ids": [text_id(state) if isinstance(state, str) else anchor_id(state) for state in states],
        "rewards": [played.turn.reward for played in turns],
        "penalties": [0.0 if played.turn.action.valid else 1.0 for played in turns],
        "tool_calls": [played.turn.action.tool_calls for played in turns],
        "status": [played.trajectory.status.code for played in turns],
        "row": [played.row for played in turns],
    }
    return TurnTable(**{name: torch.tensor(values, dtype=turn_dtype(name)) for name, values in columns.items()})


def _allowed(turns: Sequence[_Played]) -> AllowedIds | None:
    """The sets that replies were restricted to; siblings share them."""
    numbers: dict[tuple[int, ...] | None, int] = {None: -1}
    index = [numbers.setdefault(played.turn.allowed_ids, len(numbers) - 1) for played in turns]
    del numbers[None]
    members = [frozenset(ids or ()) for ids in numbers]
    for (trajectory, turn, _, _), number in zip(turns, index, strict=True):
        if number >= 0 and not members[number].issuperset(turn.token_ids):
            others = sorted(set(turn.token_ids) - members[number])[:8]
            text = f"sampled tokens {others} are not among the {len(members[number])} allowed ids"
            where = f"trajectory {trajectory.id}, turn {trajectory.turns.index(turn)}"
            raise ContractError(text, where=where, hint="use an engine that honours Sampling.allowed_ids")
    owner = [number for number, ids in enumerate(members) for _ in ids]
    ids = list(chain.from_iterable(members))
    tensors = (torch.tensor(values, dtype=torch.int64) for values in (index, owner, ids))
    return AllowedIds(*tensors) if members else None


def _check(turn: Turn, where: str) -> None:
    if not turn.prompt_ids:
        hint = "the chat encoder must give every turn at least one prompt token"
        raise ContractError("an empty prompt", where=where, hint=hint)
    if len(turn.logprobs) != len(turn.token_ids):
        text = f"{len(turn.logprobs)} log-probabilities for {len(turn.token_ids)} sampled tokens"
        raise ContractError(text, where=where)
