"""Families other than the default one in DeepSpeed (sharded, trained, saved, resumed) and in vLLM (synced)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("vllm")

from spearrl.config.sections import LearnerSection, RolloutSection, SyncSection, VllmSection  # noqa: E402
from spearrl.learner import DeepSpeedLearner, LocalLearner  # noqa: E402
from spearrl.learner.deepspeed.ranks import Ranks  # noqa: E402
from spearrl.learner.deepspeed.shard import CommandRunner  # noqa: E402
from spearrl.losses import Objective  # noqa: E402
from spearrl.models import load_model  # noqa: E402
from spearrl.rollout.vllm import VLLMEngine  # noqa: E402
from spearrl.sync import Bridge  # noqa: E402
from tests.batching.test_rows import make_rows  # noqa: E402
from tests.learner.test_learner import RUNS, batch_of  # noqa: E402
from tests.support.engine_requests import requests, serve  # noqa: E402
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


VLLM_FAMILIES = ["llama", "qwen2", "qwen3", "gemma3", "qwen3_moe"]
# The narrowest layers that vLLM takes on processors.
WIDE = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}


@pytest.mark.parametrize("name", VLLM_FAMILIES)
def test_vllm_samples_with_the_learners_weights(name: str, tmp_path):
    """Synced twice (vLLM packs some families' weights again at every sync), then replies longer than a window."""
    experts = {"qwen2_moe": {"shared_expert_intermediate_size": 32}}.get(name, {})
    more = {"moe_intermediate_size": 32, **experts} if "moe" in name else {}
    folder = family_directory(name, tmp_path / "model", **WIDE, **more)
    learner = LocalLearner(load_model(str(folder)), LearnerSection(precision="fp32"))
    rollout = RolloutSection(context_tokens=512, slots=16, cache_mib=64)
    engine = VLLMEngine(folder, VllmSection(), rollout, precision="fp32", threads=1)
    try:
        settings, ids = SyncSection(timeout_s=LIMIT_S, bucket_mib=1), list(range(6, 60))
        bridge = Bridge(learner, [engine.receiver], settings=settings, probe_ids=ids, run_folder=tmp_path / "run")
        for version in (1, 2):
            with torch.no_grad():
                for parameter in learner.model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            metrics = bridge.publish(version)
            assert metrics["sync/probe_gap"] <= 1e-4 and metrics["sync/resent"] == 0
        bridge.close()
        wanted = requests(4, max_tokens=24)
        for request, completion in zip(wanted, serve(engine, *wanted), strict=True):
            expected = learner.probe([*request.token_ids, *completion.token_ids])[-len(completion.token_ids) :]
            assert len(completion.token_ids) == 24 and completion.min_version == 2
            assert list(completion.logprobs) == pytest.approx(expected, abs=1e-4)
    finally:
        engine.close()
