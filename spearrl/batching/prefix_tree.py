"""Rows as a prefix tree: tokens that several rows begin with are there once.

Sorted lexicographically, a row shares some prefix with the row before it and adds the rest: its segment. The tokens of
the tree are the segments one after the other, which is depth-first order, so that what descends from a token lies
behind it in one piece.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

PASS_TOKENS = 64  # what one more forward pass costs, in tokens
CUT_SLACK = 0.1  # of a process's share: how far from equal parts a cut may lie


@dataclass(frozen=True)
class Shared:
    """Queries begin .. end of the tree's tokens attend to all of its tokens key_begin .. key_end."""

    begin: int
    end: int
    key_begin: int
    key_end: int


@dataclass(frozen=True)
class PrefixTree:
    """How U distinct tokens attend to each other: a token sees its own segment up to itself, and its ancestors.

    Args:
        bounds: of the segments, from 0 to U.
        shared: who attends to ancestors in earlier segments, in depth-first order of the keys.
        positions: int64 [U], each token's depth.
    """

    bounds: tuple[int, ...]
    shared: tuple[Shared, ...]
    positions: torch.Tensor

    @property
    def segments(self) -> list[tuple[int, int]]:
        """(begin, end) of each."""
        return list(pairwise(self.bounds))

    def last_descendants(self) -> torch.Tensor:
        """int64 [U], one behind the last descendant of each token: k is seen by q where k <= q < last[k]."""
        last = torch.zeros(self.bounds[-1], dtype=torch.int64)
        for begin, end in self.segments:
            last[begin:end] = end
        for part in self.shared:
            last[part.key_begin : part.key_end].clamp_(min=part.end)
        return last


def prefix_tree(sequences: Sequence[np.ndarray]) -> tuple[PrefixTree, torch.Tensor]:
    """The tree of token sequences, and int64 [S]: where each of their tokens, one sequence after another, is in it."""
    order, common = shared_prefixes(sequences)
    lengths = [len(sequences[row]) for row in order]
    bounds = [0, *accumulate(length - begin for length, begin in zip(lengths, common, strict=True))]
    index: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(sequences)
    before, positions = np.zeros(0, dtype=np.int64), []
    for number, row in enumerate(order):
        own = np.arange(bounds[number], bounds[number + 1])
        before = index[row] = np.concatenate([before[: common[number]], own])
        positions.append(np.arange(common[number], lengths[number]))
    flat = (torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts])) for parts in (positions, index))
    depth, places = flat
    return PrefixTree(tuple(bounds), _shared(bounds, common, lengths), depth), places


def shared_prefixes(sequences: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """(lexicographic order, how many tokens each sequence of it shares with the one before; the first none)."""
    keys = [sequence.astype(">u4").tobytes() for sequence in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    common = [0] * min(len(order), 1)
    for before, row in pairwise(order):
        length = min(len(sequences[before]), len(sequences[row]))
        differs = sequences[before][:length] != sequences[row][:length]
        common.append(int(differs.argmax()) if differs.any() else length)
    return order, common


def distinct_tokens(sequences: Sequence[np.ndarray]) -> int:
    """Tokens of the tree of token sequences."""
    return sum(map(len, sequences)) - sum(shared_prefixes(sequences)[1])


def tree_passes(sequences: Sequence[np.ndarray], max_tokens: int) -> list[torch.Tensor]:
    """Indices of the sequences of each forward pass, of at most `max_tokens` distinct tokens; longer ones stand alone.

    Sequences in lexicographic order are cut so that as few tokens as possible are computed twice; a pass counts as
    `PASS_TOKENS` more. The largest pass comes first, so that one that does not fit into memory fails at once.
    """
    order, common = shared_prefixes(sequences)
    lengths = [len(sequences[row]) for row in order]
    added = [0, *accumulate(length - begin for length, begin in zip(lengths, common, strict=True))]

    def size(begin: int, end: int) -> int:
        return added[end] - added[begin] + common[begin]

    cost, begins = [0], [0]  # of the sequences before each: the least, and where their last pass begins
    for end in range(1, len(order) + 1):
        best, begin = (cost[end - 1] + common[end - 1], end - 1), end - 2
        while begin >= 0 and added[end] - added[begin] <= max_tokens:
            if size(begin, end) <= max_tokens:
                best = min(best, (cost[begin] + common[begin], begin))
            begin -= 1
        cost.append(best[0] + PASS_TOKENS)
        begins.append(best[1])
    passes, end = [], len(order)
    while end:
        passes.append((begins[end], end))
        end = begins[end]
    return [torch.tensor(order[begin:end]) for begin, end in sorted(passes, key=lambda cut: -size(*cut))]


def tree_shares(sequences: Sequence[np.ndarray], ranks: int) -> list[torch.Tensor]:
    """Indices of the sequences of each process, ascending, with about as many distinct tokens each.

    Sequences in lexicographic order are cut near equal parts, where the least is shared across the cut.
    """
    order, common = shared_prefixes(sequences)
    lengths = [len(sequences[row]) for row in order]
    added = [0, *accumulate(length - begin for length, begin in zip(lengths, common, strict=True))]
    cuts = [0]
    for rank in range(1, ranks):
        equal, slack = added[-1] * rank / ranks, added[-1] * CUT_SLACK / ranks
        near = range(bisect_left(added, equal - slack, cuts[-1]), bisect_right(added, equal + slack, cuts[-1]))
        free = [cut for cut in near if cut < len(order)]
        nearest = min(bisect_left(added, equal, cuts[-1]), len(order))
        cuts.append(min(free, key=lambda cut: (common[cut], abs(added[cut] - equal))) if free else nearest)
    return [torch.tensor(sorted(order[begin:end]), dtype=torch.int64) for begin, end in pairwise([*cuts, len(order)])]


def _shared(bounds: list[int], common: list[int], lengths: list[int]) -> tuple[Shared, ...]:
    """Every piece of a path that later segments attend to.

    The path of the sequence at hand is a stack of pieces (segment, first and last depth). A piece is cut where the next
    sequence leaves the path, and what is cut off has been seen by all segments since.
    """
    shared: list[Shared] = []
    path: list[tuple[int, int, int]] = []
    for number in range(len(lengths) + 1):
        depth = common[number] if number < len(lengths) else 0
        while path and path[-1][2] > depth:
            segment, begin, end = path.pop()
            cut = max(begin, depth)
            first = bounds[segment] - common[segment]
            if bounds[number] > bounds[segment + 1]:  # repeated sequences add no token
                shared.append(Shared(bounds[segment + 1], bounds[number], first + cut, first + end))
            if cut > begin:
                path.append((segment, begin, cut))
        if number < len(lengths) and lengths[number] > depth:
            path.append((number, depth, lengths[number]))
    return tuple(sorted(shared, key=lambda part: (part.key_begin, part.begin)))
