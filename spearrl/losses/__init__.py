"""Losses as pure functions of [B, T] tensors: every one returns (loss, metrics) and pastes into a notebook.

Common to all:
    Position t is the log-probability *of* token t.
    Values outside `action_mask`, NaN included, touch neither loss nor gradient.
    `denominator` is that of the whole mini-batch, so that micro-batches add up; None: that of this call.
    Tokens in `drop` (bool) have no loss and no gradient, but still count in the denominator.
    `metrics` are means over the action tokens; every loss reports dropped_fraction.
"""

from __future__ import annotations

from spearrl.losses.aggregate import AGGREGATIONS, aggregate, denominator
from spearrl.losses.covariance import clip_cov_loss, covariance_selection, kl_cov_loss, kl_cov_selection
from spearrl.losses.importance import importance_weights
from spearrl.losses.kl import kl_divergence
from spearrl.losses.objective import ClipCov, Correction, KlCov, Objective
from spearrl.losses.surrogates import cispo_loss, clipped_policy_loss, clipped_tokens, gspo_loss
from spearrl.losses.value import value_loss

__all__ = ["AGGREGATIONS", "ClipCov", "Correction", "KlCov", "Objective", "aggregate", "cispo_loss", "clip_cov_loss"]
__all__ += ["clipped_policy_loss", "clipped_tokens", "covariance_selection", "denominator", "gspo_loss"]
__all__ += ["importance_weights", "kl_cov_loss", "kl_cov_selection", "kl_divergence", "value_loss"]
