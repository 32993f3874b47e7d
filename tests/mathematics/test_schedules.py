"""Schedules: hand values, the golden file, properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spearrl.errors import ContractError
from spearrl.schedules import ADAPTIVE, adaptive_progress, cosine_decay, cosine_warmup, schedule_value
from tests.support.shared_data import golden

HAND = [  # total, step, decay, warm-up
    (200, 1, 0.9999383163, 6.168376e-5),
    (200, 50, 0.8535533906, 0.1464466094),
    (200, 100, 0.5, 0.5),
    (200, 150, 0.1464466094, 0.8535533906),
    (200, 200, 0.0, 1.0),
    (200, 201, 0.0, 1.0),
    (100, 1, 0.9997532802, 0.0002467198),
]


@pytest.mark.parametrize(("total", "step", "decay", "warmup"), HAND)
def test_by_hand(total, step, decay, warmup):
    assert cosine_decay(step, total) == pytest.approx(decay, abs=1e-10)
    assert cosine_warmup(step, total) == pytest.approx(warmup, abs=1e-10)


def test_golden():
    for case in golden("schedules")["cases"]:
        assert cosine_decay(case["global_step"], case["T"]) == pytest.approx(case["mu_toolcall"], abs=1e-9)
        assert cosine_warmup(case["global_step"], case["T"]) == pytest.approx(case["gamma_replay"], abs=1e-9)


@given(st.integers(-5, 500), st.integers(1, 300), st.sampled_from(["cosine", "linear"]))
def test_rising_and_falling_mirror_each_other_and_are_monotonic(step, total, kind):
    up, down = schedule_value(kind, step, total, rising=True), schedule_value(kind, step, total, rising=False)
    assert up + down == pytest.approx(1.0) and 0 <= up <= 1
    assert schedule_value(kind, step + 1, total, rising=True) >= up
    assert (up == 0) if step <= 0 else (up == 1) if step >= total else (0 < up < 1)


def test_constant_and_errors():
    assert schedule_value("constant", 3, 10, rising=True) == schedule_value("constant", 3, 10, rising=False) == 1.0
    with pytest.raises(ContractError, match="cosine"):
        schedule_value("exponential", 1, 2, rising=True)
    with pytest.raises(ContractError, match="> 0"):
        cosine_decay(1, 0)


@pytest.mark.parametrize(
    ("kind", "value", "progress"),
    [  # band 0.2 .. 0.6
        ("success", 0.1, 0.0),
        ("success", 0.2, 0.0),
        ("success", 0.3, 0.25),
        ("success", 0.6, 1.0),
        ("success", 0.9, 1.0),
        ("entropy", 1.3, 0.0),
        ("entropy", 0.6, 0.0),
        ("entropy", 0.5, 0.25),
        ("entropy", 0.2, 1.0),
        ("entropy", 0.0, 1.0),
        ("curiosity", 1.0, 0.0),
        ("curiosity", 0.3, 0.75),
        ("curiosity", 0.0, 1.0),
        ("curiosity", math.inf, 0.0),
    ],
)
def test_adaptive_by_hand(kind, value, progress):
    assert adaptive_progress(kind, value, low=0.2, high=0.6) == pytest.approx(progress, abs=1e-12)


@given(st.sampled_from(ADAPTIVE), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.4), st.floats(0.5, 1))
def test_adaptive_stays_in_its_range_and_is_monotonic(kind, a, b, low, high):
    first, second = (adaptive_progress(kind, value, low=low, high=high) for value in (min(a, b), max(a, b)))
    assert 0 <= first <= 1 and 0 <= second <= 1
    assert first <= second if kind == "success" else first >= second


def test_adaptive_errors():
    with pytest.raises(ContractError, match="entropy, success, curiosity"):
        adaptive_progress("cosine", 0.5, low=0.2, high=0.8)
    for low, high in ((0.8, 0.2), (0.5, 0.5)):
        with pytest.raises(ContractError, match="low must be < high"):
            adaptive_progress("success", 0.5, low=low, high=high)
    with pytest.raises(ContractError, match="NaN"):
        adaptive_progress("entropy", math.nan, low=0.2, high=0.8)
