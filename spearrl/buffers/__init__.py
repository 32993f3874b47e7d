"""What self-imitation remembers: the agent's own good trajectories, and how well groups did when they were made."""

from __future__ import annotations

from spearrl.buffers.admission import Admission
from spearrl.buffers.baseline import BaselineBuffer
from spearrl.buffers.replay import ReplayBuffer

__all__ = ["Admission", "BaselineBuffer", "ReplayBuffer"]
