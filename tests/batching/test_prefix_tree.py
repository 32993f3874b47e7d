"""Rows as a prefix tree: every distinct prefix once, and who sees whom."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from spearrl.batching import PrefixTree, Rows, distinct_tokens, prefix_tree, sequences, tree_passes, tree_shares
from spearrl.batching.prefix_tree import PASS_TOKENS, shared_prefixes
from tests.batching.test_rows import make_rows
from tests.support.random_inputs import checked

TOKENS = st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=9)  # few tokens: much is shared


def arrays(lists: list[list[int]]) -> list[np.ndarray]:
    return [np.array(tokens, dtype=np.int64) for tokens in lists]


def dense_mask(tree: PrefixTree) -> torch.Tensor:
    """bool [U, U], which key (column) each query (row) sees."""
    index = torch.arange(tree.bounds[-1])
    return (index <= index.unsqueeze(1)) & (index.unsqueeze(1) < tree.last_descendants())


def sharing_rows(runs: list[list[int]], *, seed: int = 0, **names: int) -> Rows:
    """As `make_rows`, with beginnings that rows share: of some depth, different ones for every third row."""
    rows = make_rows(runs, seed=seed, **names)
    depth = 3 + torch.arange(len(rows)) % 4 * 2
    common = (rows.positions * 7 + rows.row_index % 3 * 5 + seed) % 50
    return replace(rows, token_ids=torch.where(rows.positions < depth[rows.row_index], common, rows.token_ids))


@checked
@given(TOKENS)
def test_the_tree_holds_every_prefix_once_and_a_token_sees_its_own(lists):
    tree, index = prefix_tree(arrays(lists))
    assert distinct_tokens(arrays(lists)) == tree.bounds[-1]
    prefixes = {}
    places = iter(index.tolist())
    for tokens in lists:
        for length in range(1, len(tokens) + 1):
            prefixes.setdefault(next(places), set()).add(tuple(tokens[:length]))
    assert sorted(prefixes) == list(range(tree.bounds[-1])) and all(len(found) == 1 for found in prefixes.values())
    prefix = [prefixes[number].pop() for number in range(tree.bounds[-1])]
    assert len(set(prefix)) == len(prefix) and tree.positions.tolist() == [len(tokens) - 1 for tokens in prefix]
    seen = torch.tensor([[query[: len(key)] == key for key in prefix] for query in prefix], dtype=torch.int64)
    seen = seen.view(len(prefix), len(prefix))
    assert torch.equal(dense_mask(tree).long(), seen)
    pieces = torch.zeros_like(seen)  # what attention goes through piece by piece is that, each pair once
    for begin, end in tree.segments:
        pieces[begin:end, begin:end] += torch.ones_like(pieces[begin:end, begin:end]).tril()
    assert all(part.begin < part.end and part.key_begin < part.key_end for part in tree.shared)
    for part in tree.shared:
        pieces[part.begin : part.end, part.key_begin : part.key_end] += 1
    assert torch.equal(pieces, seen)


def test_a_group_is_one_trunk_with_a_branch_for_each_reply():
    prompt = [5, 6, 7, 8]
    tree, index = prefix_tree(arrays([[*prompt, 1, 2], [*prompt, 3], [*prompt, 4, 4]]))
    assert tree.bounds == (0, 6, 7, 9) and tree.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 4, 5]
    (part,) = tree.shared  # one call: both later replies, over the whole prompt
    assert (part.begin, part.end, part.key_begin, part.key_end) == (6, 9, 0, 4)
    assert index.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 0, 1, 2, 3, 7, 8]


@checked
@given(TOKENS, st.integers(1, 20))
def test_passes_hold_every_row_once_and_no_more_than_fits(lists, limit):
    parts = arrays(lists)
    passes = tree_passes(parts, limit)
    assert sorted(row for rows in passes for row in rows.tolist()) == list(range(len(lists)))
    sizes = [distinct_tokens([parts[row] for row in rows]) for rows in passes]
    assert all(size <= limit or len(rows) == 1 for size, rows in zip(sizes, passes, strict=True))
    assert sizes == sorted(sizes, reverse=True)


def test_passes_are_cut_where_least_is_shared():
    groups = [[[group] * 10 + [group, reply] for reply in range(4)] for group in range(3)]  # 15 distinct tokens each
    parts = arrays([row for group in groups for row in group])
    passes = tree_passes(parts, 40)  # two groups fit, a third does not
    assert (
        sorted(len(rows) for rows in passes) == [4, 8]
        and sum(distinct_tokens([parts[r] for r in p]) for p in passes) == 45
    )
    assert PASS_TOKENS > 40  # a cut within a group would cost a pass more


@checked
@given(TOKENS, st.integers(1, 4))
def test_shares_hold_every_row_once(lists, ranks):
    shares = tree_shares(arrays(lists), ranks)
    assert len(shares) == ranks and sorted(row for rows in shares for row in rows.tolist()) == list(range(len(lists)))


def test_shares_keep_groups_whole_and_are_about_equal():
    parts = arrays([[group] * 30 + [9, reply] for group in range(8) for reply in range(4)])
    shares = tree_shares(parts, 2)
    assert [{int(parts[row][0]) for row in rows} for rows in shares] == [{0, 1, 2, 3}, {4, 5, 6, 7}]


def test_sequences_end_before_the_last_prediction():
    rows = make_rows([[1], [2, 1]])
    clear = rows.with_action_mask(rows.action_mask & (rows.turn_index != 0))
    assert [len(part) for part in sequences(clear)] == [0, 6] and [len(part) for part in sequences(rows)] == [2, 6]
    assert shared_prefixes(sequences(clear)) == ([0, 1], [0, 0])
