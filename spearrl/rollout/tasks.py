"""Which tasks a step plays: shuffled epochs, a function of (seed, step) alone, so that resuming needs no cursor."""

from __future__ import annotations

import random
from collections.abc import Sequence

from spearrl.seeds import derive
from spearrl.types import Task


def tasks_of_step(tasks: Sequence[Task], step: int, count: int, seed: int) -> list[Task]:
    """The `count` tasks of a (1-based) step; every task comes once an epoch."""
    first = (step - 1) * count
    return [
        tasks[_shuffled(len(tasks), seed, place // len(tasks))[place % len(tasks)]]
        for place in range(first, first + count)
    ]


_last: dict[tuple[int, int, int], list[int]] = {}


def _shuffled(size: int, seed: int, epoch: int) -> list[int]:
    key = (size, seed, epoch)
    if key not in _last:
        order = list(range(size))
        random.Random(derive(seed, "tasks", epoch)).shuffle(order)
        _last.clear()
        _last[key] = order
    return _last[key]
