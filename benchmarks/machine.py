"""What a benchmark ran on, how fast plain Python is there, and the file that every benchmark's --json writes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def facts() -> dict[str, Any]:
    """Cores, instruction set, memory, versions and the commit. `kind` names machines whose ratios compare."""
    import torch

    sets = instruction_sets()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "commit": commit(),
        "cores": cores,
        "instructions": sets,
        "gib": round(pages / 2**30),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kind": f"{sets[-1] if sets else platform.machine()}-{cores}",
    }


def instruction_sets() -> list[str]:
    """Of avx2, avx512 and amx, those that the processor has."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return []
    found = {"avx2": "avx2" in flags, "avx512": "avx512f" in flags, "amx": "amx_tile" in flags}
    return [name for name, there in found.items() if there]


def commit() -> str:
    """The commit of this checkout, with "+" where files differ from it."""
    try:
        name, changes = (
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + "+" * bool(changes)


def python_ms() -> float:
    """Milliseconds of a fixed piece of plain Python, the best of five.

    Times of pure Python are compared with it, since seconds of two machines do not compare.
    """
    best = float("inf")
    for _ in range(5):
        start, counts = time.perf_counter(), {}
        for number in range(40_000):
            word = str(number % 997)
            counts[word] = counts.get(word, 0) + len(word)
        best = min(best, 1e3 * (time.perf_counter() - start))
    return best


def write(
    file: Path | None,
    *,
    ratios: Mapping[str, float],
    memory_mib: Mapping[str, float] | None = None,
    figures: Any = None,
    missing: Sequence[str] = (),
) -> None:
    """Write what `make bench` reads; nothing without a file.

    Args:
        ratios: larger is better: of the other's time or memory to ours.
        memory_mib: peaks. figures: everything else that was measured. missing: what was left out, and why.
    """
    if file is not None:
        content = {"ratios": ratios, "memory_mib": memory_mib or {}, "figures": figures, "missing": list(missing)}
        file.write_text(json.dumps(content, indent=1))
