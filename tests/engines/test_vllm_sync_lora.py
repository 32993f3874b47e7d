"""Adapter-only sync to a real vLLM engine: only adapters travel, under a new id for each version."""

from __future__ import annotations

import asyncio

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("peft")

from spearrl.config.sections import LearnerSection, RolloutSection, SyncSection, VllmSection  # noqa: E402
from spearrl.errors import EngineError  # noqa: E402
from spearrl.learner import LocalLearner  # noqa: E402
from spearrl.models import load_model, save_weights  # noqa: E402
from spearrl.rollout.vllm import VLLMEngine  # noqa: E402
from spearrl.sync import Bridge  # noqa: E402
from tests.engines.test_vllm_sync import CONTEXT, LONG, gaps, request, small_model  # noqa: E402
from tests.support.engine_requests import all_begun  # noqa: E402
from tests.support.engine_requests import serve as sample  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_weights(small_model(), path)
    return path


@pytest.fixture(scope="module")
def learner(folder):
    return LocalLearner(load_model(str(folder)), LearnerSection(precision="fp32", lora={"rank": 4, "alpha": 8}))


@pytest.fixture(scope="module")
def engine(folder):
    rollout = RolloutSection(context_tokens=CONTEXT, slots=16, cache_mib=64)
    engine = VLLMEngine(folder, VllmSection(), rollout, precision="fp32", name="engine", threads=1, lora_rank=4)
    yield engine
    engine.close()


def train(learner, seed: int) -> None:
    """Stands for an update: adapters only."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, parameter in learner.adapter_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def test_adapters_travel_alone_and_requests_in_flight_keep_theirs(learner, engine, tmp_path):
    said = []
    settings = SyncSection(timeout_s=60)
    bridge = Bridge(
        learner,
        [engine.receiver],
        settings=settings,
        probe_ids=list(range(24)),
        run_folder=tmp_path,
        adapters=learner.export_adapter,
        report=said.append,
    )
    weights = sum(tensor.nbytes for _, tensor in learner.full_parameters())
    for version in (1, 2, 3):
        train(learner, version)
        metrics = bridge.publish(version)
        assert metrics["sync/probe_gap"] <= 1e-4 and metrics["sync/resent"] == 0 and not said
        assert metrics["sync/bytes"] == sum(tensor.nbytes for _, tensor in learner.adapter_parameters()) < weights / 2
        for number, completion in enumerate(sample(engine, request(0), request(1))):
            assert completion.min_version == completion.max_version == version
            assert float(gaps(learner.model, request(number), completion).max()) <= 1e-4

    async def play():
        tasks = [asyncio.create_task(engine.generate(request(number, LONG))) for number in range(3)]
        await all_begun(engine, 3)
        train(learner, 4)
        await asyncio.get_running_loop().run_in_executor(None, bridge.publish, 4)
        return await asyncio.gather(*tasks)

    old = {name: tensor.detach().clone() for name, tensor in learner.adapter_parameters()}
    completions = asyncio.run(play())
    with torch.no_grad():
        for name, parameter in learner.adapter_parameters():
            parameter.copy_(old[name])
    for number, completion in enumerate(completions):
        assert (completion.min_version, completion.max_version, len(completion.token_ids)) == (3, 3, LONG)
        assert float(gaps(learner.model, request(number), completion).max()) <= 1e-4

    with pytest.raises(
        EngineError, match="sent twice: the probe's log-probabilities differ"
    ):  # the learner is back at version 3's adapters
        bridge.adapters = lambda target: exported(learner, target)
        bridge.publish(5)
    bridge.close()


def exported(learner, target) -> None:
    """Adapters that are not the learner's."""
    trained = {name: tensor.detach().clone() for name, tensor in learner.adapter_parameters()}
    train(learner, 9)
    learner.export_adapter(target)
    with torch.no_grad():
        for name, parameter in learner.adapter_parameters():
            parameter.copy_(trained[name])


def test_merged_weights_reach_an_engine_that_also_takes_adapters(learner, engine, tmp_path):
    bridge = Bridge(
        learner,
        [engine.receiver],
        settings=SyncSection(timeout_s=60),
        probe_ids=list(range(24)),
        run_folder=tmp_path,
    )
    for version in (6, 7):
        train(learner, version)
        assert bridge.publish(version)["sync/probe_gap"] <= 1e-4
        assert float(gaps(learner.model, request(0), sample(engine, request(0))[0]).max()) <= 1e-4
    bridge.close()
