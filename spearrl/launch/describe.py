"""A placement and a step's batch arithmetic in words, for people."""

from __future__ import annotations

from spearrl.config import RunConfig
from spearrl.launch.placement import Placement, gib, span


def describe(placement: Placement) -> str:
    """Who gets what, what was worked out, and what a step trains on. A few lines of text."""
    config, count = (
        placement.config,
        len(set(placement.learner) | {gpu for group in placement.engines for gpu in group}),
    )
    if (
        not count
        and not placement.derived
        and not config.rollout.workers
        and config.learner.backend == "local"
        and config.rollout.engine == "local"
    ):
        return arithmetic(config)
    if count:
        memory = f" ({gib(placement.gpu.memory)})" if placement.gpu.memory else ""
        turns = (
            "engines sleep while the learner works"
            if placement.sleeps
            else "one set of GPUs"
            if placement.colocated
            else "GPUs of their own"
        )
        head = f"placement: {count} x {placement.gpu.name}{memory}, {'colocated' if placement.colocated else 'disaggregated'}: {turns}"
    else:
        head = "placement: processors only"
    lines = [head, _line("learner", _learner(placement)), _line("engines", _engines(placement))]
    if placement.derived:
        lines.append("  worked out: " + " ".join(f"{key}={value}" for key, value in placement.derived.items()))
    lines += [f"  note: {note}" for note in placement.notes]
    return "\n".join([*lines, arithmetic(config)])


def arithmetic(config: RunConfig) -> str:
    """From tasks to rows per rank: the numbers that frameworks call train, mini and micro batch."""
    rollout, learner = config.rollout, config.learner
    episodes = rollout.groups_per_step * rollout.group_size
    ranks = learner.processes if learner.backend == "deepspeed" else 1
    text = f"a step: {rollout.groups_per_step} tasks x {rollout.group_size} siblings = {episodes} episodes"
    most = episodes if config.env.style == "chat" else episodes * config.env.max_turns
    if config.env.style == "chat":
        text += f" = {episodes} rows (a row an episode)"
    else:
        text += f" = {episodes} to {most} rows (a row a turn)" if most else " = a row a turn"
    if learner.mini_batch_rows:
        size = learner.mini_batch_rows
        steps = (
            f"optimiser steps of {size} rows"
            if not most
            else f"{_range(-(-episodes // size), -(-most // size))} of {size} rows"
        )
    else:
        size = -(-episodes // learner.mini_batches)
        steps = f"{_range(learner.mini_batches, learner.mini_batches)} of {size} rows{'' if config.env.style == 'chat' else ' or more'}"
    share = f", {size / ranks:g} a rank" if ranks > 1 else ""
    replay = (
        "; replayed rows take steps of their own"
        if config.algo.sil.enabled and config.algo.sil.update == "alternating"
        else ""
    )
    kept = ", fewer where groups are filtered" if config.algo.filters.group_keep < 1 else ""
    return f"{text}{kept}; {steps}{share}, in passes of up to {learner.micro_batch_tokens} tokens{replay}"


def _range(least: int, most: int) -> str:
    return f"{least} optimiser step{'s' * (least > 1)}" if least == most else f"{least} to {most} optimiser steps"


def _learner(placement: Placement) -> tuple[str, str, str]:
    learner = placement.config.learner
    ranks = learner.processes if learner.backend == "deepspeed" else 1
    what = f"DeepSpeed ZeRO-{learner.zero_stage}" if learner.backend == "deepspeed" else "local"
    kept = (
        f", about {gib(placement.resident)} of weights, gradients and optimiser state each"
        if placement.resident
        else ""
    )
    return (
        f"{ranks} rank{'s' * (ranks > 1)}",
        span(placement.learner) if placement.learner else "processors",
        what + kept,
    )


def _engines(placement: Placement) -> tuple[str, str, str]:
    config = placement.config
    if config.vllm.servers:
        return "remote", "elsewhere", f"vllm at {config.vllm.servers}"
    count = max(1, config.rollout.workers)
    home = f"workers by {config.rollout.launcher}" if config.rollout.workers else "in this process"
    if not placement.engines:
        return str(count), "processors", f"{config.rollout.engine}, {home}"
    width = len(placement.engines[0])
    share = f", up to {config.vllm.memory_fraction:.2f} of a GPU's memory" if config.rollout.engine == "vllm" else ""
    gpus = span([gpu for group in placement.engines for gpu in group])
    return f"{count} x {width} GPU{'s' * (width > 1)}", gpus, f"{config.rollout.engine}, {home}{share}"


def _line(name: str, words: tuple[str, str, str]) -> str:
    return f"  {name:<9} {words[0]:<12} {words[1]:<15} {words[2]}"
