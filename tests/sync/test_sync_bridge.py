"""The weight bridge against scripted receivers: order of phases, bounds, culprits named, checks that catch what they
are for, engines never left paused.
"""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from spearrl.config.sections import SyncSection
from spearrl.errors import ConfigError, EngineError, StorageError, WorkerLost
from spearrl.sync import Bridge, InProcess
from spearrl.sync import buckets as buckets_module
from spearrl.sync import buckets as weights
from spearrl.sync.buckets import PORTIONS, bucket_folder, buckets
from spearrl.sync.probe import Probe


@pytest.fixture(autouse=True)
def _shared_memory(tmp_path, monkeypatch):
    """Bridges that a failing sync leaves open must not leave files on the machine."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(buckets_module, "SHARED_MEMORY", folder)


IDS = [3, 1, 2, 0]
MIB = 1 << 20


def answers_of(tensors: dict[str, torch.Tensor]) -> list[float]:
    """Stands for a model's log-probabilities: a function of all weights."""
    total = sum(float(tensor.double().sum()) for tensor in tensors.values())
    return [-1.0 - total * (i + 1) for i in range(len(IDS) - 1)]


class Learner:
    def __init__(self, **shapes: tuple[int, ...]):
        torch.manual_seed(0)
        self.tensors = {
            name: torch.randn(*shape) * 1e-2
            for name, shape in (shapes or {"embed": (8, 4), "layer": (4, 4), "norm": (4,)}).items()
        }
        self.closed = 0

    def full_parameters(self):
        try:
            yield from self.tensors.items()
        finally:
            self.closed += 1

    def probe(self, token_ids, dtype=None):
        return answers_of(self.tensors)

    def step(self, size=1e-3):
        self.tensors = {name: tensor + size for name, tensor in self.tensors.items()}


class Receiver:
    """Keeps what it is sent; `faults` maps a phase to what happens there, once for each entry."""

    transports = ("shared_memory",)
    shards = 1

    def __init__(self, name="engine", **faults):
        self.name, self.faults, self.log, self.held, self.paused, self.version = name, faults, [], {}, False, None
        self.buckets = []

    def _at(self, phase, *arguments):
        self.log.append(phase)
        pending = self.faults.get(phase, [])
        return pending.pop(0)(self, *arguments) if pending else None

    def pause(self, timeout_s):
        self.paused = True
        self._at("pause")

    def begin(self, plan, timeout_s):
        self.plan = plan
        self._at("begin")

    def take(self, bucket, timeout_s):
        assert self.paused
        self.buckets.append(bucket)
        self._at("take", bucket)
        tensors = {name: tensor.clone() for name, tensor in weights.read_bucket(bucket["path"]).items()}
        digests = {name: weights.digest(tensor) for name, tensor in tensors.items()}
        if changed := self._at("load", tensors):
            tensors = changed
        self.held = {**self.held, **tensors}
        return digests

    def finish(self, version, timeout_s):
        self._at("finish")
        self.version = version
        return (
            [weights.digest(torch.cat([self.held[name].flatten() for name in sorted(self.held)]))]
            if self.plan["digest"]
            else []
        )

    def probe(self, token_ids, timeout_s):
        assert not self.paused, "a paused engine computes nothing"
        return self._at("probe") or answers_of(self.held)

    def resume(self, timeout_s):
        self.paused = False
        self._at("resume")


def bridge_of(learner, receivers, folder, *, timeout_s=20.0, **settings):
    said = []
    bridge = Bridge(
        learner,
        receivers,
        settings=SyncSection(timeout_s=timeout_s, **settings),
        probe_ids=IDS,
        run_folder=folder,
        report=said.append,
    )
    bridge.said = said
    return bridge


def hang(receiver, *arguments):
    time.sleep(30)


def fail(error):
    def raises(receiver, *arguments):
        raise error

    return raises


