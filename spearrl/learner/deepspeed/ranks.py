"""The processes of a DeepSpeed learner: rank 0 is the trainer's own, the others wait for its commands (`serve`).

Commands and heartbeats go through the rendezvous store, rows and results through gloo, and DeepSpeed's own traffic
through gloo or NCCL. Every wait for a rank that works is bounded by learner.timeout_s; a rank without a command waits
as long as rank 0 lives.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from spearrl.batching.nested_tensors import pack, unpack
from spearrl.errors import ConfigError, SpearError, WorkerError, printable
from spearrl.learner.deepspeed.signing import BYTES, VARIABLE, Signer
from spearrl.processes import Child, under_launcher

Execute = Callable[[str, Any, Any], Any]  # (command, what all ranks are sent, this rank's part) → this rank's result
HEARTBEAT_S, GRACE_S, START_S = 1.0, 5.0, 120.0
RESUME = "resume the run from its last checkpoint"
CONNECTION_WORDS = ("gloo", "timed out", "connection", "socket")  # in errors of a broken collective


class RankGroup:
    """This process as one of all ranks, once they are all there."""

    def __init__(self, store: Any, rank: int, size: int, *, signer: Signer, device: str, timeout_s: float):
        self.store, self.rank, self.size, self.signer = store, rank, size, signer
        self._messages: Counter[str] = Counter()  # so far, by sender and receiver
        local_rank, limit = int(os.environ.setdefault("LOCAL_RANK", "0")), timedelta(seconds=timeout_s)
        if device == "cuda":
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"
        backend, world = "nccl" if device == "cuda" else "gloo", dist.PrefixStore("world", store)
        dist.init_process_group(backend, store=world, rank=rank, world_size=size, timeout=limit)
        self.gloo = dist.new_group(backend="gloo", timeout=limit)

    def send(self, tree: Any, rank: int) -> None:
        """Send a value that `nested_tensors.pack` takes."""
        packed = pack(tree)
        seal = self.signer.seal(self._next(self.rank, rank), packed.numpy())
        dist.send(torch.tensor([len(packed)]), rank, group=self.gloo)
        dist.send(torch.frombuffer(bytearray(seal), dtype=torch.uint8), rank, group=self.gloo)
        dist.send(packed, rank, group=self.gloo)

    def receive(self, rank: int) -> Any:
        """What that rank sends. Raises WorkerError for a message without this run's signature."""
        size, seal = torch.zeros(1, dtype=torch.int64), torch.empty(BYTES, dtype=torch.uint8)
        dist.recv(size, rank, group=self.gloo)
        dist.recv(seal, rank, group=self.gloo)
        packed = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(packed, rank, group=self.gloo)
        if not self.signer.sound(self._next(rank, self.rank), seal.numpy().tobytes(), packed.numpy()):
            text, hint = "a message lacks this run's signature", f"give all ranks the same {VARIABLE}"
            raise WorkerError(text, where=f"learner rank {rank}", hint=hint)
        return unpack(packed)

    def _next(self, sender: int, receiver: int) -> str:
        """The name of the next message between two ranks."""
        way = f"{sender}>{receiver}"
        self._messages[way] += 1
        return f"{way}/{self._messages[way]}"

    def close(self) -> None:
        """Leave the process group, so that another can be made.

        DeepSpeed would use this one for ever, and number parameters on from where it is.
        """
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
    """All ranks, as rank 0 commands them. Starts `processes - 1` of them, or takes those that a launcher started.

    Args:
        execute: runs a command in this process; the other ranks run theirs in `serve`.
        device: "cpu" or "cuda".
        environments: environment variables of each rank that is started (the first, this process's own, is unused).
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
            hint = "a process has one such learner at a time: close it first"
            raise ConfigError("this process is in a process group already", where="DeepSpeedLearner", hint=hint)
        self.execute, self.timeout_s = execute, timeout_s
        self.children: dict[int, Child] = {}
        self.commands, self.closed, self.signer = 0, False, Signer.of_environment()
        self.group: RankGroup | None = None
        threads = torch.get_num_threads()
        try:
            if under_launcher():
                store, _, size = next(dist.rendezvous("env://"))
                if processes not in (1, size):
                    text = f"learner.processes={processes}, but the launcher started {size}"
                    raise ConfigError(text, where="learner.processes", hint=f"use learner.processes={size}")
            else:
                store, size = self._start(processes, environments, max(1, threads // processes)), processes
            # Of this process: between commands, and while every rank works.
            self.threads = (threads, max(1, threads // (len(self.children) + 1)) if device == "cpu" else threads)
            self.signer.write(store, "setup", json.dumps({"device": device, "timeout_s": timeout_s}))
            self._await_all(store, size)
            self.group = RankGroup(store, 0, size, signer=self.signer, device=device, timeout_s=timeout_s)
        except BaseException:
            self.close(failed=True)
            raise

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._open_group().size

    def call(self, name: str, common: Any = None, parts: Sequence[Any] | None = None) -> list[Any]:
        """Have every rank run a command on `common` and its own part; returns their results, by rank.

        Raises:
            WorkerError: a rank died, failed or did not answer; it is named, and no further command is accepted.
        """
        group = self._open_group()
        try:
            return self._call(group, name, common, parts)
        except BaseException as error:
            diagnosed = self._diagnosed(group, error, name)
            self.close(failed=True)
            if diagnosed is error:
                raise
            raise diagnosed from error

    def close(self, *, failed: bool = False) -> None:
        """End the other ranks: by a command, or by force where one of them failed."""
        if self.closed:
            return
        self.closed = True
        if self.group is not None and not failed:
            self.signer.write(self.group.store, f"command/{self.commands}", json.dumps({"name": "close"}))
        for child in self.children.values():
            child.end(0 if failed else GRACE_S)
        if self.group is not None:
            self.group.close()

    def _open_group(self) -> RankGroup:
        if self.group is None or self.closed:
            raise WorkerError("the learner's processes are gone", where="learner", hint=RESUME)
        return self.group

    def _call(self, group: RankGroup, name: str, common: Any, parts: Sequence[Any] | None) -> list[Any]:
        command = {"name": name, "common": common, "part": parts is not None}
        self.signer.write(group.store, f"command/{self.commands}", json.dumps(command))
        self.commands += 1
        between, during = self.threads
        torch.set_num_threads(during)
        done = threading.Event()
        threading.Thread(target=self._watch, args=(group, name, done), daemon=True).start()
        try:
            if parts is not None:
                for rank in range(1, group.size):
                    group.send(parts[rank], rank)
            own = self.execute(name, common, None if parts is None else parts[0])
            return [own, *(group.receive(rank) for rank in range(1, group.size))]
        finally:
            done.set()
            torch.set_num_threads(between)

    def _watch(self, group: RankGroup, name: str, done: threading.Event) -> None:
        """End this process where a command would not end.

        Of a rank that is gone gloo tells by an error; a command that waits for it on a GPU waits for ever.
        """
        while not done.wait(HEARTBEAT_S):
            fault = self._fault(group, name)
            if fault is not None and not done.wait(2 * GRACE_S):
                print(printable(str(fault)), file=sys.stderr, flush=True)
                os._exit(fault.exit_code)

    def _start(self, processes: int, environments: Sequence[Mapping[str, str]], threads: int) -> Any:
        """Start the other ranks; returns the store."""
        # By itself the store listens on every interface, and it carries commands; here every user of the machine can.
        secret = secrets.token_hex()
        self.signer = Signer(secret)
        listener = socket.create_server(("127.0.0.1", 0))
        port, limit = listener.getsockname()[1], timedelta(seconds=self.timeout_s)
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=limit, master_listen_fd=listener.detach()
        )
        common = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        common |= {"OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        for rank in range(1, processes):
            variables = {key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            variables |= {VARIABLE: secret, **(environments[rank] if environments[rank:] else {})}
            self.children[rank] = Child("spearrl.learner.rank_process", variables)
        return store

    def _await_all(self, store: Any, size: int) -> None:
        """Wait until every rank has a heartbeat: one that cannot start must not cost the whole limit."""
        limit = max(self.timeout_s, START_S)
        deadline, missing = time.monotonic() + limit, set(range(1, size))
        while missing:
            missing = {rank for rank in missing if not store.check([f"beat/{rank}"])}
            dead = [rank for rank in missing & self.children.keys() if self.children[rank].process.poll() is not None]
            if dead or time.monotonic() > deadline:
                what = f"did not come up in {limit:g} s (learner.timeout_s)"
                if dead:
                    what = f"ended: {self.children[dead[0]].ending()}"
                where = f"learner rank {(dead or sorted(missing))[0]}"
                raise WorkerError(f"the process {what}", where=where, hint="its own output says why")
            time.sleep(0.05)

    def _diagnosed(self, group: RankGroup, error: BaseException, name: str) -> BaseException:
        """The error to raise: one that names the rank at fault, or `error` itself where this process is at fault."""
        collective = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in CONNECTION_WORDS)
        if isinstance(error, SpearError) or not isinstance(error, RuntimeError) or not collective:
            return error
        store, others = group.store, range(1, group.size)
        beats = {rank: store.get(f"beat/{rank}") for rank in others}
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            if (fault := self._fault(group, name)) is not None:
                return fault
            time.sleep(0.1)
        silent = [rank for rank in others if store.get(f"beat/{rank}") == beats[rank]]
        if silent:
            text = f"the process does not respond (command {name!r})"
            return WorkerError(text, where=f"learner rank {silent[0]}", hint=RESUME)
        text = f"{name!r} took longer than learner.timeout_s={self.timeout_s:g} s, or a connection broke: {error}"
        hint = "every rank is alive: raise learner.timeout_s, or check the network"
        return WorkerError(text, where="learner ranks", hint=hint)

    def _fault(self, group: RankGroup, name: str) -> WorkerError | None:
        """What a rank reported, or that it ended."""
        for rank in range(1, group.size):
            key = f"error/{rank}"
            if group.store.check([key]) and (said := self.signer.read(group.store, key)) is not None:
                text = f"{name!r} failed: {said}"
                return WorkerError(text, where=f"learner rank {rank}", hint=RESUME)
        for rank, child in self.children.items():
            if child.process.poll() is not None:
                text = f"the process ended during {name!r}: {child.ending()}"
                return WorkerError(text, where=f"learner rank {rank}", hint=RESUME)
        return None


def serve_commands(execute: Execute) -> int:
    """Be a rank: wait for commands, run them, answer. Returns the exit code."""
    # Ctrl-C reaches every process of the terminal, and a launcher that is stopped sends SIGTERM to all ranks: rank 0
    # decides when the run is over, and finishes its step with the others' help.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    store, rank, size = next(dist.rendezvous("env://"))
    threading.Thread(target=_beat, args=(store.clone(), rank), daemon=True).start()
    signer = Signer.of_environment()
    group = RankGroup(store, rank, size, signer=signer, **json.loads(signer.wait(store, "setup")))
    number = 0
    while True:
        command = json.loads(signer.wait(store, f"command/{number}"))
        number += 1
        if command["name"] == "close":
            group.close()
            return 0
        try:
            part = group.receive(0) if command["part"] else None
            group.send(execute(command["name"], command["common"], part), 0)
        except SpearError as error:
            signer.write(store, f"error/{rank}", str(error))
            return error.exit_code
        except Exception as error:
            signer.write(store, f"error/{rank}", f"{type(error).__name__}: {error}")
            raise


def _beat(store: Any, rank: int) -> None:
    """Write a heartbeat while this process lives, and end it once the trainer's is gone."""
    try:
        while True:
            store.add(f"beat/{rank}", 1)
            time.sleep(HEARTBEAT_S)
    except RuntimeError:
        print(f"learner rank {rank}: the trainer's process is gone", file=sys.stderr)
        os._exit(1)
