"""Baseline and replay buffers: what is kept, when a flush is due, what it holds, exact state."""

from __future__ import annotations

import json
import math

import pytest
import torch

from spearrl.batching import Rows
from spearrl.buffers import BaselineBuffer, ReplayBuffer
from spearrl.errors import ConfigError, ContractError
from spearrl.run.checkpoint import load_state, save_state
from spearrl.types import Status
from tests.batching.test_rows import make_rows, same


def baseline(*values: float, stds: list[float] | None = None) -> BaselineBuffer:
    buffer = BaselineBuffer(100)
    buffer.add(1, list(values), stds)
    return buffer


def buffer(capacity: int = 4, **options) -> ReplayBuffer:
    return ReplayBuffer(capacity, **{"max_age": 5, "fill_factor": 1.0, **options})


def add(
    replay: ReplayBuffer,
    step: int,
    rewards: list[float],
    *,
    runs: list[list[int]] | None = None,
    advantages: list[float] | None = None,
) -> Rows:
    """One trajectory of one turn per reward, unless `runs` says otherwise; advantage = reward - 1."""
    rows = make_rows(runs or [[2]] * len(rewards), first_trajectory=1000 * step, seed=step)
    values = torch.tensor(rewards, dtype=torch.float64)
    turn_advantages = values - 1 if advantages is None else torch.tensor(advantages, dtype=torch.float64)
    replay.add(step, rows, values, turn_advantages, rows.pad(rows.rollout_logprobs) - 1)
    return rows


def drain(replay: ReplayBuffer, step: int, level: BaselineBuffer, seed: int = 0):
    return replay.drain(step, level, torch.Generator().manual_seed(seed))


def steps_of(history: BaselineBuffer) -> list[int]:
    return [entry["step"] for entry in history.state_dict()["entries"]]


def test_percentile():
    assert baseline(5, 0, 5, 2.5).percentile(50) == 3.75
    assert baseline(1, 2, 3, 4).percentile(25) == 1.75 and baseline(7).percentile(99) == 7
    assert baseline(1, 3, stds=[0.5, 1.5]).percentile(50, of="std") == 1.0
    assert math.isnan(BaselineBuffer(3).percentile()) and math.isnan(baseline(1, 2).percentile(of="std"))
    with pytest.raises(ConfigError, match="median"):
        baseline(1).percentile(50, of="median")


def test_whole_steps_leave_the_baseline_and_the_cap_may_be_passed_by_one():
    history = BaselineBuffer(4)
    for step in range(1, 5):
        history.add(step, [step, step, step])
    assert steps_of(history) == [3, 4] and len(history) == 6
    history.add(5, [])
    assert steps_of(history) == [4]


def test_baseline_refuses_nonsense():
    with pytest.raises(ConfigError):
        BaselineBuffer(0)
    with pytest.raises(ContractError, match="deviations"):
        BaselineBuffer(3).add(1, [1.0, 2.0], [1.0])
    with pytest.raises(ContractError, match="finite"):
        BaselineBuffer(3).add(1, [math.nan])


def test_only_positive_advantages_are_stored():
    replay = buffer()
    rows = add(replay, 1, [0, 1, 2, 10])
    assert len(replay) == 2 and replay.entries[0][1].uid.tolist() == rows.uid[2:].tolist()
    add(replay, 2, [0, 0])
    assert len(replay.entries) == 1


def test_a_trajectory_is_judged_by_its_mean_and_kept_whole():
    replay = buffer()
    add(replay, 1, [0.0, 4.0, 0.0, 1.5], runs=[[1, 2], [3, 1]])  # advantages -1, 3 and -1, 0.5
    assert len(replay) == 1
    batch = drain(replay, 2, baseline(1.0))
    assert batch.rows.trajectory.tolist() == [1000]
    assert batch.advantages.tolist() == [[0, 0, -1, 0, 0, 3, 3]]


