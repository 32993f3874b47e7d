"""What one algorithm costs beside another: both learn from the same rollouts, step by step."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from spearrl.config import RunConfig
from spearrl.errors import ContractError
from spearrl.rollout import Engine
from spearrl.run.checkpoint import newest_checkpoint
from spearrl.run.metrics import Clock
from spearrl.start.origin import Report, silent
from spearrl.trainer import Trainer
from spearrl.types import Group

WARM_UP = 1  # first steps that are played and learnt from but not counted: allocators and kernels settle


@dataclass(frozen=True)
class Spent:
    """By one algorithm, learning from a step's episodes."""

    seconds: float  # wall time
    cpu_seconds: float  # of this process, all threads: what other processes on the machine do not change
    prepare: float  # seconds until the batch is ready: rows, shaping, log-probabilities before the update, advantages
    update: float  # seconds of the optimiser steps, replay included; the rest is storing and publishing
    flops: int = 0  # of matrix products and attention


@dataclass(frozen=True)
class CostStep:
    """A step that both algorithms learnt from."""

    step: int
    replayed: int  # rows that the studied algorithm replayed
    rollout_seconds: float
    rollout_cpu_seconds: float
    rollout_flops: int  # estimated: 2 x parameters x tokens
    studied: Spent
    against: Spent


@dataclass(frozen=True)
class Summary:
    """Of some steps. A step is the rollout and one algorithm's learning; extra is a share, 0.1 = 10 % more than the other algorithm."""

    steps: int
    rollout_seconds: float  # mean, as all seconds and FLOPs here but the medians
    seconds: float
    seconds_against: float
    median_seconds: float
    median_seconds_against: float
    flops: float
    flops_against: float
    extra: float  # of mean wall times
    extra_median: float  # median over steps of a step's own share
    extra_cpu: float
    extra_flops: float
    learn_extra: float  # of the learner's part alone
    learn_extra_median: float
    learn_extra_cpu: float
    learn_extra_flops: float
    prepare_more: float  # where the extra seconds of a step go
    update_more: float
    rest_more: float


@dataclass(frozen=True)
class Cost:
    """A finished measurement; `steps` does not hold the warm-up."""

    algo: str
    against: str
    steps: list[CostStep]

    def summaries(self) -> dict[str, Summary]:
        """Of the steps "without replay", "with replay" and "all"; a kind without steps is left out."""
        kinds = {
            "without replay": [s for s in self.steps if not s.replayed],
            "with replay": [s for s in self.steps if s.replayed],
            "all": self.steps,
        }
        return {kind: summarise(steps) for kind, steps in kinds.items() if steps}

    def as_json(self) -> dict[str, Any]:
        """Plain values: every step and the summaries."""
        summaries = {kind: asdict(summary) for kind, summary in self.summaries().items()}
        return {
            "algo": self.algo,
            "against": self.against,
            "summaries": summaries,
            "steps": [asdict(step) for step in self.steps],
        }


def cost(
    config: RunConfig, against: RunConfig, *, steps: int, folder: str | Path, report: Report | None = None
) -> Cost:
    """Measure what `config`'s algorithm costs over `against`'s.

    Both start from the same weights. Each step is played once, by the studied one; both learn from it, in turns first. FLOPs are counted
    in a second pass over the recorded episodes, which is not timed.

    Args:
        steps: counted ones, after a warm-up.
        folder: where run directories go; they stay there.
        report: called with (kind, values): the trainer's events, "cost" for a step, "count" before the second pass.
    Raises:
        ContractError: configs that differ in more than algo, or no step to count.
    """
    _check(config, against, steps)
    tell = report or silent
    studied = Trainer(_named(config, folder, "studied"), report=tell)
    try:
        start, _ = newest_checkpoint(studied.run.checkpoints)
        other = Trainer(_warm(against, folder, "against", start), report=_only_warnings(tell))
        try:
            recorded, measured = _measure(studied, other, steps + WARM_UP, tell)
        finally:
            other.close()
    finally:
        studied.close()
    tell("count", {"steps": len(recorded)})
    counts = [
        _count(_warm(which, folder, f"count-{name}", start), recorded)
        for name, which in (("studied", config), ("against", against))
    ]
    found = [_with_flops(step, *flops) for step, *flops in zip(measured, *counts, strict=True)]
    return Cost(config.algo.name, against.algo.name, found[WARM_UP:])


