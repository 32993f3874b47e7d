"""Times of the sandbox: a run from hand-over to result, sustained runs a second, and a cold `bwrap python` a run.

python -m benchmarks.sandbox [--runs 200] [--json FILE] [--threads 4] [--kind bubblewrap|none] [--packages numpy sympy]

Before each timed run the sandbox is left until its next child is ready, as between an agent's turns; sustained runs
follow one another. Run it on an idle machine: both are bound by processors. Linux schedules it with real-time priority
where --realtime is given and root allows that.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from pathlib import Path

from benchmarks import machine
from spearrl.sandbox import Sandbox, SandboxOptions, open_sandbox
from spearrl.sandbox.jail_command import ENVIRONMENT, interpreter, jail_command, package_paths

PAUSE_S = 0.05


def timed(run, count: int, pause: float) -> list[float]:
    """Seconds of each call of `run`."""
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
        time.sleep(pause)
    return times


def line(what: str, times: list[float]) -> str:
    median, p90 = 1e3 * statistics.median(times), 1e3 * statistics.quantiles(times, n=10)[8]
    return f"{what:<42} median {median:7.2f} ms   p90 {p90:7.2f} ms"


def sustained(sandbox: Sandbox, runs: int, threads: int) -> float:
    """Runs a second, `threads` at a time."""
    workers = [
        threading.Thread(target=lambda: [sandbox.run("print(1)") for _ in range(runs // threads)])
        for _ in range(threads)
    ]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return threads * (runs // threads) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--kind", choices=("bubblewrap", "none"), default="bubblewrap")
    parser.add_argument("--packages", nargs="*", default=["numpy", "sympy"])
    parser.add_argument("--json", type=Path, help="with bubblewrap only")
    parser.add_argument("--realtime", action="store_true", help="real-time priority: for a machine that is not idle")
    args = parser.parse_args()
    if args.json and args.kind == "bubblewrap" and not shutil.which("bwrap"):
        return machine.write(args.json, ratios={}, missing=["bubblewrap is not installed: make sandbox"])
    if args.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
    processors, packages = len(os.sched_getaffinity(0)), " ".join(args.packages) or "none"
    print(f"{platform.machine()}, {processors} processors, Python {platform.python_version()}, packages {packages}")
    options = SandboxOptions(kind=args.kind, unsandboxed=args.kind == "none", packages=tuple(args.packages))
    begun = time.perf_counter()
    with open_sandbox(options) as sandbox:
        print(f"{'opened and self-tested':<42} {time.perf_counter() - begun:.2f} s")
        print(line(f"print(1), {args.kind}", warm := timed(lambda: sandbox.run("print(1)"), args.runs, PAUSE_S)))
        with sandbox.session() as session:
            session.run("x = 1")
            print(line("print(x) in a session", timed(lambda: session.run("print(x)"), args.runs, 0.0)))
        for threads in (1, args.threads):
            print(f"{f'print(1), {threads} at a time':<42} {sustained(sandbox, args.runs, threads):7.0f} runs a second")
    if args.kind == "bubblewrap":
        command = [
            *jail_command(package_paths(options.packages)[0], options.tmp_mib),
            str(interpreter()),
            "-c",
            "print(1)",
        ]
        cold = timed(
            lambda: subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True),
            max(5, args.runs // 10),
            0.0,
        )
        print(line("print(1), cold: bwrap python", cold))
        ratios = {"cold bwrap python / a run": statistics.median(cold) / statistics.median(warm)}
        print(f"{'cold / warm':<42} {ratios['cold bwrap python / a run']:.1f}")
        machine.write(args.json, ratios=ratios, figures={"warm_s": warm, "cold_s": cold})


if __name__ == "__main__":
    main()