def test_windowed_trajectories_keep_all_their_rows():
    rows = make_rows([[2], [3], [1], [1]])
    owner = torch.tensor([7, 7, 8, 8])
    rows = Rows(**{**{name: getattr(rows, name) for name in Rows.__dataclass_fields__}, "trajectory": owner})
    for unit, stored, indices in (("trajectory", 1, [0, 1]), ("row", 1, [1])):
        replay = buffer(unit=unit)
        rewards = torch.tensor([0.5, 4.0, 0.0, 0.0], dtype=torch.float64)
        replay.add(1, rows, rewards, rewards - 1, torch.zeros(4, rows.width))
        assert len(replay) == stored
        assert replay.entries[0][1].uid.tolist() == rows.uid[indices].tolist()


def test_faulty_and_fully_masked_trajectories_are_not_stored():
    rows = make_rows([[2], [2], [2]])
    rows.turns.status[0] = Status.ENV_ERROR.code
    rows = rows.mask_turns(torch.tensor([True, False, True]))
    replay = buffer()
    replay.add(1, rows, torch.ones(3), torch.ones(3), torch.zeros(3, rows.width))
    assert replay.entries[0][1].trajectory.tolist() == [2]


def test_a_flush_is_due_when_more_than_enough_beat_the_baseline():
    replay = buffer(2, fill_factor=1.5)
    add(replay, 1, [10, 10, 10, 2.5])
    assert len(replay) == 4 and replay.size(baseline(2.5)) == 3
    assert not replay.ready(baseline(2.5))  # 3 is not more than 3
    assert replay.ready(baseline(2.4)) and not replay.ready(baseline(20))
    assert replay.size(BaselineBuffer(3)) == 3  # while there is no history: above the mean of the entry, 8.125
    assert buffer(1, recalibration="decay").ready(baseline(0)) is False


def test_drain_recalibrates_filters_and_empties():
    replay = buffer(10)
    rows = add(replay, 3, [10, 2.5, 2, 7])
    batch = drain(replay, 4, baseline(2.5))
    assert batch.rows.uid.tolist() == rows.uid[[0, 3]].tolist()
    assert batch.advantages.tolist() == [[0, 0, 7.5, 7.5], [0, 0, 4.5, 4.5]] and batch.advantages.dtype == torch.float32
    assert torch.equal(batch.old_logprobs, rows.pad(rows.rollout_logprobs)[[0, 3]] - 1)
    assert torch.equal(batch.rollout_logprobs, rows.pad(rows.rollout_logprobs)[[0, 3]])
    assert batch.rows.policy_version[batch.rows.action_mask].tolist() == [3] * 4
    assert len(replay) == 0 and drain(replay, 4, baseline(2.5)) is None


def test_keep_zero():
    for keep, left in ((False, 1), (True, 2)):
        replay = buffer(10, keep_zero=keep)
        add(replay, 1, [10, 2.5])
        assert len(drain(replay, 2, baseline(2.5))) == left


def test_normalised_by_the_median_deviation():
    replay = buffer(10, normalize_std=True)
    add(replay, 1, [10.0])
    batch = drain(replay, 2, baseline(2.5, stds=[5.0]))
    assert float(batch.advantages.max()) == pytest.approx(7.5 / (5 + 1e-6), rel=1e-6)
    add(replay, 3, [10.0])
    assert float(drain(replay, 4, baseline(2.5)).advantages.max()) == 7.5  # no deviations known


def test_decay_keeps_everything_that_was_stored():
    replay = buffer(10, recalibration="decay", decay=0.5)
    add(replay, 1, [2, 3], advantages=[4, 6])
    assert drain(replay, 9 - 4, baseline(100)).advantages.amax(1).tolist() == [2, 3]


def test_capacity_and_subsets():
    for subset, capacity, stored, drawn in (
        ("all", 3, 5, 3),
        ("all", 9, 5, 5),
        ("power_of_two", 9, 5, 4),
        ("power_of_two", 3, 5, 3),
        ("power_of_two", 9, 1, 0),
    ):
        replay = buffer(capacity, subset=subset)
        add(replay, 1, [10] * stored)
        batch = drain(replay, 2, baseline(0))
        assert (0 if batch is None else len(batch)) == drawn
        if batch is not None:
            assert batch.rows.trajectory.tolist() == sorted(batch.rows.trajectory.tolist())


