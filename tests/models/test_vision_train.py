"""Training with pictures through the real trainer: cold start, success that rises, exact resume, and every learner's
pass.
"""

from __future__ import annotations

import json

import pytest
import torch

from spearrl.errors import ConfigError
from spearrl.trainer import Trainer
from tests.support.short_runs import events, resumed, run, stopped
from tests.support.small_run import fingerprint, small_config

SEES = (
    "env.name=tests.support.vision_models:Colours",
    "model.tiny.vision=true",
    "model.tiny.vocab_size=340",
    "sft.episodes=100",
    "sft.noise=0.6",
    "learner.lr=5e-4",
    "rollout.group_size=8",
    "env.options.tasks=12",
    "eval.every=100",
)


def test_success_rises_where_only_the_picture_tells(tmp_path):
    trainer = run(
        small_config(
            tmp_path, *SEES, "run.steps=16", "run.checkpoint_every=0", "sft.episodes=120", "env.style=windowed"
        )
    )
    first, last = events(trainer, "eval")
    assert first["success"] <= 0.7 and last["success"] >= 0.9, (first["success"], last["success"])
    assert last["pictures"] == 1.0


SHORT = (*SEES, "sft.episodes=64", "sft.epochs=2", "run.steps=4", "eval.tasks=4", "rollout.group_size=4")


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """In chat style, with replay: rows in the buffer keep their pictures over a checkpoint."""
    whole = run(small_config(tmp_path, *SHORT, name="whole"))
    part = stopped(small_config(tmp_path, *SHORT, name="part"), after=2)
    assert any(rows.pictures for _, rows in part.memory.replay.entries), (
        "nothing is in the buffer: the test would prove little"
    )
    parts = resumed(part).parts
    assert fingerprint(parts.model) == fingerprint(whole.parts.model)
    assert parts.model.vision is not None


def test_a_worker_plays_with_pictures_and_is_synced(tmp_path):
    """Weights, the vision tower's among them, go over the bridge; prompts and pictures come back with the episodes."""
    trainer = Trainer(small_config(tmp_path, *SHORT, "rollout.workers=1", "run.steps=2"))
    update, gaps = trainer.parts.learner.update, []

    def spy(on_policy, replay, **settings):
        result = update(on_policy, replay, **settings)
        mask = on_policy.action_mask & (on_policy.advantages != 0)
        gaps.append(float((result.old_logprobs - on_policy.rollout_logprobs)[mask].abs().max()))
        assert all(on_policy.rows.images)
        return result

    trainer.parts.learner.update = spy
    trainer.train()
    trainer.close()
    assert len(gaps) == 2 and max(gaps) < 1e-4


def test_a_model_that_reads_only_text_is_told_so(tmp_path):
    trainer = Trainer(
        small_config(
            tmp_path,
            *SHORT,
            "model.tiny.vision=false",
            "env.name=tests.support.toy_envs:Fetch",
            "env.options={}",
            "sft.enabled=false",
        )
    )
    trainer.close()
    with pytest.raises(ConfigError, match="shows pictures, which this model does not take"):
        Trainer(small_config(tmp_path, *SHORT, "model.tiny.vision=false", name="blind"))


def test_a_value_head_and_a_reference_see_too(tmp_path):
    trainer = run(small_config(tmp_path, *SHORT, "run.steps=1", "algo.kl.loss_coef=0.01", algo="ppo", name="ppo"))
    line = next(
        line
        for line in map(json.loads, (trainer.run.path / "events.jsonl").read_text().splitlines())
        if line["event"] == "step"
    )
    assert line["policy/skipped"] == 0 and all(
        torch.isfinite(torch.tensor(v)) for k, v in line.items() if k.startswith(("policy/", "value/"))
    )
