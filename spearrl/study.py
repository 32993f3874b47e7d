"""What one algorithm costs beside another: both learn from the same rollouts, step by step."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from spearrl.config import RunConfig
from spearrl.errors import ContractError
from spearrl.run.checkpoint import newest_checkpoint
from spearrl.run.metrics import Clock
from spearrl.start.origin import Report, silent
from spearrl.trainer import Trainer
from spearrl.types import Group

WARM_UP = 1  # first steps that are played and learnt from but not counted: allocators and kernels settle


@dataclass(frozen=True)
class LearningCost:
    """What one algorithm spent on learning from a step's episodes.

    Args:
        seconds: wall time.
        cpu_seconds: of this process, all threads: what other processes on the machine do not change.
        prepare: seconds until the batch is ready: rows, shaping, log-probabilities before the update, advantages.
        update: seconds of the optimiser steps, replay included; the rest is storing and publishing.
        flops: of matrix products and attention.
    """

    seconds: float
    cpu_seconds: float
    prepare: float
    update: float
    flops: int = 0


@dataclass(frozen=True)
class CostStep:
    """A step that both algorithms learnt from.

    Args:
        replayed: rows that the studied algorithm replayed.
        rollout_flops: estimated: 2 x parameters x tokens.
    """

    step: int
    replayed: int
    rollout_seconds: float
    rollout_cpu_seconds: float
    rollout_flops: int
    studied: LearningCost
    against: LearningCost


@dataclass(frozen=True)
class Cost:
    """A finished measurement; `steps` does not hold the warm-up."""

    algo: str
    against: str
    steps: list[CostStep]

    def summaries(self) -> dict[str, dict[str, float]]:
        """Of the steps "without replay", "with replay" and "all"; a kind without steps is left out."""
        kinds: dict[str, list[CostStep]] = {"without replay": [], "with replay": [], "all": self.steps}
        for step in self.steps:
            kinds["with replay" if step.replayed else "without replay"].append(step)
        return {kind: summarise(steps) for kind, steps in kinds.items() if steps}

    def as_json(self) -> dict[str, Any]:
        """Plain values: every step and the summaries."""
        return {**asdict(self), "summaries": self.summaries()}


def cost(
    config: RunConfig,
    against: RunConfig,
    *,
    steps: int,
    folder: str | Path,
    report: Report = silent,
    unsandboxed_tools: bool = False,
) -> Cost:
    """Measure what `config`'s algorithm costs over `against`'s.

    Both start from the same weights. Each step is played once, by the studied one; both learn from it, in turns first.
    FLOPs are counted in a second pass over the recorded episodes, which is not timed.

    Args:
        steps: counted ones, after a warm-up.
        folder: where run directories go; they stay there.
        unsandboxed_tools: the configs may switch the sandbox off.
        report: called with (kind, values): the studied trainer's events, warnings of the other, "cost" for a step,
            "count" before the second pass.
    Raises:
        ContractError: configs that differ in more than algo, or no step to count.
    """
    _check(config, against, steps)

    def report_warnings(kind: str, values: dict[str, Any]) -> None:
        if kind == "warning":
            report(kind, values)

    open_trainer = partial(Trainer, unsandboxed_tools=unsandboxed_tools)
    with open_trainer(_variant(config, folder, "studied"), report=report) as studied:
        start, _ = newest_checkpoint(studied.run.checkpoints)
        with open_trainer(_variant(against, folder, "against", start), report=report_warnings) as other:
            episodes, measured = _measure(studied, other, steps + WARM_UP, report)
    report("count", {"steps": len(episodes)})
    with open_trainer(_variant(config, folder, "count-studied", start)) as studied:
        flops = _count(studied, episodes)
    with open_trainer(_variant(against, folder, "count-against", start)) as other:
        flops_against = _count(other, episodes)
    counted = [
        replace(step, studied=replace(step.studied, flops=mine), against=replace(step.against, flops=others))
        for step, mine, others in zip(measured, flops, flops_against, strict=True)
    ]
    return Cost(config.algo.name, against.algo.name, counted[WARM_UP:])


def summarise(steps: Sequence[CostStep]) -> dict[str, float]:
    """Of one step or more. A step is the rollout and one algorithm's learning; seconds and FLOPs are means over steps.

    extra, learn_extra: shares, 0.1 = 10 % more than the other algorithm: of a step, of learning alone. Of mean wall
    times; `_cpu`: of mean processor times; `_flops`: of FLOPs; `_median`: median of the steps' own shares.
    prepare_more, update_more, rest_more: where the extra seconds of a step go.
    """

    def mean(name: str) -> float:
        return fmean(map(attrgetter(name), steps))

    summary: dict[str, float] = {"steps": len(steps), "rollout_seconds": mean("rollout_seconds")}
    for name, unit in (("seconds", ""), ("cpu_seconds", "_cpu"), ("flops", "_flops")):
        rollout, mine, others = mean(f"rollout_{name}"), mean(f"studied.{name}"), mean(f"against.{name}")
        summary |= {
            name: rollout + mine,
            f"{name}_against": rollout + others,
            f"extra{unit}": _extra(rollout + mine, rollout + others),
            f"learn_extra{unit}": _extra(mine, others),
        }
    more = {name: mean(f"studied.{name}") - mean(f"against.{name}") for name in ("seconds", "prepare", "update")}
    whole = [(s.rollout_seconds + s.studied.seconds, s.rollout_seconds + s.against.seconds) for s in steps]
    return summary | {
        "median_seconds": median(mine for mine, _ in whole),
        "median_seconds_against": median(others for _, others in whole),
        "extra_median": median(_extra(*pair) for pair in whole),
        "learn_extra_median": median(_extra(s.studied.seconds, s.against.seconds) for s in steps),
        "prepare_more": more["prepare"],
        "update_more": more["update"],
        "rest_more": more["seconds"] - more["prepare"] - more["update"],
    }


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and the attention (as if nothing were masked) of a call, gradients included.

    The call runs a few times slower.
    """
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
    """FLOPs of sampling, estimated: 2 x parameters x tokens.

    Without attention's own products, which grow with the context.

    Args:
        prefilled, sampled: tokens. The head works on sampled ones only; the input embedding is a look-up.
    """
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    body = sum(p.numel() for p in model.parameters() if p.ndim > 1 and p is not head and p is not embedding)
    return int(2 * (body * (prefilled + sampled) + head.numel() * sampled))


