"""A placement and a step's batch arithmetic in words, for people."""

from __future__ import annotations

from spearrl.config import RunConfig
from spearrl.launch.placement import Placement, gib, span


def describe(placement: Placement) -> str:
    """Who gets what, what was worked out, and what a step trains on. A few lines of text."""
    config = placement.config
    count = len({*placement.learner, *(gpu for group in placement.engines for gpu in group)})
    in_process = not config.rollout.workers and config.learner.backend == config.rollout.engine == "local"
    if in_process and not count and not placement.derived:
        return arithmetic(config)
    head = "placement: processors only"
    if count:
        memory = f" ({gib(placement.gpu.memory)})" if placement.gpu.memory else ""
        mode = "disaggregated: GPUs of their own"
        if placement.colocated:
            mode = f"colocated: {'engines sleep while the learner works' if placement.sleeps else 'one set of GPUs'}"
        head = f"placement: {count} x {placement.gpu.name}{memory}, {mode}"
    lines = [head, _line("learner", *_learner(placement)), _line("engines", *_engines(placement))]
    if placement.derived:
        lines.append("  worked out: " + " ".join(f"{key}={value}" for key, value in placement.derived.items()))
    lines += [f"  note: {note}" for note in placement.notes]
    return "\n".join([*lines, arithmetic(config)])


def arithmetic(config: RunConfig) -> str:
    """From tasks to rows per rank: the numbers that frameworks call train, mini and micro batch."""
    rollout, learner, sil = config.rollout, config.learner, config.algo.sil
    episodes = rollout.groups_per_step * rollout.group_size
    chat = config.env.style == "chat"
    most = episodes if chat else episodes * config.env.max_turns  # rows; 0: the environment says how many turns
    rows = f"= {episodes} rows (a row an episode)" if chat else f"= {episodes} to {most} rows (a row a turn)"
    if learner.mini_batch_rows:
        size = learner.mini_batch_rows
        steps = f"{_steps(-(-episodes // size), -(-most // size))} of {size} rows"
        if not most:
            steps = f"optimiser steps of {size} rows"
    else:
        size = -(-episodes // learner.mini_batches)
        steps = f"{_steps(learner.mini_batches, learner.mini_batches)} of {size} rows{'' if chat else ' or more'}"
    ranks = _ranks(config)
    return "".join(
        (
            f"a step: {rollout.groups_per_step} tasks x {rollout.group_size} siblings = {episodes} episodes ",
            rows if most else "= a row a turn",
            ", fewer where groups are filtered" if config.algo.filters.group_keep < 1 else "",
            f"; {steps}",
            f", {size / ranks:g} a rank" if ranks > 1 else "",
            f", in passes of up to {learner.micro_batch_tokens} tokens",
            "; replayed rows take steps of their own" if sil.enabled and sil.update == "alternating" else "",
        )
    )


def _steps(least: int, most: int) -> str:
    return f"{least} optimiser step{'s' * (least > 1)}" if least == most else f"{least} to {most} optimiser steps"


def _ranks(config: RunConfig) -> int:
    return config.learner.processes if config.learner.backend == "deepspeed" else 1


def _learner(placement: Placement) -> tuple[str, str, str]:
    learner, ranks = placement.config.learner, _ranks(placement.config)
    backend = f"DeepSpeed ZeRO-{learner.zero_stage}" if learner.backend == "deepspeed" else "local"
    if placement.resident:
        backend += f", about {gib(placement.resident)} of weights, gradients and optimiser state each"
    gpus = span(placement.learner) if placement.learner else "processors"
    return f"{ranks} rank{'s' * (ranks > 1)}", gpus, backend


def _engines(placement: Placement) -> tuple[str, str, str]:
    rollout, vllm = placement.config.rollout, placement.config.vllm
    if vllm.servers:
        return "remote", "elsewhere", f"vllm at {vllm.servers}"
    count = max(1, rollout.workers)
    text = f"{rollout.engine}, {f'workers by {rollout.launcher}' if rollout.workers else 'in this process'}"
    if not placement.engines:
        return str(count), "processors", text
    if rollout.engine == "vllm":
        text += f", up to {vllm.memory_fraction:.2f} of a GPU's memory"
    width = len(placement.engines[0])
    gpus = span([gpu for group in placement.engines for gpu in group])
    return f"{count} x {width} GPU{'s' * (width > 1)}", gpus, text


def _line(name: str, count: str, gpus: str, text: str) -> str:
    return f"  {name:<9} {count:<12} {gpus:<15} {text}"
