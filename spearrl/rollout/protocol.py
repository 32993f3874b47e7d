"""What a rollout engine is: token ids in, sampled token ids with their log-probabilities out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from spearrl.types import Image


@dataclass(slots=True, frozen=True)
class Sampling:
    """How a reply is drawn.

    Log-probabilities are of logits / temperature, renormalised over what top_p and allowed_ids leave.
    """

    temperature: float = 1.0  # 0: greedy, with log-probabilities at temperature 1
    top_p: float = 1.0
    max_tokens: int = 512
    stop_ids: tuple[int, ...] = ()  # a sampled stop token is part of the completion
    allowed_ids: tuple[int, ...] | None = None
    seed: int = 0


@dataclass(slots=True, frozen=True)
class Request:
    """One reply to sample. `id` orders admission: (…, group, sibling, turn)."""

    id: tuple[int, ...]
    token_ids: tuple[int, ...]
    images: tuple[Image, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    deadline_s: float | None = None  # seconds after which the engine gives the request up


@dataclass(slots=True, frozen=True)
class Completion:
    """A sampled reply. Weights may change while it is drawn: the versions of its first and last token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str  # "stop" | "length"
    min_version: int = 0
    max_version: int = 0
    cached_tokens: int = 0  # prompt tokens that did not have to be computed


def request_problem(request: Request, *, vocabulary: int, context_tokens: int) -> str | None:
    """Why no engine of this vocabulary and context can serve the request; None where it can."""
    sampling = request.sampling
    if (
        not request.token_ids
        or sampling.max_tokens < 1
        or len(request.token_ids) + sampling.max_tokens > context_tokens
    ):
        lengths = f"{len(request.token_ids)} prompt + {sampling.max_tokens} reply tokens"
        return f"{lengths}; the context holds {context_tokens} and each must be >= 1"
    if not 0 <= min(request.token_ids) <= max(request.token_ids) < vocabulary:
        return f"token ids must lie in 0..{vocabulary - 1}"
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
        return f"temperature {sampling.temperature}, top_p {sampling.top_p}: must be >= 0 and in (0, 1]"
    if sampling.allowed_ids is not None and not all(0 <= token < vocabulary for token in sampling.allowed_ids or (-1,)):
        return f"allowed_ids must be one or more of 0..{vocabulary - 1}"
    return None


class Engine(Protocol):
    """Samples replies; one instance serves many coroutines."""

    version: int
    counters: dict[str, float]  # what it did so far; "seconds" it was busy

    async def generate(self, request: Request) -> Completion:
        """Raises EngineError where the request cannot be served."""

    async def cancel(self, request_id: tuple[int, ...]) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def publish(self, version: int) -> None:
        """The parameters shared with the learner changed in place; nothing cached before may be used again."""

    def health(self) -> bool: ...

    def close(self) -> None: ...
