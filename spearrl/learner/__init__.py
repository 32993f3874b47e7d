"""Learners: log-probabilities of rows, and updates from batches and objectives."""

from __future__ import annotations

from spearrl.learner.critic import ValueHead
from spearrl.learner.deepspeed import DeepSpeedLearner
from spearrl.learner.deepspeed.ranks import serve_commands
from spearrl.learner.deepspeed.shard import Worker
from spearrl.learner.local import LocalLearner
from spearrl.learner.protocol import Learner, UpdateResult

__all__ = ["DeepSpeedLearner", "Learner", "LocalLearner", "UpdateResult", "ValueHead", "serve"]


def serve() -> int:
    """Be a learner rank other than 0 until rank 0 ends; returns the exit code. Its place is in the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)."""
    return serve_commands(Worker())
