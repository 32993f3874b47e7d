"""Rows dealt to processes, and the bytes that processes send each other."""

from __future__ import annotations

import pytest
import torch

from spearrl.batching.nested_tensors import pack, unpack
from spearrl.learner.minibatches import deal


def test_rows_are_dealt_by_tokens_and_each_once():
    lengths = torch.randint(1, 500, (101,), generator=torch.Generator().manual_seed(0))
    for ranks in (1, 2, 8):
        dealt = deal(lengths, ranks)
        assert torch.cat(dealt).sort().values.tolist() == list(range(101))
        loads = [int(lengths[rows].sum()) for rows in dealt]
        assert max(loads) <= 1.02 * sum(loads) / ranks
    assert [rows.tolist() for rows in deal(torch.tensor([5, 1, 4]), 2)] == [[0], [1, 2]]


def test_more_ranks_than_rows_leaves_some_without():
    dealt = deal(torch.tensor([7]), 3)
    assert [len(rows) for rows in dealt] == [1, 0, 0] and all(rows.dtype == torch.int64 for rows in dealt)


def test_what_is_packed_arrives_as_it_was():
    whole = torch.arange(12.0).view(3, 4)
    tree = {
        "names": ["a", None, 1.5, True],
        "views": [whole[1], whole[:, 2], torch.zeros(0, 3, dtype=torch.float64)],
        "flags": torch.tensor([True, False]),
        "bf16": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "nothing": {},
    }
    copy = unpack(pack(tree))
    assert copy["names"] == tree["names"] and copy["nothing"] == {} and int(copy["scalar"]) == 7
    for one, two in zip(
        [*copy["views"], copy["flags"], copy["bf16"]],
        [*tree["views"], tree["flags"], tree["bf16"]],
        strict=True,
    ):
        assert one.dtype == two.dtype and torch.equal(one, two)


def test_what_json_cannot_say_is_refused():
    with pytest.raises(TypeError):
        pack({"code": print})
