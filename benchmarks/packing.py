"""Packed against padded passes: seconds and peak memory of an update over rows of skewed lengths, one process each.

    OMP_NUM_THREADS=1 python -m benchmarks.packing [--rows 96] [--tokens 4096]
Lengths are lognormal (most rows short, few long), as agents' episodes are.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from spearrl.batching import Batch
from spearrl.config.sections import LearnerSection, TinySection
from spearrl.learner import LocalLearner
from spearrl.learner.minibatches import micro_batches
from spearrl.losses import Objective
from spearrl.models import build_tiny
from tests.batching.test_rows import make_rows


def measure(packed: bool, rows: int, tokens: int) -> dict[str, float]:
    """One mini-batch's forward and backward passes and its optimiser step; the best of three."""
    torch.set_num_threads(1)
    model, _ = build_tiny(["a small corpus"] * 9, TinySection(layers=6, hidden_size=256, heads=4, feed_forward=768), 0)
    settings = LearnerSection(packing=packed, micro_batch_tokens=tokens, mini_batches=1, precision="fp32")
    learner = LocalLearner(model, settings)
    draw = torch.Generator().manual_seed(0)
    runs = torch.empty(rows).log_normal_(4.0, 1.0, generator=draw).clamp(8, 1000).int().tolist()
    data = make_rows([[n // 4, n - n // 4] for n in runs])
    batch = Batch(data, data.pad(torch.ones(len(data.token_ids))), learner.logprobs(data))
    pieces = micro_batches(data.lengths, tokens, packed=packed)
    held, seconds = len(data.token_ids) if packed else sum(len(p) * int(data.lengths[p].max()) for p in pieces), []
    for seed in range(3):
        start = time.perf_counter()
        learner.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=seed)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": min(seconds), "peak_mib": peak, "passes": len(pieces), "padding": 1 - len(data.token_ids) / held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=4096, help="learner.micro_batch_tokens")
    parser.add_argument("--only", choices=["packed", "padded"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return print(json.dumps(measure(args.only == "packed", args.rows, args.tokens)))
    measured = {}
    for kind in ("padded", "packed"):
        command = [
            sys.executable,
            "-m",
            "benchmarks.packing",
            "--only",
            kind,
            f"--rows={args.rows}",
            f"--tokens={args.tokens}",
        ]
        measured[kind] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        print(kind, {name: round(value, 3) for name, value in measured[kind].items()})
    print(
        "packed / padded:",
        {name: round(measured["packed"][name] / measured["padded"][name], 3) for name in ("seconds", "peak_mib")},
    )


if __name__ == "__main__":
    main()
