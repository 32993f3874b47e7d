"""Which floating type this processor multiplies matrices fastest in: measured, since bfloat16 without instructions of
its own runs at a fraction of float32's speed, and the processor's name does not tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

GAIN = 1.25  # bfloat16 is worth its rounding only where it is faster by this factor
TRIAL_S = 0.05  # of one type and shape


@dataclass(frozen=True)
class DtypeSpeed:
    """The faster type, and GFLOP/s measured in each."""

    dtype: torch.dtype
    float32: float
    bfloat16: float

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} (measured on one core: {self.float32:.3g} GFLOP/s in float32, {self.bfloat16:.3g} in bfloat16)"


def fastest_dtype(shapes: Sequence[tuple[int, int, int]] = ((64, 576, 1536),)) -> DtypeSpeed:
    """Time products [rows, inputs] × [inputs, outputs] in both types, on one thread: several that wait for each other
    would measure what else the machine does.

    Args:
        shapes: (rows, inputs, outputs) of the products that the model will make, such as sequences at a time × hidden ×
            intermediate size; together a few tenths of a second.
    """
    work = sum(2e-9 * rows * inputs * outputs for rows, inputs, outputs in shapes)
    wide, narrow = (work / sum(_seconds(shape, kind) for shape in shapes) for kind in (torch.float32, torch.bfloat16))
    return DtypeSpeed(torch.bfloat16 if narrow > GAIN * wide else torch.float32, wide, narrow)


def _seconds(shape: tuple[int, int, int], kind: torch.dtype) -> float:
    """Of one product: the fastest, as other processes only ever slow one down."""
    rows, inputs, outputs = shape
    tensors = {"states": torch.ones(rows, inputs, dtype=kind), "weight": torch.ones(outputs, inputs, dtype=kind)}
    timer = Timer("torch.nn.functional.linear(states, weight)", globals=tensors)
    return min(timer.blocked_autorange(min_run_time=TRIAL_S).times)
