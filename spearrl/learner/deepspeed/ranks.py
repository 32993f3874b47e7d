"""The processes of a DeepSpeed learner: rank 0 is the trainer's own, the others wait for its commands (`serve`).

Commands and signs of life go through the rendezvous store, rows and results through gloo, and DeepSpeed's own traffic through gloo or NCCL. Every
wait for a rank that works is bounded by learner.timeout_s; a rank without a command waits as long as rank 0 lives.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from spearrl.errors import ConfigError, SpearError, WorkerError
from spearrl.learner.deepspeed.wire import pack, unpack
from spearrl.processes import child_environment, under_launcher

Execute = Callable[[str, Any, Any], Any]  # (command, what all ranks are told, this rank's part) → this rank's result
BEAT_S, GRACE_S, START_S = 1.0, 5.0, 120.0
RESUME = "resume the run from its last checkpoint"
PARENT = "SPEARRL_LEARNER_PARENT"
CHILD = "from spearrl.learner import serve; raise SystemExit(serve())"


class Link:
    """A process's place among the ranks, once all of them are there."""

    def __init__(self, store: Any, rank: int, size: int, *, device: str, timeout_s: float):
        self.store, self.rank, self.size = store, rank, size
        place = int(os.environ.setdefault("LOCAL_RANK", "0"))
        if device == "cuda":
            torch.cuda.set_device(place % torch.cuda.device_count())
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.PrefixStore("world", store),
            rank=rank,
            world_size=size,
            timeout=limit,
        )
        self.control = dist.new_group(backend="gloo", timeout=limit)

    def send(self, tree: Any, rank: int) -> None:
        packed = pack(tree)
        dist.send(torch.tensor([len(packed)]), rank, group=self.control)
        dist.send(packed, rank, group=self.control)

    def receive(self, rank: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, rank, group=self.control)
        packed = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(packed, rank, group=self.control)
        return unpack(packed)

    def close(self) -> None:
        """Leave the process group, so that another can be made: DeepSpeed would use this one for ever, and number on from where it is."""
        deepspeed = sys.modules.get("deepspeed")
        if deepspeed is None or deepspeed.comm.comm.cdb is None:
            dist.destroy_process_group()
            return
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        deepspeed.comm.destroy_process_group()  # also forgets the groups that DeepSpeed keeps
        deepspeed.comm.comm.cdb = None
        deepspeed.zero.Init.param_id = 0
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


