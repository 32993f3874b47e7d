"""γ and μ over a run, by steps or by what the run showed: estimates by hand; a reloaded curriculum goes on exactly."""

from __future__ import annotations

import math
import random

import pytest
import torch

from spearrl.algorithm.curriculum import Curriculum
from spearrl.config.algo import ScheduleSection
from spearrl.errors import ContractError
from spearrl.run.checkpoint import load_state, save_state
from spearrl.schedules import cosine_decay, cosine_warmup

COSINE = ScheduleSection(kind="cosine", steps=10)


def adaptive(kind: str, smoothing: float = 0.0, **settings: float) -> ScheduleSection:
    return ScheduleSection.model_validate({"kind": kind, "smoothing": smoothing, "low": 0.2, "high": 0.8, **settings})


def show(curriculum: Curriculum, *, success=None, entropy=None, anchors=None) -> None:
    curriculum.observe(success=success, entropy=entropy, anchors=anchors)


def test_by_steps_nothing_observed_matters():
    curriculum = Curriculum(
        ScheduleSection(kind="cosine", steps=200, peak=0.5), ScheduleSection(kind="linear", steps=10, peak=2.0)
    )
    for step in (1, 4, 10, 300):
        show(curriculum, success=0.7, entropy=0.3, anchors=[step])
        assert curriculum.gamma(step) == 0.5 * cosine_warmup(step, 200)
        assert curriculum.mu(step) == pytest.approx(2.0 * (1 - min(step, 10) / 10))
    assert Curriculum(COSINE, COSINE).mu(3) == cosine_decay(3, 10)
    constant = ScheduleSection(kind="constant", peak=0.3)
    assert Curriculum(constant, constant).gamma(1) == Curriculum(constant, constant).mu(1) == 0.3
    assert curriculum.metrics() == {} and not len(curriculum.state_dict()["seen"])


@pytest.mark.parametrize("kind", ["entropy", "success", "curiosity"])
def test_before_anything_was_observed_gamma_is_0_and_mu_its_peak(kind):
    curriculum = Curriculum(adaptive(kind, peak=0.7), adaptive(kind, peak=0.4))
    show(curriculum, success=math.nan, entropy=math.inf, anchors=[])
    assert (curriculum.gamma(1), curriculum.mu(1), curriculum.metrics()) == (0.0, 0.4, {})


def test_success_by_hand():
    curriculum = Curriculum(adaptive("success", 0.75, peak=2.0), COSINE)
    show(curriculum, success=0.4)  # taken as it is: (0.4 − 0.2) / 0.6 = 1/3
    assert curriculum.gamma(2) == pytest.approx(2 / 3)
    show(curriculum, success=0.8)  # 0.75 · 0.4 + 0.25 · 0.8 = 0.5
    assert curriculum.metrics() == {"curriculum/success": pytest.approx(0.5)} and curriculum.gamma(3) == pytest.approx(
        1.0
    )
    for missing in (None, math.nan, math.inf):
        show(curriculum, success=missing)
    assert curriculum.metrics() == {"curriculum/success": pytest.approx(0.5)}
    show(curriculum, success=0.1)  # 0.75 · 0.5 + 0.25 · 0.1 = 0.4: γ goes back with it
    assert curriculum.gamma(4) == pytest.approx(2 / 3)


def test_entropy_is_relative_to_the_first_one():
    curriculum = Curriculum(adaptive("entropy"), adaptive("entropy", peak=0.5))
    show(curriculum, entropy=0.0)  # no start yet
    assert curriculum.metrics() == {}
    for entropy, relative, gone in (
        (1.5, 1.0, 0.0),
        (0.75, 0.5, 0.5),
        (0.3, 0.2, 1.0),
        (0.15, 0.1, 1.0),
        (0.0, 0.0, 1.0),
        (3.0, 2.0, 0.0),
    ):
        show(curriculum, entropy=entropy)
        assert curriculum.metrics() == {"curriculum/entropy": pytest.approx(relative)}
        assert curriculum.gamma(1) == pytest.approx(gone) and curriculum.mu(1) == pytest.approx(0.5 * (1 - gone))


