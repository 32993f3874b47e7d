"""Whole runs whose episodes are played by workers: in turns with the learner, and ahead of it."""

from __future__ import annotations

from spearrl.rollout.tasks_of_step import Episodes
from tests.support.short_runs import events, run, stopped_and_resumed
from tests.support.small_run import QUICK_START, fingerprint, small_config

WORKERS = (*QUICK_START, "rollout.workers=2", "run.threads=1", "learner.precision=fp32", "eval.every=0", "run.steps=4")


def test_two_runs_with_workers_are_the_same_run(tmp_path):
    first, second = (run(small_config(tmp_path, *WORKERS, algo="grpo+spear", name=name)) for name in ("one", "two"))
    assert fingerprint(first.parts.model) == fingerprint(second.parts.model)
    for step in events(first, "step"):
        assert step["policy/staleness_max"] == 0 and step["rollout/worker_deaths"] == 0
        assert step["policy/sampler_gap_max"] < 1e-4 and step["sync/probe_gap"] < 1e-4 and step["sync/bytes"] > 0


def test_a_run_ahead_stays_within_its_bound_and_resumes(tmp_path):
    config = small_config(tmp_path, *WORKERS, "rollout.max_staleness=2", "run.steps=6", algo="grpo+spear", name="ahead")
    assert config.algo.correction.mode == "tis"
    trainer = stopped_and_resumed(config, 3)
    steps = events(trainer, "step")
    ages = [step["policy/staleness_max"] for step in steps]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert max(ages) <= 2 and ages[0] == 0 and ages[2] >= 1, ages
    assert ages[3] == 0, "what was under way when the run stopped is played again with the weights of the resumed run"
    assert trainer.episodes.groups_played == 6 * config.rollout.groups_per_step
    folder = trainer.run.path / "trajectories"
    lines = [line for path in sorted(folder.glob("step-*.jsonl")) for line in path.read_text().splitlines()]
    assert len(lines) == 6 * config.rollout.groups_per_step * config.rollout.group_size


def test_a_run_ahead_goes_on_with_other_groups_per_step(tmp_path):
    """Groups that were begun are numbered by the old step size: the first resumed step begins its own."""

    class Nobody:
        submit = poll = None

    def episodes(*changes):
        return Episodes(small_config(tmp_path, *WORKERS, "rollout.max_staleness=2", *changes), Nobody(), [])

    state = {"groups_played": 24, "ahead": {"count": 8, "next": 24, "first_id": 0, "waiting": [9, 11]}}
    for groups, state_then in ((8, state["ahead"]), (4, {"count": 4, "next": 8, "first_id": 16, "waiting": []})):
        resumed = episodes(f"rollout.groups_per_step={groups}")
        resumed.load_state_dict(state, step=2)
        assert resumed.ahead.state_dict() == state_then
        assert resumed.groups_played == resumed.ahead.next_id == 24
