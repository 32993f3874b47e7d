"""Learners: they own the trained parameters, give log-probabilities of rows, and make updates (`protocol`)."""

from __future__ import annotations

from spearrl.learner.critic import ValueHead
from spearrl.learner.deepspeed import DeepSpeedLearner
from spearrl.learner.deepspeed.ranks import serve_commands
from spearrl.learner.deepspeed.shard import CommandRunner
from spearrl.learner.local import LocalLearner
from spearrl.learner.protocol import Learner, UpdateResult

__all__ = ["DeepSpeedLearner", "Learner", "LocalLearner", "UpdateResult", "ValueHead", "serve"]


def serve() -> int:
    """Be a rank of a DeepSpeedLearner other than 0 until rank 0 ends; returns the exit code.

    The environment says which one (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
    """
    return serve_commands(CommandRunner())