def test_curiosity_is_the_share_of_states_never_seen():
    curriculum = Curriculum(COSINE, adaptive("curiosity"))
    for anchors, unseen, mu in (
        ([1, 2, 2, 2], 1.0, 1.0),
        ([1, 3], 0.5, 0.5),
        (torch.tensor([1, 2, 3, 3, 4]), 0.25, 1 / 12),
        (iter([4]), 0.0, 0.0),
    ):
        show(curriculum, anchors=anchors)
        assert curriculum.metrics() == {"curriculum/unseen": unseen} and curriculum.mu(2) == pytest.approx(mu)
    show(curriculum, anchors=None)
    assert curriculum.metrics() == {"curriculum/unseen": 0.0} and curriculum.state_dict()["seen"].tolist() == [
        1,
        2,
        3,
        4,
    ]


def test_two_schedules_keep_their_own_estimates():
    curriculum = Curriculum(adaptive("success", 0.5), adaptive("success", 0.0))
    show(curriculum, success=0.2)
    assert curriculum.metrics() == {"curriculum/success": 0.2, "curriculum/success_mu": 0.2}
    show(curriculum, success=0.8)
    assert curriculum.metrics() == pytest.approx({"curriculum/success": 0.5, "curriculum/success_mu": 0.8})
    assert curriculum.gamma(3) == pytest.approx(0.5) and curriculum.mu(3) == pytest.approx(0.0)
    mixed = Curriculum(adaptive("success"), adaptive("curiosity"))
    show(mixed, success=0.5, anchors=[1])
    assert mixed.metrics() == {"curriculum/success": 0.5, "curriculum/unseen": 1.0}


KINDS = [("entropy", "curiosity"), ("success", "success"), ("curiosity", "cosine"), ("linear", "entropy")]


@pytest.mark.parametrize(("gamma", "mu"), KINDS)
def test_a_reloaded_curriculum_goes_on_exactly(tmp_path, gamma, mu):
    draw = random.Random(1)
    series = [
        {
            "success": draw.random(),
            "entropy": draw.uniform(0.1, 2),
            "anchors": [draw.randrange(-40, 2**62, 2**57) for _ in range(9)],
        }
        for _ in range(12)
    ]

    def new() -> Curriculum:
        return Curriculum(adaptive(gamma, 0.8, peak=0.9), adaptive(mu, 0.3))

    def after(curriculum: Curriculum, steps: range) -> list[object]:
        shown: list[object] = []
        for step in steps:
            shown.append((curriculum.gamma(step), curriculum.mu(step)))
            show(curriculum, **series[step])
            shown.append(curriculum.metrics())
        return shown

    whole = new()
    expected = after(whole, range(12))
    assert len(set(map(str, expected))) > 12  # it moves
    for cut in (0, 1, 7):
        first, second = new(), new()
        after(first, range(cut))
        save_state(tmp_path, "curriculum", first.state_dict())
        second.load_state_dict(load_state(tmp_path, "curriculum"))
        assert after(second, range(cut, 12)) == expected[2 * cut :]
        assert torch.equal(second.state_dict()["seen"], whole.state_dict()["seen"])


def test_a_changed_kind_starts_without_an_estimate_but_knows_the_first_entropy():
    old = Curriculum(adaptive("success"), adaptive("success"))
    show(old, success=0.9, entropy=2.0)
    new = Curriculum(adaptive("entropy"), adaptive("success"))
    new.load_state_dict(old.state_dict())
    assert new.gamma(2) == 0.0 and new.mu(2) == 0.0 and new.metrics() == {"curriculum/success": 0.9}
    show(new, entropy=1.0)
    assert new.metrics() == {"curriculum/entropy": 0.5, "curriculum/success": 0.9}
    other = Curriculum(adaptive("success", 0.5), adaptive("success", 0.5))
    other.load_state_dict(new.state_dict())  # γ followed entropy there
    show(other, success=0.1)
    assert other.metrics() == pytest.approx({"curriculum/success": 0.1, "curriculum/success_mu": 0.5})


def test_an_empty_band_is_refused():
    with pytest.raises(ContractError, match="low must be < high"):
        Curriculum(COSINE, adaptive("success", low=0.5, high=0.5))
    Curriculum(ScheduleSection(kind="cosine", low=0.5, high=0.5), COSINE)  # step schedules do not use it
