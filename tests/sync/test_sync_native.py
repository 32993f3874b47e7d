"""The sending half of vLLM's transfer against scripted peers: who meets whom, names, types, shapes and order, bounds.

No GPU and no vLLM needed.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import pickle
import time
import types

import pytest
import torch

from spearrl.config.sections import SyncSection
from spearrl.errors import ConfigError, EngineError
from spearrl.rollout.vllm.worker_extension import WeightReceiver
from spearrl.sync import Bridge, native
from spearrl.sync import bridge as bridge_module
from spearrl.sync import buckets as buckets_module
from spearrl.sync import buckets as weights
from spearrl.sync.native import Client, LearnerSource, Native
from spearrl.sync.receivers import ReceiverGroup

CPU = torch.device("cpu")
PLAN = {"version": 3, "transport": "nccl", "digest": False}
IDS = [0, 1, 2]


class Learner:
    def __init__(self):
        torch.manual_seed(0)
        self.tensors = {"embed": torch.randn(8, 4), "layer": torch.randn(4, 4), "norm": torch.randn(4)}
        self.events = []

    def full_parameters(self):
        for name, tensor in self.tensors.items():
            self.events.append(f"gather {name}")
            yield name, tensor

    def probe(self, token_ids, dtype=None):
        return [float(self.tensors["norm"].sum()), float(self.tensors["embed"].sum())]


class Peer:
    """An engine's receiving half: what it is told, and what a trainer class put on its wire."""

    transports = ("nccl",)

    def __init__(self, name, shards=1):
        self.name, self.shards, self.plans, self.taken, self.held, self.wire = name, shards, [], [], {}, {}

    def pause(self, timeout_s): ...

    def resume(self, timeout_s): ...

    def begin(self, plan, timeout_s):
        self.plans.append(plan)

    def take(self, bucket, timeout_s):
        self.taken.append(bucket["update"])
        self.held = {name: self.wire[name] for name in bucket["update"]["names"]}
        return {name: weights.digest(tensor) for name, tensor in self.held.items()}

    def finish(self, version, timeout_s):
        self.version = version
        return []

    def probe(self, token_ids, timeout_s):
        return [float(self.held["norm"].sum()), float(self.held["embed"].sum())]


