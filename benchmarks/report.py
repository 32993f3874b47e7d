"""`make bench`: every benchmark that fits this machine, in one table, against the accepted ratios.

    python -m benchmarks.report [--only step pure ...] [--json FILE] [--accept]

Each benchmark runs in a process of its own. Accepted ratios stand in benchmarks/baselines, a file a benchmark, by kind
of machine: instruction set and cores. One more than 15 % below its accepted value is named, and the exit code is 1, as
for a benchmark that fails. --accept writes what was measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, facts

BASELINES = Path(__file__).parent / "baselines"
TOLERANCE = 0.15


@dataclass(frozen=True)
class Benchmark:
    """A module below benchmarks, its arguments, and the seconds it may take."""

    arguments: tuple[str, ...] = ()
    limit_s: float = 240.0


BENCHMARKS = {
    "webshop": Benchmark(("--episodes", "150")),
    "logprobs": Benchmark(("--vocabulary", "152000")),
    "packing": Benchmark(),
    "sandbox": Benchmark(("--runs", "60")),
    "pure": Benchmark(),
    "agent_step": Benchmark(("--steps", "1", "--sft", "60"), limit_s=300),
    "step": Benchmark(("--threads", "1", "--steps", "1"), limit_s=420),  # a core alone: ratios that repeat
    "engine": Benchmark(("--model", "smollm2-135m", "--rounds", "2"), limit_s=300),
}
ENGINES = ROOT / ".venv-engines" / "bin" / "python"


def engine_missing() -> str:
    """Why benchmarks/engine.py cannot run here; "" where it can."""
    from spearrl.errors import SpearError
    from spearrl.models import directory_of

    try:
        directory_of("smollm2-135m")
    except SpearError as error:
        return f"{error}"
    return ""


def of_engine(content: dict[str, Any]) -> dict[str, float]:
    """Ratios of tokens a second."""
    rates = content["tokens_per_s"]
    others = {name: rate for name, rate in rates.items() if name != "spearrl"}
    return {f"spearrl / {n}: tokens/s, {content['dtype']}": rates["spearrl"] / rate for n, rate in others.items()}


def of_logprobs(content: dict[str, Any]) -> dict[str, float]:
    """Ratios of plain torch's time, and of the logits' size to our memory."""
    ratios = {}
    for case in content["cases"]:
        own = case["ways"]["spearrl"]
        name = f"V={case['vocabulary']}, {case['dtype']}, {case['head']} head"
        if "cpu_ratio" in own:
            ratios[f"plain / spearrl: processor time, {name}"] = 1 / own["cpu_ratio"]
        if own.get("memory_share", 0) > 0:
            ratios[f"logits / spearrl: memory, {name}"] = 1 / own["memory_share"]
    return ratios


RATIOS = {"engine": of_engine, "logprobs": of_logprobs}  # those whose files are their own; others: machine.write


@dataclass
class Result:
    """How a benchmark went: `error` is "" where it ended well."""

    name: str
    seconds: float = 0.0
    error: str = ""
    ratios: dict[str, float] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def run(name: str) -> Result:
    """Run one; what it prints goes to stderr."""
    if importlib.util.find_spec(f"benchmarks.{name}") is None:
        return Result(name, missing=[f"benchmarks/{name}.py is not there"])
    benchmark, begun = BENCHMARKS[name], time.monotonic()
    more: tuple[str, ...] = ()
    if name == "engine":
        if missing := engine_missing():
            return Result(name, missing=[missing])
        more = ("--vllm", str(ENGINES)) if ENGINES.exists() else ()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", *benchmark.arguments, *more, "--json", str(file)]
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, timeout=benchmark.limit_s).returncode
        except subprocess.TimeoutExpired:
            return Result(name, benchmark.limit_s, f"not done after {benchmark.limit_s:.0f} s")
        seconds = time.monotonic() - begun
        if not file.exists():
            return Result(name, seconds, f"ended with code {code} and no result")
        content = json.loads(file.read_text())
    error = f"ended with code {code}" if code else ""
    ratios = RATIOS[name](content) if name in RATIOS else content["ratios"]
    missing = content.get("missing", []) + ([] if name != "engine" or more else ["vLLM: make engines"])
    return Result(name, seconds, error, ratios, content.get("memory_mib", {}), missing)


def accepted(name: str, kind: str) -> dict[str, float]:
    """Ratios accepted for this kind of machine; none where there are none."""
    file = BASELINES / f"{name}.json"
    return json.loads(file.read_text()).get(kind, {}).get("ratios", {}) if file.exists() else {}


def accept(result: Result, machine: dict[str, Any]) -> None:
    """Keep a result's ratios for machines of this kind."""
    file = BASELINES / f"{result.name}.json"
    kinds = json.loads(file.read_text()) if file.exists() else {}
    rounded = {name: float(f"{value:.4g}") for name, value in result.ratios.items()}
    kinds[machine["kind"]] = {"commit": machine["commit"], "torch": machine["torch"], "ratios": rounded}
    BASELINES.mkdir(exist_ok=True)
    file.write_text(json.dumps(kinds, indent=1, sort_keys=True) + "\n")


