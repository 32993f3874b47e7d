"""Every algorithm in the real trainer: it trains, it differs from others, a resumed run equals an uninterrupted one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache

import pytest
import torch

from spearrl.config.fidelity import COLUMNS
from spearrl.config.grammar import BASES
from spearrl.trainer import Trainer
from tests.support.short_runs import (
    assert_sound,
    change_logprobs,
    events,
    from_model,
    run,
    spy_on_updates,
    stopped_and_resumed,
    whole_fingerprint,
)
from tests.support.small_run import fingerprint

ALONE = tuple(BASES)
WITH_SPEAR = tuple(f"{base}+spear" for base in BASES)
WITH_DRBOT = tuple(f"{base}+drbot" for base in BASES if base != "gspo")  # its clip range is a sequence ratio's: refused
MIXED = (
    "gigpo+drbot+spear",
    "grpo+drbot+spear",
    "dapo+sil",
    "grpo+intrinsic",
    "grpo+clip_cov",
    "grpo+kl_cov",
    "grpo+kl_cov+sil",
    "cispo+spear+tis",
)
QUANTILES = (
    "algo.clip_cov.enabled=true",
    "algo.clip_cov.ratio=0.1",
    "algo.clip_cov.lower=quantile:0.5",
    "algo.clip_cov.upper=quantile:0.9",
)
REPORTED = {  # word of a name: what the steps of such a run report, and no others
    "ppo": "value/error",
    "dapo": "dynamic/rounds",
    "kl_cov": "policy/penalised_fraction",
    "tis": "policy/token_weight",
    "drbot": "filter/groups_dropped",
}
SETTINGS = {  # what no name stands for: settings, and what a step must then report
    "kl in the loss": (("algo.kl.loss_coef=0.5",), "kl/divergence"),
    "kl in the loss, k1": (("algo.kl.loss_coef=0.5", "algo.kl.estimator=k1"), "kl/divergence"),
    "kl in the reward": (("algo.kl.reward_coef=0.5",), "policy/loss"),
    "entropy bonus": (("algo.policy.entropy_coef=0.05",), "entropy/entropy"),
    "quantiles": (
        (
            "algo.clip_cov.enabled=true",
            "algo.clip_cov.ratio=0.1",
            "algo.clip_cov.lower=quantile:0.5",
            "algo.clip_cov.upper=quantile:0.9",
        ),
        "policy/loss",
    ),
    "token means": (("algo.policy.aggregation=seq-mean-token-mean",), "policy/loss"),
    "turn statistics": (("algo.groups.statistics=turn",), "policy/loss"),
}
CORRECTIONS = tuple((mode, level) for mode in ("tis", "mis") for level in ("token", "sequence"))


@pytest.fixture(scope="module")
def played(model, tmp_path_factory) -> Callable[..., Trainer]:
    """Runs of three steps by algorithm and settings, each played once."""
    folder = tmp_path_factory.mktemp("runs")
    numbers = iter(range(1000))

    @cache
    def play(algo: str, *changes: str, prepare: Callable[[Trainer], None] | None = None) -> Trainer:
        return run(from_model(model, folder, *changes, algo=algo, name=f"run-{next(numbers)}"), prepare)

    return play


@pytest.mark.parametrize("algo", (*ALONE, *WITH_SPEAR, *WITH_DRBOT, *MIXED))
def test_it_trains(played, model, algo):
    from spearrl.models import load_model

    trainer = played(algo)
    assert_sound(trainer)
    assert fingerprint(trainer.parts.model) != fingerprint(load_model(str(model)))
    steps, imitates = events(trainer, "step"), "sil" in algo or "spear" in algo
    assert any(e["replay/rows"] > 0 and e["gamma"] > 0 and "sil/loss" in e for e in steps) == imitates
    assert any(e["mu"] > 0 for e in steps) == ("spear" in algo or "intrinsic" in algo)
    for word, metric in REPORTED.items():
        assert all(metric in e for e in steps) == (word in algo), metric


def test_no_two_algorithms_are_the_same(played):
    algorithms = (*ALONE, *WITH_SPEAR, *WITH_DRBOT, *MIXED)
    prints: dict[str, list[str]] = {}
    for algo in algorithms:
        prints.setdefault(whole_fingerprint(played(algo)), []).append(algo)
    # What tells dr_grpo from grpo is a part of drbot.
    assert [same for same in prints.values() if len(same) > 1] == [["grpo+drbot", "dr_grpo+drbot"]]


def test_the_order_of_modules_does_not_matter(played):
    prints = {
        whole_fingerprint(played(algo))
        for algo in ("gigpo+drbot+spear", "gigpo+spear+drbot", "gigpo+clip_cov+intrinsic+drbot+sil")
    }
    assert len(prints) == 1


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_without_a_name(played, name):
    changes, metric = SETTINGS[name]
    trainer = played("grpo", *changes)
    assert_sound(trainer)
    assert all(metric in e for e in events(trainer, "step"))
    assert whole_fingerprint(trainer) != whole_fingerprint(played("grpo"))


def test_the_divergence_is_from_the_model_the_run_began_with(played):
    """0 in the first update's first mini-batch, then it grows; with a large weight the model stays near."""
    free, held = (
        played("grpo", f"algo.kl.loss_coef={weight}", "run.steps=8", "learner.mini_batches=1", "learner.lr=3e-4")
        for weight in (1e-9, 30.0)
    )
    far, near = ([e["kl/divergence"] for e in events(t, "step")] for t in (free, held))
    assert abs(far[0]) < 1e-9 and abs(near[0]) < 1e-9
    assert statistics.fmean(far) > 1e-3 and statistics.fmean(near) < statistics.fmean(far) / 3


