"""The bridge to a real vLLM engine: right weights, caught corruption, requests in flight, bounds.

One engine for all of it.
"""

from __future__ import annotations

import asyncio
import functools
import time

import pytest
import torch

pytest.importorskip("vllm")

from spearrl.config.sections import LearnerSection, RolloutSection, SyncSection, VllmSection  # noqa: E402
from spearrl.errors import EngineError  # noqa: E402
from spearrl.learner import LocalLearner  # noqa: E402
from spearrl.models import save_weights  # noqa: E402
from spearrl.rollout import Request, Sampling  # noqa: E402
from spearrl.rollout.vllm import (  # noqa: E402
    VLLMEngine,  # noqa: E402
    arguments,
    worker_extension,
)
from spearrl.sync import Bridge  # noqa: E402
from spearrl.sync import bridge as bridge_module
from spearrl.sync.buckets import read_bucket, write_bucket  # noqa: E402
from tests.support.engine_requests import VOCABULARY, all_begun
from tests.support.engine_requests import serve as sample
from tests.support.gates import LIMIT_S

CONTEXT, LONG = 512, 400


class FaultyReceiver(worker_extension.WeightReceiver):
    """vLLM's side with a fault that a test asks for by a file."""

    def spearrl_finish(self, text):
        from pathlib import Path

        fault = Path(self.model_config.model) / "fault"
        said = fault.read_text() if fault.exists() else ""
        if said == "hang":
            end = time.monotonic() + LIMIT_S
            while fault.exists() and time.monotonic() < end:
                time.sleep(0.05)
        if said == "stale head":  # what vLLM's own reload does to a tied head on processors
            worker_extension.refresh_head, original = (lambda model: None), worker_extension.refresh_head
            try:
                return super().spearrl_finish(text)
            finally:
                worker_extension.refresh_head = original
        return super().spearrl_finish(text)


def small_model():
    """The narrowest heads that vLLM takes on processors; log-probabilities far from uniform, so that errors show."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    return Qwen3ForCausalLM(
        Qwen3Config(**shape, initializer_range=0.2, tie_word_embeddings=True, max_position_embeddings=CONTEXT)
    ).eval()


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def learner(model):
    return LocalLearner(model, LearnerSection(precision="fp32"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_weights(model, path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    original, arguments.EXTENSION = arguments.EXTENSION, "tests.engines.test_vllm_sync.FaultyReceiver"
    rollout = RolloutSection(context_tokens=CONTEXT, slots=16, cache_mib=64)
    engine = VLLMEngine(folder, VllmSection(), rollout, precision="fp32", name="worker 1 (vllm)", threads=1)
    arguments.EXTENSION = original
    yield engine
    engine.close()


@pytest.fixture
def fault(folder):
    yield folder / "fault"
    (folder / "fault").unlink(missing_ok=True)


@pytest.fixture
def bridge(learner, engine, tmp_path):
    said = []
    settings = SyncSection(timeout_s=60, bucket_mib=1)
    bridge = Bridge(
        learner,
        [engine.receiver],
        settings=settings,
        probe_ids=list(range(24)),
        run_folder=tmp_path,
        report=said.append,
    )
    bridge.said = said
    yield bridge
    bridge.close()


def nudge(model, seed: int, size: float = 0.02) -> None:
    """Stands for an update."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)


