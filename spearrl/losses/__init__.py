"""Losses as pure functions of [B, T] tensors: every one returns (loss, metrics) and pastes into a notebook.

Common to all: position t is the log-probability *of* token t; values outside `action_mask` (NaN included) touch neither loss nor gradient; `denominator` is
the full divisor of the mini-batch (None: of this call), so micro-batches add up; tokens in `drop` (bool) have no loss and no gradient but still count in it.
"""

from __future__ import annotations

from spearrl.losses.aggregate import AGGREGATIONS, aggregate
from spearrl.losses.covariance import clip_cov_loss, covariance_selection, kl_cov_loss, kl_cov_selection
from spearrl.losses.objective import ClipCov, Correction, KlCov, Objective
from spearrl.losses.surrogates import cispo_loss, clipped_policy_loss, clipped_tokens, gspo_loss
from spearrl.losses.terms import importance_weights, kl_divergence, value_loss

__all__ = [
    "AGGREGATIONS",
    "ClipCov",
    "Correction",
    "KlCov",
    "Objective",
    "aggregate",
    "cispo_loss",
    "clip_cov_loss",
    "clipped_policy_loss",
    "clipped_tokens",
    "covariance_selection",
    "gspo_loss",
    "importance_weights",
    "kl_cov_loss",
    "kl_cov_selection",
    "kl_divergence",
    "value_loss",
]