class Trainer:
    """Drives the four phases in the order of vLLM's NCCL sender, with a dictionary for a wire."""

    def __init__(self, peers, source, client, limit):
        self.peers, self.source, self.client, self.limit, self.shut = peers, source, client, limit, False
        client.init_weight_transfer_engine(
            {"rank_offset": 1, "world_size": 1 + sum(peer.shards for peer in client.group.live)}
        )

    def send_weights(self):
        meta = self.source.metadata()
        self.client.start_weight_update()
        sent = list(self.source)
        assert [(m.name, m.dtype, tuple(m.shape)) for m in meta] == [
            (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent
        ]
        for peer in self.peers:
            peer.wire = dict(sent)
        shapes = [list(m.shape) for m in meta]
        self.client.update_weights(
            {
                "names": [m.name for m in meta],
                "dtype_names": [str(m.dtype).split(".")[-1] for m in meta],
                "shapes": shapes,
            }
        )
        self.client.finish_weight_update()

    def shutdown(self):
        self.shut = True


@pytest.fixture
def trainers(monkeypatch, tmp_path):
    opened = []

    def open_trainer(kind, source, client, *, limit):
        opened.append(Trainer([peer for peer in client.group.live], source, client, limit))
        return opened[-1]

    monkeypatch.setattr(native, "open_trainer", open_trainer)
    monkeypatch.setattr(bridge_module, "Native", lambda *args, **settings: Native(*args, **settings, device=CPU))
    monkeypatch.setattr(buckets_module, "SHARED_MEMORY", tmp_path)
    return opened


def test_engines_meet_the_trainer_at_ranks_one_after_the_other(trainers, tmp_path):
    peers = [Peer("worker 0", shards=2), Peer("worker 1", shards=4), Peer("worker 2")]
    bridge = Bridge(Learner(), peers, settings=SyncSection(timeout_s=10), probe_ids=IDS, run_folder=tmp_path)
    metrics = bridge.publish(3)
    assert [peer.plans[0]["init"]["rank_offset"] for peer in peers] == [1, 3, 7]
    assert all(peer.plans[0]["init"]["world_size"] == 8 for peer in peers)
    for peer in peers:
        assert ["init" in plan for plan in peer.plans] == [True, False] and peer.version == 3
        assert peer.taken == [
            {"names": ["embed", "layer", "norm"], "dtype_names": ["float32"] * 3, "shapes": [[8, 4], [4, 4], [4]]}
        ]
    assert (
        metrics["sync/bytes"] == 4 * (32 + 16 + 4) and metrics["sync/buckets"] == 1 and metrics["sync/probe_gap"] == 0
    )
    bridge.publish(4)
    assert len(trainers) == 1 and ["init" in plan for plan in peers[0].plans] == [True, False, False], (
        "one group serves every sync"
    )
    peers[1] = Peer("worker 1", shards=4)
    bridge.publish(5)
    assert len(trainers) == 2 and trainers[0].shut, "a replaced engine means a new group"
    bridge.close()
    assert trainers[1].shut


def test_what_arrives_otherwise_than_it_was_sent_is_caught(trainers, tmp_path):
    peer = Peer("worker 0")
    plain = peer.take

    def corrupt(bucket, timeout_s):
        peer.wire = {**peer.wire, "layer": peer.wire["layer"] + 1e-6}
        return plain(bucket, timeout_s)

    peer.take = corrupt
    bridge = Bridge(
        Learner(),
        [peer],
        settings=SyncSection(timeout_s=10),
        probe_ids=IDS,
        run_folder=tmp_path,
        report=lambda text: None,
    )
    with pytest.raises(
        EngineError, match="worker 0 received 1 tensors otherwise than they were sent, layer among them"
    ):
        bridge.publish(1)


def test_a_bucket_is_gathered_whole_before_any_of_it_is_sent():
    learner = Learner()
    source = LearnerSource(learner, limit=4 * (32 + 16), dtype=torch.bfloat16, device=CPU)
    assert [m.dtype for m in source.metadata()] == [torch.bfloat16] * 3 and source.metadata() is source.metadata()
    learner.events.clear()
    source._idle = lambda: learner.events.append("idle")
    for name, tensor in source:
        learner.events.append(f"send {name}")
        assert torch.equal(tensor, learner.tensors[name].bfloat16())
    assert learner.events == [
        "gather embed",
        "gather layer",
        "gather norm",
        "idle",
        "send embed",
        "send layer",
        "send norm",
        "idle",
    ]
    source.limit = 2 * 32
    learner.events.clear()
    for name, _ in source:
        learner.events.append(f"send {name}")
    assert learner.events[:4] == ["gather embed", "gather layer", "idle", "send embed"], (
        "the device idles before and after each bucket"
    )
    assert source.digests == {name: weights.digest(tensor.bfloat16()) for name, tensor in learner.tensors.items()}


def test_ipc_handles_travel_as_text_and_no_rank_is_given_out():
    peer = Peer("engine")
    peer.take = lambda bucket, timeout_s: peer.taken.append(bucket) or {}
    client = Client(ReceiverGroup([peer], 5), {**PLAN, "transport": "ipc"})
    client.init_weight_transfer_engine({"packed": True})
    assert peer.plans == [{**PLAN, "transport": "ipc", "init": {"packed": True}}]
    handles = {"GPU-1": (torch.float32, b"handle")}
    client.update_weights({"names": ["a"], "ipc_handles": handles, "ipc_handles_pickled": None, "tensor_sizes": [4]})
    sent = peer.taken[0]["update"]
    assert (
        set(sent) == {"names", "ipc_handles_pickled", "tensor_sizes"}
        and pickle.loads(base64.b64decode(sent["ipc_handles_pickled"])) == handles
    )


@pytest.mark.parametrize("stuck", [False, True])
def test_an_engine_that_does_not_take_part_is_named_though_the_sender_hangs(trainers, monkeypatch, stuck):
    """NCCL's broadcast waits for ever for a peer that is not there."""
    peer = Peer("worker 1")

    class Hangs(Trainer):
        def send_weights(self):
            if not stuck:
                self.client.update_weights({"names": []})
            time.sleep(60)

    def refuse(bucket, timeout_s):
        raise EngineError("out of memory")

    peer.take = refuse
    monkeypatch.setattr(
        native, "open_trainer", lambda kind, source, client, *, limit: Hangs([peer], source, client, limit)
    )
    start = time.monotonic()
    with pytest.raises(EngineError, match="worker 1" if stuck else "worker 1 failed at the update: out of memory"):
        Native("nccl", Learner(), limit=1 << 20, dtype=None, device=CPU).send(ReceiverGroup([peer], 0.2), PLAN)
    assert time.monotonic() - start < 40


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_the_error_says_what_to_install():
    with pytest.raises(ConfigError, match="no trainer side") as caught:
        native.open_trainer("nccl", LearnerSource(Learner(), 1, None, CPU), Client(ReceiverGroup([], 1), PLAN), limit=1)
    assert "shared_memory" in caught.value.hint


class Worker(WeightReceiver):
    """vLLM's worker as the extension sees it."""

    def __init__(self):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = torch.nn.Parameter(torch.zeros(4))

            def load_weights(self, pairs):
                for _, tensor in pairs:
                    self.norm.data.copy_(tensor)

        self.model, self.calls = Model(), []
        self.model_runner = types.SimpleNamespace(get_model=lambda: self.model)

    def __getattr__(self, name):
        if name in (
            "init_weight_transfer_engine",
            "shutdown_weight_transfer_engine",
            "start_weight_update",
            "finish_weight_update",
        ):
            return lambda *arguments: self.calls.append((name, *arguments))
        raise AttributeError(name)

    def update_weights(self, info):
        if info.get("fail"):
            raise RuntimeError("no handle for this GPU")
        self.model.load_weights(iter([("norm", torch.full((4,), info["value"]))]))


def test_vllms_transfer_engines_load_through_the_recorder():
    worker = Worker()
    worker.spearrl_begin(json.dumps({**PLAN, "init": {"rank_offset": 1}}))
    worker.spearrl_begin(json.dumps(PLAN))
    received = worker.spearrl_take(json.dumps({"update": {"value": 2.0}}))
    assert received == {"norm": weights.digest(torch.full((4,), 2.0))} and float(worker.model.norm.detach().sum()) == 8
    assert worker.spearrl_finish(json.dumps({**PLAN, "digest": True})) == {"digest": weights.model_digest(worker.model)}
    names = [call[0] for call in worker.calls]
    assert names == [
        "shutdown_weight_transfer_engine",
        "init_weight_transfer_engine",
        "start_weight_update",
        "finish_weight_update",
    ]
    assert worker.calls[1][1] == {"rank_offset": 1}
    with pytest.raises(RuntimeError, match="no handle"):
        worker.spearrl_take(json.dumps({"update": {"fail": True}}))
    assert "load_weights" not in vars(worker.model), "the model's own method is back"
