"""spearrl eval: play a fixed panel with a run's newest checkpoint, or with a model directory."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spearrl.cli.target import model_of

if TYPE_CHECKING:
    from spearrl.types import Group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="RUN|MODEL",
        help="a run directory, or a model directory that holds the config.toml it was made with",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings that differ from the run's, e.g. eval.tasks=500",
    )
    parser.add_argument("--split", help="split the panel comes from (default: the run's eval.split)")
    parser.add_argument("--step", type=int, help="checkpoint of this step instead of the newest")
    parser.add_argument("--trajectories", metavar="FILE", help="write the episodes as JSON lines")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from spearrl.config import load_config
    from spearrl.errors import RefusedError

    target = Path(args.target)
    if not (target / "config.toml").is_file():
        raise RefusedError(
            f"{target} holds no config.toml", hint="give a run directory, or a model directory made by `spearrl sft`"
        )
    overrides = [*args.overrides, *([f"eval.split={args.split}"] if args.split else [])]
    config = load_config(target / "config.toml", [*overrides, f"model.path={model_of(target, args.step)}"])
    from spearrl.evaluation import evaluate_with_groups

    result, groups = evaluate_with_groups(config)
    print(
        json.dumps({"model": config.model.path, **result.as_json()}) if args.json else _table(result, config.model.path)
    )
    if args.trajectories:
        _write(Path(args.trajectories), groups)
    return 0


def _write(path: Path, groups: Sequence[Group]) -> None:
    from spearrl.errors import StorageError
    from spearrl.run import write_trajectories

    try:
        write_trajectories(path, groups)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", where="--trajectories") from error


def _table(result: Any, model: str) -> str:
    lines = [
        f"model    {model}",
        f"panel    {result.panel}: {result.success.tasks} tasks of {result.split!r}, {result.attempts} attempt(s), temperature {result.temperature}",
        f"success  {result.success}" + (f"   (avg@{result.attempts})" if result.attempts > 1 else ""),
        *(
            [f"pass@k   {'   '.join(f'{k}: {100 * rate:.1f}%' for k, rate in result.pass_at.items())}"]
            if result.pass_at
            else []
        ),
        *(f"  {name}: {rate}" for name, rate in result.strata.items()),
        f"reward   {result.reward:.3f}   turns {result.turns:.2f}",
        *(f"{name}   {value:.3f}" for name, value in result.measures.items()),
        *(f"{name}   {value}" for name, value in result.notes.items()),
        "status   " + ", ".join(f"{name} {count}" for name, count in sorted(result.statuses.items())),
    ]
    return "\n".join(lines)
