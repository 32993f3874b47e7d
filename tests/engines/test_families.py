"""Models of other families than the default one in DeepSpeed: sharded, trained, saved, resumed by any learner."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

from spearrl.config.sections import LearnerSection  # noqa: E402
from spearrl.learner import DeepSpeedLearner, LocalLearner  # noqa: E402
from spearrl.learner.deepspeed.ranks import Ranks  # noqa: E402
from spearrl.learner.deepspeed.shard import CommandRunner  # noqa: E402
from spearrl.losses import Objective  # noqa: E402
from spearrl.models import load_model  # noqa: E402
from tests.batching.test_rows import make_rows  # noqa: E402
from tests.learner.test_learner import RUNS, batch_of  # noqa: E402
from tests.support.families import FAMILIES, family_directory  # noqa: E402
from tests.support.gates import LIMIT_S  # noqa: E402

POLICY = [Objective("policy")]


@pytest.fixture(scope="module")
def ranks():
    held = Ranks(CommandRunner(), 2, device="cpu", timeout_s=LIMIT_S)
    yield held
    held.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_train_save_and_resume_as_one_process_does(ranks, name: str, tmp_path):
    folder, settings = (
        family_directory(name, tmp_path / "model"),
        LearnerSection(
            lr=1e-3, precision="fp32", mini_batches=1, lm_head_chunk=8, backend="deepspeed", timeout_s=LIMIT_S
        ),
    )
    local = LocalLearner(load_model(str(folder)), settings, temperature=0.7)
    sharded = DeepSpeedLearner(folder, settings, temperature=0.7, _ranks=ranks)
    batch = batch_of(make_rows(RUNS), local, shift=0.2)
    assert float((local.logprobs(batch.rows) - sharded.logprobs(batch.rows)).abs().max()) <= 1e-4
    for learner in (local, sharded):
        learner.update(batch, None, gamma=0.0, objectives=POLICY, seed=0)
    sharded.save(tmp_path / "saved")
    load_model(str(tmp_path / "saved"))  # complete, as transformers reads it
    assert gap(local, sharded) <= 2e-4
    again = DeepSpeedLearner(folder, settings, temperature=0.7, _ranks=ranks)
    again.load(tmp_path / "saved")
    local.load(tmp_path / "saved")
    assert gap(local, again) == 0
    for learner in (local, again):
        learner.update(batch, None, gamma=0.0, objectives=POLICY, seed=1)
    assert gap(local, again) <= 2e-4 and again.steps == 2


def gap(one, two) -> float:
    first, second = dict(one.full_parameters()), dict(two.full_parameters())
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)
