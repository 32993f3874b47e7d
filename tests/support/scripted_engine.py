"""An engine for tests: replies come from a function, through the same protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from spearrl.errors import EngineError
from spearrl.rollout.protocol import Completion, Request


class ScriptedEngine:
    """Answers with `reply(request)`, log-probability −1 a token; what the function raises becomes an EngineError."""

    def __init__(self, reply: Callable[[Request], Sequence[int]]):
        self.version = 0
        self.requests: list[Request] = []
        self.counters: dict[str, float] = {}
        self._reply = reply

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        await asyncio.sleep(0)
        try:
            tokens = tuple(self._reply(request))[: request.sampling.max_tokens]
        except Exception as error:
            raise EngineError(f"{type(error).__name__}: {error}", where=f"request {request.id}") from error
        stopped = bool(tokens) and tokens[-1] in request.sampling.stop_ids
        return Completion(tokens, (-1.0,) * len(tokens), "stop" if stopped else "length", self.version, self.version)

    async def cancel(self, request_id: tuple[int, ...]) -> None:
        """Replies come at once; there is nothing to cancel."""

    def pause(self) -> None:
        """Nothing is in flight between two calls."""

    def resume(self) -> None:
        """Nothing was paused."""

    def publish(self, version: int) -> None:
        self.version = version

    def health(self) -> bool:
        return True

    def close(self) -> None:
        """There is nothing to release."""
