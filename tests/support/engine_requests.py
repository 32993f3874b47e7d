"""Requests to an engine, and their answers."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

from spearrl.rollout import Completion, Request, Sampling
from tests.support.gates import LIMIT_S

VOCABULARY = 96


def serve(engine, *requests: Request) -> list[Completion]:
    async def all_of_them():
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return asyncio.run(all_of_them())


def prompt(seed: int, length: int) -> tuple[int, ...]:
    draws = random.Random(seed)
    return tuple(draws.randrange(1, VOCABULARY) for _ in range(length))


def requests(count: int = 12, **sampling) -> list[Request]:
    return [
        Request(
            (i, 0, 0), prompt(i, 5 + 3 * i), sampling=Sampling(**{"max_tokens": 4 + i % 5, "seed": 100 + i, **sampling})
        )
        for i in range(count)
    ]


def send_weights(receiver, folder: Path, version: int, timeout_s: float = 60.0) -> None:
    """A model directory's weights to a receiver, as the bridge sends them but without its checks."""
    receiver.pause(timeout_s)
    receiver.begin({"version": version, "transport": "shared_memory"}, timeout_s)
    for file in sorted(folder.glob("model*.safetensors")):
        assert receiver.take({"path": str(file)}, timeout_s)
    receiver.finish(version, timeout_s)
    receiver.resume(timeout_s)


async def all_begun(engine, count: int) -> None:
    """Until each of the `count` requests that a vLLM engine has in flight got its first token."""
    end = time.monotonic() + LIMIT_S
    while True:
        states = list(engine.llm.output_processor.request_states.values())
        if len(states) == count and all(state.detokenizer.output_token_ids for state in states):
            return
        assert time.monotonic() < end, f"{count} requests in flight"
        await asyncio.sleep(0.001)
