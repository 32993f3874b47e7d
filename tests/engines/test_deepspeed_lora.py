"""Adapters and packing on two DeepSpeed ranks: the numbers of the local learner."""

from __future__ import annotations

import pytest
import torch

from spearrl.config.sections import LoraSection
from spearrl.errors import CheckpointError
from spearrl.learner import DeepSpeedLearner, LocalLearner
from spearrl.losses import ClipCov, Objective
from spearrl.models import load_model, save_weights
from tests.batching.test_prefix_tree import sharing_rows
from tests.learner.test_learner import RUNS, batch_of, settings, tiny

pytest.importorskip("deepspeed")
peft = pytest.importorskip("peft")

KINDS = [
    Objective("policy", clip_cov=ClipCov(0.2, -60.0, 60.0)),
    Objective("kl", weight=0.1),
    Objective("entropy", weight=0.01),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_weights(tiny(), folder)
    return folder


def options(**changes):
    return settings(
        **{"processes": 2, "lr": 0.01, "lora": LoraSection(rank=4, alpha=8.0), "micro_batch_tokens": 24, **changes}
    )


def batch(learner, seed: int = 0):
    batch = batch_of(sharing_rows(RUNS), learner, shift=0.2, seed=seed)
    batch.ref_logprobs = learner.logprobs(batch.rows, reference=True)
    return batch


def train(learner, data, steps: int = 3) -> None:
    for seed in range(steps):
        learner.update(data, None, gamma=0.0, objectives=KINDS, seed=seed)


@pytest.mark.parametrize(("stage", "packing"), [(3, "tree"), (2, "padded")])
def test_two_ranks_with_adapters_are_the_local_learner(base, tmp_path, stage, packing):
    rows = sharing_rows(RUNS)
    local = LocalLearner(load_model(str(base)), options(packing=packing), temperature=0.7, seed=7)
    data = batch(local)
    start, reference = local.logprobs(rows), data.ref_logprobs
    train(local, data)
    learner = DeepSpeedLearner(base, options(zero_stage=stage, packing=packing), temperature=0.7, seed=7)
    try:
        assert torch.allclose(learner.logprobs(rows), start, atol=1e-5)
        train(learner, data)
        assert torch.allclose(learner.logprobs(rows, reference=True), reference, atol=1e-5)
        assert torch.allclose(learner.logprobs(rows), local.logprobs(rows), atol=1e-3) and not torch.allclose(
            local.logprobs(rows), start, atol=1e-2
        )
        wanted, merged = dict(local.full_parameters()), dict(learner.full_parameters())
        assert set(merged) == set(wanted)
        assert all(torch.allclose(merged[name], wanted[name], atol=1e-4) for name in wanted)
        learner.save(tmp_path)
        logprobs = LocalLearner(load_model(str(tmp_path)), settings(), temperature=0.7).logprobs(rows)
        assert torch.allclose(logprobs, learner.logprobs(rows), atol=1e-5)
        train(learner, data, 1)
        after = dict(learner.adapter_parameters())
        learner.load(tmp_path)
        train(learner, data, 1)
        assert all(torch.equal(tensor, after[name]) for name, tensor in learner.adapter_parameters()), (
            "resumed is not what went on"
        )
    finally:
        learner.close()
    adapted = peft.PeftModel.from_pretrained(load_model(str(base)), tmp_path / "adapter").merge_and_unload()
    logprobs = LocalLearner(adapted.requires_grad_(True), settings(), temperature=0.7).logprobs(rows)
    assert torch.allclose(
        logprobs, LocalLearner(load_model(str(tmp_path)), settings(), temperature=0.7).logprobs(rows), atol=1e-5
    )
    wrong = DeepSpeedLearner(tmp_path, options(zero_stage=stage, processes=1), temperature=0.7)
    try:
        with pytest.raises(CheckpointError, match="trained on another model"):
            wrong.load(tmp_path)
    finally:
        wrong.close()
