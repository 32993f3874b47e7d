"""Counter-based hashes of tokens: draws that depend on neither the order of rows nor the number of processes."""

from __future__ import annotations

import torch
from torch import Tensor


def counter_keys(seed: int, uids: Tensor, width: int) -> Tensor:
    """int64 [B, width]: a random-looking number for every token from (seed, row uid, position) alone (splitmix64, doi:10.1145/2660193.2660195).

    Args:
        uids: [B] integers that name rows across the run.
    """
    start = torch.tensor(_signed(seed), dtype=torch.int64, device=uids.device)
    position = torch.arange(width, dtype=torch.int64, device=uids.device)
    return _mix(_mix(_mix(start) + uids.to(torch.int64))[:, None] + position[None, :])


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's shift of a signed integer copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the same low 64 bits."""
    return (x + 2**63) % 2**64 - 2**63
