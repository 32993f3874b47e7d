"""Colocated runs: engines give their GPU memory back before the learner works, and take it again for new weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from spearrl.errors import WorkerLost
from spearrl.sync.receivers import Receiver

GIB = 1 << 30
# The least share of what an engine may take that a sleeping one gives back; CUDA's context, graphs and workspace stay.
RETURNED = 0.6


def put_to_sleep(
    receivers: Sequence[Receiver],
    gpus: Sequence[Sequence[int]],
    *,
    expected: float,
    free: Callable[[int], int | None] | None = None,
) -> list[str]:
    """All engines at once to sleep at level 2 (weights and cache given up: only a sync wakes them again); a warning for
    each whose memory did not come back.

    Args:
        gpus: of each receiver's engine.
        expected: bytes an engine may take of each of its GPUs.
        free: GPU -> free bytes, None where this process cannot see it (another machine's); default: what CUDA says.
    """
    read = free or free_bytes
    before = {gpu: read(gpu) for gpu in sorted({gpu for group in gpus for gpu in group})}
    _all([receiver.sleep for receiver in receivers])
    gained = {
        gpu: after - held for gpu, held in before.items() if held is not None and (after := read(gpu)) is not None
    }
    return [
        f"{receiver.name} sleeps, but GPU {gpu} got {gained[gpu] / GIB:.1f} GiB back "
        f"of at least {RETURNED * expected / GIB:.1f} GiB: the learner may run out of memory"
        for receiver, group in zip(receivers, gpus, strict=False)
        for gpu in group
        if gpu in gained and gained[gpu] < RETURNED * expected
    ]


def wake_up(receivers: Sequence[Receiver]) -> None:
    """All engines at once take memory for weights again, just before a sync fills it; its end takes that of their
    caches.
    """
    _all([receiver.wake for receiver in receivers])


def _all(calls: Sequence[Callable[[], None]]) -> None:
    """At once; a worker that is gone holds no memory, and its fleet replaces it."""

    def unless_lost(call: Callable[[], None]) -> None:
        with suppress(WorkerLost):
            call()

    with ThreadPoolExecutor(max(1, len(calls))) as threads:
        list(threads.map(unless_lost, calls))


def free_bytes(gpu: int) -> int | None:
    """Free memory of a GPU of this machine, whichever process uses it; None for one that this process cannot see."""
    import torch

    return int(torch.cuda.mem_get_info(gpu)[0]) if gpu < torch.cuda.device_count() else None
