"""The weight bridge between learner and engines."""

from spearrl.sync.bridge import Bridge, InProcess, Publisher

__all__ = ["Bridge", "InProcess", "Publisher"]
