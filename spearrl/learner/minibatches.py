"""Which rows share an optimiser step, which of them a process gets, and which of those a forward pass.

An update is cut three times:

1. `plan`: mini-batches, one optimiser step each. A row's step follows from a keyed hash of the row, so it depends
   neither on the order of rows nor on the number of processes.
2. `deal`: a mini-batch's rows among processes, with about as many tokens each.
3. `micro_batches`: a process's rows into forward passes of a bounded number of tokens. Gradients add up over them.
"""

from __future__ import annotations

import math

import torch

from spearrl.batching import Batch
from spearrl.batching.token_hashes import counter_keys
from spearrl.config.sections import LearnerSection
from spearrl.learner.loss_inputs import Share, Weighted
from spearrl.seeds import derive

WORTHWHILE_TOKENS = 3072  # a smaller pass spends its time on launching operations
FILLED = 0.9


def plan(
    on_policy: tuple[Batch, Weighted],
    replay: tuple[Batch | None, Weighted],
    settings: LearnerSection,
    *,
    joint: bool,
    seed: int,
) -> list[list[Share]]:
    """The shares of each optimiser step, in order: on-policy steps, then replay steps; `joint`: both in each step."""
    batch, objectives = on_policy
    parts = math.ceil(len(batch) / settings.mini_batch_rows) if settings.mini_batch_rows else settings.mini_batches
    parts = max(1, min(parts, len(batch)))
    steps = [[share] for share in _shares(batch, objectives, parts, derive(seed, "on-policy"), current=True)]
    replayed_batch, replay_objectives = replay
    if replayed_batch is None:
        return steps
    if joint:
        replay_parts = parts
    elif settings.mini_batch_rows:
        replay_parts = math.ceil(len(replayed_batch) / settings.mini_batch_rows)
    else:  # never more replay steps than on-policy ones: after a step that lost most of its rows `size` says little
        size = max(1, math.ceil(len(batch) / parts))
        replay_parts = min(parts, math.ceil(len(replayed_batch) / size))
    replayed = _shares(replayed_batch, replay_objectives, max(1, replay_parts), derive(seed, "replay"), current=False)
    if not joint:
        return steps + [[share] for share in replayed]
    if not steps:
        return [[share] for share in replayed]
    for number, share in enumerate(replayed):
        steps[number % len(steps)].append(share)
    return steps


def _shares(batch: Batch, objectives: Weighted, parts: int, seed: int, *, current: bool) -> list[Share]:
    """Shares of equal size; those without an action token have no loss and are left out."""
    if not objectives:
        return []
    keys = counter_keys(derive(seed, "mini-batch"), batch.rows.uid, 1).flatten()
    pieces = [index.sort().values for index in mini_batches(keys, parts)]
    shares = [
        Share.of(batch.select(index), objectives, derive(seed, number), current=current, index=index)
        for number, index in enumerate(pieces)
    ]
    return [share for share in shares if bool(share.batch.action_mask.any())]


def mini_batches(keys: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Row indices of each mini-batch: rows in order of their key, cut into pieces whose sizes differ by at most one.

    Args:
        keys: [B], a hash of seed and row uid.
        parts: number of pieces; empty ones are left out.
    """
    order = torch.argsort(keys, stable=True)
    bounds = [len(order) * i // parts for i in range(parts + 1)]
    return [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


def deal(lengths: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Row indices of each process, ascending.

    Longest rows first, each goes to the process with the fewest tokens so far. The largest share of tokens is at most
    4/3 of the best possible one (Graham 1969, doi:10.1137/0117039).

    Args:
        lengths: int64 [B], tokens of each row.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads, sizes = [0] * ranks, lengths.tolist()
    for row in _longest_first(lengths).tolist():
        rank = loads.index(min(loads))
        dealt[rank].append(row)
        loads[rank] += sizes[row]
    return [torch.tensor(sorted(rows), dtype=torch.int64) for rows in dealt]


def micro_batches(lengths: torch.Tensor, max_tokens: int) -> list[torch.Tensor]:
    """Row indices of each forward pass, of at most `max_tokens` tokens; a longer row has a pass of its own.

    The largest pass comes first, so that one that does not fit into memory fails at once. Rows of similar length are
    padded to the longest; a pass also ends where it is worth its overhead already and the next row would be padded by a
    tenth or more.

    Args:
        lengths: int64 [B], tokens of each row.
    """
    order = _longest_first(lengths)
    sizes, passes, begin = lengths[order].tolist(), [], 0
    for end in range(1, len(sizes) + 1):
        if end < len(sizes):
            full = (end + 1 - begin) * sizes[begin] > max_tokens
            wasteful = (end - begin) * sizes[begin] >= WORTHWHILE_TOKENS and sizes[end] <= FILLED * sizes[begin]
            if not (full or wasteful):
                continue
        passes.append(order[begin:end])
        begin = end
    return passes


def _longest_first(lengths: torch.Tensor) -> torch.Tensor:
    return torch.argsort(lengths, descending=True, stable=True)