def _measure(studied: Trainer, other: Trainer, steps: int, report: Report) -> tuple[list[list[Group]], list[CostStep]]:
    """The episodes of every step, and what both learners spent on them; FLOPs of learning are still missing."""
    episodes: list[list[Group]] = []
    measured: list[CostStep] = []
    for step in range(1, steps + 1):
        engine = studied.parts.players.engine
        before, start = dict(engine.counters), _now()
        groups, _ = studied.play(step)
        seconds, cpu_seconds = _since(start)
        tokens = {n: engine.counters[f"{n}_tokens"] - before[f"{n}_tokens"] for n in ("prefilled", "sampled")}
        turns = (studied, other) if step % 2 else (other, studied)  # who goes second finds the episodes in the caches
        costs = {trainer: _learn(trainer, step, groups) for trainer in turns}
        (mine, metrics), (others, _) = costs[studied], costs[other]
        flops = rollout_flops(studied.parts.model, **tokens)
        replayed = int(metrics.get("replay/rows", 0.0))
        measured.append(CostStep(step, replayed, seconds, cpu_seconds, flops, studied=mine, against=others))
        episodes.append(groups)
        report("cost", {**asdict(measured[-1]), "steps": steps})
    return episodes, measured


def _learn(trainer: Trainer, step: int, groups: list[Group]) -> tuple[LearningCost, dict[str, float]]:
    gc.collect()  # so that nobody clears up after the other
    start, clock = _now(), Clock()
    metrics = trainer.learn(step, groups, clock)
    seconds, cpu_seconds = _since(start)
    laps = clock.metrics()
    successes = [t.success for g in groups for t in g.valid]
    trainer.observe({**metrics, **({"rollout/success": fmean(successes)} if successes else {})})
    spent = LearningCost(seconds, cpu_seconds, laps.get("time/prepare", 0.0), laps.get("time/update", 0.0))
    return spent, metrics


def _count(trainer: Trainer, episodes: Sequence[list[Group]]) -> list[int]:
    """FLOPs of learning from each step's episodes: the same work once more, from the same weights."""
    return [count_flops(partial(_learn, trainer, step, groups)) for step, groups in enumerate(episodes, start=1)]


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
    if config.model_copy(update={"algo": against.algo}) != against:
        others = [name for name in RunConfig.model_fields if getattr(config, name) != getattr(against, name)]
        text = f"the two configs differ in {', '.join(name for name in others if name != 'algo')}"
        raise ContractError(text, where="study cost", hint="make them from the same settings, but for algo")


def _variant(config: RunConfig, folder: str | Path, name: str, start: Path | None = None) -> RunConfig:
    """The same run under another name; `start`: a checkpoint to begin from, without a cold start."""
    changes: dict[str, Any] = {"run.output_dir": str(folder), "run.name": name, "run.tensorboard": False}
    if start is not None:
        changes |= {"model.path": str(start), "sft.enabled": False}
    return config.with_settings(changes)


def _extra(value: float, base: float) -> float:
    """0 where there is nothing to compare with."""
    return value / base - 1 if base else 0.0
