"""spearrl eval: play a fixed panel with a run's newest checkpoint, or with a model directory.

examples:
  spearrl eval runs/webshop-grpo-spear-s0 --split val
  spearrl eval runs/webshop-grpo-spear-s0 --split val eval.tasks=500 eval.temperature=1.0
  spearrl eval models/shop --json
  spearrl eval smollm2-135m --env webshop eval.tasks=8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from spearrl.cli.parsing import add_unsandboxed, config_from, is_override
from spearrl.cli.target import model_of
from spearrl.cli.terminal import say

if TYPE_CHECKING:
    from spearrl.config import RunConfig
    from spearrl.evaluation import EvalResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    words_help = "a run, or a model made by `spearrl sft`: both know their settings; or any model, with --env or "
    words_help += "--preset; and settings that differ, e.g. eval.tasks=500"
    parser.add_argument("overrides", nargs="*", metavar="RUN | MODEL | section.key=value", help=words_help)
    parser.add_argument("--env", metavar="NAME", help="environment, for a model without a run")
    parser.add_argument("--preset", metavar="NAME", help="settings, for a model without a run")
    parser.add_argument("--model", metavar="MODEL", help="the model, as a directory or a name: the same as MODEL")
    add_unsandboxed(parser)
    parser.add_argument("--split", help="split the panel comes from (default: the run's eval.split)")
    parser.add_argument("--step", type=int, help="checkpoint of this step instead of the newest")
    parser.add_argument("--trajectories", metavar="FILE", help="write the episodes as JSON lines")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from spearrl.cli.progress import Progress, watched
    from spearrl.errors import StorageError

    with watched("starting"):
        config = _config(args)
        from spearrl.evaluation import evaluate_with_groups
        from spearrl.run import write_trajectories

        result, groups = evaluate_with_groups(config, report=Progress().report, unsandboxed_tools=args.unsandboxed)
    model = config.model.path
    say(json.dumps({"model": model, **result.as_json()}) if args.json else _table(result, model))
    if args.trajectories:
        try:
            write_trajectories(Path(args.trajectories), groups)
        except OSError as error:
            raise StorageError(f"cannot write {args.trajectories}: {error.strerror}", where="--trajectories") from error
    return 0


def _config(args: argparse.Namespace) -> RunConfig:
    """That of the run, with its newest weights; or for a model alone, that of an environment or a preset."""
    from spearrl.config import load_config
    from spearrl.errors import RefusedError

    targets = [word for word in args.overrides if not is_override(word)] + ([args.model] if args.model else [])
    if len(targets) != 1:
        raise RefusedError(
            f"{len(targets)} runs or models are named", hint="give one: a run directory, or a model's directory or name"
        )
    args.overrides = [word for word in args.overrides if is_override(word)]
    args.overrides += [f"eval.split={args.split}"] if args.split else []
    target = Path(targets[0])
    if args.env or args.preset:
        args.algo, args.model = None, str(model_of(target, args.step))
        return config_from(args)
    if not (target / "config.toml").is_file():
        hint = "give a run directory, a model directory made by `spearrl sft`, or any model with --env NAME"
        raise RefusedError(f"{target} holds no config.toml", hint=hint)
    return load_config(target, [*args.overrides, f"model.path={model_of(target, args.step)}"])


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