class Ranks:
    """Rank 0's hold on all ranks. Starts `processes - 1` of them, or finds those that a launcher started.

    Args:
        execute: runs a command in this process; the other ranks run theirs in `serve`.
        device: "cpu" or "cuda".
        environments: environment variables of each rank that is started (the first, this process's own, is left alone).
    Raises:
        ConfigError: the launcher started another number. WorkerError: a rank did not come up.
    """

    def __init__(
        self,
        execute: Execute,
        processes: int,
        *,
        device: str,
        timeout_s: float,
        environments: Sequence[Mapping[str, str]] = (),
    ):
        if dist.is_initialized():
            raise ConfigError(
                "this process is in a process group already",
                where="DeepSpeedLearner",
                hint="a process has one such learner at a time: close it first",
            )
        self.execute, self.timeout_s = execute, timeout_s
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        self.commands, self.closed = 0, False
        self.link: Link | None = None
        threads = torch.get_num_threads()
        try:
            store, size = (
                self._launched(processes)
                if under_launcher()
                else self._start(processes, environments, max(1, threads // processes))
            )
            self.threads = (threads, max(1, threads // (len(self.children) + 1)) if device == "cpu" else threads)
            store.set("setup", json.dumps({"device": device, "timeout_s": timeout_s}))
            self._await_all(store, size)
            self.link = Link(store, 0, size, device=device, timeout_s=timeout_s)
        except BaseException:
            self.close(failed=True)
            raise

    @property
    def size(self) -> int:
        return self._linked().size

    def _linked(self) -> Link:
        if self.link is None or self.closed:
            raise WorkerError("the learner's processes are gone", where="learner", hint=RESUME)
        return self.link

    def call(self, name: str, common: Any = None, parts: Sequence[Any] | None = None) -> list[Any]:
        """Every rank runs a command on `common` and its own part; their results, by rank.

        Raises:
            WorkerError: a rank died, failed or did not answer; it is named, and no further command is accepted.
        """
        link = self._linked()
        try:
            return self._call(link, name, common, parts)
        except BaseException as error:
            raised = self._diagnosed(error, name)
            self.close(failed=True)
            if raised is error:
                raise
            raise raised from error

    def close(self, *, failed: bool = False) -> None:
        """Dismiss the ranks: politely, or by force where one of them failed."""
        if self.closed:
            return
        self.closed = True
        if self.link is not None and not failed:
            self.link.store.set(f"command/{self.commands}", json.dumps({"name": "close"}))
        for child in self.children.values():
            try:
                child.wait(0 if failed else GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if self.link is not None:
            self.link.close()

    def _call(self, link: Link, name: str, common: Any, parts: Sequence[Any] | None) -> list[Any]:
        link.store.set(
            f"command/{self.commands}", json.dumps({"name": name, "common": common, "part": parts is not None})
        )
        self.commands += 1
        before, during = self.threads
        torch.set_num_threads(during)
        done = threading.Event()
        threading.Thread(target=self._watch, args=(name, done), daemon=True).start()
        try:
            if parts is not None:
                for rank in range(1, link.size):
                    link.send(parts[rank], rank)
            found = [self.execute(name, common, None if parts is None else parts[0])]
            return found + [link.receive(rank) for rank in range(1, link.size)]
        finally:
            done.set()
            torch.set_num_threads(before)

    def _watch(self, name: str, done: threading.Event) -> None:
        """A rank that is gone ends a command by an error of gloo's; a command that waits for it on a GPU would not end. This process then goes too."""
        while not done.wait(BEAT_S):
            fault = self._fault(name)
            if fault is not None and not done.wait(2 * GRACE_S):
                print(fault, file=sys.stderr, flush=True)
                os._exit(fault.exit_code)

    def _launched(self, processes: int) -> tuple[Any, int]:
        store, _, size = next(dist.rendezvous("env://"))
        if processes not in (1, size):
            hint = f"use learner.processes={size}"
            raise ConfigError(
                f"learner.processes={processes}, but the launcher started {size}", where="learner.processes", hint=hint
            )
        return store, size

    def _start(self, processes: int, environments: Sequence[Mapping[str, str]], threads: int) -> tuple[Any, int]:
        listener = socket.create_server(
            ("127.0.0.1", 0)
        )  # by itself the store listens on every interface, and it carries commands
        port, limit = listener.getsockname()[1], timedelta(seconds=self.timeout_s)
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=limit, master_listen_fd=listener.detach()
        )
        for rank in range(1, processes):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": store.port,
                PARENT: os.getpid(),
            }
            environment = {**child_environment(), **{key: str(value) for key, value in place.items()}}
            environment |= {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
            given = environments[rank] if rank < len(environments) else {}
            self.children[rank] = subprocess.Popen(
                [sys.executable, "-c", CHILD], env={**environment, **given}, stdin=subprocess.DEVNULL, stdout=sys.stderr
            )
        return store, processes

    def _await_all(self, store: Any, size: int) -> None:
        """Until every rank has said that it is there: a rank that cannot start must not cost the whole limit."""
        limit = max(self.timeout_s, START_S)
        deadline, missing = time.monotonic() + limit, set(range(1, size))
        while missing:
            missing = {rank for rank in missing if not store.check([f"beat/{rank}"])}
            dead = [rank for rank in missing if rank in self.children and self.children[rank].poll() is not None]
            if dead or time.monotonic() > deadline:
                what = (
                    f"ended with exit code {self.children[dead[0]].returncode}"
                    if dead
                    else f"did not come up in {limit:g} s (learner.timeout_s)"
                )
                raise WorkerError(
                    f"the process {what}",
                    where=f"learner rank {(dead or sorted(missing))[0]}",
                    hint="its own output says why",
                )
            time.sleep(0.05)

    def _diagnosed(self, error: BaseException, name: str) -> BaseException:
        """The error to raise: one that names the rank at fault, or the given one where this process is."""
        talk = isinstance(error, dist.DistError) or any(
            word in str(error).lower() for word in ("gloo", "timed out", "connection", "socket")
        )
        if self.link is None or isinstance(error, SpearError) or not isinstance(error, RuntimeError) or not talk:
            return error
        store, others = self.link.store, range(1, self.link.size)
        beats = {rank: store.get(f"beat/{rank}") for rank in others}
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            fault = self._fault(name)
            if fault is not None:
                return fault
            time.sleep(0.1)
        silent = [rank for rank in others if store.get(f"beat/{rank}") == beats[rank]]
        if silent:
            return WorkerError(
                f"the process does not respond (command {name!r})", where=f"learner rank {silent[0]}", hint=RESUME
            )
        message = f"{name!r} took longer than learner.timeout_s={self.timeout_s:g} s, or a connection broke: {error}"
        return WorkerError(
            message, where="learner ranks", hint="every rank is alive: raise learner.timeout_s, or check the network"
        )

    def _fault(self, name: str) -> WorkerError | None:
        """What a rank reported, or that it ended."""
        store = self._linked().store
        for rank in range(1, self.size):
            if store.check([f"error/{rank}"]):
                return WorkerError(
                    f"{name!r} failed: {store.get(f'error/{rank}').decode()}", where=f"learner rank {rank}", hint=RESUME
                )
        for rank, child in self.children.items():
            if child.poll() is not None:
                return WorkerError(
                    f"the process {_ending(child.returncode)} during {name!r}",
                    where=f"learner rank {rank}",
                    hint=RESUME,
                )
        return None


def serve_commands(execute: Execute) -> int:
    """A rank's life: wait for commands, run them, answer. Returns the exit code."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process of the terminal; rank 0 decides when it is over
    store, rank, size = next(dist.rendezvous("env://"))
    threading.Thread(target=_live, args=(store.clone(), rank), daemon=True).start()
    _wait(store, "setup")
    setup = json.loads(store.get("setup"))
    link = Link(store, rank, size, device=setup["device"], timeout_s=setup["timeout_s"])
    if (
        PARENT not in os.environ
    ):  # a launcher that is told to stop sends this to all ranks: rank 0 finishes its step, with the others' help
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    number = 0
    while True:
        _wait(store, f"command/{number}")
        command = json.loads(store.get(f"command/{number}"))
        number += 1
        if command["name"] == "close":
            link.close()
            return 0
        try:
            part = link.receive(0) if command["part"] else None
            link.send(execute(command["name"], command["common"], part), 0)
        except SpearError as error:
            store.set(f"error/{rank}", str(error))
            return error.exit_code
        except Exception as error:
            store.set(f"error/{rank}", f"{type(error).__name__}: {error}")
            raise


def _wait(store: Any, key: str) -> None:
    store.wait([key], timedelta(days=3650))  # `_live` ends it where nothing can come any more


def _live(store: Any, rank: int) -> None:
    """Say so while this process lives, and end it with the trainer's."""
    parent = int(os.environ.get(PARENT, "0"))
    try:
        while not parent or os.getppid() == parent:
            store.add(f"beat/{rank}", 1)
            time.sleep(BEAT_S)
    except RuntimeError:
        print(f"learner rank {rank}: the trainer's process is gone", file=sys.stderr)
    os._exit(1)


def _ending(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
