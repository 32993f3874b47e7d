"""Weights over training steps. Steps are 1-based; before step 0 and after `total` a schedule is constant."""

from __future__ import annotations

import math

from spearrl.errors import ContractError

ADAPTIVE = ("entropy", "success", "curiosity")  # kinds that follow what the run logs instead of the step count


def cosine_warmup(step: float, total: float) -> float:
    """(1 - cos(pi step / total)) / 2, then 1: the weight of self-imitation (SPEAR, arXiv:2509.22601)."""
    return (1 - math.cos(math.pi * _progress(step, total))) / 2


def cosine_decay(step: float, total: float) -> float:
    """(1 + cos(pi step / total)) / 2, then 0: the weight of the intrinsic reward (SPEAR, arXiv:2509.22601)."""
    return (1 + math.cos(math.pi * _progress(step, total))) / 2


def schedule_value(kind: str, step: float, total: float, *, rising: bool) -> float:
    """Value in [0, 1] of a schedule that rises from 0, or falls from 1, over `total` steps.

    Args:
        kind: "cosine", "linear", or "constant" (always 1).

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


def adaptive_progress(kind: str, value: float, *, low: float, high: float) -> float:
    """How far an adaptive curriculum has gone, in [0, 1] and linear in between.

    γ = peak · progress, μ = peak · (1 − progress). An answer of ours to a question that SPEAR (arXiv:2509.22601) leaves
    open: what to do where nobody knows how many steps the run needs.

    Args:
        kind: what `value` is. "entropy": policy entropy / entropy of the first step; "curiosity": share of the step's
            anchor states that were new to the run (both: 0 at >= high, 1 at <= low). "success": estimate of the success
            rate (0 at <= low, 1 at >= high).
        value: the driving quantity, a number without unit.

    Raises:
        ContractError: unknown kind, low >= high, or a value that is NaN.
    """
    if kind not in ADAPTIVE:
        raise ContractError(f"adaptive schedule kind {kind!r} is not known", hint=f"use {', '.join(ADAPTIVE)}")
    if not low < high:
        text = f"the band of an adaptive schedule is low={low}, high={high}; low must be < high"
        raise ContractError(text, hint="for example low = 0.2, high = 0.8")
    if math.isnan(value):
        hint = "skip steps in which it could not be measured"
        raise ContractError(f"the {kind} that drives a schedule is NaN", hint=hint)
    done = min(max((value - low) / (high - low), 0.0), 1.0)
    return done if kind == "success" else 1 - done


def _progress(step: float, total: float) -> float:
    if not total > 0:
        hint = "for a weight that never changes use kind 'constant'"
        raise ContractError(f"a schedule over total={total} steps; must be > 0", hint=hint)
    return min(max(step / total, 0.0), 1.0)
