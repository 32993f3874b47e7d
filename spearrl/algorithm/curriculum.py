"""The weights γ (self-imitation) and μ (intrinsic reward) of a step, and what adaptive schedules follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from spearrl.config.algo import ScheduleSection
from spearrl.errors import ContractError
from spearrl.schedules import ADAPTIVE, adaptive_progress, schedule_value

_LOGGED = {"entropy": "curriculum/entropy", "success": "curriculum/success", "curiosity": "curriculum/unseen"}


class Curriculum:
    """γ rises and μ falls (SPEAR, arXiv:2509.22601): over steps, or with what the run itself shows.

    The latter are the adaptive kinds "entropy", "success" and "curiosity". The quantity behind one is an exponential
    moving average, estimate ← smoothing · estimate + (1 − smoothing) · observed, whose first value is the first
    observation. Before that, γ = 0 and μ = peak. γ and μ have an estimate each, with their own smoothing.

    Args:
        gamma: schedule of the replay weight.
        mu: schedule of the bonus weight.

    Raises:
        ContractError: an adaptive schedule whose low is not below its high.
    """

    def __init__(self, gamma: ScheduleSection, mu: ScheduleSection):
        self._schedules = {"gamma": gamma, "mu": mu}
        self._estimates: dict[str, float | None] = {"gamma": None, "mu": None}
        self._start: float | None = None  # the first entropy above 0 that was observed
        self._anchors_met: set[int] = set()
        for name, schedule in self._schedules.items():
            if schedule.kind in ADAPTIVE and not schedule.low < schedule.high:
                text = f"schedule {name}: low={schedule.low}, high={schedule.high}; low must be < high"
                raise ContractError(text, hint="for example low = 0.2, high = 0.8")

    def gamma(self, step: int) -> float:
        """γ at a 1-based step, in [0, peak]. Adaptive: from the steps observed so far, this one excluded."""
        return self._schedules["gamma"].peak * self._progress("gamma", step)

    def mu(self, step: int) -> float:
        """μ at a 1-based step, in [0, peak]. Adaptive: as γ."""
        schedule = self._schedules["mu"]
        if schedule.kind in ADAPTIVE:
            return schedule.peak * (1 - self._progress("mu", step))
        return schedule.peak * schedule_value(schedule.kind, step, schedule.steps, rising=False)

    @property
    def needs_anchors(self) -> bool:
        """Whether some schedule follows the share of unseen states."""
        return any(schedule.kind == "curiosity" for schedule in self._schedules.values())

    def observe(self, *, success: float | None, entropy: float | None, anchors: Iterable[int] | None) -> None:
        """Update the estimates by what a finished step showed.

        None, a non-finite number or no anchors: it was not measured, the estimate stays.

        Args:
            success: share of the step's episodes that succeeded.
            entropy: policy entropy of the step, nats. Schedules see it relative to the first one above 0.
            anchors: ids (int64) of the states of the step's turns. Each counts once per step.
        """
        observed = {"entropy": self._relative(entropy), "success": success, "curiosity": self._unseen(anchors)}
        for name, schedule in self._schedules.items():
            value = observed.get(schedule.kind)
            if value is None or not math.isfinite(value):
                continue
            old = self._estimates[name]
            mean = value if old is None else schedule.smoothing * old + (1 - schedule.smoothing) * value
            self._estimates[name] = mean

    def metrics(self) -> dict[str, float]:
        """The estimates in use. `…_mu`: μ follows the same quantity as γ, smoothed otherwise."""
        gamma, mu = self._schedules["gamma"], self._schedules["mu"]
        first, second = self._estimates["gamma"], self._estimates["mu"]
        metrics = {} if first is None else {_LOGGED[gamma.kind]: first}
        if second is not None and gamma.kind != mu.kind:
            metrics[_LOGGED[mu.kind]] = second
        elif second is not None and (gamma.smoothing != mu.smoothing or first != second):
            metrics[f"{_LOGGED[mu.kind]}_mu"] = second
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """JSON values and one tensor; `load_state_dict` restores them exactly."""
        return {
            "kinds": {name: schedule.kind for name, schedule in self._schedules.items()},
            "estimates": dict(self._estimates),
            "entropy_start": self._start,
            "seen": torch.tensor(sorted(self._anchors_met), dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A schedule whose kind was changed starts without an estimate: the stored one is of another quantity."""
        for name, schedule in self._schedules.items():
            self._estimates[name] = state["estimates"][name] if state["kinds"][name] == schedule.kind else None
        self._start = state["entropy_start"]
        self._anchors_met = set(state["seen"].tolist())

    def _progress(self, name: str, step: int) -> float:
        """In [0, 1], rising."""
        schedule, estimate = self._schedules[name], self._estimates[name]
        if schedule.kind not in ADAPTIVE:
            return schedule_value(schedule.kind, step, schedule.steps, rising=True)
        if estimate is None:
            return 0.0
        return adaptive_progress(schedule.kind, estimate, low=schedule.low, high=schedule.high)

    def _relative(self, entropy: float | None) -> float | None:
        """Of the first one above 0, which is kept whatever the kinds are, for a run that is resumed with "entropy"."""
        if entropy is None or not math.isfinite(entropy):
            return None
        if self._start is None and entropy > 0:
            self._start = entropy
        return None if self._start is None else entropy / self._start

    def _unseen(self, anchors: Iterable[int] | None) -> float | None:
        """Share of the step's distinct anchors that are new; they are known from now on."""
        states = set() if anchors is None or not self.needs_anchors else {int(anchor) for anchor in anchors}
        if not states:
            return None
        new = states - self._anchors_met
        self._anchors_met |= new
        return len(new) / len(states)
