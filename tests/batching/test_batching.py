"""Groups → rows by the prefix rule; batches, denominators, mini- and micro-batches."""

from __future__ import annotations

import pytest
import torch

from spearrl.batching import Batch, Rows, denominator, forward_inputs, rows_from_groups
from spearrl.errors import ContractError
from spearrl.learner.minibatches import micro_batches, mini_batches
from spearrl.types import Action, Group, Image, Status, Task, Trajectory, Turn
from tests.batching.test_rows import make_rows

TASK = Task("task-0", "train")


def turn(prompt: tuple[int, ...], sampled: tuple[int, ...], **changes) -> Turn:
    fields = {
        "finish_reason": "stop",
        "reply": "",
        "observation": f"page {len(prompt)}",
        "anchor": None,
        "action": Action("go"),
    }
    logprobs = tuple(-0.5 - i for i in range(len(sampled)))
    return Turn(prompt, sampled, logprobs, **{**fields, **changes})


def chat(
    group: int, identity: int, turns: int, *, status: Status = Status.SUCCESS, prompt_tokens: int = 3, said: int = 2
) -> Trajectory:
    trajectory, ids = Trajectory(TASK, group, 0, identity, status=status), ()
    for number in range(turns):
        prompt = ids + tuple(100 * number + i for i in range(prompt_tokens))
        sampled = tuple(1000 + number for _ in range(said))
        trajectory.turns.append(turn(prompt, sampled, reward=float(number), min_version=number, max_version=number + 1))
        ids = prompt + sampled
    return trajectory


def test_an_append_only_chat_is_one_row():
    rows = rows_from_groups([Group(0, TASK, [chat(0, 7, 2)])])
    assert len(rows) == 1 and len(rows.turns) == 2
    assert rows.token_ids.tolist() == [0, 1, 2, 1000, 1000, 100, 101, 102, 1001, 1001]
    assert rows.action_mask.tolist() == [False] * 3 + [True] * 2 + [False] * 3 + [True] * 2
    assert rows.turn_index.tolist() == [-1] * 3 + [0] * 2 + [-1] * 3 + [1] * 2
    assert rows.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -1.5, 0, 0, 0, -0.5, -1.5]
    assert rows.policy_version.tolist() == [-1] * 3 + [0] * 2 + [-1] * 3 + [1] * 2
    assert rows.turns.rewards.tolist() == [0.0, 1.0] and rows.turns.row.tolist() == [0, 0]
    assert rows.uid.tolist() == [7 * 4096] and rows.turns.status.tolist() == [Status.SUCCESS.code] * 2


def test_a_prompt_that_does_not_extend_the_row_starts_a_new_one():
    turns = [
        turn((1, 2), (3,)),
        turn((1, 2, 3, 4), (5,)),
        turn((9, 9), (5,)),
        turn((9, 9, 5, 1), (2, 2)),
        turn((9, 9, 5), (8,)),
    ]
    rows = rows_from_groups([Group(4, TASK, [Trajectory(TASK, 4, 0, 2, turns)])])
    assert rows.lengths.tolist() == [5, 6, 4]
    assert rows.turns.row.tolist() == [0, 0, 1, 1, 2]
    assert rows.uid.tolist() == [2 * 4096, 2 * 4096 + 1, 2 * 4096 + 2]
    assert rows.group.tolist() == [4] * 3 and rows.trajectory.tolist() == [2] * 3


def test_only_sampled_tokens_are_action_tokens():
    groups = [Group(g, TASK, [chat(g, g * 2 + s, 1 + s, said=s + 1) for s in range(2)]) for g in range(3)]
    rows = rows_from_groups(groups)
    sampled = [token for g in groups for t in g.trajectories for u in t.turns for token in u.token_ids]
    assert rows.token_ids[rows.action_mask].tolist() == sampled
    assert not rows.action_mask[rows.offsets[:-1]].any()
    assert torch.equal(rows.turn_index >= 0, rows.action_mask)


def test_faulty_trajectories_and_empty_groups_are_left_out():
    rows = rows_from_groups(
        [Group(0, TASK, [chat(0, 0, 2, status=Status.ENV_ERROR), chat(0, 1, 1)]), Group(1, TASK, [])]
    )
    assert rows.trajectory.tolist() == [1]
    assert len(rows_from_groups([])) == 0