def test_a_divergence_in_the_reward_costs_advantage(played):
    """Not in the first step, where policy and reference are one."""
    plain, charged = (played("grpo", *c) for c in ((), ("algo.kl.reward_coef=0.5",)))
    losses = [[e["policy/loss"] for e in events(t, "step")] for t in (plain, charged)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5) and losses[0][1] != losses[1][1]


def noisy(trainer: Trainer) -> None:
    """An engine whose log-probabilities are off by up to 0.9, alternating."""
    change_logprobs(
        trainer, lambda request, values: tuple(v + 0.3 * ((i + sum(request)) % 7 - 3) for i, v in enumerate(values))
    )


@pytest.mark.parametrize(("mode", "level"), CORRECTIONS)
def test_importance_weights_correct_for_another_engine(played, mode, level):
    settings = (f"algo.correction.mode={mode}", f"algo.correction.level={level}", "algo.correction.cap=1.5")
    plain, corrected = played("grpo+sil", prepare=noisy), played("grpo+sil", *settings, prepare=noisy)
    assert_sound(corrected)
    assert whole_fingerprint(corrected) != whole_fingerprint(plain)
    weights = [e["policy/token_weight"] for e in events(corrected, "step")]  # 0: a sequence rule may mask every row
    assert all(0 <= weight <= 1.5 for weight in weights) and any(weights)
    assert all(e["policy/sampler_gap"] > 0.1 for e in events(corrected, "step"))
    assert any("sil/token_weight" in e for e in events(corrected, "step"))


def test_all_corrections_differ(played):
    prints = {
        whole_fingerprint(
            played(
                "grpo+sil",
                f"algo.correction.mode={mode}",
                f"algo.correction.level={level}",
                "algo.correction.cap=1.5",
                prepare=noisy,
            )
        )
        for mode, level in CORRECTIONS
    }
    assert len(prints) == len(CORRECTIONS)


@pytest.mark.parametrize("algo", ["grpo+spear", "gigpo+drbot+spear", "ppo+sil"])
def test_a_joint_update_is_one_step_for_both(played, algo):
    apart, joint = played(algo), played(algo, "algo.sil.update=joint")
    assert_sound(joint)
    replaying = [e for e in events(joint, "step") if e["replay/rows"] > 0]
    assert replaying and all("sil/loss" in e and e["policy/updates"] == 2 for e in replaying)
    assert any(e["policy/updates"] == 3 for e in events(apart, "step"))
    assert whole_fingerprint(joint) != whole_fingerprint(apart)


@pytest.mark.parametrize("algo", ["grpo+spear", "gigpo+drbot+spear"])
def test_every_fidelity_trains_and_differs(played, algo):
    """Windowed, as the agent release plays; a few long replies, so that it matters what is taken for a row."""
    trainers = [
        played(algo, f"algo.fidelity={name}", "env.style=windowed", "rollout.max_reply_tokens=4", "run.steps=4")
        for name in COLUMNS
    ]
    for trainer in trainers:
        assert_sound(trainer)
        assert any(e["replay/rows"] > 0 for e in events(trainer, "step"))
    assert len({whole_fingerprint(t) for t in trainers}) == len(COLUMNS)


