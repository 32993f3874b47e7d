"""Beyond the paper, in real runs: credit under unreliable tools, token weights, curricula that follow the run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from spearrl.config.algo import ScheduleSection
from spearrl.losses import Objective
from spearrl.schedules import adaptive_progress
from tests.support.short_runs import (
    assert_sound,
    events,
    from_model,
    run,
    spy_on_updates,
    stopped_and_resumed,
    whole_fingerprint,
)
from tests.support.toy_envs import Fetch

# Unreliable tools


class Shaky(Fetch):
    """Fetch whose shelf shakes at every second task: it says so and goes on."""

    def step(self, action):
        outcome = super().step(action)
        if self._index % 2 == 0:
            outcome = replace(outcome, info={**outcome.info, "fault": "the shelf shook"})
        return outcome


def test_what_a_fault_touched_trains_but_is_not_remembered(model, tmp_path):
    recorded, stored = [], set()

    def prepare(trainer):
        recorded.append(spy_on_updates(trainer))
        add = trainer.memory.replay.add
        trainer.memory.replay.add = lambda step, rows, *rest, **options: (
            stored.update(rows.trajectory.tolist()) or add(step, rows, *rest, **options)
        )
        play = trainer.play
        trainer.play = lambda step: recorded.append(play(step)) or recorded[-1]

    trainer = run(
        from_model(
            model,
            tmp_path,
            "env.name=tests.algorithm.test_beyond:Shaky",
            "rollout.temperature=1",
            "run.steps=6",
            algo="grpo+sil",
        ),
        prepare,
    )
    assert_sound(trainer)
    played = {t.id: t for groups, _ in recorded[1:] for g in groups for t in g.trajectories}
    touched = {i for i, t in played.items() if t.faults}
    assert touched == {i for i, t in played.items() if int(t.task.data["index"]) % 2 == 0} and 0 < len(touched) < len(
        played
    )
    trained = {i for on_policy, _, _ in recorded[0] for i in on_policy.rows.trajectory.tolist()}
    assert touched <= trained
    assert stored == set(played) - touched
    replayed = {i for _, replay, _ in recorded[0] if replay is not None for i in replay.rows.trajectory.tolist()}
    assert replayed and not replayed & touched
    assert any(played[i].success for i in touched), "none of the refused had been good"
    assert [line["replay/refused"] for line in events(trainer, "step")] == [
        sum(t.faults > 0 for g in groups for t in g.trajectories) for groups, _ in recorded[1:]
    ]
    assert all(
        line["rollout/faults"] == line["replay/refused"] / sum(len(g.trajectories) for g in groups)
        for line, (groups, _) in zip(events(trainer, "step"), recorded[1:], strict=True)
    )


def test_a_task_must_be_won_twice_before_its_wins_are_imitated(model, tmp_path):
    """Wins count over the whole run, through a restart; a task's second win admits the first of the same step too."""
    settings = (
        "run.steps=6",
        "run.checkpoint_every=1",
        "algo.sil.min_wins=2",
        "algo.sil.capacity=1000",
        "rollout.group_size=2",
        "rollout.temperature=1",
    )
    whole = run(
        from_model(model, tmp_path, *settings, "env.options.tasks=6", algo="grpo+sil", name="whole"), keeper := Keeper()
    )
    wins: dict[str, int] = {}
    refused_wins = admitted_wins = 0
    for groups, admitted in keeper.steps:
        episodes = [t for g in groups for t in g.trajectories]
        for t in episodes:
            wins[t.task.id] = wins.get(t.task.id, 0) + t.success
        for t in episodes:
            assert (t.id in admitted) == (not t.success or wins[t.task.id] >= 2), (t.task.id, wins)
            refused_wins += t.success and t.id not in admitted
            admitted_wins += t.success and t.id in admitted
    assert refused_wins and admitted_wins
    resumed = stopped_and_resumed(
        from_model(model, tmp_path, *settings, "env.options.tasks=6", algo="grpo+sil", name="part"), after=2
    )
    assert resumed.memory.admission.state_dict() == whole.memory.admission.state_dict()
    assert sorted(t for _, r in resumed.memory.replay.entries for t in r.trajectory.tolist()) == sorted(
        t for _, r in whole.memory.replay.entries for t in r.trajectory.tolist()
    )
    assert whole_fingerprint(resumed) == whole_fingerprint(whole)


