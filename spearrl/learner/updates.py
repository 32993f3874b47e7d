"""An update as a sequence of optimiser steps: the same on every learner, which adds how one step is made."""

from __future__ import annotations

import time
from collections.abc import Sequence

from spearrl.batching import Batch
from spearrl.config import LearnerSection
from spearrl.learner.minibatch import Share, Tally, split_objectives
from spearrl.learner.optimizer import learning_rate
from spearrl.learner.partition import plan
from spearrl.learner.protocol import UpdateResult
from spearrl.losses import Objective


class Updates:
    """Counts optimiser steps and gives each its rows and rate.

    Args:
        total_steps: optimiser steps over which the rate falls to 0, by the schedule `decay`; None: it stays.
        joint: one optimiser step for on-policy and replay rows, J + γ J_SIL (arXiv 2509.22601), instead of steps of their own.
    """

    def __init__(self, settings: LearnerSection, *, total_steps: int | None, joint: bool, decay: str = "linear"):
        self.settings, self.total_steps, self.decay, self.joint, self.steps = settings, total_steps, decay, joint, 0

    def update(
        self, on_policy: Batch, replay: Batch | None, *, gamma: float, objectives: Sequence[Objective], seed: int
    ) -> UpdateResult:
        """Optimiser steps on the on-policy rows, then on the replayed ones with weight γ (or both in each step: `joint`).

        The gradient of a step does not depend on micro-batches, padding, the order of rows or the number of processes. A step whose loss
        or gradient is not finite is skipped and counted.
        """
        started, tally, skipped, before = time.monotonic(), Tally(), 0, self.steps
        on_objectives, replay_objectives = split_objectives(objectives, gamma)
        for shares in plan(
            (on_policy, on_objectives), (replay, replay_objectives), self.settings, joint=self.joint, seed=seed
        ):
            fresh = self.steps == before
            done = self._step([Share(s.batch, s.objectives, s.seed, s.current and fresh) for s in shares], tally)
            self.steps += done
            skipped += not done
        tokens = len(on_policy.rows.token_ids) + (
            len(replay.rows.token_ids) if replay is not None and replay_objectives else 0
        )
        metrics = {
            **tally.means(),
            "policy/updates": float(self.steps - before),
            "policy/lr": self._rate(max(0, self.steps - 1)),
        }
        seconds = time.monotonic() - started
        return UpdateResult({**metrics, "update/tokens": float(tokens), "update/seconds": seconds}, skipped)

    def _step(self, shares: list[Share], tally: Tally) -> bool:
        """One optimiser step on these shares at the rate of step `self.steps`; False where it was skipped for a number that is not finite."""
        raise NotImplementedError

    def _rate(self, step: int) -> float:
        return learning_rate(step, self.settings, self.total_steps, decay=self.decay)
