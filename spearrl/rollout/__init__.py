"""Rollout: engines, the chat encoder and the collector."""

from spearrl.models.chat import ChatEncoder
from spearrl.rollout.asynchronous import Ahead
from spearrl.rollout.collector import Collector
from spearrl.rollout.local import LocalEngine
from spearrl.rollout.player import Player
from spearrl.rollout.protocol import Completion, Engine, Request, Sampling

__all__ = [
    "Ahead",
    "ChatEncoder",
    "Collector",
    "Completion",
    "Engine",
    "LocalEngine",
    "Player",
    "Request",
    "Sampling",
]
