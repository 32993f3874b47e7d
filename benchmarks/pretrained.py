"""A pretrained model on one core: sampling in float32 and bfloat16, and an update's memory; a process for each.

python -m benchmarks.pretrained --model smollm2-135m
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from spearrl.batching import Batch, rows_from_groups
from spearrl.config.sections import LearnerSection, LoraSection
from spearrl.learner import LocalLearner
from spearrl.losses import Objective
from spearrl.models import directory_of, load_model, load_tokenizer, text_ids
from spearrl.rollout.local import LocalEngine
from spearrl.rollout.protocol import Completion, Request, Sampling
from spearrl.types import Action, Group, Task, Trajectory, Turn

REQUESTS, PROMPT, REPLY = 8, 400, 64
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def sampling(model: str, dtype: str) -> str:
    """Speed of both kinds of passes, and how far log-probabilities are from a float32 forward pass."""
    text = text_ids(load_tokenizer(model))
    engine = LocalEngine(
        load_model(model, dtype=TYPES[dtype]),
        slots=REQUESTS,
        cache_mib=1024,
        context_tokens=PROMPT + REPLY,
        probe_ids=text,
    )
    prompts = [tuple((text * PROMPT)[: PROMPT - 1] + [100 + number]) for number in range(REQUESTS)]

    async def reply(turn: int, tokens: int) -> list[Completion]:
        settings = [Sampling(1.0, 1.0, tokens, (), None, number) for number in range(REQUESTS)]
        requests = (
            Request((0, 0, n, turn), p, sampling=s) for n, (p, s) in enumerate(zip(prompts, settings, strict=True))
        )
        return list(await asyncio.gather(*map(engine.generate, requests)))

    start = time.process_time()
    asyncio.run(reply(0, 1))
    read = time.process_time()
    replies = asyncio.run(reply(1, REPLY))
    end = time.process_time()
    exact, gaps = load_model(model), []
    for prompt, completion in zip(prompts, replies, strict=True):
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            logprobs = exact(ids).logits[0, PROMPT - 1 : -1].log_softmax(-1)
        gaps.append(logprobs.gather(1, ids[0, PROMPT:, None])[:, 0] - torch.tensor(completion.logprobs))
    gap = torch.cat(gaps).abs()
    prefilled, sampled = engine.counters["prefilled_tokens"] / (read - start), REQUESTS * REPLY / (end - read)
    return (
        f"sampling {dtype}: prompts {prefilled:.0f}, replies {sampled:.0f} tokens a CPU second; "
        f"gap {float(gap.mean()):.3f} nats a token, at most {float(gap.max()):.2f}"
    )


def update(model: str, precision: str, tokens: int, checkpointing: str, rank: str) -> str:
    """One optimiser step on a row of so many tokens, the last 256 of them sampled."""
    settings = LearnerSection(
        precision=precision,  # type: ignore[arg-type]
        gradient_checkpointing=checkpointing == "on",
        lm_head_chunk=512,
        lora=LoraSection(rank=int(rank)),
    )
    learner = LocalLearner(load_model(model), settings)
    ids = tuple(torch.randint(100, 40_000, (tokens,), generator=torch.Generator().manual_seed(0)).tolist())
    turn = Turn(ids[:-256], ids[-256:], (-1.0,) * 256, "stop", "", "", None, Action(""), 1.0, 0, 0)
    task = Task("task", "train", {})
    rows = rows_from_groups([Group(0, task, [Trajectory(task, 0, 0, 0, [turn])])])
    old = learner.logprobs(rows)
    start = time.process_time()
    result = learner.update(
        Batch(rows, torch.ones_like(old), old), None, gamma=0.0, objectives=[Objective("policy")], seed=0
    )
    seconds, peak = time.process_time() - start, Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return (
        f"update {precision}, {tokens} tokens, checkpointing {checkpointing}, adapters' rank {rank}: "
        f"{int(peak) / 1e6:.2f} GB, {seconds:.1f} CPU seconds, gradient norm {result.metrics['policy/grad_norm']:.5g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="directory or name")
    parser.add_argument("--only", nargs="+", help="one measurement, as the other ones are started")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = str(directory_of(arguments.model))
    if arguments.only:
        kind, first, *rest = arguments.only
        print(sampling(model, first) if kind == "sampling" else update(model, first, int(rest[0]), rest[1], rest[2]))
        return
    updates = [(p, "2048", c, "0") for p in TYPES for c in ("off", "on")]
    updates += [("fp32", "2048", "on", "8")] if find_spec("peft") else []
    for case in [("sampling", dtype) for dtype in TYPES] + [("update", *case) for case in updates]:
        subprocess.run([sys.executable, "-m", "benchmarks.pretrained", "--model", model, "--only", *case], check=True)


if __name__ == "__main__":
    main()
