"""Pictures on a DeepSpeed learner of two processes: the local learner's log-probabilities and gradient, also where a
rank's pass shows none.
"""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("deepspeed")

from spearrl.batching import Batch, Rows
from spearrl.config.sections import LearnerSection
from spearrl.learner import DeepSpeedLearner, LocalLearner
from spearrl.learner.deepspeed.ranks import Ranks
from spearrl.learner.deepspeed.shard import CommandRunner
from spearrl.learner.optimizer import make_optimizer
from spearrl.losses import Objective
from spearrl.models import load_model, save_model
from spearrl.rollout import ChatEncoder
from tests.models.test_vision import engine_of, played, rows_of
from tests.support.vision_models import vision_model

LIMIT_S = 120.0


@pytest.fixture(scope="module")
def ranks():
    held = Ranks(CommandRunner(), 2, device="cpu", timeout_s=LIMIT_S)
    yield held
    held.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    model, tokenizer = vision_model()
    folder = tmp_path_factory.mktemp("model")
    save_model(model, tokenizer, folder)
    return folder, rows_of(played(engine_of(model), ChatEncoder(tokenizer), *range(6)))


def batch_of(rows: Rows) -> Batch:
    old = rows.pad(rows.rollout_logprobs)
    return Batch(
        rows, torch.where(rows.padded_mask, torch.linspace(-1, 1, len(rows))[:, None].expand_as(old), 0.0), old
    )


def weights(learner) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for _, tensor in learner.full_parameters()])


@pytest.mark.parametrize("stage", [1, 3])
def test_the_local_learners_pass_and_gradient(ranks, scene, tmp_path, stage: int):
    folder, rows = scene
    # Every pass of a row or two: text rows share no pass with others, so at times one rank sees and the other does not.
    options = LearnerSection(
        lr=0.1,
        precision="fp32",
        mini_batches=1,
        grad_clip=1e9,
        micro_batch_tokens=70,
        backend="deepspeed",
        zero_stage=stage,
        timeout_s=LIMIT_S,
    )
    local = LocalLearner(load_model(str(folder)), options)
    local.optimizer = make_optimizer(local.model.named_parameters(), options, critic=None, kind="sgd")
    other = DeepSpeedLearner(folder, options, _optimizer="sgd", _ranks=ranks)
    torch.testing.assert_close(other.logprobs(rows), local.logprobs(rows), atol=1e-5, rtol=0)
    dealt = [rows.select(index).images for index in other._deal(rows)[0]]
    assert any(not images for part in dealt for images in part) and any(images for part in dealt for images in part)
    before = weights(local)
    for learner in (local, other):
        learner.update(batch_of(copy.deepcopy(rows)), None, gamma=0.0, objectives=[Objective("policy")], seed=1)
    wanted, moved = weights(local) - before, weights(other) - before
    assert float(wanted.norm()) > 0 and float((moved - wanted).norm()) <= 1e-4 * float(wanted.norm())
    other.export(tmp_path)
    again = load_model(str(tmp_path))
    assert again.vision is not None
    torch.testing.assert_close(LocalLearner(again, options).logprobs(rows), other.logprobs(rows), atol=1e-5, rtol=0)
