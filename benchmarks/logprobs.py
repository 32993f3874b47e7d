"""Chunked log-probabilities against plain log_softmax at V = 152,000, d = 1,536: error, time and peak memory.

    python benchmarks/logprobs.py [--positions 256 1024] [--chunk 256] [--threads 2]

Time is forward and backward with a trained head. Memory is with a frozen head, whose gradient would hide the logits:
the growth of a fresh process's resident set over its inputs. With --check the exit code is 1 unless the error is <=
1e-5 and the chunked peak grows by less than one chunk of logits from the fewest to the most positions.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from spearrl.learner.logprobs import token_logprobs

VOCABULARY, WIDTH = 152_000, 1_536
MIB = 2**20


def inputs(positions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, WIDTH, generator=draw).requires_grad_()
    weight = torch.empty(VOCABULARY, WIDTH).normal_(std=0.05, generator=draw).requires_grad_()
    return hidden, weight, torch.randint(0, VOCABULARY, (positions,), generator=draw)


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
    return token_logprobs(hidden, weight, targets, chunk=chunk)[0]


def resident() -> float:
    """Peak resident set so far in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, positions: int, chunk: int, *, trained: bool) -> dict[str, float]:
    """Forward and backward in this process: seconds, and MiB above the inputs."""
    hidden, weight, targets = inputs(positions)
    weight.requires_grad_(trained)
    before, start = resident(), time.perf_counter()
    logprobs = plain(hidden, weight, targets) if way == "plain" else chunked(hidden, weight, targets, chunk)
    (-logprobs.mean()).backward()
    return {"seconds": time.perf_counter() - start, "mib": resident() - before}


def error(positions: int, chunk: int) -> float:
    """Largest distance from the same number in float64."""
    hidden, weight, targets = inputs(positions)
    with torch.no_grad():
        logprobs = chunked(hidden, weight, targets, chunk).double()
        worst = 0.0
        for row in range(positions):
            logits = torch.zeros(VOCABULARY, dtype=torch.float64)
            for begin in range(0, VOCABULARY, 8192):
                logits[begin : begin + 8192] = weight[begin : begin + 8192].double() @ hidden[row].double()
            worst = max(worst, abs(float(logprobs[row] - logits.log_softmax(-1)[targets[row]])))
    return worst


def fresh(*arguments: str) -> dict[str, float]:
    """Run this file in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--frozen", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=["plain", "chunked", "error"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one == "error":
        print(json.dumps({"error": error(options.positions[0], options.chunk)}))
        return 0
    if options.one:
        print(json.dumps(measure(options.one, options.positions[0], options.chunk, trained=not options.frozen)))
        return 0
    return report(options)


def report(options: argparse.Namespace) -> int:
    common = ["--chunk", str(options.chunk), "--threads", str(options.threads)]
    logits, head = options.chunk * VOCABULARY * 4 / MIB, VOCABULARY * WIDTH * 4 / MIB
    worst = fresh("--one", "error", "--positions", "16", *common)["error"]
    print(
        f"V={VOCABULARY} d={WIDTH} chunk={options.chunk}; one chunk of logits is {logits:.0f} MiB, the head "
        f"{head:.0f} MiB"
    )
    print(f"largest error against float64: {worst:.1e}")
    peaks = []
    for positions in options.positions:
        arguments = ["--positions", str(positions), *common]
        memory = {way: fresh("--one", way, "--frozen", *arguments)["mib"] for way in ("plain", "chunked")}
        seconds = {way: fresh("--one", way, *arguments)["seconds"] for way in ("plain", "chunked")}
        peaks.append(memory["chunked"])
        print(
            f"n={positions}: memory plain {memory['plain']:.0f} MiB, chunked {memory['chunked']:.0f} MiB, ratio "
            f"{memory['chunked'] / memory['plain']:.2f}; ",
            end="",
        )
        print(
            f"time plain {seconds['plain']:.1f} s, chunked {seconds['chunked']:.1f} s, ratio "
            f"{seconds['chunked'] / seconds['plain']:.2f}"
        )
    print(
        f"growth of the chunked peak from n={options.positions[0]} to n={options.positions[-1]}: "
        f"{peaks[-1] - peaks[0]:.0f} MiB"
    )
    return int(options.check and (worst > 1e-5 or peaks[-1] - peaks[0] > logits))


if __name__ == "__main__":
    sys.exit(main())
