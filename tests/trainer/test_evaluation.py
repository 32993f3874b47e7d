"""Rates, intervals, panels."""

from __future__ import annotations

import json

import pytest

from spearrl.cli.main import main
from spearrl.config.sections import EvalSection, RunConfig
from spearrl.evaluation import panel_id, pass_rates, success_rate, summarise, wilson
from spearrl.trainer import Trainer
from spearrl.types import Group, Status, Task, Trajectory
from tests.support.small_run import small_config


def group(number: int, *statuses: Status, stratum: str = "s") -> Group:
    task = Task(f"t{number}", "val", {"stratum": stratum})
    return Group(
        number,
        task,
        [
            Trajectory(task, number, i, number * 10 + i, status=s, info={"score": float(i)})
            for i, s in enumerate(statuses)
        ],
    )


def test_wilson_by_hand():
    low, high = wilson(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert wilson(0.0, 10)[0] == 0.0 and wilson(1.0, 10)[1] == pytest.approx(1.0)


def test_faulty_episodes_are_in_no_rate():
    groups = [group(0, Status.SUCCESS), group(1, Status.FAILURE), group(2, Status.ENV_ERROR)]
    rate = success_rate(groups)
    assert rate.rate == 0.5 and rate.tasks == 2
    result = summarise(groups, EvalSection(tasks=3), "p")
    assert result.errors == 1 and result.statuses == {"success": 1, "failure": 1, "env_error": 1}


def test_attempts_are_averaged_within_a_task():
    rate = success_rate([group(0, Status.SUCCESS, Status.FAILURE), group(1, Status.SUCCESS, Status.SUCCESS)])
    assert rate.rate == 0.75 and rate.tasks == 2


def test_pass_at_k_is_unbiased():
    """By counting: of all ways to choose k of n attempts, those that hold a win."""
    from itertools import combinations

    wins = [[True, False, False, True, False, False], [False] * 6, [True] * 6]
    groups = [
        group(n, *(Status.SUCCESS if won else Status.FAILURE for won in outcomes)) for n, outcomes in enumerate(wins)
    ]
    rates = pass_rates(groups, 6)
    assert list(rates) == ["1", "2", "4", "6"]
    for k, rate in rates.items():
        ways = [[any(chosen) for chosen in combinations(outcomes, int(k))] for outcomes in wins]
        assert rate == pytest.approx(sum(sum(w) / len(w) for w in ways) / 3)
    assert pass_rates(groups[:1], 1) == {} and rates["1"] == pytest.approx(success_rate(groups).rate)
    short = Group(0, groups[0].task, groups[0].trajectories[:3])  # three attempts lost to faults: no pass@4
    assert list(pass_rates([short], 6)) == ["1", "2"]


def test_strata_are_reported_apart():
    result = summarise(
        [group(0, Status.SUCCESS, stratum="seen"), group(1, Status.FAILURE, stratum="unseen")], EvalSection(), "p"
    )
    assert result.strata["seen"].rate == 1.0 and result.strata["unseen"].rate == 0.0


def test_the_panel_hash_changes_with_what_defines_it():
    tasks = [Task("a", "val"), Task("b", "val")]
    changes = [
        {},
        {"eval": {"temperature": 1.0}},
        {"eval": {"seed": 1}},
        {"env": {"max_turns": 8}},
        {"env": {"options": {"seed": 1}}},
    ]
    ids = [panel_id(tasks, RunConfig.model_validate(change)) for change in changes]
    assert ids[0] == panel_id(tasks, RunConfig(run={"seed": 3}))
    assert len({*ids, panel_id(tasks[:1], RunConfig())}) == 6


def test_an_environments_measures_replace_no_number_of_ours(tmp_path, capsys):
    """In the event log of a run, its metrics, and what `spearrl eval` says."""
    settings = ("env.name=tests.support.hostile_envs:Boasting", "sft.enabled=false", "run.steps=1", "eval.tasks=3")
    with Trainer(small_config(tmp_path, *settings)) as trainer:
        trainer.train()
    logged = [json.loads(line) for line in (trainer.run.path / "events.jsonl").read_text().splitlines()]
    episodes = (trainer.run.path / "trajectories" / "eval-val-000001.jsonl").read_text().splitlines()
    paid = sum(json.loads(line)["reward"] for line in episodes) / len(episodes)
    evaluation = [event for event in logged if event["event"] == "eval"][-1]
    assert (evaluation["reward"], evaluation["step"], evaluation["tasks"], evaluation["errors"]) == (paid, 1, 3, 0)
    assert evaluation["turns"] <= 4 and evaluation["low"] <= 1 and evaluation["panel"] != "mine"
    assert evaluation["seconds"] >= 0 and evaluation["time"] != "then" and "rollout/reward" not in evaluation
    assert 0 < evaluation["env/reward"] <= 123 and evaluation["env/panel"] == "mine"
    (step,) = [event for event in logged if event["event"] == "step"]
    assert step["rollout/reward"] <= 10 < step["env/reward"] and step["step"] == 1
    assert main(["eval", str(trainer.run.path), settings[0], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["reward"] == paid and said["measures"]["env/reward"] == evaluation["env/reward"]
