"""Rollout workers as Ray actors, spread over the machines of a cluster."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from spearrl.errors import ConfigError
from spearrl.launch.worker_process import open_worker, token_of
from spearrl.processes import as_for_children, child_environment, log_tail
from spearrl.rollout.workers.link import Launcher, Link
from spearrl.rollout.workers.messages import Start
from spearrl.rollout.workers.rollout_worker import RolloutWorker

RESOURCES_S = 30.0  # in which a cluster that is just being started may bring what is asked of it
CONNECT_S = 10.0
POLL_S = 1.0


class WorkerActor:
    """The same worker as in a process, inside an actor, which hands its messages out."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[bytes] = SimpleQueue()
        self._worker: RolloutWorker | None = None

    def start(self, data: bytes, log: str) -> None:
        """Build the worker beside this call; it logs into the run's directory where it can, else into Ray's logs."""
        if Path(log).parent.is_dir():
            file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.dup2(file, 1)
            os.dup2(file, 2)
        threading.Thread(target=self._serve, args=(data,), daemon=True).start()

    def deliver(self, data: bytes) -> None:
        """A message of the controller."""
        if self._worker is not None and not self._worker.deliver(data):
            self._worker.close()

    def take(self, timeout_s: float) -> list[bytes]:
        """The worker's messages since the last call; waits for the first one."""
        messages: list[bytes] = []
        try:
            messages.append(self._messages.get(timeout=timeout_s))
            while True:
                messages.append(self._messages.get_nowait())
        except Empty:
            return messages

    def _serve(self, data: bytes) -> None:
        self._worker = open_worker(data, self._messages.put)
        if self._worker is not None:
            self._worker.serve()
            os._exit(0)  # what is closed is not waited for


class ActorLink:
    """One actor, as a Link of rollout/workers/link.py."""

    def __init__(self, actor: Any, start: Start, log: Path):
        self._actor, self._log = actor, log
        self._received: deque[bytes] = deque()
        self._ending = "its actor was not scheduled, or ended"
        self._started = actor.start.remote(pickle.dumps(("start", start)), str(log))

    def send(self, data: bytes) -> None:
        self._actor.deliver.remote(data)  # that an actor is dead shows in `receive`

    def receive(self) -> bytes:
        import ray

        while not self._received:
            try:
                self._received.extend(ray.get(self._actor.take.remote(POLL_S)))
            except ray.exceptions.RayError as error:
                self._ending = " ".join(str(error).split())[:400]
                raise ConnectionError(self._ending) from error
        return self._received.popleft()

    def kill(self) -> None:
        import ray

        if ray.is_initialized():
            ray.kill(self._actor)

    def ending(self) -> str:
        return f"{self._ending}{log_tail(self._log)}"


def actors(start: Start, folder: Path, *, gpus: int = 0) -> Launcher:
    """Starts workers as actors, on the cluster at RAY_ADDRESS or on a local one.

    Args:
        start: what each is built from, but for its index. Every machine of the cluster can read the model's directory.
        folder: where worker-<index>.log goes, on machines that have it.
        gpus: of each worker; Ray says which.
    Raises:
        ConfigError: Ray is not installed, no cluster answers, or it does not have what the workers need.
    """
    ray, config = _connect(), start.config
    _await_resources(ray, {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}, config.rollout.workers)
    variables = {
        "PYTHONPATH": child_environment()["PYTHONPATH"],
        "OMP_NUM_THREADS": str(max(1, config.run.threads)),
        **token_of(config),
    }
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_concurrency=8)(WorkerActor)
    remote = remote.options(scheduling_strategy="SPREAD", runtime_env={"env_vars": variables})

    def launch(index: int) -> Link:
        return ActorLink(remote.remote(), replace(start, index=index), folder.resolve() / f"worker-{index}.log")

    return launch


def _connect() -> Any:
    try:
        import ray
    except ImportError as error:
        hint = 'pip install "spearrl[ray]", or use rollout.launcher=processes'
        raise ConfigError("Ray is not installed", where="rollout.launcher", hint=hint) from error
    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS")
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    try:
        if host:  # Ray itself tries for minutes, and then ends the process
            socket.create_connection((host, int(port)), CONNECT_S).close()
        with as_for_children({}):  # a cluster of this machine starts here
            ray.init(
                address=address or "local",
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level="warning",
            )
    except (OSError, RuntimeError, ValueError) as error:
        text = f"no Ray cluster answers at {address or 'local'}: {error}"
        hint = "start one with `ray start --head` and set RAY_ADDRESS, or unset it for a cluster of this machine alone"
        raise ConfigError(text, where="RAY_ADDRESS", hint=hint) from error
    return ray


def _await_resources(ray: Any, needs: Mapping[str, int], workers: int) -> None:
    """Wait until the cluster has what each worker needs. Raises ConfigError naming what it lacks."""

    def lacking() -> str:
        resources = ray.cluster_resources()
        missing = [
            (name, need * workers, resources.get(name, 0.0))
            for name, need in needs.items()
            if resources.get(name, 0.0) < need * workers
        ]
        return ", ".join(f"{need:g} {name} (it has {has:g})" for name, need, has in missing)

    end = time.monotonic() + RESOURCES_S
    if text := lacking():
        print(f"waiting for the Ray cluster to have {text}", file=sys.stderr)
    while text := lacking():
        if time.monotonic() > end:
            nodes = sum(node["Alive"] for node in ray.nodes())
            raise ConfigError(
                f"rollout.workers={workers} needs {text} of a Ray cluster of {nodes} machines",
                where="rollout.launcher",
                hint="add machines with `ray start --address=…`, or lower rollout.workers",
            )
        time.sleep(0.2)
