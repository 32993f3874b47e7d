"""The embedded engine: continuous batching over a transformers model in this process."""

from spearrl.rollout.local.engine import LocalEngine

__all__ = ["LocalEngine"]
