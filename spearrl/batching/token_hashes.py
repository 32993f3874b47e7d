"""Counter-based random numbers: hashes (SplitMix64, doi:10.1145/2660193.2660195) of a seed and what is drawn for.

Neither the order of rows, nor the number of processes, nor what else is drawn changes one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def counter_keys(seed: int, uids: Tensor, width: int) -> Tensor:
    """int64 [B, width]: a number for every token from (seed, row uid, position) alone.

    Args:
        uids: [B] integers that name rows across the run.
    """
    start = torch.tensor(_signed(seed), dtype=torch.int64, device=uids.device)
    position = torch.arange(width, dtype=torch.int64, device=uids.device)
    return _splitmix64(_splitmix64(_splitmix64(start) + uids.to(torch.int64))[:, None] + position[None, :])


def counter_uniforms(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """float64 [b] in [0, 1): SplitMix64 of each seed, advanced by the position of its token."""
    state = _splitmix64(torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64))
    state = _splitmix64(state + torch.tensor(positions, dtype=torch.int64) * _GOLDEN)
    return _shift(state, 11).double() / 2.0**53


def _signed(x: int) -> int:
    """The int64 with the same low 64 bits."""
    return (x + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _splitmix64(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's shift of a signed integer copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