class Keeper:
    """Prepares a trainer to keep, for each step, its groups and the ids that were offered to the buffer."""

    def __init__(self):
        self.steps: list[tuple[list, set[int]]] = []

    def __call__(self, trainer):
        remember, add, offered = trainer.memory.remember, trainer.memory.replay.add, []

        def spy_add(step, rows, *rest, **options):
            offered.append(set(rows.trajectory.tolist()))
            return add(step, rows, *rest, **options)

        def spy(step, groups, *rest):
            remember(step, groups, *rest)
            self.steps.append((groups, offered[-1]))

        trainer.memory.remember, trainer.memory.replay.add = spy, spy_add


# Token weights


class Tokens:
    """One row of three tokens of probability 0.9, 0.5 and 0.1, the last outside the mask."""

    action_mask = torch.tensor([[True, True, False]])
    logprobs = torch.tensor([[0.9, 0.5, 0.1]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[2.0, 2.0, 2.0]], dtype=torch.float64)
    old_logprobs = logprobs.detach()
    ref_logprobs = rollout_logprobs = values = returns = None


WEIGHTS = {
    ("none", 1.0): (1.0, 1.0),
    ("confident", 1.0): (0.9, 0.5),
    ("confident", 2.0): (0.81, 0.25),
    ("unsure", 1.0): (0.1, 0.5),
    ("unsure", 0.5): (math.sqrt(0.1), math.sqrt(0.5)),
}


@pytest.mark.parametrize(("kind", "power"), WEIGHTS)
def test_token_weights_by_hand_and_without_a_gradient_of_their_own(kind, power):
    """At ratio 1 the loss is −mean(w A), its gradient −w A / 2: w is a constant, though made of the probability."""
    weights = WEIGHTS[kind, power]
    objective = Objective("sil", token_weight=kind, token_power=power)
    loss, metrics = objective.loss(Tokens, Tokens.logprobs, denominator=None)
    (gradient,) = torch.autograd.grad(loss, Tokens.logprobs)
    assert float(loss.detach()) == pytest.approx(-sum(weights), rel=1e-6)
    assert gradient.tolist()[0] == pytest.approx([-weights[0], -weights[1], 0.0], rel=1e-6)
    assert kind == "none" or metrics["token_weight"] == pytest.approx(sum(weights) / 2)


def test_a_certain_token_has_no_weight_where_the_unsure_ones_count():
    """p = 1 up to rounding above: no NaN of a negative base."""
    objective = Objective("sil", token_weight="unsure", token_power=0.5)

    class Certain(Tokens):
        logprobs = torch.tensor([[1e-7, 0.0, 0.0]], dtype=torch.float32)
        old_logprobs, advantages = torch.zeros(1, 3), torch.ones(1, 3)

    loss, metrics = objective.loss(Certain, Certain.logprobs, denominator=None)
    assert float(loss) == 0 and metrics["token_weight"] == 0


def test_token_weights_touch_replay_alone(model, tmp_path):
    runs = {
        w: run(from_model(model, tmp_path, f"algo.sil.token_weight={w}", algo="grpo+sil", name=w))
        for w in ("none", "confident", "unsure")
    }
    assert len({whole_fingerprint(t) for t in runs.values()}) == 3
    lines = {name: events(t, "step") for name, t in runs.items()}
    for name in ("confident", "unsure"):
        replaying = [e for e in lines[name] if e["replay/rows"] > 0]
        assert replaying and all(0 < e["sil/token_weight"] < 1 for e in replaying)
        assert not any("policy/token_weight" in e for e in lines[name])
        first = next(i for i, e in enumerate(lines[name]) if e["replay/rows"] > 0)
        same = [k for k in lines[name][0] if k.startswith(("policy/", "rollout/"))]
        assert all(lines[name][i][k] == lines["none"][i][k] for i in range(first) for k in same)


# Curricula that follow the run

