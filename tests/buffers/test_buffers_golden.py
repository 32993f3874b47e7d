"""The replay buffer against the reference's step-by-step simulations, row id by row id."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spearrl.batching import Rows, TurnTable
from spearrl.buffers import BaselineBuffer, ReplayBuffer
from tests.support.shared_data import golden

CASES = [
    "binary_p50",
    "binary_p50_small_baseline",
    "decay0.9",
    "rising_rewards_p50",
    "tolerance_evicts",
    "norm_std_p50",
    "weight_decay_above_1_means_p50",
]


def rows_of(batch: dict[str, Any]) -> Rows:
    """One prompt token and the response per row; one turn per row, whose group id is the row id of the simulation."""
    mask = torch.tensor(batch["mask"], dtype=torch.bool)
    count, width = mask.shape
    flat = torch.cat([torch.zeros(count, 1, dtype=torch.bool), mask], 1).flatten()
    ids, zeros = torch.tensor(batch["row_id"]), torch.zeros(count, dtype=torch.int64)
    names = sorted(set(batch["traj_uid"]))
    trajectory = torch.tensor([names.index(name) for name in batch["traj_uid"]])
    turn = torch.arange(count).repeat_interleave(width + 1)
    table = TurnTable(zeros, trajectory, zeros, zeros.double(), zeros.double(), zeros, zeros, torch.arange(count))
    return Rows(
        token_ids=torch.zeros(count * (width + 1), dtype=torch.int64),
        action_mask=flat,
        turn_index=torch.where(flat, turn, -1),
        rollout_logprobs=torch.zeros(count * (width + 1)),
        policy_version=torch.where(flat, 0, -1),
        offsets=torch.arange(count + 1) * (width + 1),
        group=zeros,
        trajectory=trajectory,
        uid=ids,
        turns=table,
    )


def make_buffers(case: dict[str, Any], tree: str) -> tuple[ReplayBuffer, BaselineBuffer]:
    decay = case["weight_decay"]
    replay = ReplayBuffer(
        case["buffer_size"],
        max_age=case["effective_tolerate"],
        recalibration="decay" if 0 < decay <= 1 else "median",
        decay=decay if 0 < decay <= 1 else 1.0,
        normalize_std=case["norm_adv_by_std"],
        keep_zero=tree == "agent",
        age_reference="newest",
        subset="power_of_two",
        unit="row",
    )
    return replay, BaselineBuffer(case["baseline_buffer_size"])


def check_flush(
    entry: dict[str, Any], replay: ReplayBuffer, baseline: BaselineBuffer, generator: torch.Generator
) -> None:
    if "flush" not in entry:  # the reference crashes here, after its draw; ours must go on
        batch = replay.drain(entry["step"], baseline, generator)
        assert batch is not None and (batch.advantages[batch.action_mask] >= 0).all()
        return
    flush = entry["flush"]
    assert [(step, rows.uid.tolist()) for step, rows in replay.entries] == [
        (e["step"], e["rows"]) for e in flush["before"]
    ]
    assert baseline.percentile(50) == pytest.approx(flush["p50_mean"], rel=1e-9)
    assert baseline.percentile(50, of="std") == pytest.approx(flush["p50_std"], rel=1e-9)
    batch = replay.drain(entry["step"], baseline, generator)
    assert batch is not None
    assert batch.rows.uid.tolist() == flush["selected_row_ids"]
    advantages = [float(a[m][0]) for a, m in zip(batch.advantages, batch.action_mask, strict=True)]
    assert advantages == pytest.approx(flush["selected_adv_per_row"], rel=1e-5)


def check_step(
    entry: dict[str, Any], replay: ReplayBuffer, baseline: BaselineBuffer, generator: torch.Generator
) -> None:
    assert replay.size(baseline) == entry["size_before"]
    assert replay.ready(baseline) == entry["full_before_update"]
    if entry["full_before_update"]:
        check_flush(entry, replay, baseline, generator)
        assert len(replay) == 0
    batch = entry["batch"]
    rows = rows_of(batch)
    rewards, advantages = (
        torch.tensor(batch["reward"]),
        torch.tensor(batch["adv"]).sum(1) / torch.tensor(batch["mask"]).sum(1).clamp(min=1),
    )
    if replay.keep_zero is False:  # the math tree stores only conversations with a tool call
        rows = rows.mask_turns(torch.tensor(batch["has_tool_call"]))
    replay.add(entry["step"], rows, rewards, advantages, torch.zeros(len(rows), rows.width))
    step, means = entry["baseline_history"][-1]
    assert step == entry["step"]
    baseline.add(step, means, entry["baseline_std_history"][-1][1])
    assert [(step, rows.uid.tolist()) for step, rows in replay.entries] == [
        (e["step"], e["rows"]) for e in entry["stored"]
    ]
    kept_before = [e["step"] for e in entry["stored"] if e["step"] != entry["step"]]
    assert kept_before == [s for s in entry["entries_after_remove_old"] if s != entry["step"]]
    assert [e["step"] for e in baseline.state_dict()["entries"]] == [step for step, _ in entry["baseline_history"]]
    assert replay.size(baseline) == entry["size_after"]


@pytest.mark.parametrize("tree", ["agent", "math"])
@pytest.mark.parametrize("name", CASES)
def test_simulation(tree, name):
    case = next(case for case in golden(f"replay_buffer_{tree}")["cases"] if case["name"] == name)
    replay, baseline = make_buffers(case, tree)
    generator = torch.Generator().manual_seed(case["seed"])  # the simulation seeds once and draws in order
    for entry in case["log"]:
        check_step(entry, replay, baseline, generator)


def test_the_cases_are_all_there():
    assert (
        [case["name"] for case in golden("replay_buffer_agent")["cases"]]
        == CASES
        == [c["name"] for c in golden("replay_buffer_math")["cases"]]
    )