def summarise(steps: Sequence[CostStep]) -> Summary:
    """Of one step or more."""
    mine, others = [s.studied for s in steps], [s.against for s in steps]
    rollout, rollout_cpu = [s.rollout_seconds for s in steps], fmean(s.rollout_cpu_seconds for s in steps)
    seconds, seconds_against = (_plus(rollout, part) for part in (mine, others))
    flops, flops_against, played = _mean(mine, "flops"), _mean(others, "flops"), fmean(s.rollout_flops for s in steps)
    more = {name: _mean(mine, name) - _mean(others, name) for name in ("seconds", "prepare", "update")}
    return Summary(
        steps=len(steps),
        rollout_seconds=fmean(rollout),
        seconds=fmean(seconds),
        seconds_against=fmean(seconds_against),
        median_seconds=median(seconds),
        median_seconds_against=median(seconds_against),
        flops=played + flops,
        flops_against=played + flops_against,
        extra=_extra(fmean(seconds), fmean(seconds_against)),
        extra_median=median(map(_extra, seconds, seconds_against)),
        extra_cpu=_extra(rollout_cpu + _mean(mine, "cpu_seconds"), rollout_cpu + _mean(others, "cpu_seconds")),
        extra_flops=_extra(played + flops, played + flops_against),
        learn_extra=_extra(_mean(mine, "seconds"), _mean(others, "seconds")),
        learn_extra_median=median(_extra(a.seconds, b.seconds) for a, b in zip(mine, others, strict=True)),
        learn_extra_cpu=_extra(_mean(mine, "cpu_seconds"), _mean(others, "cpu_seconds")),
        learn_extra_flops=_extra(flops, flops_against),
        prepare_more=more["prepare"],
        update_more=more["update"],
        rest_more=more["seconds"] - more["prepare"] - more["update"],
    )


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and the attention (as if nothing were masked) of a call, gradients included. The call runs a few times slower."""
    aten = torch.ops.aten
    # What torch's counter (2.13) passes over: the head's weight gradient, and attention on processors.
    formulas = {
        aten.addmm_: lambda total, a, b, *_, **__: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    return counter.get_total_flops()


def rollout_flops(model: Any, *, prefilled: float, sampled: float) -> int:
    """FLOPs of sampling, estimated: 2 x parameters x tokens, without attention's own products, which grow with the context.

    Args:
        prefilled, sampled: tokens. The head works on sampled ones only; the input embedding is a look-up.
    """
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    body = sum(p.numel() for p in model.parameters() if p.ndim > 1 and p is not head and p is not embedding)
    return int(2 * (body * (prefilled + sampled) + head.numel() * sampled))


def _measure(studied: Trainer, other: Trainer, steps: int, tell: Report) -> tuple[list[list[Group]], list[CostStep]]:
    """The episodes of every step, and what both learners spent on them; FLOPs of learning are still missing."""
    recorded, measured = [], []
    for step in range(1, steps + 1):
        before = _counters(studied.parts.players.engine)
        start = _now()
        groups, _ = studied.play(step)
        seconds, cpu_seconds = _since(start)
        tokens = {name: value - before[name] for name, value in _counters(studied.parts.players.engine).items()}
        spent, rows = {}, 0.0
        for trainer in (
            (studied, other) if step % 2 else (other, studied)
        ):  # who goes second finds the episodes in the caches
            spent[trainer is studied], metrics = _learn(trainer, step, groups)
            rows = metrics.get("replay/rows", 0.0) if trainer is studied else rows
        flops = rollout_flops(studied.parts.model, **tokens)
        measured.append(
            CostStep(step, int(rows), seconds, cpu_seconds, flops, studied=spent[True], against=spent[False])
        )
        recorded.append(groups)
        tell("cost", {**asdict(measured[-1]), "steps": steps})
    return recorded, measured


def _learn(trainer: Trainer, step: int, groups: list[Group]) -> tuple[Spent, dict[str, float]]:
    gc.collect()  # so that nobody clears up after the other
    clock, start = Clock(), _now()
    metrics = trainer.learn(step, groups, clock)
    seconds, cpu_seconds = _since(start)
    laps = clock.metrics()
    wins = [t.success for g in groups for t in g.valid]
    trainer.observe({**metrics, **({"rollout/success": sum(wins) / len(wins)} if wins else {})})
    return Spent(seconds, cpu_seconds, laps.get("time/prepare", 0.0), laps.get("time/update", 0.0)), metrics


def _count(config: RunConfig, recorded: Sequence[list[Group]]) -> list[int]:
    """FLOPs of learning from each step's episodes: the same work once more, from the same weights."""
    trainer = Trainer(config)
    try:
        return [count_flops(partial(_learn, trainer, step, groups)) for step, groups in enumerate(recorded, start=1)]
    finally:
        trainer.close()


def _with_flops(step: CostStep, studied: int, against: int) -> CostStep:
    return replace(step, studied=replace(step.studied, flops=studied), against=replace(step.against, flops=against))


def _counters(engine: Engine) -> dict[str, float]:
    return {"prefilled": engine.counters["prefilled_tokens"], "sampled": engine.counters["sampled_tokens"]}


def _now() -> tuple[float, float]:
    """(wall, processor) seconds, once the GPU has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    wall, processor = _now()
    return wall - start[0], processor - start[1]


def _check(config: RunConfig, against: RunConfig, steps: int) -> None:
    if steps < 1:
        raise ContractError(f"steps={steps}; must be >= 1", where="study cost", hint="measure 20 steps or more")
    differing = [
        name for name in RunConfig.model_fields if name != "algo" and getattr(config, name) != getattr(against, name)
    ]
    if differing:
        raise ContractError(
            f"the two configs differ in {', '.join(differing)}",
            where="study cost",
            hint="make them from the same settings, but for algo",
        )


def _named(config: RunConfig, folder: str | Path, name: str) -> RunConfig:
    return config.model_copy(
        update={"run": config.run.model_copy(update={"output_dir": str(folder), "name": name, "tensorboard": False})}
    )


def _warm(config: RunConfig, folder: str | Path, name: str, start: Path) -> RunConfig:
    """The same run, from the weights that another one began with."""
    model, sft = config.model.model_copy(update={"path": str(start)}), config.sft.model_copy(update={"enabled": False})
    return _named(config, folder, name).model_copy(update={"model": model, "sft": sft})


def _only_warnings(report: Report) -> Report:
    def tell(kind: str, values: dict[str, Any]) -> None:
        if kind == "warning":
            report(kind, values)

    return tell


def _plus(rollout: Sequence[float], learning: Sequence[Spent]) -> list[float]:
    return [played + spent.seconds for played, spent in zip(rollout, learning, strict=True)]


def _mean(spent: Sequence[Spent], name: str) -> float:
    return fmean(getattr(one, name) for one in spent)


def _extra(value: float, base: float) -> float:
    """0 where there is nothing to compare with."""
    return value / base - 1 if base else 0.0
