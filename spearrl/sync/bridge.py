"""Brings the learner's weights to every engine, and proves at every sync that they arrived and are in use.

Phases: pause (requests in flight stay) → begin → buckets → finish → resume → probe. The probe comes last because a
paused engine computes nothing; tokens that requests in flight sampled from refused weights carry the log-probabilities
they were sampled with.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch

from spearrl.config.sections import SyncSection
from spearrl.errors import ConfigError, EngineError
from spearrl.processes import AT_DEATH
from spearrl.sync.buckets import PORTIONS, bucket_folder, buckets, digest, read_bucket, write_bucket
from spearrl.sync.native import Native
from spearrl.sync.probe import FP32, LOW, Probe
from spearrl.sync.receivers import Call, Receiver, ReceiverGroup

MIB = 1 << 20
ADAPTERS_KEPT = 8  # folders: requests in flight read theirs again when vLLM evicted it


class WeightSource(Protocol):
    """What the bridge asks of a learner.

    Tensors stay valid after the next one was taken; all ranks of a sharded one take part.
    """

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def probe(self, token_ids: list[int], dtype: torch.dtype | None = None) -> list[float]: ...


class Publisher(Protocol):
    """Makes the learner's weights those of the engines, under a version number."""

    def publish(self, version: int) -> dict[str, float]: ...

    def catch_up(self, receiver: Receiver) -> None: ...

    def close(self) -> None: ...


class InProcess:
    """An engine of the learner's process: it shares the learner's parameters, or copies them into another type.

    Args:
        engine: a LocalEngine.
        learner: whose weights are copied; None: they are shared.
    """

    def __init__(self, engine: Any, learner: WeightSource | None = None):
        self.engine, self.learner = engine, learner

    def publish(self, version: int) -> dict[str, float]:
        """Have the engine go on with the learner's parameters, its caches flushed."""
        if self.learner is not None:
            self.engine.load(self.learner.full_parameters())
        self.engine.publish(version)
        return {}

    def catch_up(self, receiver: Receiver) -> None:
        """Raises ConfigError: such an engine is never replaced."""
        raise ConfigError("an engine in the learner's process has no replacement", where=receiver.name)

    def close(self) -> None:
        """Nothing is held."""


