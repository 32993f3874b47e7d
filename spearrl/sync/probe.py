"""The check that new weights are really in use: log-probabilities of a fixed text, on engine and learner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

FP32, LOW = 1e-3, 0.05  # nats that are never a fault, in float32 and below; sync.probe_tolerance overrides
ROUNDINGS = 4  # times what the learner itself differs by in the engine's type, which explains an engine's difference
MOVED = 10  # the learner's log-probabilities moved for certain where they did by more than tolerance / MOVED


@dataclass
class Probe:
    """Compares engines with the learner, and with themselves one version earlier.

    Args:
        tolerance: nats; in float32 of the worst token, otherwise of the mean over tokens, each weighted by its
            probability: rounding changes unlikely tokens most.
        rounding: what the learner's own log-probabilities differ by in the engine's type; 0: not measured.
    """

    token_ids: list[int]
    tolerance: float
    float32: bool
    rounding: float = 0.0
    gap: float = 0.0  # the largest of this sync
    _learner: list[float] = field(default_factory=list)
    _engines: dict[str, list[float]] = field(default_factory=dict)

    @property
    def bound(self) -> float:
        """The difference that is still no fault, nats."""
        return max(self.tolerance, ROUNDINGS * self.rounding)

    def problem(self, name: str, logprobs: list[float], expected: list[float]) -> str | None:
        """What is wrong with an engine's log-probabilities, None where they are the learner's.

        An update smaller than the bound would hide weights that never arrived: an engine must also move where the
        learner moved.
        """
        gap = self.difference(logprobs, expected)
        self.gap = max(self.gap, gap) if not math.isnan(gap) else gap
        if not gap <= self.bound:
            gaps = [abs(a - b) for a, b in zip(logprobs, expected, strict=True)]
            worst = max(range(len(gaps)), key=lambda i: math.inf if math.isnan(gaps[i]) else gaps[i])
            values = f"{logprobs[worst]:.4f} on {name}, {expected[worst]:.4f} on the learner"
            own = f", its own rounding {self.rounding:.2g}" if self.rounding else ""
            text = f"the probe's log-probabilities differ by {gap:.2g} nats (allowed {self.bound:.2g}{own})"
            return f"{text}; at position {worst + 1}: {values}"
        before = self._engines.get(name)
        if before is None or not self._learner:
            return None
        moved, followed = self.difference(self._learner, expected), self.difference(before, logprobs)
        if moved > self.tolerance / MOVED and followed < moved / MOVED:
            text = f"{name} answers the probe as before (moved {followed:.2g} nats) although the learner's moved by"
            return f"{text} {moved:.2g}: the sync was not applied"
        return None

    def passed(self, engines: dict[str, list[float]], learner: list[float]) -> None:
        """Remember a version that was right."""
        self._engines, self._learner = {**self._engines, **engines}, learner

    def difference(self, logprobs: Sequence[float], expected: Sequence[float]) -> float:
        """Between two answers to the probe, nats; not a number where one of them is none."""
        gaps = [abs(a - b) for a, b in zip(logprobs, expected, strict=True)]
        if any(math.isnan(gap) for gap in gaps):
            return math.nan
        if self.float32:
            return max(gaps)
        weights = [math.exp(logprob - max(expected)) for logprob in expected]
        return sum(weight * gap for weight, gap in zip(weights, gaps, strict=True)) / sum(weights)
