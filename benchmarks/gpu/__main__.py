"""Everything that only a GPU can show, in one table: engine parity, weight transfer, sleep, ZeRO-3, throughput.

    python -m benchmarks.gpu [--json FILE] [--only NAME ...] [--timeout 900]
    python -m benchmarks.gpu --tiny --device cpu        the same script on processors, with toy shapes

Every check runs in a process of its own: one that fails, hangs or dies is a row of the table. Exit code 0: all that
could run here held; 1: a check failed; 3: there is no GPU. Models have random weights at Qwen2.5 shapes; nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

NO_GPU = 3
TAIL = 12  # lines of a failed check's output that are shown


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="checks whose name begins so")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON too")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds a check may take")
    parser.add_argument(
        "--folder", metavar="DIR", help="keep the random models here (8 GB); default: a temporary folder"
    )
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.child:
        return child(args)
    import torch

    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    if args.device == "cuda" and not gpus:
        print(
            "torch sees no GPU: nothing was measured\n  fix: run it on a machine with one, or with --tiny --device cpu",
            file=sys.stderr,
        )
        return NO_GPU
    with tempfile.TemporaryDirectory() as folder:
        args.folder = args.folder or folder
        Path(args.folder).mkdir(parents=True, exist_ok=True)
        rows, host = run_all(args, gpus)
    print(table(rows, host))
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": host, "checks": rows}, indent=1) + "\n")
    return 1 if any(row["result"] == "FAILED" for row in rows) else 0


def run_all(args: argparse.Namespace, gpus: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a check, and what the machine is."""
    from benchmarks.gpu.checks import CHECKS

    chosen = {
        name: check
        for name, check in CHECKS.items()
        if not args.only or any(name.startswith(start) for start in args.only)
    }
    if not chosen:
        raise SystemExit(f"no check begins with {' or '.join(args.only)}\n  fix: use {', '.join(CHECKS)}")
    host = run_check(args, "machine")
    rows = []
    for name, check in chosen.items():
        if check.gpus > gpus:
            needed = f"needs {check.gpus} GPU{'s' * (check.gpus > 1)}, there {'is' if gpus == 1 else 'are'} {gpus}"
            rows.append({"check": name, "result": "not run", "seconds": 0.0, "error": needed})
        else:
            rows.append(run_check(args, name))
        print(
            "\n".join([line(rows[-1]), *(f"    {text}" for text in rows[-1].get("log", ()))]),
            file=sys.stderr,
            flush=True,
        )
    when = {
        "date": datetime.date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
    }
    return rows, {
        **when,
        "device": args.device,
        "shapes": "tiny" if args.tiny else "full",
        **host.get("figures", {}),
        "error": host.get("error", ""),
    }


def run_check(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A check in a process group of its own, ended whole when it takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--device",
            args.device,
            "--folder",
            args.folder,
            "--child",
            name,
            str(result),
        ]
        start = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, *(["--tiny"] if args.tiny else [])],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(args.timeout)
                ended = f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                ended = f"no result within {args.timeout:g} s"
            finally:
                end_group(process)
        row = {"check": name, "result": "FAILED", "seconds": time.monotonic() - start}
        tail = log.read_text(errors="replace").splitlines()
        outcome = {**row, **(json.loads(result.read_text()) if result.exists() else {"error": ended})}
        return (
            outcome
            if outcome["result"] == "ok"
            else {**outcome, "log": [text for text in tail if "Error" in text][-TAIL:] or tail[-TAIL:]}
        )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Engines and ranks that a check left behind would hold the GPU against the next one."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def child(args: argparse.Namespace) -> int:
    """One check, its outcome in a file: libraries print what they like."""
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.checks import CHECKS, machine

    name, file = args.child
    check = machine if name == "machine" else CHECKS[name].run
    try:
        outcome = {"result": "ok", "figures": check(Bench(args.device, args.tiny, Path(args.folder)))}
    except Exception as error:  # whatever it is, it is this check's result
        last = traceback.extract_tb(error.__traceback__)[-1]
        outcome = {
            "result": "FAILED",
            "error": f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})",
        }
    Path(file).write_text(json.dumps(outcome))
    return 0


def table(rows: list[dict[str, Any]], host: dict[str, Any]) -> str:
    """Markdown, to be pasted into docs/performance.md."""
    about = ", ".join(f"{key} {value}" for key, value in host.items() if value != "")
    return "\n".join(
        [about, "", "| check | result | figures | seconds in all |", "|---|---|---|---|", *map(line, rows)]
    )


def line(row: dict[str, Any]) -> str:
    figures = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.get("figures", {}).items()
    )
    return (
        f"| {row['check']} | {row['result']} | {figures or row.get('error', '').replace(chr(10), ' / ')} | "
        f"{row['seconds']:.0f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
