"""Rows: padding, selection, joining, saving, and the anchors' ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spearrl.batching import Rows, TurnTable, anchor_id
from spearrl.batching.anchors import canonical
from spearrl.errors import ContractError
from tests.support.shared_data import golden


def make_rows(lengths: list[list[int]], *, first_trajectory: int = 0, seed: int = 0) -> Rows:
    """Rows of alternating observation (2 tokens) and action runs: `lengths[b]` lists the action runs, one turn each."""
    draw = torch.Generator().manual_seed(seed)
    mask, turn_index, offsets, row_of_turn = [], [], [0], []
    for b, runs in enumerate(lengths):
        for run in runs:
            mask += [False] * 2 + [True] * run
            turn_index += [-1] * 2 + [len(row_of_turn)] * run
            row_of_turn.append(b)
        offsets.append(len(mask))
    size, count, turns = len(mask), len(lengths), len(row_of_turn)
    action_mask, row = torch.tensor(mask, dtype=torch.bool), torch.tensor(row_of_turn, dtype=torch.int64)
    trajectory = torch.arange(count) + first_trajectory
    table = TurnTable(
        group_ids=trajectory[row] // 2,
        trajectory_ids=trajectory[row],
        anchor_ids=torch.randint(0, 1000, (turns,), generator=draw),
        rewards=torch.rand(turns, generator=draw, dtype=torch.float64),
        penalties=torch.zeros(turns, dtype=torch.float64),
        tool_calls=torch.ones(turns, dtype=torch.int64),
        status=torch.zeros(turns, dtype=torch.int64),
        row=row,
    )
    return Rows(
        token_ids=torch.randint(0, 50, (size,), generator=draw),
        action_mask=action_mask,
        turn_index=torch.tensor(turn_index, dtype=torch.int64),
        rollout_logprobs=torch.where(action_mask, -torch.rand(size, generator=draw), 0.0),
        policy_version=torch.where(action_mask, 3, -1),
        offsets=torch.tensor(offsets),
        group=trajectory // 2,
        trajectory=trajectory,
        uid=trajectory * 4096,
        turns=table,
        images=tuple((f"picture-{i}",) for i in trajectory.tolist()),
    )


def same(a: Rows, b: Rows) -> bool:
    one, two = a.state_dict(), b.state_dict()
    turns = [torch.equal(one["turns"][k], two["turns"][k]) for k in one["turns"]]
    return (
        all(torch.equal(one[k], two[k]) for k in one if isinstance(one[k], torch.Tensor))
        and all(turns)
        and one["images"] == two["images"]
    )


def test_pad_and_unpad_are_inverse():
    rows = make_rows([[1, 2], [3], [1, 1, 1]])
    padded = rows.pad(rows.token_ids, -7)
    assert padded.shape == (3, 9) == (len(rows), rows.width)
    assert torch.equal(rows.unpad(padded), rows.token_ids)
    for b in range(3):
        length = int(rows.lengths[b])
        assert padded[b, :length].tolist() == rows.token_ids[rows.offsets[b] : rows.offsets[b + 1]].tolist()
        assert (padded[b, length:] == -7).all()


def test_pad_carries_gradients():
    rows = make_rows([[1, 2], [3]])
    flat = torch.rand(len(rows.token_ids), requires_grad=True)
    rows.pad(flat).sum().backward()
    assert torch.equal(flat.grad, torch.ones_like(flat))


def test_scatter_gives_each_action_token_its_turn():
    rows = make_rows([[1, 2], [3]])
    values = torch.tensor([10.0, 20.0, 30.0])
    assert rows.scatter(values).tolist() == [[0, 0, 10, 0, 0, 20, 20], [0, 0, 30, 30, 30, 0, 0]]
    assert torch.equal(rows.padded_mask, rows.scatter(values) != 0)


def test_masked_turns_leave_the_loss_and_stay_in_the_table():
    rows = make_rows([[1, 2], [3]])
    masked = rows.mask_turns(torch.tensor([True, False, True]))
    assert masked.scatter(torch.ones(3)).sum(1).tolist() == [1, 3]
    assert len(masked.turns) == 3
    assert masked.trained_turns().tolist() == [True, False, True]
    assert torch.equal(masked.turn_index, rows.turn_index)


def test_an_action_mask_of_ones_own():
    rows = make_rows([[1, 2]])
    everything = torch.ones(len(rows.token_ids), dtype=torch.bool)
    everything[0] = False
    wide = rows.with_action_mask(everything)
    assert wide.padded_mask.sum() == 6
    assert wide.scatter(torch.tensor([5.0, 6.0])).tolist() == [[0, 0, 5, 0, 0, 6, 6]]
    assert wide.mask_turns(torch.tensor([True, False])).padded_mask.tolist() == [
        [False, True, True, True, True, False, False]
    ]


@pytest.mark.parametrize("chosen", [[2, 0], [1], [], [0, 1, 2, 3]])
def test_select(chosen):
    rows = make_rows([[1, 2], [3], [2, 2], [4]])
    part = rows.select(torch.tensor(chosen, dtype=torch.int64))
    assert part.trajectory.tolist() == chosen and part.images == tuple(rows.images[i] for i in chosen)
    padded, values = rows.scatter(rows.turns.rewards), part.scatter(part.turns.rewards)
    assert torch.equal(values, padded[torch.tensor(chosen, dtype=torch.int64)][:, : part.width])
    assert torch.equal(part.turns.rewards, rows.turns.rewards[rows.turns_of(torch.tensor(chosen, dtype=torch.int64))])
    assert part.trajectory[part.turns.row].tolist() == part.turns.trajectory_ids.tolist()


def test_select_by_mask_equals_select_by_index():
    rows = make_rows([[1], [2], [3]])
    assert same(rows.select(torch.tensor([True, False, True])), rows.select([0, 2]))


def test_selecting_a_row_twice_is_refused():
    with pytest.raises(ContractError, match="twice"):
        make_rows([[1], [2]]).select([0, 0])


def test_concat_undoes_select():
    rows = make_rows([[1, 2], [3], [2, 2]])
    assert same(Rows.concat([rows.select([0]), rows.select([1, 2])]), rows)
    assert len(Rows.concat([])) == 0 and Rows.concat([]).width == 0
    assert same(Rows.concat([Rows.concat([]), rows]), rows)


def test_save_and_load(tmp_path):
    rows = make_rows([[1, 2], [3], [2, 2]])
    rows.save(tmp_path / "rows.safetensors")
    assert same(Rows.load(tmp_path / "rows.safetensors"), rows)
    nothing = rows.select([])
    nothing.save(tmp_path / "nothing.safetensors")
    assert same(Rows.load(tmp_path / "nothing.safetensors"), nothing)


def test_loading_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ContractError, match="format"):
        Rows.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_ids", torch.zeros(3, dtype=torch.int64)),
        ("action_mask", torch.zeros(7)),
        ("offsets", torch.tensor([0, 8])),
        ("turn_index", torch.full((7,), 9)),
        ("uid", torch.zeros(2, dtype=torch.int64)),
        ("action_mask", torch.ones(7, dtype=torch.bool)),
        ("images", ((), ())),
    ],
)
def test_malformed_rows_are_refused(name, value):
    state = make_rows([[1, 2]]).__dict__
    fields = {key: state[key] for key in Rows.__dataclass_fields__}
    with pytest.raises(ContractError):
        Rows(**{**fields, name: value})


def test_anchor_labels_as_the_reference():
    array = np.array  # the file writes arrays as Python expressions
    for case in golden("anchor_hash_agent")["cases"]:
        ids = [anchor_id(eval(text, {"array": array})) for text in case["anchor_obs"]]
        distinct: list[int] = []
        labels = [distinct.index(i) if i in distinct else (distinct.append(i) or len(distinct) - 1) for i in ids]
        assert labels == case["labels"], case["name"]


def test_anchor_ids_are_stable_and_positive():
    assert anchor_id("a page") == anchor_id("a page") != anchor_id("a page ")
    assert 0 <= anchor_id("a page") < 2**63
    assert canonical({"b": 1, "a": [True, 2.5]}) == (("a", (1, 2.5)), ("b", 1))
    assert anchor_id(("ab", "c")) != anchor_id(("a", "bc"))
    assert anchor_id(torch.tensor([[1, 2]])) == anchor_id([1, 2]) == anchor_id(np.array([1.0, 2.0]))
    assert anchor_id("1") != anchor_id(1)


def test_anchors_of_other_types_are_refused():
    with pytest.raises(ContractError, match="set"):
        anchor_id({1, 2})
