"""Rollout: engines, the chat encoder and the collector."""

from spearrl.rollout.chat import ChatEncoder
from spearrl.rollout.collector import Collector
from spearrl.rollout.engine import Completion, Engine, Request, Sampling
from spearrl.rollout.local import LocalEngine
from spearrl.rollout.scripted import ScriptedEngine

__all__ = ["ChatEncoder", "Collector", "Completion", "Engine", "LocalEngine", "Request", "Sampling", "ScriptedEngine"]