STATEFUL = {
    "ppo": ("ppo", "rollout.group_size=2"),
    "kl": ("grpo", "algo.kl.loss_coef=0.5"),
    "kl_in_reward": ("grpo+sil", "algo.kl.reward_coef=0.1"),
    "dapo": ("dapo+sil",),
    "adaptive": (
        "grpo+spear",
        "algo.sil.gamma.kind=success",
        "algo.intrinsic.mu.kind=entropy",
        "algo.intrinsic.mu.high=1.0",
        "algo.intrinsic.mu.low=0.0",
    ),
    "curious": ("grpo+spear", "algo.sil.gamma.kind=curiosity", "algo.intrinsic.mu.kind=success"),
    "min_wins": ("grpo+sil", "algo.sil.min_wins=2", "env.options.tasks=4"),
    "gigpo": ("gigpo+drbot+spear", "algo.fidelity=release_agent", "env.style=windowed"),
    "joint": ("cispo+spear", "algo.sil.update=joint", "algo.sil.token_weight=unsure"),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_resumed_run_equals_an_uninterrupted_one(model, tmp_path, name):
    """Weights, critic, buffers, curriculum, health and every logged number that is not a time."""
    algo, *changes = STATEFUL[name]
    whole, part = (
        from_model(model, tmp_path, "run.steps=5", "run.checkpoint_every=1", *changes, algo=algo, name=n)
        for n in ("whole", "part")
    )
    whole, resumed = run(whole), stopped_and_resumed(part, after=3)
    assert whole_fingerprint(resumed) == whole_fingerprint(whole)
    lines = [
        [{k: v for k, v in e.items() if "time" not in k and "seconds" not in k} for e in events(t, "step")]
        for t in (whole, resumed)
    ]
    assert lines[0] == lines[1]
    assert resumed.health.state_dict() == whole.health.state_dict()
    assert repr(resumed.curriculum.state_dict()) == repr(whole.curriculum.state_dict())
    assert repr(resumed.memory.state_dict()) == repr(whole.memory.state_dict())


def test_ppo_gets_values_of_its_own_critic_and_the_critic_learns(played):
    updates = []
    trainer = played(
        "ppo", "run.steps=20", "rollout.temperature=1", prepare=lambda t: updates.append(spy_on_updates(t))
    )
    batches = [on_policy for on_policy, _, _ in updates[0]]
    assert (batches[0].values == 0).all(), "a critic starts at 0"
    for batch in batches:
        mask = batch.action_mask
        assert (
            (batch.values[~mask] == 0).all()
            and (batch.returns[~mask] == 0).all()
            and (batch.advantages[~mask] == 0).all()
        )
        # With discount and λ of 1 a token's return is what its episode earned from its turn on, whatever the critic is.
        turns = batch.rows.turns
        earned = (turns.rewards - 0.1 * turns.penalties).tolist()
        ids = turns.trajectory_ids.tolist()
        returns = [
            sum(earned[later] for later in range(turn, len(ids)) if ids[later] == ids[turn]) for turn in range(len(ids))
        ]
        batch_returns = batch.rows.unpad(batch.returns)[batch.rows.action_mask].tolist()
        assert batch_returns == pytest.approx(
            [returns[turn] for turn in batch.rows.turn_index[batch.rows.action_mask].tolist()], abs=1e-5
        )
    late = [(batch.values[batch.action_mask], batch.returns[batch.action_mask]) for batch in batches[8:]]
    values, returns = (torch.cat(parts) for parts in zip(*late, strict=True))
    assert ((values - returns) ** 2).mean() < 0.8 * (returns**2).mean(), "the critic knows no more than at its start"
    assert all("value/error" in e for e in events(trainer, "step"))


def test_ppo_learns_the_toy(played):
    trainer = played("ppo", "run.steps=30", "rollout.temperature=1", "rollout.group_size=8", "run.checkpoint_every=0")
    curve = [e["rollout/success"] for e in events(trainer, "step")]
    assert sum(curve[:5]) / 5 <= 0.6 and sum(curve[-10:]) / 10 >= sum(curve[:5]) / 5 + 0.2, curve
