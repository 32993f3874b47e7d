"""vLLM's own weight transfer between GPUs: NCCL to engines with GPUs of their own, CUDA IPC to an engine on the
learner's GPU.

vLLM's trainer-side classes do the sending; they talk to engines through a client of four methods, which here speaks to
all receivers at once.
"""

from __future__ import annotations

import base64
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from spearrl.errors import ConfigError, EngineError
from spearrl.sync.buckets import buckets, cast, digest
from spearrl.sync.receivers import GRACE_S, Receiver, ReceiverGroup


class Meta(NamedTuple):
    """A parameter as vLLM's trainer side announces it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class LearnerSource:
    """The learner's weights as vLLM's WeightSource: metadata without sending, and any number of passes.

    A bucket is gathered whole before its first tensor is handed over, and the device is idle in between: gathering uses
    the learner's process group and sending the engines', and two groups at work at a time can wait for each other for
    ever.
    """

    def __init__(self, learner: Any, limit: int, dtype: torch.dtype | None, device: torch.device):
        self.learner, self.limit, self.dtype, self.device = learner, limit, dtype, device
        self.digests: dict[str, int] = {}
        self.bytes = self.buckets = 0
        self._meta: list[Meta] = []

    def metadata(self) -> list[Meta]:
        if not self._meta:  # names and shapes never change
            self._meta = [
                Meta(name, cast(tensor, self.dtype).dtype, tuple(tensor.shape))
                for name, tensor in self.learner.full_parameters()
            ]
        return self._meta

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.digests, self.bytes, self.buckets = {}, 0, 0
        for bucket in buckets(self.learner.full_parameters(), self.limit, self.dtype):
            tensors = {name: tensor.to(self.device) for name, tensor in bucket.items()}
            self.digests |= {name: digest(tensor) for name, tensor in tensors.items()}
            self.buckets += 1
            self.bytes += sum(tensor.nbytes for tensor in tensors.values())
            self._idle()
            yield from tensors.items()
            self._idle()

    def _idle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Client:
    """vLLM's trainer-side client: each of its calls goes to every receiver."""

    def __init__(self, group: ReceiverGroup, plan: dict[str, Any]):
        self.group, self.plan = group, plan
        self.received: list[tuple[Receiver, dict[str, int]]] = []
        self.failure: BaseException | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every receiver joins the trainer's group; its GPUs follow those of the receivers before it."""
        offsets, rank = {}, init_info.get("rank_offset")
        for receiver in self.group.live:
            offsets[receiver.name] = {} if rank is None else {"rank_offset": rank}
            rank = None if rank is None else rank + receiver.shards
        self._call(
            "the meeting with the trainer",
            lambda r: r.begin({**self.plan, "init": {**init_info, **offsets[r.name]}}, self.group.timeout_s),
        )

    def start_weight_update(self) -> None:
        self._call("begin", lambda r: r.begin(self.plan, self.group.timeout_s))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Runs beside the broadcast; what receivers got is kept."""
        handles = update_info.get("ipc_handles")
        info = {name: value for name, value in update_info.items() if value is not None and name != "ipc_handles"}
        if handles is not None:  # vLLM reads them back itself, where its process allows it
            info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        answers = self._call("the update", lambda r: r.take({"update": info}, self.group.timeout_s))
        earlier = {id(receiver): digests for receiver, digests in self.received}
        self.received = [(receiver, {**earlier.get(id(receiver), {}), **digests}) for receiver, digests in answers]

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The bridge finishes, with the version."""

    def _call(self, phase: str, call: Any) -> list[tuple[Receiver, Any]]:
        try:
            return self.group.call(phase, call)
        except BaseException as error:
            self.failure = error  # vLLM's sender may be stuck in a broadcast that nobody joins
            raise


class Native:
    """The sending half for one set of receivers."""

    def __init__(
        self, kind: str, learner: Any, *, limit: int, dtype: torch.dtype | None, device: torch.device | None = None
    ):
        device = device or torch.device("cuda", torch.cuda.current_device())
        self.kind, self.limit = kind, limit
        self.source = LearnerSource(learner, limit, dtype, device)
        self._receivers: list[int] = []
        self._trainer: Any = None

    def serves(self, kind: str, receivers: list[Receiver]) -> bool:
        """Whether its process group is of these receivers: a replaced one means a new group."""
        return kind == self.kind and self._receivers == [id(receiver) for receiver in receivers]

    def send(
        self, group: ReceiverGroup, plan: dict[str, Any]
    ) -> tuple[list[tuple[Receiver, dict[str, int]]], dict[str, int]]:
        """One pass over the weights; digests as received, by receiver, and as sent.

        Raises:
            EngineError: a receiver failed or did not join within the group's time limit.
        """
        client = Client(group, plan)
        done: Future[None] = Future()
        threading.Thread(target=self._drive, args=(client, done), name="sync-native", daemon=True).start()
        try:
            done.result(group.timeout_s * 3 + GRACE_S)  # meeting, begin, update
        except TimeoutError as error:
            if client.failure is not None:
                raise client.failure from error
            names = ", ".join(receiver.name for receiver in group.live)
            raise EngineError(
                f"the {self.kind} transfer to {names} did not end within {3 * group.timeout_s:g} s", where="weight sync"
            ) from error
        return client.received, self.source.digests

    def reclaim(self) -> None:
        """Memory that engines opened over CUDA IPC is given back only when asked for, after they closed it."""
        if self.kind == "ipc":
            torch.cuda.ipc_collect()

    def close(self) -> None:
        if self._trainer is not None:
            self._trainer.shutdown()
            self._trainer = None

    def _drive(self, client: Client, done: Future[None]) -> None:
        try:
            if self.source.device.type == "cuda":
                torch.cuda.set_device(self.source.device)  # of this thread
            if self._trainer is None:
                self._receivers = [id(receiver) for receiver in client.group.live]
                self._trainer = open_trainer(self.kind, self.source, client, limit=self.limit)
            self._trainer.client = client
            self._trainer.send_weights()
        except BaseException as error:
            done.set_exception(client.failure or error)
        else:
            done.set_result(None)


def open_trainer(kind: str, source: LearnerSource, client: Client, *, limit: int) -> Any:
    """vLLM's sender, after all receivers have met it. Raises ConfigError where this vLLM has none."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    except ImportError as error:
        hint = 'install vllm 0.29 or newer, or set sync.transport="shared_memory"'
        raise ConfigError(
            f"this vllm has no trainer side of its weight transfer: {error}", where="sync.transport", hint=hint
        ) from error
    wire: dict[str, Any] = {"packed": True, "packed_buffer_size_bytes": limit, "rank": 0}
    if kind == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        world = 1 + sum(receiver.shards for receiver in client.group.live)
        info: Any = NCCLTrainerInitInfo(master_address=get_ip(), master_port=get_open_port(), world_size=world, **wire)
    else:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        info = IPCTrainerInitInfo(**wire)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
