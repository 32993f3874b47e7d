"""Colocated runs: engines give their GPU memory back before the learner works, and take it again for its new weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from spearrl.errors import WorkerLost
from spearrl.launch.placement import Placement, gib

RETURNED = 0.6  # least share of what an engine may take that a sleeping one must give back; CUDA's context, graphs and workspace stay


class Sleeper(Protocol):
    """What takes turns: an engine of this process, or the proxy of a worker."""

    name: str

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


@dataclass(frozen=True)
class Slept:
    """Bytes that came back over all GPUs, and a warning for each engine that kept its memory."""

    freed: int
    warnings: tuple[str, ...] = ()


def put_to_sleep(
    sleepers: Sequence[Sleeper], placement: Placement, *, free: Callable[[int], int | None] | None = None
) -> Slept:
    """All engines at once to sleep at level 2 (weights and cache given up: only a sync wakes them again), and whether memory really came back.

    Args:
        free: GPU -> free bytes, None where this process cannot see it (another machine's); None: what CUDA says.
    """
    if not placement.sleeps or not sleepers:
        return Slept(0)
    read = free or free_bytes
    gpus = sorted({gpu for group in placement.engines for gpu in group})
    before = {gpu: read(gpu) for gpu in gpus}
    _all([sleeper.sleep for sleeper in sleepers])
    gained = {
        gpu: after - held for gpu, held in before.items() if held is not None and (after := read(gpu)) is not None
    }
    due = RETURNED * placement.config.vllm.memory_fraction * placement.gpu.memory
    warnings = [
        f"{sleeper.name} sleeps, but GPU {gpu} got {gib(gained[gpu])} back of at least {gib(round(due))}: the learner may run out of memory"
        for sleeper, group in zip(sleepers, placement.engines, strict=False)
        for gpu in group
        if gpu in gained and gained[gpu] < due
    ]
    return Slept(sum(gained.values()), tuple(warnings))


def wake_up(sleepers: Sequence[Sleeper], placement: Placement) -> None:
    """All engines at once take memory for weights again, just before a sync fills it; its end takes that of their caches."""
    if placement.sleeps and sleepers:
        _all([sleeper.wake for sleeper in sleepers])


def _all(calls: Sequence[Callable[[], None]]) -> None:
    """At once; a worker that is gone holds no memory, and its fleet replaces it."""

    def unless_lost(call: Callable[[], None]) -> None:
        with suppress(WorkerLost):
            call()

    with ThreadPoolExecutor(len(calls)) as threads:
        list(threads.map(unless_lost, calls))


def free_bytes(gpu: int) -> int | None:
    """Free memory of a GPU of this machine, whichever process uses it; None for one that this process cannot see."""
    import torch

    return int(torch.cuda.mem_get_info(gpu)[0]) if gpu < torch.cuda.device_count() else None
