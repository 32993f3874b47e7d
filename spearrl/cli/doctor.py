"""spearrl doctor: what this machine has, what will not work on it, and how to fix that."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from spearrl.config.tables import table

EXTRAS: dict[str, list[str]] = table(__file__, "doctor.toml")["extras"]
LEAST_DISK = 10 << 30
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """`state`: ok, none (it is not there, and only what needs it misses it), warn, fail."""

    name: str
    state: str
    words: str
    fix: str = ""

    def __str__(self) -> str:
        return (
            f"[{self.state}]".ljust(7)
            + self.name.ljust(12)
            + self.words
            + (f"\n{'':19}fix: {self.fix}" if self.fix else "")
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [*CHECKS, *EXTRAS]
    parser.add_argument(
        "need", nargs="*", metavar="NEED", help=f"what must be there, else the exit code is 1: {', '.join(names)}"
    )
    parser.add_argument(
        "--sandbox-url", metavar="URL", help="check this SandboxFusion server instead of a sandbox on this machine"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    from spearrl.errors import ConfigError

    unknown = [name for name in args.need if name not in (*CHECKS, *EXTRAS)]
    if unknown:
        raise ConfigError(
            f"doctor knows no {', '.join(unknown)}", where="command line", hint=f"use {', '.join([*CHECKS, *EXTRAS])}"
        )
    findings = [finding for check in CHECKS.values() for finding in check(args)] + [
        _extra(*item) for item in EXTRAS.items()
    ]
    failed = [f.name for f in findings if f.state == "fail"]
    broken = [
        f.name
        for f in findings
        if (f.state == "fail" and f.name == "versions") or (f.state in ("fail", "none") and f.name in args.need)
    ]
    if args.json:
        print(json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print("\n".join(map(str, findings)))
        lame = "; tools that run code do not" if "sandbox" in failed else ""
        print(
            f"missing: {', '.join(broken)}"
            if broken
            else "what was asked for works"
            if args.need
            else f"training works on this machine{lame}"
        )
    return 1 if broken else 0


def _versions(args: argparse.Namespace) -> Iterator[Finding]:
    from spearrl import __version__

    found = {name: _version(name) for name in ("torch", "transformers", "numpy", "pydantic")}
    missing = [name for name, version in found.items() if not version]
    words = ", ".join(
        [
            f"spearrl {__version__}",
            f"Python {platform.python_version()}",
            *(f"{name} {version}" for name, version in found.items() if version),
        ]
    )
    yield Finding("versions", "fail" if missing else "ok", words, f"pip install {' '.join(missing)}" if missing else "")


def _machine(args: argparse.Namespace) -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(
        "machine",
        "ok",
        f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} processors, {memory / GIB:.0f} GiB of memory",
    )
    free = shutil.disk_usage(".").free
    few = free < LEAST_DISK
    yield Finding(
        "disk",
        "warn" if few else "ok",
        f"{free / GIB:.0f} GiB free here",
        "set run.output_dir to a disk with more room" if few else "",
    )


def _gpu(args: argparse.Namespace) -> Iterator[Finding]:
    from spearrl.launch.devices import detect

    gpus = detect().gpus
    if gpus:
        yield Finding("gpu", "ok", f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory / GIB:.0f} GiB each")
    else:
        yield Finding(
            "gpu", "none", "no GPU that torch can use: everything runs on processors, which is for small models"
        )


def _sandbox(args: argparse.Namespace) -> Iterator[Finding]:
    from spearrl.errors import ConfigError
    from spearrl.sandbox import SandboxOptions, open_sandbox

    chosen: dict[str, Any] = {"kind": "fusion", "url": args.sandbox_url} if args.sandbox_url else {}
    try:
        with open_sandbox(SandboxOptions(**chosen)) as sandbox:
            times = [sandbox.run("print(1)").seconds for _ in range(9)]
            words = f"{sandbox.describe()}; print(1) takes {1e3 * statistics.median(times):.1f} ms"
    except ConfigError as error:
        yield Finding("sandbox", "fail", f"code that a model wrote will not be run: {error.message}", error.hint or "")
    else:
        yield Finding("sandbox", "ok", words)


def _extra(name: str, words: list[str]) -> Finding:
    if version := _version(name):
        return Finding(name, "ok", f"{version}: {words[0]}")
    return Finding(name, "none", f"not installed: {words[0]}", f'pip install "spearrl[{words[1]}]"')


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


CHECKS: dict[str, Callable[[argparse.Namespace], Iterator[Finding]]] = {
    "versions": _versions,
    "machine": _machine,
    "gpu": _gpu,
    "sandbox": _sandbox,
}