def flip(receiver, bucket):
    """One bit of a bucket's last tensor, between writing and reading."""
    with open(bucket["path"], "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


def test_weights_arrive_in_phases_and_close_leaves_no_file(tmp_path):
    learner, receivers = Learner(), [Receiver("worker 0"), Receiver("worker 1")]
    bridge = bridge_of(learner, receivers, tmp_path)
    metrics = bridge.publish(4)
    for receiver in receivers:
        assert receiver.log == ["pause", "begin", "take", "load", "finish", "resume", "probe"]
        assert receiver.version == 4 and all(
            torch.equal(receiver.held[name], tensor) for name, tensor in learner.tensors.items()
        )
    assert metrics["sync/bytes"] == sum(t.nbytes for t in learner.tensors.values()) and metrics["sync/buckets"] == 1
    assert metrics["sync/resent"] == metrics["sync/lost"] == 0 and metrics["sync/probe_gap"] <= 1e-6
    assert 0 < metrics["sync/pause_seconds"] <= metrics["sync/seconds"]
    assert bridge.version == 4 and len(list(bridge.folder.iterdir())) == 1 and not bridge.said
    bridge.close()
    assert not bridge.folder.exists()


def test_buckets_are_bounded_and_only_a_few_exist_at_a_time(tmp_path):
    learner = Learner(
        **{f"w{i}": (MIB // 16,) for i in range(8)}, big=(MIB // 4,)
    )  # 8 of a quarter of a MiB, one of a MiB
    files = []
    receiver = Receiver(take=[lambda r, bucket: files.append(len(list(bridge.folder.iterdir())))] * 9)
    bridge = bridge_of(learner, [receiver], tmp_path, bucket_mib=1)
    assert bridge.publish(1)["sync/buckets"] == 5
    assert [bucket["number"] for bucket in receiver.buckets] == [0, 1, 2, 3, 4]
    assert max(files) <= 2 + PORTIONS and set(receiver.held) == set(learner.tensors)
    groups = list(buckets(learner.full_parameters(), MIB // 2))
    assert [list(group) for group in groups] == [["w0", "w1"], ["w2", "w3"], ["w4", "w5"], ["w6", "w7"], ["big"]]


def test_floating_weights_travel_in_the_engines_type(tmp_path):
    learner = Learner(w=(4, 4))
    learner.tensors["steps"] = torch.tensor([7])
    receiver = Receiver()
    bridge = Bridge(
        learner,
        [receiver],
        settings=SyncSection(probe_tolerance=1.0),
        probe_ids=IDS,
        run_folder=tmp_path,
        dtype=torch.bfloat16,
    )
    bridge.publish(1)
    assert receiver.held["w"].dtype == torch.bfloat16 and receiver.held["steps"].dtype == torch.int64


def test_a_flipped_bit_is_caught_and_sent_again(tmp_path):
    learner, receiver = Learner(), Receiver("worker 1", take=[flip])
    bridge = bridge_of(learner, [Receiver("worker 0"), receiver], tmp_path)
    metrics = bridge.publish(2)
    assert (
        metrics["sync/resent"] == 1
        and "worker 1 received 1 tensors otherwise" in bridge.said[0]
        and "norm" in bridge.said[0]
    )
    assert receiver.log.index("probe") > receiver.log.index("resume") and receiver.log.count("pause") == 1, (
        "nobody samples from refused weights"
    )
    assert all(torch.equal(receiver.held[name], tensor) for name, tensor in learner.tensors.items())
    assert metrics["sync/buckets"] == 2


def test_twice_corrupted_stops_the_run_and_names_receiver_and_tensor(tmp_path):
    receivers = [Receiver("worker 0"), Receiver("worker 1", take=[flip, flip])]
    with pytest.raises(
        EngineError,
        match=r"version 2 did not arrive, sent twice: .*worker 1 received 1 tensors otherwise .*, norm among them",
    ):
        bridge_of(Learner(), receivers, tmp_path).publish(2)
    assert not any(receiver.paused for receiver in receivers)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda r, tensors: {**tensors, "embed": torch.zeros_like(tensors["embed"])},
            "probe's log-probabilities differ by",
        ),  # right bytes, wrongly loaded
        (
            lambda r, tensors: {"layer": tensors["layer"], "norm": tensors["norm"]},
            "probe's log-probabilities differ by",
        ),  # one left as it was
        (lambda r, tensors: {name: tensor * float("nan") for name, tensor in tensors.items()}, "differ by nan"),
    ],
)
def test_weights_that_are_loaded_wrongly_are_caught_by_the_probe(tmp_path, change, said):
    learner, receiver = Learner(), Receiver()
    bridge = bridge_of(learner, [receiver], tmp_path)
    bridge.publish(0)
    learner.step(1e-2)
    receiver.faults["load"] = [change]
    assert bridge.publish(1)["sync/resent"] == 1
    assert said in bridge.said[0] and "on engine" in bridge.said[0] and "on the learner" in bridge.said[0]
    learner.step(1e-2)
    receiver.faults["load"] = [change, change]
    with pytest.raises(EngineError, match="sent twice"):
        bridge.publish(2)
    assert not receiver.paused


def test_a_sync_too_small_for_the_tolerance_must_still_move_the_engine(tmp_path):
    learner, receiver = Learner(), Receiver()
    bridge = bridge_of(learner, [receiver], tmp_path)
    bridge.publish(0)
    learner.step(5e-6)  # moves the log-probabilities by less than the tolerance of 1e-3
    old = {name: tensor.clone() for name, tensor in receiver.held.items()}
    receiver.faults["load"] = [lambda r, tensors: old] * 2
    with pytest.raises(
        EngineError,
        match=r"answers the probe as before .* although the learner's moved by .*: the sync was not applied",
    ):
        bridge.publish(1)
    assert bridge.publish(2)["sync/resent"] == 0, "and the same step is fine when it is applied"


def test_replicas_must_agree_after_loading(tmp_path):
    nudge = lambda r, tensors: {**tensors, "embed": tensors["embed"] + 1e-7}  # noqa: E731  (below every other check)
    bridge = bridge_of(Learner(), [Receiver("worker 0"), Receiver("worker 1", load=[nudge])], tmp_path)
    assert bridge.publish(1)["sync/resent"] == 1 and "worker 1 holds other weights than worker 0" in bridge.said[0]


@pytest.mark.parametrize(
    ("phase", "named"),
    [
        ("pause", "the pause"),
        ("begin", "begin"),
        ("take", "the update of bucket 0"),
        ("finish", "finish"),
        ("probe", "the probe"),
        ("resume", "the resume"),
    ],
)
def test_who_hangs_is_named_within_the_bound_and_the_others_go_on(tmp_path, phase, named):
    receivers = [Receiver("worker 0"), Receiver("worker 1", **{phase: [hang]})]
    bridge = bridge_of(Learner(), receivers, tmp_path, timeout_s=1.0)
    start = time.monotonic()
    with pytest.raises(EngineError, match=f"worker 1 did not answer {named} within 1 s") as caught:
        bridge.publish(1)
    assert "worker 0" not in caught.value.message
    assert time.monotonic() - start < 25  # who hangs does so for 30 s
    assert not receivers[0].paused and "resume" in receivers[0].log
    assert bridge.version == -1 and len(list(bridge.folder.glob("*.safetensors"))) <= PORTIONS


@pytest.mark.parametrize("phase", ["pause", "begin", "take", "finish", "probe"])
def test_who_fails_is_named_and_everybody_is_resumed(tmp_path, phase):
    learner = Learner()
    receivers = [Receiver("worker 0"), Receiver("worker 1", **{phase: [fail(ValueError("meta tensor"))]})]
    with pytest.raises(EngineError, match=r"worker 1 failed at .*: ValueError: meta tensor"):
        bridge_of(learner, receivers, tmp_path).publish(1)
    assert not any(receiver.paused for receiver in receivers) and learner.closed == 1, (
        "the learner's generator is closed too"
    )


def test_the_first_error_is_the_one_reported(tmp_path):
    receiver = Receiver(take=[fail(EngineError("first"))], resume=[fail(EngineError("second"))])
    with pytest.raises(EngineError, match="first") as caught:
        bridge_of(Learner(), [receiver], tmp_path).publish(1)
    assert any("second" in note for note in caught.value.__notes__)


def test_a_lost_worker_is_left_out_and_caught_up_later(tmp_path):
    learner, gone = Learner(), Receiver("worker 1", take=[fail(WorkerLost("killed"))])
    receivers = [Receiver("worker 0"), gone]
    bridge = bridge_of(learner, receivers, tmp_path)
    metrics = bridge.publish(3)
    assert (
        metrics["sync/lost"] == 1
        and receivers[0].version == 3
        and gone.version is None
        and "worker 1 went down" in bridge.said[0]
    )
    receivers[1] = Receiver("worker 1")
    bridge.catch_up(receivers[1])
    assert receivers[1].version == 3 and torch.equal(receivers[1].held["embed"], learner.tensors["embed"])
    assert receivers[0].log.count("pause") == 1, "the others are not disturbed"
    assert bridge.publish(4)["sync/lost"] == 0 and receivers[1].version == 4


def test_with_every_worker_lost_the_sync_ends_without_one(tmp_path):
    bridge = bridge_of(Learner(), [Receiver(begin=[fail(WorkerLost("killed"))])], tmp_path)
    assert bridge.publish(1)["sync/lost"] == 1
    assert bridge_of(Learner(), [], tmp_path).publish(1)["sync/lost"] == 0


def test_nothing_can_be_caught_up_before_it_was_published(tmp_path):
    with pytest.raises(EngineError, match="no weights were published"):
        bridge_of(Learner(), [], tmp_path).catch_up(Receiver())


def test_the_first_bucket_is_written_while_engines_pause(tmp_path):
    written = threading.Event()
    learner = Learner()
    learner.probe, plain = (lambda ids: answers_of(learner.tensors)), learner.full_parameters

    def parameters():
        yield from plain()
        written.set()

    learner.full_parameters = parameters
    receiver = Receiver(pause=[lambda r: written.wait(10) or pytest.fail("the pause was waited for")])
    bridge_of(learner, [receiver], tmp_path).publish(1)
    assert written.is_set()


def test_a_pause_that_ends_late_is_not_overtaken_by_the_resume(tmp_path):
    receiver = Receiver()
    late = lambda r: time.sleep(0.5) or setattr(r, "paused", True)  # noqa: E731
    receiver.faults["pause"] = [late]
    learner = Learner()
    learner.full_parameters = lambda: (_ for _ in ()).throw(RuntimeError("gather failed"))
    with pytest.raises(RuntimeError, match="gather failed"):
        bridge_of(learner, [receiver], tmp_path).publish(1)
    assert not receiver.paused


def test_transports_must_be_common(tmp_path):
    other = Receiver("server 1")
    other.transports = ("nccl",)
    with pytest.raises(
        ConfigError, match=r'no transport "auto" that all engines take \(engine: shared_memory; server 1: nccl\)'
    ):
        bridge_of(Learner(), [Receiver(), other], tmp_path).publish(1)
    with pytest.raises(ConfigError, match='no transport "ipc"'):
        bridge_of(Learner(), [Receiver()], tmp_path, transport="ipc").publish(1)


def test_files_of_a_killed_run_are_removed_when_it_goes_on(tmp_path, monkeypatch):
    folder = bucket_folder(tmp_path, 1)
    (folder / "0.safetensors").write_bytes(b"left")
    assert bucket_folder(tmp_path, 1) == folder and not list(folder.iterdir())
    assert folder.is_relative_to(buckets_module.SHARED_MEMORY) and folder.stat().st_mode & 0o77 == 0
    other = bucket_folder(tmp_path / "other", 1)
    assert other != folder
    other.rmdir()
    folder.rmdir()
    in_run = bucket_folder(tmp_path, 1 << 50)  # more than shared memory holds
    assert in_run.parent == tmp_path


def test_a_full_disk_is_a_storage_error(tmp_path, monkeypatch):
    bridge = bridge_of(Learner(), [receiver := Receiver()], tmp_path)
    bridge.folder.rmdir()
    with pytest.raises(StorageError, match=r"bucket of weights could not be written"):
        bridge.publish(1)
    assert not receiver.paused


def test_adapters_alone_travel_where_only_they_are_trained(tmp_path):
    from safetensors.torch import save_file

    learner, lora = Learner(), {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.zeros(4, 2)}

    def export(folder):
        folder.mkdir()
        save_file(lora, folder / "adapter_model.safetensors")

    class Takes(Receiver):
        transports = ("adapter", "shared_memory")

        def take(self, bucket, timeout_s):
            self.folders = [*getattr(self, "folders", []), bucket["adapter"]]
            self.held = dict(learner.tensors)
            return {
                name: weights.digest(t)
                for name, t in weights.read_bucket(f"{bucket['adapter']}/adapter_model.safetensors").items()
            }

    receiver = Takes()
    bridge = Bridge(learner, [receiver], settings=SyncSection(), probe_ids=IDS, run_folder=tmp_path, adapters=export)
    for version in range(12):
        assert bridge.publish(version)["sync/bytes"] == 64
    assert len(set(receiver.folders)) == 12 and len(list(bridge.folder.iterdir())) == 8
    bridge.close()
    whole = bridge_of(learner, [Receiver()], tmp_path)
    assert whole.publish(1)["sync/bytes"] == sum(t.nbytes for t in learner.tensors.values())


def test_in_process_only_the_version_travels():
    class Engine:
        def publish(self, version):
            self.version = version

    engine = Engine()
    assert InProcess(engine).publish(7) == {} and engine.version == 7


def test_bf16_is_judged_by_a_mean_and_fp32_by_the_worst():
    expected, answered = [-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.12]
    assert Probe(IDS, 0.05, float32=False).problem("e", answered, expected) is None
    assert "position 4: -1.1200 on e, -1.0000 on the learner" in Probe(IDS, 0.05, float32=True).problem(
        "e", answered, expected
    )
    unlikely = Probe(IDS, 0.05, float32=False).difference([-1.0, -1.0, -7.0], [-1.0, -1.0, -8.0])
    assert unlikely == pytest.approx(math.exp(-8) / (2 * math.exp(-1) + math.exp(-8)))


def test_digests_see_bytes_and_places():
    torch.manual_seed(0)
    tensor = torch.randn(5, 3)
    assert weights.digest(tensor) == weights.digest(tensor.clone()) == weights.digest(tensor.t().contiguous().t())
    for other in (tensor.flip(0), -tensor, tensor * (1 + 1e-7), tensor[:4]):
        assert weights.digest(other) != weights.digest(tensor)
    assert weights.digest(torch.tensor(1.0, dtype=torch.bfloat16)) != weights.digest(torch.tensor(1.0))


def test_what_a_killed_run_left_is_removed_by_the_next_one_and_a_living_ones_files_stay(tmp_path):
    program = (
        "import pathlib, sys, spearrl.sync.buckets as b; b.SHARED_MEMORY = pathlib.Path(sys.argv[1]);"
        "f = b.bucket_folder(pathlib.Path(sys.argv[2]), 1); (f / '0.safetensors').write_bytes(b'x');"
        "b.AT_DEATH._shell.kill();"  # what would remove it at once
        "print(f, flush=True); sys.stdin.read()"
    )
    others = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(buckets_module.SHARED_MEMORY), str(tmp_path / name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("killed", "living")
    ]
    killed, living = (Path(other.stdout.readline().strip()) for other in others)
    others[0].kill()
    others[0].wait()
    assert killed.is_dir() and living.is_dir()
    own = bucket_folder(tmp_path / "own", 1)
    assert not killed.exists() and (living / "0.safetensors").exists() and own.is_dir()
    for other in others:
        other.kill()
        other.communicate()