def test_draws_follow_the_generator():
    drawn = []
    for seed in (0, 0, 1):
        replay = buffer(4)
        add(replay, 1, [10] * 20)
        drawn.append(drain(replay, 2, baseline(0), seed).rows.trajectory.tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_min_rows():
    replay = buffer(4, min_rows=3)
    add(replay, 1, [10, 10])
    assert drain(replay, 2, baseline(0)) is None and len(replay) == 0


def test_age_counts_from_the_current_step():
    replay = buffer(10, max_age=2, fill_factor=0.1)
    add(replay, 1, [10, 10])
    add(replay, 2, [10])
    assert replay.size(baseline(0)) == 3
    replay.add(3, make_rows([]), torch.zeros(0), torch.zeros(0), torch.zeros(0, 0))
    assert len(replay) == 3 and replay.size(baseline(0)) == 1  # step 1 will be too old at step 4
    assert len(drain(replay, 4, baseline(0))) == 1
    add(replay, 5, [10])
    assert drain(replay, 8, baseline(0)) is None


def test_age_counts_from_the_newest_entry():
    replay = buffer(10, max_age=2, age_reference="newest")
    for step in (1, 2, 4, 5):
        add(replay, step, [10])
    assert [step for step, _ in replay.entries] == [2, 4, 5]  # at step 5 the newest stored was 4
    assert len(drain(replay, 50, baseline(0))) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"unit": "token"},
        {"subset": "half"},
        {"recalibration": "mean"},
        {"age_reference": "oldest"},
        {"min_rows": 0},
        {"max_age": -1},
        {"fill_factor": 0},
    ],
)
def test_settings_are_checked(options):
    with pytest.raises(ConfigError):
        buffer(**options)


def test_shapes_are_checked():
    rows = make_rows([[2], [2]])
    with pytest.raises(ContractError, match="rewards"):
        buffer().add(1, rows, torch.ones(3), torch.ones(2), torch.zeros(2, rows.width))
    with pytest.raises(ContractError, match="expected"):
        buffer().add(1, rows, torch.ones(2), torch.ones(2), torch.zeros(2, rows.width + 1))


def test_state_round_trip(tmp_path):
    replay, history = buffer(3), BaselineBuffer(5)
    for step in (1, 2):
        add(replay, step, [10, 3, 0, 8], runs=[[1, 2], [3, 1]])
        history.add(step, [0.1 * step, 3.0], [1.0, 2.0])
    save_state(tmp_path, "state", {"replay": replay.state_dict(), "baseline": history.state_dict()})
    json.loads((tmp_path / "state.json").read_text())
    state = load_state(tmp_path, "state")
    again, past = buffer(3), BaselineBuffer(5)
    again.load_state_dict(state["replay"])
    past.load_state_dict(state["baseline"])
    assert steps_of(past) == steps_of(history) and past.percentile(37, of="std") == history.percentile(37, of="std")
    assert [step for step, _ in again.entries] == [1, 2] and again.size(past) == replay.size(history)
    assert all(same(a, b) for (_, a), (_, b) in zip(again.entries, replay.entries, strict=True))
    one, two = drain(replay, 3, history), drain(again, 3, past)
    assert (
        same(one.rows, two.rows)
        and torch.equal(one.advantages, two.advantages)
        and torch.equal(one.old_logprobs, two.old_logprobs)
    )


def test_empty_state_round_trip(tmp_path):
    save_state(tmp_path, "state", {"replay": buffer().state_dict(), "baseline": BaselineBuffer(1).state_dict()})
    replay = buffer()
    replay.load_state_dict(load_state(tmp_path, "state")["replay"])
    assert len(replay) == 0
