"""docs/metrics.md names every number a step reports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.short_runs import events, from_model, run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
RUNS = {
    "grpo+spear": (
        "algo.policy.entropy_coef=0.01",
        "algo.kl.loss_coef=0.01",
        "algo.correction.mode=tis",
        "algo.sil.token_weight=unsure",
        "algo.filters.group_keep=0.75",
    ),
    "ppo": ("algo.filters.overlong=true", "algo.dynamic.enabled=true", "algo.dynamic.rounds=2"),
    "grpo+sil+kl_cov": ("algo.sil.gamma.kind=success", "algo.sil.gamma.low=0.0", "algo.sil.gamma.high=0.1"),
}


def documented(key: str, names: list[str]) -> bool:
    return any(re.fullmatch(re.escape(name).replace("<name>", ".+").replace("…", ".+"), key) for name in names)


@pytest.mark.parametrize("algo", RUNS)
def test_every_metric_is_documented(model, tmp_path, algo):
    trainer = run(from_model(model, tmp_path, "run.steps=5", *RUNS[algo], algo=algo))
    entries = re.findall(r"^- (`.*?`):", PAGE.read_text(), re.MULTILINE)
    names = re.findall(r"`([^`]+)`", "".join(entries))
    lines = events(trainer, "step")
    keys = {key for line in lines for key in line} - {"event", "step", "steps", "time"}
    assert any(line.get("replay/rows") for line in lines) or algo == "ppo"
    unknown = sorted(key for key in keys if not documented(key, names))
    assert not unknown, unknown
