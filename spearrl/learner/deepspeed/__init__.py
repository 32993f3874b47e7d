"""The learner on many processes, sharded by DeepSpeed (ZeRO, arXiv 1910.02054)."""

from spearrl.learner.deepspeed.learner import DeepSpeedLearner

__all__ = ["DeepSpeedLearner"]
