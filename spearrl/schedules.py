"""Weights over training steps. Steps are 1-based; before step 0 and after `total` a schedule is constant."""

from __future__ import annotations

import math

from spearrl.errors import ContractError


def cosine_warmup(step: float, total: float) -> float:
    """(1 - cos(pi step / total)) / 2, then 1: the weight of self-imitation (SPEAR, arXiv:2509.22601)."""
    return (1 - math.cos(math.pi * _progress(step, total))) / 2


def cosine_decay(step: float, total: float) -> float:
    """(1 + cos(pi step / total)) / 2, then 0: the weight of the intrinsic reward (SPEAR, arXiv:2509.22601)."""
    return (1 + math.cos(math.pi * _progress(step, total))) / 2


def schedule_value(kind: str, step: float, total: float, *, rising: bool) -> float:
    """Value in [0, 1] of a schedule: "cosine" | "linear" | "constant" (always 1), rising from 0 or falling from 1 over `total` steps.

    Raises:
        ContractError: unknown kind, or total <= 0.
    """
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        return cosine_warmup(step, total) if rising else cosine_decay(step, total)
    if kind == "linear":
        return _progress(step, total) if rising else 1 - _progress(step, total)
    raise ContractError(f"schedule kind {kind!r} is not known", hint="use 'cosine', 'linear' or 'constant'")


def _progress(step: float, total: float) -> float:
    if not total > 0:
        raise ContractError(f"a schedule over total={total} steps; must be > 0", hint="for a weight that never changes use kind 'constant'")
    return min(max(step / total, 0.0), 1.0)
