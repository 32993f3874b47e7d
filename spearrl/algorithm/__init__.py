"""From settings to mathematics: a step's rewards, what its tokens are worth, objectives, and what is remembered."""

from __future__ import annotations

from spearrl.algorithm.credit import Credit, assign_credit, check_advantage, needs_critic, needs_reference
from spearrl.algorithm.memory import Memory
from spearrl.algorithm.objectives import objectives
from spearrl.algorithm.rewards import Shaped, episode_bonuses, shape, trainable

__all__ = ["Credit", "Memory", "Shaped", "assign_credit", "check_advantage", "episode_bonuses", "needs_critic"]
__all__ += ["needs_reference", "objectives", "shape", "trainable"]