def worse(result: Result, baseline: dict[str, float]) -> list[str]:
    """Names of ratios that lie more than TOLERANCE below the accepted ones, and of accepted ones that are gone."""
    gone = [name for name in baseline if name not in result.ratios and not result.missing]
    return gone + [n for n, v in result.ratios.items() if n in baseline and v < (1 - TOLERANCE) * baseline[n]]


def table(results: list[Result], machine: dict[str, Any]) -> str:
    """Markdown: ratios with their accepted values, then memory, then what was left out."""
    instructions = ", ".join(machine["instructions"]) or "none of avx2, avx512, amx"
    lines = [
        f"commit {machine['commit']}; {machine['cores']} cores, {instructions}, {machine['gib']} GiB; "
        f"torch {machine['torch']}, Python {machine['python']}",
        "",
        "| benchmark | what | value | accepted | |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        baseline = accepted(result.name, machine["kind"])
        bad = worse(result, baseline)
        for name in [*result.ratios, *(name for name in bad if name not in result.ratios)]:
            value = f"{result.ratios[name]:.3g}" if name in result.ratios else "not measured"
            known = f"{baseline[name]:.3g}" if name in baseline else "none"
            lines.append(f"| {result.name} | {name} | {value} | {known} | {'WORSE' if name in bad else ''} |")
        lines += [f"| {result.name} | {name} | {value:.0f} MiB | | |" for name, value in result.memory_mib.items()]
        if result.error:
            lines.append(f"| {result.name} | FAILED | {result.error} | | |")
    lines += ["", *(f"{result.name}: left out: {text}" for result in results for text in result.missing)]
    taken = ", ".join(f"{result.name} {result.seconds:.0f} s" for result in results)
    return "\n".join([*lines, f"took {taken}; {sum(result.seconds for result in results) / 60:.1f} minutes in all"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=[*BENCHMARKS])
    parser.add_argument("--json", type=Path, help="file for the table's content")
    parser.add_argument("--accept", action="store_true", help="keep the measured ratios as the accepted ones")
    options = parser.parse_args(arguments)
    machine = facts()
    results = [run(name) for name in options.only]
    print(table(results, machine))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": [vars(r) for r in results]}, indent=1))
    failed = [result.name for result in results if result.error]
    if options.accept:
        for result in results:
            if not result.error and result.ratios:
                accept(result, machine)
        return int(bool(failed))
    bad = [f"{r.name}: {name}" for r in results for name in worse(r, accepted(r.name, machine["kind"]))]
    for text in [*(f"{name} failed" for name in failed), *(f"more than 15 % worse: {text}" for text in bad)]:
        print(text, file=sys.stderr)
    return int(bool(failed or bad))


if __name__ == "__main__":
    sys.exit(main())
