"""spearrl doctor: what this machine has, what will not work on it, and how to fix that.

examples:
  spearrl doctor
  spearrl doctor sandbox gpu vllm     exit code 1 where one of them is missing
  spearrl doctor sandbox --sandbox-url http://sandbox:8080
  spearrl doctor --model DIR          how a model's chats are written and its calls read
  spearrl doctor --model org/name --format template
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from spearrl.cli.terminal import say
from spearrl.processes import version_of

EXTRAS = {  # optional packages: what each is for, and the extra that installs it
    "vllm": ("rollouts on GPUs", "vllm"),
    "deepspeed": ("a learner of several processes", "deepspeed"),
    "ray": ("rollout workers on several machines", "ray"),
    "peft": ("LoRA", "lora"),
    "alfworld": ("ALFWorld's own engine, for comparison", "alfworld"),
    "renderers": ("chat formats made by hand", "formats"),
    "math-verify": ("math answers compared as formulas", "envs"),
    "pillow": ("environments with pictures", "envs"),
}
LEAST_DISK = 10 << 30
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a check of the machine says. `state`: ok, none (not there, and missed only by what needs it), warn, fail."""

    name: str
    state: str
    words: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{f'[{self.state}]':<7}{self.name:<12}{self.words}"
        return f"{text}\n{'':19}fix: {self.fix}" if self.fix else text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join([*CHECKS, *EXTRAS])
    parser.add_argument("need", nargs="*", metavar="NEED", help=f"what must be there, else the exit code is 1: {names}")
    parser.add_argument(
        "--sandbox-url", metavar="URL", help="check this SandboxFusion server instead of a sandbox on this machine"
    )
    model_help = (
        "show a model's chat format instead: a conversation, its ids, what ends a reply, what is read; no weights "
        "are downloaded"
    )
    parser.add_argument("--model", metavar="MODEL", help=model_help)
    parser.add_argument("--format", default="auto", help="with --model: the model.format to show (default: auto)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    from spearrl.errors import ConfigError

    if args.model:
        from spearrl.config.sections import ModelSection
        from spearrl.models import load_tokenizer
        from spearrl.models.formats import explain_format

        lines = explain_format(load_tokenizer(args.model), ModelSection(path=args.model, format=args.format))
        say(json.dumps({"format": lines}, indent=1) if args.json else "\n".join(lines))
        return 0
    known = [*CHECKS, *EXTRAS]
    if unknown := [name for name in args.need if name not in known]:
        raise ConfigError(f"doctor knows no {', '.join(unknown)}", where="command line", hint=f"use {', '.join(known)}")
    diagnoses = [diagnosis for check in CHECKS.values() for diagnosis in check(args)]
    diagnoses += [_extra(name, purpose, extra) for name, (purpose, extra) in EXTRAS.items()]
    needed = {"versions", *args.need}
    missing = [d.name for d in diagnoses if d.state in ("fail", "none") and d.name in needed]
    if args.json:
        say(json.dumps({"ok": not missing, "findings": [asdict(diagnosis) for diagnosis in diagnoses]}, indent=1))
        return 1 if missing else 0
    say("\n".join(map(str, diagnoses)))
    no_code = any(d.state == "fail" and d.name == "sandbox" for d in diagnoses)
    if missing:
        say(f"missing: {', '.join(missing)}")
    elif args.need:
        say("what was asked for works")
    else:
        say(f"training works on this machine{'; tools that run code do not' if no_code else ''}")
    return 1 if missing else 0


def _versions(args: argparse.Namespace) -> Iterator[Diagnosis]:
    from spearrl import __version__

    versions = {name: version_of(name) for name in ("torch", "transformers", "numpy", "pydantic")}
    missing = [name for name, version in versions.items() if not version]
    installed = [f"{name} {version}" for name, version in versions.items() if version]
    words = ", ".join([f"spearrl {__version__}", f"Python {platform.python_version()}", *installed])
    fix = f"pip install {' '.join(missing)}" if missing else ""
    yield Diagnosis("versions", "fail" if missing else "ok", words, fix)


def _machine(args: argparse.Namespace) -> Iterator[Diagnosis]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processors = len(os.sched_getaffinity(0))
    words = f"{platform.system()} {platform.machine()}, {processors} processors, {memory / GIB:.0f} GiB of memory"
    yield Diagnosis("machine", "ok", words)
    free = shutil.disk_usage(".").free
    few = free < LEAST_DISK
    fix = "set run.output_dir to a disk with more room" if few else ""
    yield Diagnosis("disk", "warn" if few else "ok", f"{free / GIB:.0f} GiB free here", fix)


def _gpu(args: argparse.Namespace) -> Iterator[Diagnosis]:
    from spearrl.launch.devices import detect

    if gpus := detect().gpus:
        yield Diagnosis("gpu", "ok", f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory / GIB:.0f} GiB each")
    else:
        yield Diagnosis(
            "gpu", "none", "no GPU that torch can use: everything runs on processors, which is for small models"
        )


def _sandbox(args: argparse.Namespace) -> Iterator[Diagnosis]:
    from spearrl.errors import ConfigError
    from spearrl.sandbox import SandboxOptions, open_sandbox

    options: dict[str, Any] = {"kind": "fusion", "url": args.sandbox_url} if args.sandbox_url else {}
    try:
        with open_sandbox(SandboxOptions(**options)) as sandbox:
            times = [sandbox.run("print(1)").seconds for _ in range(9)]
            words = f"{sandbox.describe()}; print(1) takes {1e3 * statistics.median(times):.1f} ms"
    except ConfigError as error:
        yield Diagnosis(
            "sandbox", "fail", f"code that a model wrote will not be run: {error.message}", error.hint or ""
        )
    else:
        yield Diagnosis("sandbox", "ok", words)


def _extra(name: str, purpose: str, extra: str) -> Diagnosis:
    if version := version_of(name):
        return Diagnosis(name, "ok", f"{version}: {purpose}")
    return Diagnosis(name, "none", f"not installed: {purpose}", f'pip install "spearrl[{extra}]"')


CHECKS: dict[str, Callable[[argparse.Namespace], Iterator[Diagnosis]]] = {
    "versions": _versions,
    "machine": _machine,
    "gpu": _gpu,
    "sandbox": _sandbox,
}
