"""Schedules: hand values, the golden file, properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spearrl.errors import ContractError
from spearrl.schedules import cosine_decay, cosine_warmup, schedule_value
from tests.shared_data import golden

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
