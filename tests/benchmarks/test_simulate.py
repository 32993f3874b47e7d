"""benchmarks/simulate.py against timelines worked out by hand."""

from __future__ import annotations

import itertools
import json

import pytest

from benchmarks.simulate import Asynchronous, Episode, Machine, Outcome, episodes_of, main, over_issued, quantile


def groups_of(*groups: tuple[float, ...]):
    """Groups in turn, for ever; an episode of n seconds has n tokens."""
    endless = itertools.cycle(groups)
    return lambda: [Episode(seconds, seconds) for seconds in next(endless)]


def test_a_synchronous_step():
    """Two sequences: 0-1 and 0-1, then 1-2 and 1-4; six tokens learn for 3 s, publishing takes 1 s."""
    draw, machine = groups_of((1, 1), (1, 3)), Machine(slots=2, train_s=0.5, sync_s=1.0)
    outcome = over_issued(draw, machine, gpus=1, groups=2, extra=0.0, steps=3)
    assert outcome == Outcome(4 + 3 + 1, 1 - 6 / 8, 1 / 4, 0.0, 0, 1.0)


def test_an_over_issued_step_ends_with_the_groups_it_needs_and_keeps_the_short_ones():
    draw, machine = groups_of((1, 1), (1, 3)), Machine(slots=2, train_s=0.5, sync_s=0.0)
    outcome = over_issued(draw, machine, gpus=1, groups=1, extra=1.0, steps=2)
    assert outcome == Outcome(1 + 1, 0.0, 0.0, 0.0, 0, pytest.approx(1.0 / 1.5))


def test_asynchronous_steps():
    """Episodes of 2 s on two sequences, updates of 1 s, one version ahead. From 6 s on two steps take 3 s: the learner
    works at 6-7, 8-9, 9-10, 11-12, episodes run at 6-8, 7-9, 9-11, 10-12."""
    machine = Machine(slots=2, train_s=0.5, sync_s=0.0)
    schedule = Asynchronous(groups_of((2,)), machine, engines=1, learners=1, groups=1, max_staleness=1)
    outcome = schedule.play(steps=4, warm_up=3)
    assert outcome == Outcome(1.5, pytest.approx(1 - 8 / 12), pytest.approx(1 / 3), 1.0, 1, 1.0)


def test_a_straggler_holds_back_only_the_step_that_is_its_last():
    """A group of 9 s among ones of 1 s: it is left behind until its age would exceed the limit."""
    draw, machine = groups_of((9,), (1,), (1,), (1,), (1,), (1,)), Machine(slots=4, train_s=1.0, sync_s=0.0)
    schedule = Asynchronous(draw, machine, engines=1, learners=1, groups=1, max_staleness=2)
    outcome = schedule.play(steps=6, warm_up=0)
    assert outcome.staleness_max == 2 and outcome.step_s < 9


def test_publishing_stops_generation():
    machine = Machine(slots=1, train_s=0.0, sync_s=3.0)
    schedule = Asynchronous(groups_of((2,)), machine, engines=1, learners=1, groups=1, max_staleness=1)
    assert schedule.play(steps=4, warm_up=2).step_s == 5.0


def test_episodes_come_from_a_run_or_from_quantiles(tmp_path):
    with pytest.raises(SystemExit, match="run.trajectories_every above 0"):
        episodes_of(tmp_path)
    (tmp_path / "trajectories").mkdir()
    lines = [{"turns": [{"tokens": 3}, {"tokens": 4}]}, {"turns": []}, {"turns": [{"tokens": 5}]}]
    (tmp_path / "trajectories" / "step-000001.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert episodes_of(tmp_path) == [(7, 2), (5, 1)]
    assert [quantile([(0, 10), (50, 20), (100, 60)], share) for share in (0, 0.25, 0.5, 0.75, 1)] == [
        10,
        15,
        20,
        40,
        60,
    ]


def test_the_table_is_the_same_for_the_same_seed(tmp_path, capsys):
    small = ["--gpus", "8", "--groups-per-gpu", "1", "--group-size", "2", "--steps", "2"]
    assert main([*small, "--json", str(tmp_path / "a.json")]) == main([*small, "--json", str(tmp_path / "b.json")]) == 0
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert main([*small, "--seed", "1", "--json", str(tmp_path / "c.json")]) == 0
    assert (tmp_path / "c.json").read_text() != (tmp_path / "a.json").read_text()
    rows = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == 4 + 3 * 3 and all(row["staleness_max"] <= 4 for row in rows)
    assert "8 GPUs: " in capsys.readouterr().out