class Bridge:
    """Sends the learner's weights to receivers.

    Args:
        receivers: who is in it at a `publish` takes part.
        probe_ids: text whose log-probabilities engines and learner must agree on.
        run_folder: the run's directory; names the bucket files, and holds them where shared memory is too small.
        dtype: the engines' type where it is another than the learner's: half the bytes travel.
        float32: whether engine and learner both compute in float32: how close their log-probabilities must be.
        adapters: writes the learner's adapters to a folder (learner.export_adapter), where only those are trained.
        report: told of what is noteworthy; default: a Python warning.
    """

    def __init__(
        self,
        learner: WeightSource,
        receivers: Iterable[Receiver],
        *,
        settings: SyncSection,
        probe_ids: list[int],
        run_folder: Path,
        dtype: torch.dtype | None = None,
        float32: bool = True,
        adapters: Callable[[Path], None] | None = None,
        report: Callable[[str], None] | None = None,
    ):
        self.learner, self.receivers, self.settings = learner, receivers, settings
        self.dtype, self.adapters = dtype, adapters
        self.version = -1
        self.probe = Probe(probe_ids, settings.probe_tolerance or (FP32 if float32 else LOW), float32)
        self._limit = settings.bucket_mib * MIB
        self.folder = bucket_folder(run_folder, self._limit)
        self._report = report or (lambda text: warnings.warn(text, stacklevel=3))
        self._native: Native | None = None
        self._adapters_sent = 0
        self._clock = self._paused_at = 0.0
        self._opening: list[Call] = []
        self._paused: list[Receiver] = []
        self._sent = Counter[str]()
        self._pause_s = 0.0
        self.laps: dict[str, float] = {}  # seconds of the phases of the last sync

    def publish(self, version: int) -> dict[str, float]:
        """Bring the learner's weights to every receiver, as `version`.

        Returns:
            sync/seconds, sync/pause_seconds, sync/bytes, sync/buckets, sync/resent, sync/lost; in nats sync/probe_gap,
            sync/probe_bound, sync/probe_rounding.
        Raises:
            EngineError: a receiver failed, did not answer, or holds other weights than the learner although they were
                sent twice.
        """
        metrics = self._publish(list(self.receivers), version)
        self.version = version
        return metrics

    def catch_up(self, receiver: Receiver) -> None:
        """Bring the published version to a receiver that started later; from the thread that drives the learner, before
        its next update.

        Raises:
            EngineError: as `publish`, or nothing was published yet.
        """
        if self.version < 0:
            raise EngineError("no weights were published yet", where=receiver.name, hint="publish first")
        self._publish([receiver], self.version)

    def close(self) -> None:
        """Remove what is left of bucket files, and leave the engines' process group."""
        shutil.rmtree(self.folder, ignore_errors=True)
        AT_DEATH.set("rm", str(self.folder), due=False)
        if self._native is not None:
            self._native.close()

    def _publish(self, receivers: list[Receiver], version: int) -> dict[str, float]:
        started = time.perf_counter()
        group = ReceiverGroup(receivers, self.settings.timeout_s)
        self._sent, self._pause_s, self.laps = Counter(bytes=0, buckets=0), 0.0, {}
        self._expected: list[float] = []
        resent = 0
        try:
            while group.live and (problems := self._attempt(group, version)):
                if resent:
                    text = f"weights of version {version} did not arrive, sent twice: {'; '.join(problems)}"
                    raise EngineError(text, where="weight sync", hint="see docs/sync.md")
                resent += 1
                self._report(f"weights of version {version} are sent again: {'; '.join(problems)}")
            self._resume(group)
        except BaseException as error:  # whatever happened: never leave an engine paused
            try:
                self._resume(group)
            except EngineError as second:
                error.add_note(f"and then: {second.message}")
            raise
        if group.lost:
            self._report(f"{', '.join(group.lost)} went down in the sync of version {version} and is left out")
        metrics = {
            "seconds": time.perf_counter() - started,
            "pause_seconds": self._pause_s,
            "probe_gap": self.probe.gap,
            "probe_bound": self.probe.bound,
            "probe_rounding": self.probe.rounding,
            **self._sent,
            "resent": resent,
            "lost": len(group.lost),
        }
        return {f"sync/{name}": float(value) for name, value in metrics.items()}

    def _attempt(self, group: ReceiverGroup, version: int) -> list[str]:
        """Send everything and check it; what is wrong."""
        transport, timeout = self._transport(group.live), self.settings.timeout_s
        # Replicas are compared among themselves: cheap, and the only look at what their layers hold after loading.
        plan = {"version": version, "transport": transport, "digest": len(group.live) > 1}
        self._begin(group, plan)
        try:
            problems = self._send(group, plan)
            finishing = group.start([("finish", lambda receiver: receiver.finish(version, timeout))])
            expected = self._learner_logprobs()
            problems += _unlike(group.wait(finishing))
        finally:
            self._clear()
        self._lap("finish")
        if problems:  # stays paused: nobody samples from these
            return problems
        self._resume(group)
        answers = group.call("the probe", lambda receiver: receiver.probe(self.probe.token_ids, timeout))
        self._lap("probe")
        logprobs = {receiver.name: answer for receiver, answer in answers}
        problems = self._compare(logprobs, expected)
        if problems and self._calibrate():  # the learner rounds more by now, or it is a fault
            problems = self._compare(logprobs, expected)
        if not problems:
            self.probe.passed(logprobs, expected)
        return problems

    def _begin(self, group: ReceiverGroup, plan: dict[str, Any]) -> None:
        """Start pausing; the first bucket is gathered meanwhile."""
        self._clock = time.perf_counter()
        timeout, fresh = self.settings.timeout_s, not self._paused
        phases = [("the pause", lambda receiver: receiver.pause(timeout))] if fresh else []
        if plan["transport"] not in ("nccl", "ipc"):  # vLLM's trainer side begins by itself
            phases.append(("begin", lambda receiver: receiver.begin(plan, timeout)))
        if fresh:
            self._paused, self._paused_at = list(group.live), time.perf_counter()
        self._opening = group.start(phases)

    def _opened(self, group: ReceiverGroup) -> None:
        calls, self._opening = self._opening, []
        if calls:
            group.wait(calls, 2)
            self._lap("pause")

    def _send(self, group: ReceiverGroup, plan: dict[str, Any]) -> list[str]:
        """The weights, by the plan's transport; what arrived wrong."""
        if plan["transport"] == "adapter":
            return self._send_adapter(group)
        if plan["transport"] == "shared_memory":
            with closing(buckets(self.learner.full_parameters(), self._limit // PORTIONS, self.dtype)) as portions:
                return self._send_files(group, portions)
        self._opened(group)
        if self._native is None or not self._native.serves(plan["transport"], group.live):
            if self._native is not None:
                self._native.close()
            self._native = Native(plan["transport"], self.learner, limit=self._limit // PORTIONS, dtype=self.dtype)
        received, sent = self._native.send(group, plan)
        self._sent.update(bytes=self._native.source.bytes, buckets=self._native.source.buckets)
        self._lap("update")
        return _changed(received, sent)

    def _send_files(self, group: ReceiverGroup, portions: Iterable[dict[str, torch.Tensor]]) -> list[str]:
        """While receivers read one bucket, the next is gathered and written, and the digests of what was sent are
        computed.
        """
        problems: list[str] = []
        under_way: tuple[list[Call], dict[str, int], Path] | None = None
        for number, bucket in enumerate(portions):
            tensors = {name: tensor.cpu() for name, tensor in bucket.items()}
            path = self.folder / f"{number}.safetensors"
            write_bucket(tensors, path)
            self._lap("write")
            self._opened(group)
            problems += self._received(group, under_way)
            calls = self._offer(group, f"the update of bucket {number}", {"path": str(path), "number": number})
            under_way = (calls, {name: digest(tensor) for name, tensor in tensors.items()}, path)
            self._sent.update(bytes=sum(tensor.nbytes for tensor in tensors.values()), buckets=1)
        self._learner_logprobs()
        return problems + self._received(group, under_way)

    def _offer(self, group: ReceiverGroup, phase: str, bucket: dict[str, Any]) -> list[Call]:
        """Have every receiver take a bucket."""
        return group.start([(phase, lambda receiver: receiver.take(bucket, self.settings.timeout_s))])

    def _learner_logprobs(self) -> list[float]:
        """The learner's answer to the probe, once a sync; made while engines load what they took last."""
        if not self._expected:
            self._expected = self.learner.probe(self.probe.token_ids)
            if self.version < 0:
                self._calibrate()
        return self._expected

    def _calibrate(self) -> bool:
        """Measure what the engines' type alone changes, on the learner; False where it changes nothing."""
        if self.dtype is None or self.settings.probe_tolerance:
            return False
        rounded = self.learner.probe(self.probe.token_ids, self.dtype)
        self.probe.rounding = self.probe.difference(rounded, self._expected)
        return True

    def _compare(self, answers: dict[str, list[float]], expected: list[float]) -> list[str]:
        self.probe.gap = 0.0
        return [text for name in answers if (text := self.probe.problem(name, answers[name], expected))]

    def _received(self, group: ReceiverGroup, under_way: tuple[list[Call], dict[str, int], Path] | None) -> list[str]:
        if under_way is None:
            return []
        calls, sent, path = under_way
        problems = _changed(group.wait(calls), sent)
        if int(path.stem) >= PORTIONS:
            path.unlink(missing_ok=True)
        self._lap("update")
        return problems

    def _send_adapter(self, group: ReceiverGroup) -> list[str]:
        """Only the adapters, as a folder in peft's format."""
        if self.adapters is None:
            raise ConfigError(
                "the learner trains no adapters", where="sync.transport", hint='set sync.transport="auto"'
            )
        self._adapters_sent += 1
        folder = self.folder / f"adapter-{self._adapters_sent}"
        self.adapters(folder)
        tensors = read_bucket(folder / "adapter_model.safetensors")
        sent = {name: digest(tensor) for name, tensor in tensors.items()}
        self._opened(group)
        answers = group.wait(self._offer(group, "the adapter", {"adapter": str(folder)}))
        shutil.rmtree(self.folder / f"adapter-{self._adapters_sent - ADAPTERS_KEPT}", ignore_errors=True)
        self._sent.update(bytes=sum(tensor.nbytes for tensor in tensors.values()), buckets=1)
        self._lap("update")
        return _changed(answers, sent)

    def _resume(self, group: ReceiverGroup) -> None:
        """Let every paused receiver go on, at most once a pause."""
        paused, self._paused = [receiver for receiver in self._paused if receiver in group.live], []
        if not paused:
            return
        timeout = self.settings.timeout_s
        calls, self._opening = self._opening, []
        wait([call.answer for call in calls], timeout)  # a pause still under way would come after the resume
        group.call("the resume", lambda receiver: receiver.resume(timeout))
        self._pause_s += time.perf_counter() - self._paused_at
        self._lap("resume")
        if self._native is not None:
            self._native.reclaim()

    def _clear(self) -> None:
        """Files of the first buckets, sync.bucket_mib in all, stay: the next sync writes into them."""
        for file in self.folder.glob("*.safetensors"):
            if int(file.stem) >= PORTIONS:
                file.unlink(missing_ok=True)

    def _lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self._clock
        self._clock = now

    def _transport(self, receivers: list[Receiver]) -> str:
        """The configured transport, or the best that every receiver takes."""
        setting, distributed = self.settings.transport, torch.distributed
        ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        for name in receivers[0].transports:
            possible = setting == name or (
                setting == "auto" and (name != "adapter" or self.adapters) and (name != "ipc" or ranks == 1)
            )
            if possible and all(name in receiver.transports for receiver in receivers):
                return name
        listed = "; ".join(f"{receiver.name}: {', '.join(receiver.transports) or 'none'}" for receiver in receivers)
        text = f'no transport "{setting}" that all engines take ({listed})'
        raise ConfigError(text, where="sync.transport", hint='set sync.transport="auto"')


def _changed(answers: list[tuple[Receiver, dict[str, int]]], sent: dict[str, int]) -> list[str]:
    """Receivers that got tensors whose bytes are not what was sent."""
    problems = []
    for receiver, received in answers:
        if wrong := [name for name in sent.keys() | received.keys() if sent.get(name) != received.get(name)]:
            text = f"received {len(wrong)} tensors otherwise than they were sent, {min(wrong)} among them"
            problems.append(f"{receiver.name} {text}")
    return problems


def _unlike(answers: list[tuple[Receiver, list[int]]]) -> list[str]:
    """Replicas (split alike) that hold different weights after loading."""
    first: dict[int, tuple[str, list[int]]] = {}
    problems = []
    for receiver, digests in answers:
        name, expected = first.setdefault(len(digests), (receiver.name, digests))
        if digests != expected:
            problems.append(f"{receiver.name} holds other weights than {name} after loading the same")
    return problems
