"""A user's own loss and advantage by import path: used in training, or refused before anything starts."""

from __future__ import annotations

import pytest
import torch

from spearrl.errors import ConfigError, ContractError, NumericsError
from spearrl.learner.loss_inputs import Share
from spearrl.trainer import Trainer
from tests.support import user_functions as own
from tests.support.short_runs import (
    assert_sound,
    events,
    from_model,
    run,
    spy_on_updates,
    whole_fingerprint,
)


@pytest.fixture(autouse=True)
def no_calls():
    own.calls.clear()


@pytest.mark.parametrize("algo", ["grpo+sil+intrinsic", "gigpo+drbot+sil", "ppo"])
def test_an_own_loss_equal_to_the_clip_gives_the_same_bits(model, tmp_path, monkeypatch, algo):
    """With all rows in the passes: under an own loss none is known to have no gradient, so their rounding differs."""
    monkeypatch.setattr(Share, "signal", property(lambda share: torch.ones(len(share.batch), dtype=torch.bool)))
    built_in = run(from_model(model, tmp_path, algo=algo, name="built-in"))
    mine = run(from_model(model, tmp_path, "algo.loss=tests.support.user_functions:clip_again", algo=algo, name="mine"))
    assert_sound(mine)
    assert own.calls.count("clip_again") >= 6 + ("sil" in algo), "two on-policy updates a step, and replay"
    assert whole_fingerprint(mine) == whole_fingerprint(built_in)


def test_an_own_loss_trains(model, tmp_path):
    runs = [
        run(from_model(model, tmp_path, *c, algo="grpo+sil", name=n))
        for n, c in (("a", ()), ("b", ("algo.loss=tests.support.user_functions:cubed",)))
    ]
    assert_sound(runs[1])
    assert set(own.calls) == {"cubed"}, "it gets what it asks for, on-policy and on replay"
    assert all("policy/cubed" in e for e in events(runs[1], "step")) and any(
        "sil/cubed" in e for e in events(runs[1], "step")
    )
    assert whole_fingerprint(runs[0]) != whole_fingerprint(runs[1])


def test_an_own_advantage_trains(model, tmp_path):
    updates = []
    trainer = run(
        from_model(model, tmp_path, "algo.advantage=tests.support.user_functions:only_best", algo="grpo+sil"),
        lambda t: updates.append(spy_on_updates(t)),
    )
    assert_sound(trainer)
    assert own.calls == ["only_best"] * 3
    for on_policy, _, _ in updates[0]:
        turns, rows = on_policy.rows.turns, on_policy.rows
        for group in turns.group_ids.unique():
            inside = turns.group_ids == group
            assert inside.sum() >= 8
        best = on_policy.advantages[on_policy.action_mask]
        assert ((best - best.round()).abs() < 0.02).all() and best.max() > 0.9
        assert len(rows.trajectory.unique()) == 16


def test_both_in_one_run(model, tmp_path):
    run(
        from_model(
            model,
            tmp_path,
            "algo.advantage=tests.support.user_functions:only_best",
            "algo.loss=tests.support.user_functions:cubed",
            algo="grpo+tis",
        )
    )
    assert set(own.calls) == {"cubed", "only_best"}


REFUSED = {
    "algo.loss=tests.support.user_functions:no_keywords": "aggregation, horizon, denominator, drop",
    "algo.loss=tests.support.user_functions:other_order": "def other_order(logprobs, old_logprobs, advantages",
    "algo.loss=tests.support.user_functions:wants_more": "moon_phase",
    "algo.loss=tests.support.user_functions:nothing_here": "nothing_here",
    "algo.loss=tests.support.user_functions:NUMBER": "not a function",
    "algo.loss=no_such_module:f": "no_such_module",
    "algo.advantage=tests.support.user_functions:swapped": "def swapped(rewards, group_ids",
    "algo.advantage=tests.support.user_functions:wants_weather": "weather",
    "algo.advantage=tests.support.user_functions:missing": "missing",
    "algo.advantage=tests.support.user_functions:NUMBER": "not a function",
    "algo.loss=clap": "clap",
    "algo.advantage=ppo": "ppo",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_wrong_functions_are_refused_before_anything_starts(model, tmp_path, setting):
    """A clear error with the fix, and no run directory left behind."""
    with pytest.raises(ConfigError) as error:
        Trainer(from_model(model, tmp_path, setting))
    assert REFUSED[setting] in str(error.value) and setting.partition("=")[0] in str(error.value)
    assert not (tmp_path / "run").exists() and own.calls == []


WRONG = {
    "algo.loss=tests.support.user_functions:only_a_tensor": "returned Tensor",
    "algo.loss=tests.support.user_functions:a_vector": "scalar",
    "algo.advantage=tests.support.user_functions:too_short": "returned [",
    "algo.advantage=tests.support.user_functions:a_list": "returned list",
    "algo.advantage=tests.support.user_functions:undefined": "finite",
}


@pytest.mark.parametrize("setting", WRONG)
def test_wrong_results_are_caught(model, tmp_path, setting):
    with pytest.raises(ContractError) as error:
        run(from_model(model, tmp_path, setting))
    assert WRONG[setting] in str(error.value) and setting.partition("=")[0] in str(error.value)


def test_a_loss_that_is_not_finite_skips_its_updates(model, tmp_path):
    trainer = Trainer(from_model(model, tmp_path, "algo.loss=tests.support.user_functions:not_finite", "run.steps=1"))
    with trainer, pytest.raises(NumericsError):  # nothing was learnt in the whole run
        trainer.train()
    assert [(e["policy/updates"], e["policy/skipped"]) for e in events(trainer, "step")] == [(0, 2)]
    assert all(p.isfinite().all() for p in trainer.parts.model.parameters())
    assert "skipped_updates" in [e.get("flag") for e in events(trainer, "warning")]
