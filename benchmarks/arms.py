"""Arms of a comparison: `spearrl train` from one cold-started model with every seed, some runs at a time.

A run that is there already is not run again: call a comparison twice to see its table again, or to add seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def parser_of(page: str, *, steps: int, output: str) -> argparse.ArgumentParser:
    """The arguments that comparisons share.

    Args:
        page: the module's docstring.
        steps, output: defaults.
    """
    parser = argparse.ArgumentParser(description=page.splitlines()[0])
    parser.add_argument("--model", required=True, help="model directory every run starts from (made by `spearrl sft`)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--output", default=output)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("overrides", nargs="*")
    return parser


def of_every_seed(
    args: argparse.Namespace, arms: Iterable[str], run: Callable[[argparse.Namespace, str, int], Any]
) -> dict[tuple[str, int], Any]:
    """What `run(args, arm, seed)` returns, for every arm and seed."""
    work = [(arm, seed) for seed in args.seeds for arm in arms]
    with ThreadPoolExecutor(args.jobs) as pool:
        return dict(zip(work, pool.map(lambda pair: run(args, *pair), work), strict=True))


def trained(args: argparse.Namespace, name: str, seed: int, *words: str) -> list[dict[str, Any]]:
    """The events of a run of one thread. `words`: flags and settings of its arm."""
    folder = Path(args.output) / name
    last = {"event": "eval", "step": args.steps}
    if not (folder / "events.jsonl").exists() or not any(last.items() <= event.items() for event in _events(folder)):
        command = [sys.executable, "-m", "spearrl", "train", "--model", args.model, "sft.enabled=false"]
        command += [f"run.seed={seed}", f"run.steps={args.steps}", f"run.name={name}", f"run.output_dir={args.output}"]
        command += ["run.threads=1", "run.checkpoint_every=0", "run.tensorboard=false", "run.trajectories_every=0"]
        command += [*words, *args.overrides]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return _events(folder)


def mean(values: Sequence[float]) -> float:
    """0 for no values."""
    return sum(values) / max(1, len(values))


def _events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
