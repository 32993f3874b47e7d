"""spearrl eval: play a fixed panel with a run's newest checkpoint, or with a model directory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from spearrl.cli.target import model_of

if TYPE_CHECKING:
    from spearrl.evaluation import EvalResult

EXAMPLES = """
examples:
  spearrl eval runs/webshop-grpo-spear-s0 --split val
  spearrl eval runs/webshop-grpo-spear-s0 --split val eval.tasks=500 eval.temperature=1.0
  spearrl eval models/shop --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    target_help = "a run directory, or a model directory that holds the config.toml it was made with"
    parser.add_argument("target", metavar="RUN|MODEL", help=target_help)
    overrides_help = "settings that differ from the run's, e.g. eval.tasks=500"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=overrides_help)
    parser.add_argument("--split", help="split the panel comes from (default: the run's eval.split)")
    parser.add_argument("--step", type=int, help="checkpoint of this step instead of the newest")
    parser.add_argument("--trajectories", metavar="FILE", help="write the episodes as JSON lines")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from spearrl.config import load_config
    from spearrl.errors import RefusedError, StorageError

    target = Path(args.target)
    if not (target / "config.toml").is_file():
        hint = "give a run directory, or a model directory made by `spearrl sft`"
        raise RefusedError(f"{target} holds no config.toml", hint=hint)
    overrides = [*args.overrides, *([f"eval.split={args.split}"] if args.split else [])]
    config = load_config(target / "config.toml", [*overrides, f"model.path={model_of(target, args.step)}"])
    from spearrl.evaluation import evaluate_with_groups
    from spearrl.run import write_trajectories

    result, groups = evaluate_with_groups(config)
    model = config.model.path
    print(json.dumps({"model": model, **result.as_json()}) if args.json else _table(result, model))
    if args.trajectories:
        try:
            write_trajectories(Path(args.trajectories), groups)
        except OSError as error:
            message = f"cannot write {args.trajectories}: {error.strerror}"
            raise StorageError(message, where="--trajectories") from error
    return 0


def _table(result: EvalResult, model: str) -> str:
    panel = f"{result.success.tasks} tasks of {result.split!r}, {result.attempts} attempt(s)"
    lines = [
        f"model    {model}",
        f"panel    {result.panel}: {panel}, temperature {result.temperature}",
        f"success  {result.success}" + (f"   (avg@{result.attempts})" if result.attempts > 1 else ""),
    ]
    if result.pass_at:
        lines.append("pass@k   " + "   ".join(f"{k}: {100 * rate:.1f}%" for k, rate in result.pass_at.items()))
    lines += [f"  {name}: {rate}" for name, rate in result.strata.items()]
    lines.append(f"reward   {result.reward:.3f}   turns {result.turns:.2f}")
    lines += [f"{name}   {value:.3f}" for name, value in result.measures.items()]
    lines += [f"{name}   {value}" for name, value in result.notes.items()]
    lines.append("status   " + ", ".join(f"{name} {count}" for name, count in sorted(result.statuses.items())))
    return "\n".join(lines)
