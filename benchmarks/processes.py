"""An update with ZeRO-3 on one process and on two (gloo, one thread each), beside the local learner: time and memory.

    OMP_NUM_THREADS=1 .venv-engines/bin/python -m benchmarks.processes [--rounds 3] [--million 21] [--json FILE]

The same rows, weights and optimiser steps for every side, which is checked by the gradient's norm; sides take turns, an
update each, and the first is not counted. Wall seconds say something only where every process has a core to itself;
processor seconds, of each rank, do not depend on that. Memory: the peak of a rank's resident memory over what rank 0
had with everything imported and nothing made.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.packing import work
from benchmarks.step_work import memory_mib
from benchmarks.sync import SHAPES, random_model

SIDES = {"local": 1, "zero3-1": 1, "zero3-2": 2}
ROWS = 24


def worker(side: str, folder: str) -> None:
    """Answers every line on standard input with one update."""
    from spearrl.batching import Batch
    from spearrl.config.sections import LearnerSection
    from spearrl.learner import DeepSpeedLearner, LocalLearner
    from spearrl.losses import Objective
    from spearrl.models import load_model

    torch.set_num_threads(SIDES[side])  # DeepSpeed's learner divides them by its ranks
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not reach the protocol
    importlib.import_module("deepspeed")  # so that no side's memory begins before it
    before = memory_mib("VmRSS")
    settings = LearnerSection(precision="fp32", mini_batches=1, micro_batch_tokens=1024, processes=SIDES[side])
    learner: Any = LocalLearner(load_model(folder), settings) if side == "local" else DeepSpeedLearner(folder, settings)
    rows = work("skewed").select(torch.arange(ROWS))
    batch = Batch(rows, rows.pad(torch.ones(len(rows.token_ids))), rows.pad(rows.rollout_logprobs))
    others = [child.process.pid for child in learner.ranks.children.values()] if side == "zero3-2" else []
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        start, used, theirs = time.perf_counter(), time.process_time(), processor_seconds(others)
        result = learner.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=0)
        line = {
            "wall": time.perf_counter() - start,
            "cpu": [time.process_time() - used, *([processor_seconds(others) - theirs] if others else [])],
            "peak_mib": [memory_mib("VmHWM") - before, *(peak_mib(other) - before for other in others)],
            "tokens": int(result.metrics["update/tokens"]),
            "norm": result.metrics["policy/grad_norm"],
        }
        print(json.dumps(line), file=out, flush=True)
    if side != "local":
        learner.close()


def processor_seconds(processes: list[int]) -> float:
    """Of processes, all of their threads, so far."""
    ticks = 0
    for process in processes:
        ticks += sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_mib(process: int) -> float:
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--million", type=int, default=21, choices=sorted(SHAPES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        return worker(*options.only)
    from spearrl.models import save_weights

    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        save_weights(random_model(options.million, torch.float32), folder)
        command = [sys.executable, "-m", "benchmarks.processes", "--only"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started = {side: subprocess.Popen([*command, side, folder], **pipes) for side in SIDES}
        for process in started.values():
            process.stdout.readline()
        for number in range(options.rounds + 1):
            for side, process in started.items():
                print(number, file=process.stdin, flush=True)
                measured[side].append(json.loads(process.stdout.readline() or "null"))
                print(f"{side} {measured[side][-1]}", file=sys.stderr, flush=True)
            latest = [measured[side][-1] for side in SIDES]
            if any(
                abs(one["norm"] / latest[0]["norm"] - 1) > 1e-4 or one["tokens"] != latest[0]["tokens"]
                for one in latest
            ):
                raise SystemExit(f"the sides did not do the same: {latest}")
        for process in started.values():
            process.stdin.close()
            process.wait()
    figures = {}
    for side, rounds in measured.items():
        cpu = [statistics.median(values) for values in zip(*(line["cpu"] for line in rounds[1:]), strict=True)]
        wall, peak = statistics.median(line["wall"] for line in rounds[1:]), rounds[-1]["peak_mib"]
        figures[side] = {"wall": wall, "cpu": cpu, "peak_mib": peak}
        print(
            f"{side:8} {rounds[-1]['tokens']} tokens, norm {rounds[-1]['norm']:.6g}: wall {wall:.2f} s, processor "
            f"{' + '.join(f'{c:.2f}' for c in cpu)} s, peak {' + '.join(f'{m:.0f}' for m in peak)} MiB",
            flush=True,
        )
    machine.write(options.json, ratios={}, figures=figures)


if __name__ == "__main__":
    main()
