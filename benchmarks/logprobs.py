"""Log-probabilities inside the head against plain torch, TRL and torch's own, on the same tensors in one run.

    python -m benchmarks.logprobs [--vocabulary 152000 49152 2048] [--width 576] [--positions 1024] [--json FILE]

The ways: `plain` log_softmax of full logits (in float32), gathered, and entropies without a gradient; `spearrl`
token_logprobs; `trl` selective_log_softmax_and_entropy of full logits; `trl fused` its fused head; `torch`
linear_cross_entropy, whole and in chunks, which has no entropies. What is not installed is named and left out.

Time is the best of --repeats, the ways in turns: wall and processor seconds, forward alone and with the backward pass
of random upstream gradients, with a trained head (hidden states and head get a gradient) and a frozen one; `--zeros`:
the share of positions whose upstream gradient is 0, as of clipped tokens. Memory is the growth of a fresh process's
resident set beyond inputs and gradients, as a share of the logits' size in float32. Errors are against float64, at as
many positions as make more logits than are kept. With --check the exit code is 1 unless spearrl's log-probabilities are
within 1e-5, and with 152,000 tokens its memory is <= 5 % and its time <= plain.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from spearrl.learner.logprobs import KEPT_BYTES, token_logprobs

MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LARGE, SLOW = 152_000, "torch chunked"
Scored = tuple[torch.Tensor, torch.Tensor | None]
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Scored]


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Scored:
    logprobs = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(-1)
    with torch.no_grad():
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropies


def trl(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Scored:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logprobs, entropies = selective_log_softmax_and_entropy((hidden @ weight.T)[None], targets[None], False)
    return logprobs[0], entropies[0]


def trl_fused(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Scored:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    outputs = ("log_probs", "entropy")
    rest = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs)
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, *rest)[:2]


def torch_own(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, chunked: bool) -> Scored:
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options), None


def ways() -> tuple[dict[str, Way], list[str]]:
    """The ways that can run here, and why others cannot."""
    found: dict[str, Way] = {"plain": plain, "spearrl": token_logprobs}
    missing = []
    try:
        importlib.import_module("trl.trainer.utils")
        found |= {"trl": trl, "trl fused": trl_fused}
    except ImportError as error:
        missing.append(f"TRL's ways are left out: {error}")
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = partial(torch_own, chunked=False)
        found["torch chunked"] = partial(torch_own, chunked=True)
    else:
        missing.append("this torch has no linear_cross_entropy")
    return found, missing


def inputs(case: dict[str, Any], positions: int | None = None) -> tuple[torch.Tensor, ...]:
    """Hidden states, head, targets, upstream gradients."""
    draw, n, dtype = torch.Generator().manual_seed(0), positions or case["positions"], DTYPES[case["dtype"]]
    hidden = torch.randn(n, case["width"], generator=draw).to(dtype).requires_grad_()
    weight = torch.empty(case["vocabulary"], case["width"]).normal_(std=0.05, generator=draw).to(dtype)
    upstream = torch.randn(n, generator=draw) * (torch.rand(n, generator=draw) >= case["zeros"])
    targets = torch.randint(0, case["vocabulary"], (n,), generator=draw)
    return hidden, weight.requires_grad_(case["head"] == "trained"), targets, upstream


def seconds(case: dict[str, Any], found: dict[str, Way], repeats: int) -> dict[str, dict[str, float]]:
    """Of each way: forward, both passes, and processor seconds of both; the best of `repeats`."""
    hidden, weight, targets, upstream = inputs(case)
    best: dict[str, dict[str, float]] = {name: {} for name in found}
    for _ in range(repeats):
        for name, way in found.items():
            hidden.grad = weight.grad = None
            start, cpu = time.perf_counter(), time.process_time()
            logprobs = way(hidden, weight, targets)[0]
            middle = time.perf_counter()
            (logprobs * upstream).sum().backward()
            one = {"forward_s": middle - start, "both_s": time.perf_counter() - start}
            one["cpu_s"] = time.process_time() - cpu
            del logprobs
            best[name] = {key: min(value, best[name].get(key, value)) for key, value in one.items()}
    return best


def errors(case: dict[str, Any], found: dict[str, Way]) -> dict[str, dict[str, float]]:
    """Largest distance from float64: log-probabilities and entropies in nats, gradients as a share of the largest."""
    n = KEPT_BYTES // (4 * case["vocabulary"]) + 32
    hidden, weight, targets, upstream = inputs(case, n)

    def gradients(way: Way, *leaves: torch.Tensor) -> list[torch.Tensor | None]:
        logprobs, entropies = way(*leaves, targets)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        made = torch.autograd.grad((logprobs * upstream.to(logprobs.dtype)).sum(), wanted)
        return [logprobs.detach(), entropies, *made]

    exact = gradients(plain, *(x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight)))
    names = ("logprobs", "entropies", "grad_hidden", "grad_head")
    result = {}
    for name, way in found.items():
        result[name] = {}
        for key, one, two in zip(names, gradients(way, hidden, weight), exact, strict=False):
            if one is not None and two is not None:
                distance = float((one.detach().double() - two.detach()).abs().max())
                result[name][key] = distance / (float(two.abs().max()) if key.startswith("grad") else 1.0)
    return result


def resident(*, reset: bool = False) -> float:
    """Peak resident set of this process in MiB; since the last reset, where the system can (Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def memory(case: dict[str, Any], way: Way) -> float:
    """MiB that both passes take in this process beyond inputs and gradients."""
    small = inputs(case | {"vocabulary": 4096, "positions": 16})
    way(*small[:3])[0].sum().backward()  # what torch sets up once is none of it
    del small
    hidden, weight, targets, upstream = inputs(case)
    before = resident(reset=True)
    (way(hidden, weight, targets)[0] * upstream).sum().backward()
    made = [leaf.grad for leaf in (hidden, weight) if leaf.grad is not None]
    return resident() - before - sum(grad.numel() * grad.element_size() for grad in made) / MIB


def fresh(case: dict[str, Any], way: str, threads: int) -> float:
    """`memory` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.logprobs", "--threads", str(threads), "--one", json.dumps([case, way])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def measure(case: dict[str, Any], found: dict[str, Way], options: argparse.Namespace) -> dict[str, Any]:
    """One case, all ways; printed as a table."""
    logits = case["positions"] * case["vocabulary"] * 4 / MIB
    print(", ".join(f"{key} {value}" for key, value in case.items()), f"- logits {logits:.0f} MiB in float32")
    full = ("plain", "trl", "torch")
    chosen = {name: way for name, way in found.items() if logits <= options.limit_mib or name not in full}
    if len(chosen) < len(found):
        print(f"  logits above --limit-mib {options.limit_mib}: {', '.join(set(found) - set(chosen))} left out")
    timed, wrong = seconds(case, chosen, options.repeats), errors(case, chosen)
    for name in chosen:
        row = timed[name]
        row |= {"memory_mib": fresh(case, name, options.threads), **wrong[name]} if options.memory else wrong[name]
        text = f"  {name:14} forward {row['forward_s']:7.3f} s, both {row['both_s']:7.3f} s, cpu {row['cpu_s']:7.3f} s"
        if "plain" in timed:
            row["time_ratio"], row["cpu_ratio"] = (row[key] / timed["plain"][key] for key in ("both_s", "cpu_s"))
            text += f", {row['time_ratio']:.2f} of plain (cpu {row['cpu_ratio']:.2f})"
        if options.memory:
            row["memory_share"] = row["memory_mib"] / logits
            text += f"; {row['memory_mib']:6.1f} MiB, {row['memory_share']:.1%} of the logits"
        print(text + "; errors " + ", ".join(f"{key} {value:.0e}" for key, value in wrong[name].items()), flush=True)
    return {**case, "logits_mib": logits, "ways": timed}


def failures(results: list[dict[str, Any]]) -> list[str]:
    """Which bars spearrl missed."""
    missed = []
    for result in results:
        own, large = result["ways"]["spearrl"], result["vocabulary"] >= LARGE
        name = f"V={result['vocabulary']} n={result['positions']} {result['dtype']} {result['head']}"
        missed += [f"{name}: error {own['logprobs']:.1e} > 1e-5"] if own["logprobs"] > 1e-5 else []
        for key, bar in (("memory_share", 0.05), ("time_ratio", 1.0)):
            missed += [f"{name}: {key} {own[key]:.2f} > {bar}"] if large and own.get(key, 0) > bar else []
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[LARGE, 49_152, 2_048])
    parser.add_argument("--width", type=int, nargs="+", default=[576])
    parser.add_argument("--positions", type=int, nargs="+", default=[1024])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--head", nargs="+", choices=["trained", "frozen"], default=["trained", "frozen"])
    parser.add_argument("--ways", nargs="+", help="these alone; default: all but torch chunked, which takes minutes")
    parser.add_argument("--zeros", type=float, default=0.0, help="share of positions without an upstream gradient")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-mib", type=int, default=1024, help="full logits above this are not computed")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="no fresh process per way")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found, missing = ways()
    if options.one:
        case, way = json.loads(options.one)
        print(memory(case, found[way]))
        return 0
    found = {name: way for name, way in found.items() if name in (options.ways or set(found) - {SLOW})}
    print(f"torch {torch.__version__}, {options.threads} threads, {platform.machine()}", *missing, sep="\n")
    results = []
    shapes = product(options.vocabulary, options.width, options.positions, options.dtype, options.head)
    for vocabulary, width, positions, dtype, head in shapes:
        case = {"vocabulary": vocabulary, "width": width, "positions": positions, "dtype": dtype, "head": head}
        results.append(measure(case | {"zeros": options.zeros}, found, options))
    if options.json:
        report = {"torch": torch.__version__, "threads": options.threads, "missing": missing, "cases": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    missed = failures(results)
    print(*missed, sep="\n", end="\n" if missed else "")
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
