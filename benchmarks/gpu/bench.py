"""What the GPU checks share: models of real shapes with random weights (no downloads), requests, rows, memory."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from spearrl.batching import Batch, Rows, rows_from_groups
from spearrl.config.sections import LearnerSection, RolloutSection, VllmSection
from spearrl.learner import LocalLearner
from spearrl.models import load_model
from spearrl.rollout import Completion, Request, Sampling
from spearrl.rollout.vllm import VLLMEngine
from spearrl.types import Action, Group, Task, Trajectory, Turn

T = TypeVar("T")
SHAPES: dict[
    str, dict[str, int]
] = {  # Qwen2.5-0.5B and -1.5B; their config.json, less what has no influence on time or memory
    "0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
    },
    "1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 128,
        "vocab_size": 512,
    },
}
GIB = 1 << 30
ENGINE_SHARE = 0.35  # of a GPU, so that a learner fits beside an engine


class CheckFailed(Exception):
    """A check ran and did not hold."""


@dataclass(frozen=True)
class Bench:
    """Where and how large. `shape(...)` and the sizes shrink with tiny."""

    device: str
    tiny: bool
    folder: Path

    def shape(self, name: str) -> str:
        return "tiny" if self.tiny else name

    @property
    def prompts(self) -> int:
        return 4 if self.tiny else 64

    @property
    def siblings(self) -> int:
        return 2 if self.tiny else 8

    @property
    def prompt_tokens(self) -> int:
        return 24 if self.tiny else 512

    @property
    def reply_tokens(self) -> int:
        return 8 if self.tiny else 256

    def model(self, shape: str, dtype: str) -> Path:
        """A model directory of random weights, made once. Deterministic."""
        from transformers import Qwen2Config, Qwen2ForCausalLM

        path = self.folder / f"{shape}-{dtype}"
        if path.exists():
            return path
        config = Qwen2Config(
            **SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=32768, dtype=getattr(torch, dtype)
        )
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
        with tempfile.TemporaryDirectory(dir=self.folder) as building:
            model.save_pretrained(building)
            path.parent.mkdir(exist_ok=True)
            Path(building).rename(path)
            Path(building).mkdir()  # for the context manager to remove
        return path

    def rollout(self) -> RolloutSection:
        return RolloutSection(
            engine="vllm",
            context_tokens=self.prompt_tokens + self.reply_tokens + 8,
            slots=self.prompts * self.siblings,
            cache_mib=64,
        )

    @contextmanager
    def engine(
        self, model: Path, *, environment: Mapping[str, str] | None = None, **options: Any
    ) -> Iterator[VLLMEngine]:
        """A vLLM engine on the model, its processes with other variables than this one; beside a learner it gets a
        third of the GPU.
        """
        settings, before = VllmSection(memory_fraction=ENGINE_SHARE, eager=self.tiny), dict(os.environ)
        os.environ.update(environment or {})
        try:
            engine = VLLMEngine(model, settings, self.rollout(), device=self.device, **options)
        finally:
            os.environ.clear()
            os.environ.update(before)
        try:
            yield engine
        finally:
            engine.close()

    def learner(self, model: Path, precision: str) -> LocalLearner:
        settings = LearnerSection(precision=precision, gradient_checkpointing=not self.tiny, lr=1e-4)
        return LocalLearner(load_model(str(model)), settings, device=self.device)

    def requests(self, shape: str, *, prompts: int | None = None) -> list[Request]:
        """Siblings of random prompts; every reply has all its tokens."""
        draw = random.Random(0)
        requests = []
        for group in range(prompts or self.prompts):
            ids = tuple(draw.randrange(SHAPES[shape]["vocab_size"]) for _ in range(self.prompt_tokens))
            for sibling in range(self.siblings):
                sampling = Sampling(max_tokens=self.reply_tokens, seed=group * 100 + sibling)
                requests.append(Request((group, sibling, 0), ids, sampling=sampling))
        return requests


def play(engine: VLLMEngine, requests: list[Request]) -> list[Completion]:
    """All requests at once."""

    async def together() -> list[Completion]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return asyncio.run(together())


def rows_of(requests: list[Request], replies: list[Completion]) -> Rows:
    """One row a reply, in the engine's own tokens and log-probabilities."""
    groups: dict[int, Group] = {}
    for number, (request, reply) in enumerate(zip(requests, replies, strict=True)):
        group, sibling, _ = request.id
        turn = Turn(
            request.token_ids,
            reply.token_ids,
            reply.logprobs,
            reply.finish_reason,
            "",
            "",
            None,
            Action(""),
            reward=float(number % 2),
        )
        task = Task(str(group), "bench")
        groups.setdefault(group, Group(group, task)).trajectories.append(
            Trajectory(task, group, sibling, number, [turn])
        )
    return rows_from_groups(list(groups.values()))


def random_rows(bench: Bench, shape: str) -> Rows:
    """Rows that no engine had to sample."""
    requests = bench.requests(shape)
    draw = random.Random(1)
    tokens = [tuple(draw.randrange(SHAPES[shape]["vocab_size"]) for _ in range(bench.reply_tokens)) for _ in requests]
    return rows_of(requests, [Completion(ids, (-5.0,) * len(ids), "length") for ids in tokens])


def batch_of(rows: Rows, logprobs: torch.Tensor) -> Batch:
    """The rows with advantages of either sign."""
    sign = torch.where(torch.arange(len(rows)) % 2 == 0, 1.0, -1.0)[:, None]
    return Batch(rows, sign.expand_as(logprobs) * rows.padded_mask, logprobs)


def timed(work: Callable[[], T], device: str) -> tuple[T, float]:
    """The result, and seconds until the device is done."""
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def peak_gib(device: str) -> float:
    """Peak of torch's device memory in this process since it began; 0 on processors."""
    return torch.cuda.max_memory_allocated() / GIB if device == "cuda" else 0.0
