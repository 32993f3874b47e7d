"""Learners: log-probabilities of rows, and updates from batches and objectives."""

from __future__ import annotations

from spearrl.learner.critic import ValueHead
from spearrl.learner.local import LocalLearner
from spearrl.learner.protocol import Learner, UpdateResult

__all__ = ["Learner", "LocalLearner", "UpdateResult", "ValueHead"]
