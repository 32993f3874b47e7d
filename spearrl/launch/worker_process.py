"""A rollout worker's process, `python -m spearrl.launch.worker_process`: builds the worker and serves the controller.

`processes` starts it; messages travel over a socket.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from spearrl.config import RunConfig
from spearrl.launch.factories import make_collector, make_engine, make_environment, make_pool, receiver_of
from spearrl.models import directory_of, load_tokenizer, prepare_torch, threads_of
from spearrl.models.formats import open_format
from spearrl.processes import Child, connection_to_parent
from spearrl.rollout.workers.link import Launcher, Link
from spearrl.rollout.workers.messages import Start
from spearrl.rollout.workers.rollout_worker import RolloutWorker, reported

GOODBYE_S = 3.0


def processes(start: Start, folder: Path, environments: Sequence[Mapping[str, str]] = ()) -> Launcher:
    """Starts workers as processes of this machine.

    Args:
        start: what each is built from, but for its index. The model's directory must stay for as long as workers may
            have to be replaced.
        folder: where worker-<index>.log goes.
        environments: variables of each worker's process, CUDA_VISIBLE_DEVICES among them.
    """
    config = start.config
    cores = max(1, threads_of(config) // max(1, config.rollout.workers))

    def launch(index: int) -> Link:
        variables = {"OMP_NUM_THREADS": str(cores), "PYTHONUNBUFFERED": "1"}
        variables |= environments[index] if environments else {}
        variables |= token_of(config)
        child = Child("spearrl.launch.worker_process", variables, log=folder / f"worker-{index}.log")
        child.send(pickle.dumps(("start", replace(start, index=index))))
        return child

    return launch


def token_of(config: RunConfig) -> dict[str, str]:
    """The one secret that a worker's process gets: the token of vLLM servers, where it asks some."""
    name = config.vllm.token_variable
    return {name: os.environ[name]} if config.vllm.servers and name in os.environ else {}


def build_worker(start: Start, send: Callable[[bytes], None]) -> RolloutWorker:
    """The worker that a config names. Raises SpearError: environment, model or engine cannot be built."""
    config = start.config
    device = prepare_torch(config, share=max(1, config.rollout.workers))
    folder = str(directory_of(start.model_dir))
    environment = make_environment(config)
    encoder = open_format(load_tokenizer(folder), config.model, environment.tools())
    pool = make_pool(config, environment)
    shared = {"colocated": start.colocated, "sleeps": start.sleeps, "tokenizer": encoder.tokenizer}
    engine = make_engine(config, folder, device=device, index=start.index, **shared)
    return RolloutWorker(
        config.rollout.engine,
        engine,
        receiver_of(engine),
        pool,
        make_collector=lambda sampling: make_collector(config, engine, encoder, pool, sampling=sampling),
        send=send,
    )


def open_worker(data: bytes, send: Callable[[bytes], None]) -> RolloutWorker | None:
    """A worker from its ("start", Start) message; where it cannot be built the controller is told why."""
    _, start = pickle.loads(data)
    try:
        return build_worker(start, send)
    except Exception as error:
        send(pickle.dumps(("failed", None, reported(error))))
        return None


def main() -> None:
    """Serve the controller at the other end of a socket until it closes; nothing that was started here stays behind."""
    faulthandler.enable()  # a crash leaves its stack in the log
    connection, lock = connection_to_parent(_end), threading.Lock()

    def send(data: bytes) -> None:
        try:
            with lock:
                connection.send_bytes(data)
        except OSError:
            return  # nobody listens any more; the next receive ends the process

    def listen(worker: RolloutWorker) -> None:
        try:
            while worker.deliver(connection.recv_bytes()):
                continue
        except (EOFError, OSError):
            print("the controller is gone", file=sys.stderr)
        worker.close()
        time.sleep(GOODBYE_S)  # for environments and engine to be released
        _end()

    worker = open_worker(connection.recv_bytes(), send)
    if worker is not None:
        threading.Thread(target=listen, args=(worker,), name="controller", daemon=True).start()
        worker.serve()
    _end()


def _end() -> None:
    """End this process and its children, an engine's core among them."""
    sys.stdout.flush()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
