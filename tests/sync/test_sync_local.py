"""The bridge to local engines with models of their own: right weights, caught faults, other threads."""

from __future__ import annotations

import asyncio
import copy
import threading
import time

import pytest
import torch

from spearrl.config.sections import LearnerSection, SyncSection
from spearrl.errors import EngineError
from spearrl.learner import LocalLearner
from spearrl.rollout.local.receiver import LocalWeights
from spearrl.sync import Bridge
from spearrl.sync import buckets as buckets_module
from spearrl.sync.buckets import write_bucket
from tests.rollout.test_local_engine import engine_of, tiny
from tests.support.engine_requests import requests, serve


@pytest.fixture(params=["tied", "untied"])
def pair(request, tmp_path, monkeypatch):
    """A learner, two engines with copies of its model, and the bridge between them."""
    monkeypatch.setattr(buckets_module, "SHARED_MEMORY", tmp_path)
    model = tiny("qwen3", tie_word_embeddings=request.param == "tied")
    learner = LocalLearner(model, LearnerSection(precision="fp32"))
    receivers = [LocalWeights(engine_of(copy.deepcopy(model)), f"worker {i}") for i in range(2)]
    said = []
    bridge = Bridge(
        learner,
        receivers,
        settings=SyncSection(timeout_s=20, bucket_mib=1),
        probe_ids=list(range(24)),
        run_folder=tmp_path / "run",
        report=said.append,
    )
    yield model, receivers, bridge, said
    bridge.close()


def nudge(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def test_engines_sample_what_the_learners_model_would(pair):
    model, receivers, bridge, said = pair
    for version in (1, 2):
        nudge(model, version)
        metrics = bridge.publish(version)
        assert metrics["sync/probe_gap"] <= 1e-5 and metrics["sync/resent"] == 0 and not said
        wanted = serve(engine_of(model), *requests(4))
        for receiver in receivers:
            completions = serve(receiver.engine, *requests(4))
            assert [(c.token_ids, c.logprobs) for c in completions] == [(c.token_ids, c.logprobs) for c in wanted]
            assert all(c.min_version == version for c in completions)


def test_a_weight_left_as_it_was_is_caught_and_sent_again(pair):
    model, receivers, bridge, said = pair
    bridge.publish(1)
    nudge(model)
    receiver, plain, faults = receivers[1], receivers[1].take, [1]

    def stale(bucket, timeout_s):
        head = receiver.engine.model.get_output_embeddings().weight
        old = head.detach().clone()
        digests = plain(bucket, timeout_s)
        if faults.pop() if faults else 0:
            head.data.copy_(old)
        return digests

    receiver.take = stale
    assert bridge.publish(2)["sync/resent"] == 1 and "worker 1 holds other weights than worker 0" in said[0]


@pytest.mark.parametrize("pair", ["tied"], indirect=True)
def test_unknown_misshapen_and_missing_weights_name_the_worker(pair, tmp_path):
    model, receivers, bridge, _ = pair
    receiver, file = receivers[0], tmp_path / "x.safetensors"
    for tensors, said in (
        ({"nothing": torch.ones(2)}, "nothing"),
        ({"model.norm.weight": torch.ones(2)}, r"model.norm.weight \(2,\)"),
    ):
        write_bucket(tensors, file)
        with pytest.raises(EngineError, match=f"worker 0: weight {said}.* does not belong"):
            receiver.take({"path": str(file)}, 5)
    receiver.begin({}, 5)
    with pytest.raises(EngineError, match="worker 0: .* weights did not come"):
        receiver.finish(1, 5)
    assert receiver.engine.version == 0


@pytest.mark.parametrize("pair", ["tied"], indirect=True)
def test_weights_change_between_passes_of_an_engine_at_work_in_another_thread(pair):
    model, receivers, bridge, _ = pair
    engine, stop, passes = receivers[0].engine, threading.Event(), []
    plain = engine._decode

    def slow():
        before = torch.cat([p.flatten() for p in engine.model.parameters()])
        time.sleep(0.02)
        plain()
        passes.append(torch.equal(before, torch.cat([p.flatten() for p in engine.model.parameters()])))

    engine._decode = slow

    def work():
        while not stop.is_set():
            serve(engine, *requests(3))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for version in range(1, 6):
            nudge(model, version)
            bridge.publish(version)
    finally:
        stop.set()
        thread.join(30)
    assert len(passes) > 5 and all(passes)


@pytest.mark.parametrize("pair", ["tied"], indirect=True)
def test_a_pass_that_does_not_end_is_named(pair):
    _, receivers, _, _ = pair
    receivers[0].engine.passing.acquire()
    with pytest.raises(EngineError, match=r"worker 0: the pass under way did not end within 0.1 s"):
        receivers[0].pause(0.1)
    receivers[0].engine.passing.release()


@pytest.mark.parametrize("pair", ["tied"], indirect=True)
def test_requests_in_flight_finish_after_a_sync_with_both_versions(pair):
    model, receivers, bridge, _ = pair
    engine = receivers[0].engine
    long = [one for one in requests(3, max_tokens=30)]

    async def play():
        tasks = [asyncio.create_task(engine.generate(one)) for one in long]
        while engine.counters["sampled_tokens"] < 12:
            await asyncio.sleep(0)
        nudge(model)
        await asyncio.get_running_loop().run_in_executor(None, bridge.publish, 5)
        return await asyncio.gather(*tasks)

    bridge.publish(4)
    assert [(c.min_version, c.max_version, len(c.token_ids)) for c in asyncio.run(play())] == [(4, 5, 30)] * 3
