"""How far a rollout is, for whoever watches it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from spearrl.rollout.player import Episode
from spearrl.rollout.protocol import Engine


class Counting(Protocol):
    """What plays: counts the episodes that ended, ever."""

    engine: Engine
    ended: int


class Standing:
    """Of the episodes that begin now. As text: episodes and tokens since then, at the moment it is printed."""

    def __init__(self, player: Counting, episodes: Sequence[Episode]):
        self._player, self._episodes = player, len(episodes)
        self._purpose = str(episodes[0][3][0]) if episodes else "nothing to play"
        self._began, self._ended, self._tokens = time.monotonic(), player.ended, self._sampled()

    def _sampled(self) -> float:
        return self._player.engine.counters.get("sampled_tokens", 0.0)

    def __str__(self) -> str:
        ended, tokens = self._player.ended - self._ended, self._sampled() - self._tokens
        rate = tokens / max(time.monotonic() - self._began, 1e-3)
        return f"{self._purpose}: {ended} of {self._episodes} episodes, {tokens:,.0f} tokens, {rate:.0f} tokens/s"
