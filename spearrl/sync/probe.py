"""The check that new weights are really in use: log-probabilities of a fixed prompt, on engine and learner."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from spearrl.seeds import derive

FP32, BF16 = 1e-3, 0.05  # nats; sync.probe_tolerance overrides
PROMPT = 24  # tokens
MOVED = 10  # the learner's log-probabilities moved for certain where they did by more than tolerance / MOVED


def probe_prompt(vocabulary: int, seed: int) -> list[int]:
    """Token ids spread over the vocabulary, the same for the whole run."""
    draws = random.Random(derive(seed, "probe"))
    return [draws.randrange(vocabulary) for _ in range(PROMPT)]


@dataclass
class Probe:
    """Compares engines with the learner, and with themselves one version earlier.

    Args:
        tolerance: nats; in float32 of the worst token, otherwise of the mean over tokens (rounding makes single tokens
            differ by more).
    """

    token_ids: list[int]
    tolerance: float
    float32: bool
    gap: float = 0.0  # the largest of this sync
    _learner: list[float] = field(default_factory=list)
    _engines: dict[str, list[float]] = field(default_factory=dict)

    def problem(self, name: str, logprobs: list[float], expected: list[float]) -> str | None:
        """What is wrong with an engine's log-probabilities, None where they are the learner's.

        An update smaller than the tolerance would hide weights that never arrived: an engine must also move where the
        learner moved.
        """
        gaps = [abs(a - b) for a, b in zip(logprobs, expected, strict=True)]
        gap = self._size(gaps)
        self.gap = max(self.gap, gap) if not math.isnan(gap) else gap
        if not gap <= self.tolerance:
            worst = max(range(len(gaps)), key=lambda i: math.inf if math.isnan(gaps[i]) else gaps[i])
            values = f"{logprobs[worst]:.4f} on {name}, {expected[worst]:.4f} on the learner"
            text = f"the probe's log-probabilities differ by {gap:.2g} nats (allowed {self.tolerance:g})"
            return f"{text}; at position {worst + 1}: {values}"
        before = self._engines.get(name)
        if before is None or not self._learner:
            return None
        moved, followed = self._moved(self._learner, expected), self._moved(before, logprobs)
        if moved > self.tolerance / MOVED and followed < moved / MOVED:
            text = f"{name} answers the probe as before (moved {followed:.2g} nats) although the learner's moved by"
            return f"{text} {moved:.2g}: the sync was not applied"
        return None

    def passed(self, engines: dict[str, list[float]], learner: list[float]) -> None:
        """Remember a version that was right."""
        self._engines, self._learner = {**self._engines, **engines}, learner

    def _moved(self, before: list[float], now: list[float]) -> float:
        return self._size([abs(a - b) for a, b in zip(before, now, strict=True)])

    def _size(self, gaps: list[float]) -> float:
        if any(math.isnan(gap) for gap in gaps):
            return math.nan
        return max(gaps) if self.float32 else sum(gaps) / len(gaps)
