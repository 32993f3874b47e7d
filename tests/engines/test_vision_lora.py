"""Adapters in a vision model: in its language model only, whose names the vision tower shares."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")

from spearrl.batching import Batch
from spearrl.config.sections import LearnerSection, LoraSection
from spearrl.learner import LocalLearner
from spearrl.losses import Objective
from spearrl.rollout import ChatEncoder
from tests.models.test_vision import SETTINGS, engine_of, played, rows_of
from tests.support.vision_models import vision_model


def test_adapters_leave_the_vision_tower_alone(tmp_path):
    model, tokenizer = vision_model()
    rows = rows_of(played(engine_of(model), ChatEncoder(tokenizer), *range(3)))
    old = LocalLearner(model, LearnerSection(**SETTINGS)).logprobs(rows)
    learner = LocalLearner(
        model, LearnerSection(**{**SETTINGS, "mini_batches": 1, "lora": LoraSection(rank=4)}), seed=1
    )
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all("language_model" in name for name in names) and any("gate_proj" in name for name in names)
    assert torch.equal(learner.logprobs(rows), old)
    advantages = torch.where(rows.padded_mask, torch.linspace(-1, 1, len(rows))[:, None].expand_as(old), 0.0)
    for seed in range(3):
        learner.update(Batch(rows, advantages, old), None, gamma=0.0, objectives=[Objective("policy")], seed=seed)
    trained = learner.logprobs(rows)
    assert not torch.equal(trained, old) and torch.equal(learner.logprobs(rows, reference=True), old)
    learner.export(tmp_path)  # adapters merged
    from spearrl.models import load_model

    torch.testing.assert_close(
        LocalLearner(load_model(str(tmp_path)), LearnerSection(**SETTINGS)).logprobs(rows), trained, atol=1e-4, rtol=0
    )
