"""What takes weights (a Receiver), and the receivers of a sync, driven side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from spearrl.errors import EngineError, SpearError, WorkerLost

GRACE_S = 1.0  # a receiver's own time limit comes first: its error says more


class Receiver(Protocol):
    """What the weight bridge asks of everything that takes weights: an engine in this process, or the proxy of a
    worker.

    Every call is bounded by its timeout_s and raises EngineError (or WorkerError) naming itself. Arguments and results
    are JSON-able.
    """

    name: str  # "engine", "worker 2 (vllm)"
    transports: tuple[str, ...]  # what it can take, best first: "adapter", "ipc", "nccl", "shared_memory"
    shards: int  # GPUs the model is split over

    def pause(self, timeout_s: float) -> None:
        """Freeze generation; requests in flight stay."""

    def begin(self, plan: dict[str, Any], timeout_s: float) -> None:
        """Open an update: {"version", "transport", "digest"}, with "init" where a connection to the trainer has to be
        made first.
        """

    def take(self, bucket: dict[str, Any], timeout_s: float) -> dict[str, int]:
        """Load {"path": a safetensors file}, {"update": what vLLM's transfer engine wants} or {"adapter": a folder};
        digests of what was received.
        """

    def finish(self, version: int, timeout_s: float) -> list[int]:
        """Make the weights live and flush every cache; a digest of the loaded weights for each shard, where the plan
        calls for it.
        """

    def probe(self, token_ids: list[int], timeout_s: float) -> list[float]:
        """Log-probabilities at temperature 1 of token_ids[1:], each given what precedes it; of a receiver that is not
        paused.
        """

    def resume(self, timeout_s: float) -> None: ...

    def sleep(self) -> None:
        """Give device memory back, weights included; nothing to do where there is none."""

    def wake(self) -> None:
        """Take memory for weights again; `finish` takes that of the caches."""


Phases = Sequence[tuple[str, Callable[[Receiver], Any]]]  # what is done, in words, and by which call


@dataclass
class Call:
    """What one receiver is doing: the phase it is in, and the answer to its last call."""

    receiver: Receiver
    answer: Future[Any] = field(default_factory=Future)
    phase: str = ""

    def run(self, phases: Phases) -> None:
        """Make the calls, one after the other."""
        result = None
        try:
            for self.phase, call in phases:
                result = call(self.receiver)
        except BaseException as error:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(result)


class ReceiverGroup:
    """The receivers of one sync, driven side by side: every wait is bounded, and an error names who caused it.

    A receiver that is lost (its fleet replaces it) leaves the group; any other failure ends the sync.
    """

    def __init__(self, receivers: Sequence[Receiver], timeout_s: float):
        self.live, self.timeout_s = list(receivers), timeout_s
        self.lost: list[str] = []

    def start(self, phases: Phases) -> list[Call]:
        """Begin calls, one after the other on each receiver, all receivers at once."""
        calls = [Call(receiver) for receiver in self.live]
        for call in calls:  # daemons: a receiver that never answers must not keep the process alive
            threading.Thread(target=call.run, args=(phases,), name=f"sync-{call.receiver.name}", daemon=True).start()
        return calls

    def wait(self, calls: list[Call], phases: int = 1) -> list[tuple[Receiver, Any]]:
        """Every receiver's last answer.

        Raises:
            EngineError: names each receiver that failed or did not answer in time, and the phase.
        """
        deadline = time.monotonic() + self.timeout_s * phases + GRACE_S
        answers, problems = [], []
        cause: Exception | None = None
        for call in calls:
            name = call.receiver.name
            try:
                answers.append((call.receiver, call.answer.result(max(0.0, deadline - time.monotonic()))))
            except WorkerLost:
                self.live = [receiver for receiver in self.live if receiver is not call.receiver]
                self.lost.append(name)
            except TimeoutError as error:
                problems.append(f"{name} did not answer {call.phase} within {self.timeout_s:g} s")
                cause = error
            except Exception as error:  # whatever an engine raises ends the sync, under its name
                text = error.message if isinstance(error, SpearError) else f"{type(error).__name__}: {error}"
                problems.append(f"{name} failed at {call.phase}: {text}")
                cause = error
        if problems:
            hint = "see the engine's log; sync.timeout_s bounds every part of a sync"
            raise EngineError("; ".join(problems), where="weight sync", hint=hint) from cause
        return answers

    def call(self, phase: str, call: Callable[[Receiver], Any]) -> list[tuple[Receiver, Any]]:
        """`start` and `wait` for one call."""
        return self.wait(self.start([(phase, call)]))
