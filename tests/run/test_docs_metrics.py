"""docs/metrics.md names every number a step reports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spearrl import Trainer
from tests.support.small_run import small_config

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
def test_every_metric_is_documented(tmp_path, algo):
    trainer = Trainer(
        small_config(tmp_path, "run.steps=5", "eval.every=0", "rollout.temperature=1.2", *RUNS[algo], algo=algo)
    )
    trainer.train()
    trainer.close()
    entries = re.findall(r"^- (`.*?`):", PAGE.read_text(), re.MULTILINE)
    names = re.findall(r"`([^`]+)`", "".join(entries))
    lines = [json.loads(line) for line in (trainer.run.path / "events.jsonl").read_text().splitlines()]
    keys = {key for line in lines if line["event"] == "step" for key in line} - {"event", "step", "steps", "time"}
    assert any(line.get("replay/rows") for line in lines) or algo == "ppo"
    unknown = sorted(key for key in keys if not documented(key, names))
    assert not unknown, unknown
