"""A rollout worker: an engine, environments and collectors in a process of their own, driven by messages.

spearrl.launch.worker_process builds one from a config; it serves in a process of this machine or inside a Ray actor.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spearrl.envs.pool import Pool
from spearrl.errors import ContractError, SpearError
from spearrl.processes import pickled, portable
from spearrl.rollout.collector import MEASURES, Collector
from spearrl.rollout.protocol import Engine
from spearrl.rollout.workers.messages import Assignment, Hello, Report
from spearrl.sync.receivers import Receiver
from spearrl.types import Status

BEAT_S = 1.0
COMMANDS = ("pause", "begin", "take", "finish", "probe", "resume", "sleep", "wake")  # of sync.receivers.Receiver


class RolloutWorker:
    """Plays assignments and carries out the bridge's commands at the same time.

    Args:
        kind: of the engine, as rollout.engine has it.
        receiver: takes the engine's weights.
        pool: where environments step.
        make_collector: makes a collector over engine and pool for a sampling (temperature, top_p).
        send: takes a message's bytes to the controller; called from several threads.
    """

    def __init__(
        self,
        kind: str,
        engine: Engine,
        receiver: Receiver,
        pool: Pool,
        *,
        make_collector: Callable[[tuple[float, float]], Collector],
        send: Callable[[bytes], None],
    ):
        self._kind, self.engine, self._receiver, self._pool = kind, engine, receiver, pool
        self._make_collector, self._send_bytes = make_collector, send
        self._collectors: dict[tuple[float, float], Collector] = {}
        self._running: dict[int, asyncio.Task[None]] = {}
        self._last_turn, self._healthy = time.monotonic(), True
        self._closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._commands = ThreadPoolExecutor(1)  # weights come in beside the event loop, in order

    def serve(self) -> None:
        """Play until `close`, in this thread: environments step here, and some want the main one."""
        receiver, host = self._receiver, socket.gethostname()
        hello = Hello(self._kind, receiver.transports, receiver.shards, self.engine.version, host, os.getpid())
        self._loop.call_soon(self._turn)
        self._loop.call_soon(self._send, "ready", hello)
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self.engine.close()
        self._pool.close()

    def deliver(self, data: bytes) -> bool:
        """Take a message; False where it was the last one."""
        kind, *values = pickle.loads(data)
        if kind == "play":
            self._loop.call_soon_threadsafe(self._play, [pickle.loads(part) for part in values[0]])
        elif kind == "cancel":
            self._loop.call_soon_threadsafe(self._cancel, values[0])
        elif kind == "call":
            self._commands.submit(self._command, *values)
        return bool(kind != "close")

    def close(self) -> None:
        """Have `serve` release engine and environments, and return; from another thread."""
        self._closed.set()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def report(self) -> Report:
        collectors, budget = list(self._collectors.values()), self._pool.budget
        tokens = sum(held for collector in collectors for held in list(collector.tokens_held.values()))
        counters = {name: sum(collector.measures[name] for collector in collectors) for name in MEASURES}
        counters |= {
            "engine_seconds": self.engine.counters.get("seconds", 0.0),
            "env/restarts": float(budget.restarts),
            "env/deadline": float(budget.deadlines),
        }
        return Report(len(self._running), tokens, time.monotonic() - self._last_turn, self._healthy, counters)

    def _turn(self) -> None:
        self._last_turn = time.monotonic()
        self._loop.call_later(BEAT_S / 4, self._turn)

    def _beat(self) -> None:
        """A sign of life every second, from beside the event loop: a long pass of the model is no fault, and the
        report says for how long the loop has stood still."""
        while not self._closed.wait(BEAT_S):
            self._healthy = self.engine.health()
            self._send("beat", self.report())

    def _play(self, assignments: list[Assignment]) -> None:
        """Begin episodes; all of one message meet the engine in the same turn of the loop, as those of one
        Collector.collect do."""
        if not self._running:
            self._pool.budget.refill()
        for assignment in assignments:
            self._running[assignment.number] = self._loop.create_task(self._episode(assignment))

    async def _episode(self, assignment: Assignment) -> None:
        a, number, sampling = assignment, assignment.number, assignment.sampling
        if sampling not in self._collectors:
            self._collectors[sampling] = self._make_collector(sampling)
        try:
            trajectory = await self._collectors[sampling].play(a.task, a.group, a.sibling, seed=a.seed)
        except Exception as error:
            self._send("failed", number, reported(error))
            return
        finally:
            self._running.pop(number, None)
        if trajectory.status is Status.ENGINE_ERROR:
            self._healthy = self.engine.health()
        self._send("played", number, trajectory, self.report())

    def _cancel(self, numbers: list[int]) -> None:
        for number in numbers:
            if number in self._running:
                self._running[number].cancel()

    def _command(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            if method not in COMMANDS:
                hint = f"one of {', '.join(COMMANDS)}"
                raise ContractError(f"{method!r} is not a command", where="worker", hint=hint)
            with_data = method == "take" and "data" in arguments[0]
            answer = self._take_data(*arguments) if with_data else getattr(self._receiver, method)(*arguments)
            self._send("answer", number, answer)
        except Exception as error:
            self._send("refused", number, reported(error))

    def _take_data(self, bucket: dict[str, Any], timeout_s: float) -> Any:
        """A bucket whose file is on the controller's machine came as bytes: the engine reads it from a file here."""
        with tempfile.TemporaryDirectory(prefix="spearrl-") as folder:
            path = Path(folder, Path(bucket["path"]).name)
            path.write_bytes(bucket["data"])
            return self._receiver.take(
                {"path": str(path), **{k: v for k, v in bucket.items() if k not in ("data", "path")}}, timeout_s
            )

    def _send(self, kind: str, *values: Any) -> None:
        try:
            data = pickled((kind, *values))
        except ContractError as error:
            data = pickled(("refused" if kind == "answer" else "failed", values[0], error))
        self._send_bytes(data)


def reported(error: Exception) -> SpearError:
    """An error that the controller can raise, which is told of it in this process too."""
    traceback.print_exception(error)
    return portable(error, where="rollout worker", hint="this is a fault of the environment or of spearrl")
