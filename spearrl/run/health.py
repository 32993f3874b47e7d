"""Alarms over a run's metrics: what looks wrong, in plain words, and which setting to try. docs/health.md lists them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from spearrl.config.tables import table

WINDOW = 10  # steps that one mean is taken over
NORMS = 100  # gradient norms remembered for the median
CALM = 3  # a condition that was away for so many steps has cleared; one that flaps around its limit is told once
ENTROPY_STEPS = 50  # a fall of the entropy counts as a collapse up to this step
_SAID = table(__file__, "health.toml")
_LIMITS: dict[str, dict[str, Any]] = _SAID["limit"]
_TEXTS: dict[str, str] = _SAID["text"]


@dataclass(frozen=True)
class Alarm:
    """A condition that has just begun. `text`: what was seen, and at its end the setting to try."""

    flag: str
    text: str


class Health:
    """Watches the metrics of each step.

    A metric that is missing or not finite proves nothing: alarms that need it are neither raised nor cleared in that step.
    """

    def __init__(self) -> None:
        self._entropy_start: float | None = None  # the first one above 0
        self._replies: list[list[float]] = []  # [tokens per reply, reward] of the last 2 WINDOW steps
        self._tools: list[list[float]] = []  # [tool calls per episode, success] of the last WINDOW steps
        self._best: list[float] | None = None  # the same as means over the WINDOW steps of highest success
        self._norms: list[float] = []
        self._active: dict[str, int] = {}  # flag: steps for which its condition has been away

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Alarms that begin with this step; a flag comes again only after its condition was away for CALM steps.

        Args:
            step: 1-based training step.
            metrics: what the step logged (docs/metrics.md).
        """
        seen = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        alarms = []
        judged = {
            flag: _over(seen.get(limit["metric"]), limit["above"], limit["text"]) for flag, limit in _LIMITS.items()
        }
        judged |= {flag: check(self, step, seen) for flag, check in _CHECKS.items()}
        for flag, text in judged.items():
            if text and flag not in self._active:
                alarms.append(Alarm(flag, text))
            if text:
                self._active[flag] = 0
            elif text is not None and flag in self._active:
                self._active[flag] += 1
                if self._active[flag] == CALM:
                    del self._active[flag]
        return alarms

    def state_dict(self) -> dict[str, Any]:
        """JSON values; `load_state_dict` restores them exactly."""
        return {
            "entropy_start": self._entropy_start,
            "replies": [list(pair) for pair in self._replies],
            "tools": [list(pair) for pair in self._tools],
            "best": self._best,
            "norms": list(self._norms),
            "active": dict(self._active),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._entropy_start, self._best = state["entropy_start"], state["best"]
        self._replies, self._tools = [list(pair) for pair in state["replies"]], [list(pair) for pair in state["tools"]]
        self._norms, self._active = list(state["norms"]), dict(state["active"])

    # A check returns what to say, "" where all is well, None where this step cannot tell.

    def _entropy_collapse(self, step: int, seen: Mapping[str, float]) -> str | None:
        entropy = seen.get("policy/entropy")
        if self._entropy_start is None and entropy is not None and entropy > 0:
            self._entropy_start = entropy
        if entropy is None or self._entropy_start is None:
            return None
        if step > ENTROPY_STEPS or entropy >= 0.3 * self._entropy_start:
            return ""
        return _TEXTS["entropy_collapse"].format(
            now=entropy, share=entropy / self._entropy_start, start=self._entropy_start
        )

    def _equal_groups(self, step: int, seen: Mapping[str, float]) -> str | None:
        mixed, success = seen.get("rollout/mixed_groups"), seen.get("rollout/success")
        if mixed is None:
            return None
        if 1 - mixed <= 0.6:
            return ""
        why = "equal_somehow" if success is None else "equal_easy" if success >= 0.5 else "equal_hard"
        return _TEXTS["equal_groups"].format(share=1 - mixed, why=_TEXTS[why].format(success=success))

    def _length_growth(self, step: int, seen: Mapping[str, float]) -> str | None:
        if "rollout/reply_tokens" not in seen or "rollout/reward" not in seen:
            return None
        self._replies = [*self._replies, [seen["rollout/reply_tokens"], seen["rollout/reward"]]][-2 * WINDOW :]
        if len(self._replies) < 2 * WINDOW:
            return None
        (length, reward), (long, later) = _means(self._replies[:WINDOW]), _means(self._replies[WINDOW:])
        flat = later <= reward or later - reward < 0.02 * abs(reward)
        if long <= 1.25 * length or not flat:
            return ""
        return _TEXTS["length_growth"].format(length=length, long=long, steps=WINDOW, reward=reward, later=later)

    def _truncation(self, step: int, seen: Mapping[str, float]) -> str | None:
        episodes = sum(value for name, value in seen.items() if name.startswith("status/"))
        if episodes <= 0:
            return None
        context, overlong = seen.get("status/context_limit", 0.0), seen.get("status/overlong", 0.0)
        if (context + overlong) / episodes <= 0.1:
            return ""
        why = _TEXTS["cut_context" if context >= overlong else "cut_reply"]
        return _TEXTS["truncation"].format(share=(context + overlong) / episodes, why=why)

    def _grad_norm(self, step: int, seen: Mapping[str, float]) -> str | None:
        norm = seen.get("policy/grad_norm")
        if norm is None or norm <= 0:  # nothing was learnt: no measure of what is usual
            return None
        before, self._norms = self._norms, [*self._norms, norm][-NORMS:]
        if len(before) < WINDOW:
            return None
        usual = median(before)
        if norm <= 10 * usual:
            return ""
        return _TEXTS["grad_norm"].format(norm=norm, times=norm / usual, usual=usual)

    def _tool_bonus(self, step: int, seen: Mapping[str, float]) -> str | None:
        if "rollout/tool_calls" not in seen or "rollout/success" not in seen:
            return None
        self._tools = [*self._tools, [seen["rollout/tool_calls"], seen["rollout/success"]]][-WINDOW:]
        if len(self._tools) < WINDOW:
            return None
        calls, success = _means(self._tools)
        if self._best is None or success > self._best[1]:
            self._best = [calls, success]
        if calls <= 1.5 * self._best[0] or success >= 0.5 * self._best[1]:
            return ""
        cure = _TEXTS["bonus_over" if seen.get("mu") == 0 else "bonus_paid"]
        return _TEXTS["tool_bonus"].format(
            before=self._best[0], calls=calls, best=self._best[1], success=success, steps=WINDOW, cure=cure
        )


def _over(value: float | None, limit: float, text: str) -> str | None:
    if value is None:
        return None
    return text.format(value) if value > limit else ""


def _means(pairs: list[list[float]]) -> tuple[float, float]:
    return fmean(first for first, _ in pairs), fmean(second for _, second in pairs)


_CHECKS: dict[str, Callable[[Health, int, Mapping[str, float]], str | None]] = {
    "entropy_collapse": Health._entropy_collapse,
    "equal_groups": Health._equal_groups,
    "length_growth": Health._length_growth,
    "truncation": Health._truncation,
    "grad_norm": Health._grad_norm,
    "tool_bonus_farmed": Health._tool_bonus,
}
FLAGS = (*_LIMITS, *_CHECKS)
