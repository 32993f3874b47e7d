"""What engines share that answer from an event loop of their own, in a thread of this process: vLLM's, here and on a
server.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from spearrl.errors import EngineError
from spearrl.rollout.protocol import Completion, Request, request_problem
from spearrl.rollout.vllm.arguments import COLDEST, image_tokens, takes_images

T = TypeVar("T")
GRACE_S = 2.0  # beyond a call's own limit, for an event loop that does not run
SYNC_S = 120.0


class BackgroundEngine(ABC):
    """Bounded calls, requests from any event loop, deadlines, cancellation and counters; a subclass gives `_complete`,
    `_end` and `receiver`.
    """

    receiver: Any  # takes its weights
    _vocabulary: int

    def __init__(self, name: str, context_tokens: int, model_dir: str | Path):
        self.name, self.context_tokens, self.version = name, context_tokens, 0
        self.takes_images, self._image_tokens = takes_images(model_dir), image_tokens(model_dir)
        self.adapter: Any = None  # what requests without an adapter of their own use
        self.counters: dict[str, float] = {
            "prefilled_tokens": 0,
            "cached_tokens": 0,
            "sampled_tokens": 0,
            "seconds": 0.0,
        }
        self._tasks: dict[asyncio.Task[Any], tuple[int, ...]] = {}
        self._since, self._closed = 0.0, False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> Completion:
        """Sample one reply.

        Raises:
            EngineError: malformed request, deadline, cancelled, engine dead or closed.
        """
        if problem := self._problem(request):
            raise EngineError(problem, where=f"request {request.id}")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._serve(request), self._loop))

    async def cancel(self, request_id: tuple[int, ...]) -> None:
        """Drop a request; who waits for it gets an EngineError."""
        self._loop.call_soon_threadsafe(self._drop, request_id, "cancelled")

    def run(self, factory: Callable[[], Awaitable[T]], timeout_s: float, *, doing: str) -> T:
        """Await factory() on the engine's loop, from any other thread.

        Raises:
            EngineError: no answer within timeout_s, or whatever was raised; names the engine and what it was doing.
        """

        async def bounded() -> T:
            return await asyncio.wait_for(factory(), timeout_s)

        if self._closed:
            raise EngineError("the engine is closed", where=f"{self.name}, {doing}")
        future = asyncio.run_coroutine_threadsafe(bounded(), self._loop)
        try:
            return future.result(timeout_s + GRACE_S)
        except EngineError as error:
            raise EngineError(error.message, where=error.where or f"{self.name}, {doing}", hint=error.hint) from error
        except TimeoutError as error:
            future.cancel()
            raise EngineError(f"no answer within {timeout_s:g} s", where=f"{self.name}, {doing}") from error
        except Exception as error:  # of whatever library is underneath
            raise EngineError(f"{type(error).__name__}: {error}", where=f"{self.name}, {doing}") from error

    def pause(self, timeout_s: float = SYNC_S) -> None:
        """Stop between two tokens; what is in flight stays."""
        self.receiver.pause(timeout_s)

    def resume(self, timeout_s: float = SYNC_S) -> None:
        """Go on where `pause` stopped."""
        self.receiver.resume(timeout_s)

    def publish(self, version: int) -> None:
        """Raises EngineError: such an engine shares no parameters with anyone."""
        raise EngineError("the engine has weights of its own", where=self.name, hint="send them through the bridge")

    def health(self) -> bool:
        """Whether requests are taken."""
        return not (self._closed or self._dead())

    def close(self) -> None:
        """Fail what is in flight and take no more."""
        if not self._closed:
            self._end()
            self._closed = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(GRACE_S)

    def _dead(self) -> bool:
        """Whether it is known that no reply can come any more; at once."""
        return False

    @abstractmethod
    def _end(self) -> None:
        """Release what a subclass holds; everything in flight has to end."""

    @abstractmethod
    async def _complete(self, request: Request) -> Completion:
        """One reply, on the engine's own loop; whatever it raises becomes the request's EngineError."""

    def _problem(self, request: Request) -> str | None:
        """Why a request is refused."""
        if self._closed or self._dead():
            return f"{self.name} {'is closed' if self._closed else 'is dead'}"
        if 0 < request.sampling.temperature < COLDEST:
            return f"vLLM does not sample at temperature {request.sampling.temperature}: 0, or at least {COLDEST}"
        return request_problem(request, vocabulary=self._vocabulary, context_tokens=self.context_tokens)

    def _prompt_ids(self, request: Request) -> list[int]:
        """The prompt as vLLM takes it: one image token for each picture, of which it makes as many as stand for it."""
        ids = request.token_ids
        if not request.images or not self._image_tokens:
            return list(ids)
        image = self._image_tokens[0]
        return [token for token, before in zip(ids, (None, *ids), strict=False) if token != image or before != image]

    async def _serve(self, request: Request) -> Completion:
        task: Any = asyncio.current_task()
        where = f"request {request.id}"
        self._tasks[task] = request.id
        self._tick(1)
        try:
            async with asyncio.timeout(request.deadline_s) as limit:
                completion = await self._complete(request)
        except asyncio.CancelledError as error:
            if error.args:  # by `_drop`
                raise EngineError(str(error), where=where) from None
            raise
        except EngineError as error:
            raise EngineError(error.message, where=where, hint=error.hint) from error
        except Exception as error:  # of whatever library is underneath
            reason = (
                f"no reply within {request.deadline_s} s" if limit.expired() else f"{type(error).__name__}: {error}"
            )
            raise EngineError(f"{self.name} died" if self._dead() else reason, where=where) from error
        finally:
            self._tick(0)
            del self._tasks[task]
        counts = f"{len(completion.token_ids)} tokens and {len(completion.logprobs)} log-probabilities"
        if completion.finish_reason not in ("stop", "length") or len(completion.token_ids) != len(completion.logprobs):
            raise EngineError(f'vLLM ended the request with "{completion.finish_reason}", {counts}', where=where)
        for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            if not math.isfinite(logprob):
                raise EngineError(
                    f"token {token} has log-probability {logprob}: the model's weights are not finite", where=where
                )
        self.counters["prefilled_tokens"] += len(request.token_ids) - completion.cached_tokens
        self.counters["cached_tokens"] += completion.cached_tokens
        self.counters["sampled_tokens"] += len(completion.token_ids)
        return completion

    def _drop(self, request_id: tuple[int, ...] | None, reason: str) -> None:
        """Cancel the requests of an id (None: all), on the loop."""
        for task, own in list(self._tasks.items()):
            if request_id in (None, own):
                task.cancel(reason)

    async def _drop_all(self) -> None:
        tasks = list(self._tasks)
        self._drop(None, "the engine was closed")
        await asyncio.gather(*tasks, return_exceptions=True)

    def _tick(self, idle: int) -> None:
        """Count the time since the last request came or went, if more than `idle` requests are in flight now."""
        now = time.perf_counter()
        if len(self._tasks) > idle:
            self.counters["seconds"] += now - self._since
        self._since = now


def versions(spans: Iterable[Any] | None, begun: int, now: int) -> tuple[int, int]:
    """Weight versions of the first and the last token: as vLLM labelled them; where it does not, the widest that is
    possible.
    """
    labels = [str(span["version"] if isinstance(span, dict) else span.version) for span in spans or ()]
    if labels and all(label.isdigit() for label in labels):
        return int(labels[0]), int(labels[-1])
    return begun, now