def test_invalid_actions_anchors_and_images():
    one, two = Image(b"one"), Image(b"two")
    turns = [
        turn((1,), (2,), action=Action("?", valid=False, tool_calls=3), images=(one,)),
        turn((1, 2, 3), (4,), images=(one, two), anchor=("state", 1)),
        turn((5,), (4,), observation="page 1"),
    ]
    rows = rows_from_groups([Group(0, TASK, [Trajectory(TASK, 0, 0, 0, turns)])])
    assert rows.turns.penalties.tolist() == [1.0, 0.0, 0.0] and rows.turns.tool_calls.tolist() == [3, 0, 0]
    assert rows.images == ((one.digest, two.digest), ())
    assert rows.turns.anchor_ids[0] == rows.turns.anchor_ids[2] != rows.turns.anchor_ids[1]


@pytest.mark.parametrize("bad", [turn((), (1,)), Turn((1,), (2, 3), (0.0,), "stop", "", "", None, Action(""))])
def test_broken_turns_are_refused(bad):
    with pytest.raises(ContractError, match="trajectory 5, turn 0"):
        rows_from_groups([Group(0, TASK, [Trajectory(TASK, 0, 0, 5, [bad])])])


def test_batch_selects_all_its_tensors():
    rows = make_rows([[1, 2], [3], [2, 2]])
    ones = torch.arange(3 * rows.width, dtype=torch.float32).view(3, rows.width)
    batch = Batch(rows, ones, ones + 1, values=ones + 2)
    part = batch.select(torch.tensor([1]))
    assert part.advantages.tolist() == ones[1:2, :5].tolist() and part.values.tolist() == (ones + 2)[1:2, :5].tolist()
    assert part.ref_logprobs is None and len(part) == 1 and torch.equal(part.action_mask, rows.padded_mask[1:2, :5])
    with pytest.raises(ContractError, match="old_logprobs"):
        Batch(rows, ones, ones[:2])


def test_denominators():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert denominator(mask, "token-mean", 10) == 3
    assert denominator(mask, "seq-mean-token-sum", 10) == 2 == denominator(mask, "seq-mean-token-mean", 10)
    assert denominator(mask, "seq-mean-token-sum-norm", 10) == 20
    assert denominator(torch.zeros(0, 0, dtype=torch.bool), "token-mean", 10) == 1
    with pytest.raises(ContractError, match="mean-mean"):
        denominator(mask, "mean-mean", 10)


def test_mini_batches_partition_by_key():
    keys = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    parts = mini_batches(keys, 3)
    assert sorted(torch.cat(parts).tolist()) == list(range(11)) and [len(p) for p in parts] == [3, 4, 4]
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    for part, again in zip(parts, mini_batches(keys[order], 3), strict=True):
        assert sorted(part.tolist()) == sorted(order[again].tolist())
    assert len(mini_batches(keys[:2], 5)) == 2 and mini_batches(keys[:0], 2) == []


def test_micro_batches_respect_the_budget():
    lengths = torch.tensor([3, 9, 4, 4, 100, 2, 9])
    parts = micro_batches(lengths, 18)
    assert sorted(torch.cat(parts).tolist()) == list(range(7))
    for part in parts:
        assert len(part) == 1 or len(part) * int(lengths[part].max()) <= 18
    assert parts[0].tolist() == [4] and micro_batches(lengths[:0], 10) == []
    assert len(micro_batches(lengths, 10**6)) == 1


def test_the_shift():
    rows = make_rows([[1, 2], [3]])
    inputs = forward_inputs(rows)
    padded = rows.pad(rows.token_ids)
    assert inputs.token_ids.shape == (2, 6)  # the last token predicts nothing
    previous = padded[:, :6].flatten()[inputs.source]
    expected = [padded[b, t - 1] for b in range(2) for t in range(7) if rows.padded_mask[b, t]]
    assert previous.tolist() == expected
    assert inputs.target.tolist() == padded.flatten()[inputs.padded].tolist() == padded[rows.padded_mask].tolist()
    silent = forward_inputs(rows.with_action_mask(torch.zeros_like(rows.action_mask)))
    assert len(silent.target) == 0 and silent.token_ids.shape == (2, 1)
    assert len(Rows.concat([])) == 0
