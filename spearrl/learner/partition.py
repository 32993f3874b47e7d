"""Which rows share an optimiser step (`plan`), a process (`deal`) and a forward pass (`micro_batches`).

Membership of a step is by keyed hash of row, whatever the order of rows and however many processes there are.
"""

from __future__ import annotations

import math

import torch

from spearrl.batching import Batch
from spearrl.config import LearnerSection
from spearrl.learner.minibatch import Share, Weighted, row_keys
from spearrl.seeds import derive

WORTHWHILE_TOKENS = 3072  # a smaller pass spends its time on launching operations
FILLED = 0.9


def mini_batches(keys: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Row indices of each optimiser step: rows in order of their key, cut into `parts` pieces whose sizes differ by at most one.

    Args:
        keys: [B] a hash of seed and row uid, so that membership does not depend on the order of rows.
        parts: pieces; empty ones are left out.
    """
    order = torch.argsort(keys, stable=True)
    bounds = [len(order) * i // parts for i in range(parts + 1)]
    return [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


def micro_batches(lengths: torch.Tensor, max_tokens: int, *, packed: bool = False) -> list[torch.Tensor]:
    """Row indices of each forward pass: rows of similar length, with rows x longest <= max_tokens (a longer row goes alone).

    A pass also ends early where it is worth its overhead already and the next row would be padded by a tenth or more.

    Args:
        lengths: int64 [B]. Longest rows come first, so that a pass that does not fit into memory fails at once.
        packed: there is no padding; `packs` chooses.
    """
    if packed:
        return packs(lengths, max_tokens)
    order = torch.argsort(lengths, descending=True, stable=True)
    pieces, begin = [], 0
    sizes = lengths[order].tolist()
    for end in range(1, len(sizes) + 1):
        if end < len(sizes):
            full = (end + 1 - begin) * sizes[begin] > max_tokens
            wasteful = (end - begin) * sizes[begin] >= WORTHWHILE_TOKENS and sizes[end] <= FILLED * sizes[begin]
            if not (full or wasteful):
                continue
        pieces.append(order[begin:end])
        begin = end
    return pieces


def packs(lengths: torch.Tensor, max_tokens: int) -> list[torch.Tensor]:
    """Row indices of each forward pass: first-fit decreasing (at most 11/9 of the fewest passes, plus one) by tokens; a longer row goes alone.

    Args:
        lengths: int64 [B]. The fullest pass comes first, so that a pass that does not fit into memory fails at once.
    """
    pieces: list[list[int]] = []
    room: list[int] = []
    sizes = lengths.tolist()
    for row in torch.argsort(lengths, descending=True, stable=True).tolist():
        place = next((i for i, free in enumerate(room) if sizes[row] <= free), len(room))
        if place == len(room):
            pieces.append([])
            room.append(max_tokens)
        pieces[place].append(row)
        room[place] -= sizes[row]
    return [torch.tensor(pieces[i]) for i in sorted(range(len(pieces)), key=lambda i: room[i])]


def deal(lengths: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Row indices of each rank, ascending: longest rows first, each to the rank with the fewest tokens so far (at most 4/3 of the best possible maximum).

    Args:
        lengths: int64 [B].
    """
    loads, dealt = [0] * ranks, [[] for _ in range(ranks)]  # type: tuple[list[int], list[list[int]]]
    sizes = lengths.tolist()
    for row in torch.argsort(lengths, descending=True, stable=True).tolist():
        rank = loads.index(min(loads))
        dealt[rank].append(row)
        loads[rank] += sizes[row]
    return [torch.tensor(sorted(rows), dtype=torch.int64) for rows in dealt]


def plan(
    policy: tuple[Batch, Weighted],
    imitation: tuple[Batch | None, Weighted],
    settings: LearnerSection,
    *,
    joint: bool,
    seed: int,
) -> list[list[Share]]:
    """The shares of each optimiser step, in order: on-policy steps, then replay steps; `joint`: both in each step."""
    (on_policy, on_objectives), (replay, replay_objectives) = policy, imitation
    parts = _parts(len(on_policy), settings)
    size = math.ceil(len(on_policy) / parts)
    steps = [[share] for share in _shares(on_policy, on_objectives, parts, derive(seed, "on-policy"), current=True)]
    if replay is None or not replay_objectives:
        return steps
    rows = settings.mini_batch_rows
    # Never more replay steps than on-policy ones: after a step that lost most of its rows `size` says little.
    alternating = math.ceil(len(replay) / rows) if rows else min(parts, math.ceil(len(replay) / max(size, 1)))
    replay_parts = parts if joint else max(1, alternating)
    replayed = _shares(replay, replay_objectives, replay_parts, derive(seed, "replay"), current=False)
    if not joint:
        return steps + [[share] for share in replayed]
    if not steps:
        return [[share] for share in replayed]
    for number, share in enumerate(replayed):
        steps[number % len(steps)].append(share)
    return steps


def _parts(rows: int, settings: LearnerSection) -> int:
    wanted = math.ceil(rows / settings.mini_batch_rows) if settings.mini_batch_rows else settings.mini_batches
    return max(1, min(wanted, rows))


def _shares(batch: Batch, objectives: Weighted, parts: int, seed: int, *, current: bool) -> list[Share]:
    """Parts of equal size by keyed hash of row; parts without an action token say nothing and are left out."""
    if not objectives:
        return []
    pieces = [batch.select(index.sort().values) for index in mini_batches(row_keys(batch.rows.uid, seed), parts)]
    return [
        Share(piece, objectives, derive(seed, number), current)
        for number, piece in enumerate(pieces)
        if bool(piece.action_mask.any())
    ]