def gaps(model, request, completion) -> torch.Tensor:
    """Differences between reported log-probabilities and the model's own."""
    ids = torch.tensor([[*request.token_ids, *completion.token_ids]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1).gather(-1, ids[0, 1:, None])[:, 0]
    return (logprobs[-len(completion.token_ids) :] - torch.tensor(completion.logprobs)).abs()


def request(number: int, tokens: int = 12) -> Request:
    return Request(
        (number, 0, 0), tuple(range(1 + number, 40 + number)), sampling=Sampling(max_tokens=tokens, seed=number)
    )


def test_every_sync_is_verified_and_engines_sample_with_the_new_weights(model, learner, engine, bridge):
    for version in (1, 2):
        nudge(model, version)
        metrics = bridge.publish(version)
        assert metrics["sync/resent"] == 0 and metrics["sync/probe_gap"] <= 1e-4 and not bridge.said
        for number, completion in enumerate(sample(engine, request(0), request(1))):
            assert (completion.min_version, completion.max_version) == (version, version)
            assert float(gaps(model, request(number), completion).max()) <= 1e-4


def test_requests_in_flight_finish_with_both_versions_and_right_logprobs(model, engine, bridge):
    bridge.publish(10)
    before, wanted = (
        torch.nn.utils.parameters_to_vector(model.parameters()).clone(),
        [request(number, LONG) for number in range(6)],
    )

    async def play():
        tasks = [asyncio.create_task(engine.generate(one)) for one in wanted]
        await all_begun(engine, 6)
        nudge(model, 11)
        await asyncio.get_running_loop().run_in_executor(None, bridge.publish, 11)
        return await asyncio.gather(*tasks)

    completions = asyncio.run(play())
    after = [gaps(model, one, completion) for one, completion in zip(wanted, completions, strict=True)]
    now = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    torch.nn.utils.vector_to_parameters(before, model.parameters())
    old = [gaps(model, one, completion) for one, completion in zip(wanted, completions, strict=True)]
    torch.nn.utils.vector_to_parameters(now, model.parameters())
    for completion, under_old, under_new in zip(completions, old, after, strict=True):
        assert len(completion.token_ids) == LONG and (completion.min_version, completion.max_version) == (10, 11)
        switch = int((under_old <= 1e-4).long().cumprod(0).sum())  # tokens before the new weights
        assert 0 < switch < LONG and float(under_new[switch:].max()) <= 1e-4, (
            "right under the old weights up to the switch, under the new ones from it on"
        )


def test_cached_beginnings_of_old_weights_are_not_used(model, engine, bridge):
    long = Request((0, 0, 0), tuple(1 + i % 90 for i in range(200)), sampling=Sampling(max_tokens=4))
    sample(engine, long)
    assert sample(engine, long)[0].cached_tokens > 0
    nudge(model, 12)
    bridge.publish(12)
    fresh = sample(engine, long)[0]
    assert fresh.cached_tokens == 0 and float(gaps(model, long, fresh).max()) <= 1e-4


def test_a_flipped_byte_is_caught_named_and_sent_again(engine, bridge, monkeypatch):
    times = []

    def corrupting(tensors, path):
        write_bucket(tensors, path)
        if not times:
            times.append(path)
            with open(path, "r+b") as file:
                file.seek(-3, 2)
                file.write(b"\x7f")

    monkeypatch.setattr(bridge_module, "write_bucket", corrupting)
    metrics = bridge.publish(13)
    assert (
        metrics["sync/resent"] == 1
        and metrics["sync/probe_gap"] <= 1e-4
        and "received 1 tensors otherwise" in bridge.said[0]
    )
    assert engine.version == 13


def test_weights_under_a_wrong_name_stop_the_run(learner, engine, bridge, monkeypatch):
    """Bytes and names agree on both sides, the tensor is another layer's: only the probe can tell."""
    swap = {"0": "1", "1": "0"}

    def swapped():
        for name, tensor in type(learner).full_parameters(learner):
            parts = name.split(".")
            yield (
                ".".join(
                    swap.get(part, part) if parts[i - 1] == "layers" and "mlp" in parts else part
                    for i, part in enumerate(parts)
                ),
                tensor,
            )

    monkeypatch.setattr(learner, "full_parameters", swapped)
    with pytest.raises(
        EngineError,
        match=r"sent twice: the probe's log-probabilities differ by .* on worker 1 \(vllm\), .* on the learner",
    ):
        bridge.publish(14)
    assert sample(engine, request(0))[0].token_ids, "and the engine is not left paused"
    monkeypatch.undo()
    assert bridge.publish(15)["sync/resent"] == 0


def test_a_head_left_stale_is_caught(model, engine, bridge, fault):
    bridge.publish(16)
    nudge(model, 17)
    fault.write_text("stale head")
    with pytest.raises(EngineError, match="sent twice: the probe's log-probabilities differ"):
        bridge.publish(17)
    fault.unlink()
    assert bridge.publish(18)["sync/resent"] == 0


def test_a_file_that_is_gone_names_the_engine(engine, bridge, monkeypatch):
    monkeypatch.setattr(
        bridge_module, "write_bucket", lambda tensors, path: (write_bucket(tensors, path), path.unlink())
    )
    with pytest.raises(EngineError, match=r"worker 1 \(vllm\) failed at the update of bucket 0"):
        bridge.publish(19)
    monkeypatch.undo()
    assert bridge.publish(20)["sync/resent"] == 0, "nothing of the half sync is left in the engine"


def test_replicas_report_a_digest_of_what_they_hold(learner, engine, tmp_path):
    receiver = engine.receiver
    write_bucket(dict(learner.full_parameters()), tmp_path / "all.safetensors")
    digests = []
    for _ in range(2):
        receiver.pause(30)
        receiver.begin({"version": 23, "transport": "shared_memory", "digest": True}, 30)
        assert set(receiver.take({"path": str(tmp_path / "all.safetensors")}, 30)) == set(
            read_bucket(tmp_path / "all.safetensors")
        )
        digests.append(receiver.finish(23, 30))
        receiver.resume(30)
    assert digests[0] == digests[1] and len(digests[0]) == 1


def test_an_engine_that_hangs_in_the_update_is_named_within_the_bound(engine, learner, tmp_path, fault):
    settings = SyncSection(timeout_s=5)
    bridge = Bridge(learner, [engine.receiver], settings=settings, probe_ids=list(range(24)), run_folder=tmp_path)
    fault.write_text("hang")
    start = time.monotonic()
    with pytest.raises(
        EngineError,
        match=r"worker 1 \(vllm\) (did not answer finish within 5 s|failed at finish: no answer within 5 s)",
    ):
        bridge.publish(24)
    assert time.monotonic() - start < LIMIT_S / 2
    fault.unlink()
    bridge.close()


def test_vllms_own_sender_speaks_to_all_receivers(learner, monkeypatch):
    """The trainer-side class of this vLLM with its NCCL calls taken out: what it asks of our client and source."""
    from vllm.distributed.weight_transfer import nccl_engine

    from spearrl.sync import native
    from spearrl.sync.receivers import ReceiverGroup
    from tests.sync.test_sync_native import PLAN, Peer

    peers, broadcast = [Peer("worker 0", shards=2), Peer("worker 1")], []
    opened = []

    def producer(iterator, group, **settings):
        pairs = list(iterator)
        broadcast.extend(pairs)
        for peer in peers:
            peer.wire = {name: tensor.clone() for name, tensor in pairs}

    def take(peer, bucket, timeout_s):
        while not peer.wire:  # the broadcast is under way
            time.sleep(0.01)
        return Peer.take(peer, bucket, timeout_s)

    for peer in peers:
        peer.take = functools.partial(take, peer)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: opened.append(info) or "group")
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", producer)
    sender = native.Native("nccl", learner, limit=1 << 14, dtype=torch.bfloat16, device=torch.device("cpu"))
    received, sent = sender.send(ReceiverGroup(peers, 20), PLAN)
    assert [dict(digests) == sent for _, digests in received] == [True, True] and len(sent) == len(
        list(learner.full_parameters())
    )
    init = [peer.plans[0]["init"] for peer in peers]
    assert [
        (one["rank_offset"], one["world_size"], one["packed"], one["packed_buffer_size_bytes"]) for one in init
    ] == [
        (1, 4, True, 1 << 14),
        (3, 4, True, 1 << 14),
    ]
    assert (opened[0].master_address, opened[0].master_port) == (init[0]["master_address"], init[0]["master_port"])
    assert peers[0].taken[0]["names"] == [name for name, _ in broadcast] and set(peers[0].taken[0]["dtype_names"]) == {
        "bfloat16"
    }
    nccl_engine.NCCLWeightTransferInitInfo(**init[1])  # and the engine's side takes what was sent
    nccl_engine.NCCLWeightTransferUpdateInfo(**peers[0].taken[0])