BANDS = {"entropy": (0.2, 0.95), "success": (0.05, 0.6), "curiosity": (0.05, 0.5)}
LOGGED = {"entropy": "curriculum/entropy", "success": "curriculum/success", "curiosity": "curriculum/unseen"}


def adaptive_settings(gamma: str, mu: str) -> list[str]:
    words = [
        "run.steps=6",
        "run.seed=1",
        "run.checkpoint_every=1",
        "rollout.temperature=1",
        "learner.lr=3e-3",
        "algo.sil.gamma.smoothing=0.5",
        "algo.intrinsic.mu.smoothing=0.5",
        "algo.intrinsic.mu.peak=2",
    ]
    for name, kind in (("algo.sil.gamma", gamma), ("algo.intrinsic.mu", mu)):
        words += [f"{name}.kind={kind}", f"{name}.low={BANDS[kind][0]}", f"{name}.high={BANDS[kind][1]}"]
    return words


def assert_follows_its_log(lines: list[dict], gamma: str, mu: str) -> None:
    """γ and μ of a step are functions of what the same line logs; before there is anything, 0 and the peak."""
    assert (lines[0]["gamma"], lines[0]["mu"]) == (0, 2) and not [k for k in lines[0] if k.startswith("curriculum/")]
    for line in lines[1:]:
        done = {
            kind: adaptive_progress(kind, line[LOGGED[kind]], low=BANDS[kind][0], high=BANDS[kind][1])
            for kind in (gamma, mu)
        }
        assert line["gamma"] == done[gamma] and line["mu"] == 2 * (1 - done[mu])
    assert len({line["gamma"] for line in lines}) > 1 and len({line["mu"] for line in lines}) > 1, "they never moved"


@pytest.mark.parametrize(
    ("gamma", "mu"),
    [("entropy", "success"), ("success", "curiosity"), ("curiosity", "entropy"), ("success", "success")],
)
def test_gamma_and_mu_follow_what_their_line_logs(model, tmp_path, gamma, mu):
    settings = adaptive_settings(gamma, mu)
    whole = run(from_model(model, tmp_path, *settings, algo="grpo+spear", name="whole"))
    assert_sound(whole)
    lines = events(whole, "step")
    assert_follows_its_log(lines, gamma, mu)
    resumed = stopped_and_resumed(from_model(model, tmp_path, *settings, algo="grpo+spear", name="part"), after=3)
    again = events(resumed, "step")
    keys = ("gamma", "mu", *LOGGED.values())
    assert [[e.get(k) for k in keys] for e in again] == [[e.get(k) for k in keys] for e in lines]
    assert whole_fingerprint(resumed) == whole_fingerprint(whole)


def test_the_estimates_are_averages_of_what_the_steps_showed(model, tmp_path):
    """Success and entropy of the steps before, half old and half new; entropy is relative to the first."""
    lines = events(
        run(from_model(model, tmp_path, *adaptive_settings("success", "entropy"), algo="grpo+spear")), "step"
    )
    for logged, observed, scale in (
        ("curriculum/success", "rollout/success", 1.0),
        ("curriculum/entropy", "policy/entropy", lines[0]["policy/entropy"]),
    ):
        estimate = lines[0][observed] / scale
        for before, line in zip(lines[1:], lines[2:], strict=False):
            assert before[logged] == pytest.approx(estimate, rel=1e-9)
            estimate = 0.5 * estimate + 0.5 * before[observed] / scale
            assert line[logged] == pytest.approx(estimate, rel=1e-9)


def test_gamma_reaches_the_learner_and_mu_the_rewards(model, tmp_path):
    """The weight that is logged is the one that is used; at 0 nothing is drained from the buffer."""
    updates = []
    settings = adaptive_settings("success", "success")
    trainer = run(
        from_model(model, tmp_path, *settings, algo="grpo+spear"), lambda t: updates.append(spy_on_updates(t))
    )
    lines = events(trainer, "step")
    assert [gamma for _, _, gamma in updates[0]] == [line["gamma"] for line in lines]
    assert all(replay is None for _, replay, gamma in updates[0] if gamma == 0) and any(
        replay is not None for _, replay, _ in updates[0]
    )
    assert ScheduleSection().kind == "cosine", "all of this is off by default"
