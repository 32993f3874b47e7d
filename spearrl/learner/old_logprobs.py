"""Log-probabilities at the start of an update, from its own passes where those come before the weights change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from spearrl.batching import Batch, Rows
from spearrl.learner.loss_inputs import Share


class OldLogprobs:
    """old_logprobs of an update's on-policy batch.

    A batch that brings none gets those that the update's passes find: the first optimiser step computes them anyway.
    Only where a row has its pass after that step, or where a rule must know them first, a pass is made before.

    Args:
        batch: with old_logprobs, or None.
    """

    def __init__(self, batch: Batch):
        self.known = batch.old_logprobs is not None
        unknown = torch.full((len(batch), batch.rows.width), math.nan)
        self.values = unknown if batch.old_logprobs is None else batch.old_logprobs
        self._batch = batch

    @property
    def batch(self) -> Batch:
        """The batch with what is known so far; not a number at tokens that are not."""
        return replace(self._batch, old_logprobs=self.values)

    def record(self, rows: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Keep what a pass found before the first step, unless one before it found it.

        Args:
            rows: int64 [b], of the batch.
            logprobs: [b, W] of them on the CPU, W at most T.
        """
        if not self.known:
            self.values = self.values.to(logprobs.dtype)
            before = self.values[rows, : logprobs.shape[1]]
            self.values[rows, : logprobs.shape[1]] = torch.where(before.isnan(), logprobs, before)

    def result(self) -> torch.Tensor:
        """[B, T]; not a number at action tokens of rows without a pass, 0 where there is no action token."""
        return self.values if self.known else torch.where(self._batch.action_mask, self.values, 0.0)

    def needed_before(self, steps: Sequence[Sequence[Share]], one_pass: Callable[[Rows], bool]) -> torch.Tensor:
        """int64 [b], rows of the batch that need a pass before the first optimiser step.

        Those of later steps; those that have no pass of their own, but a place in a covariance rule or in the replay
        buffer (whose trajectories come whole); all of the first step, where its rule looks over several passes.

        Args:
            one_pass: whether a step computes such rows in one pass, in which a rule sees all of them.
        """
        before = torch.zeros(len(self._batch), dtype=torch.bool)
        if self.known:
            return before.nonzero()[:, 0]
        rows = self._batch.rows
        good = ((self._batch.advantages > 0) & self._batch.action_mask).any(1)
        stored, first = torch.isin(rows.trajectory, rows.trajectory[good]), True
        for shares in steps:
            trained = False
            for share in shares:
                share = replace(share, current=share.current and first)
                signal = share.signal
                trained |= bool(signal.any())
                if share.index is None:
                    continue
                before[share.index] = stored[share.index] | signal
                if first and signal.any():
                    rule = share.has_mini_batch_rule
                    whole = rule and not one_pass(share.batch.rows.select(signal))
                    before[share.index] = (stored[share.index] | rule) & ~signal | whole
            first &= not trained
        return before.nonzero()[:, 0]
