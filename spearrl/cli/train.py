"""spearrl train: start a run, or continue one.

examples:
  spearrl train --env webshop --algo grpo+spear
  spearrl train --preset tiny run.steps=20 run.seed=3
  spearrl train --env webshop env.options.data=PATH --algo grpo+spear
  spearrl train --preset webshop-1.5b --model DIR --gpus 8
  spearrl train --resume runs/webshop-grpo-spear-s0
  spearrl train --resume runs/webshop-grpo-spear-s0 --fork windowed env.style=windowed
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spearrl.cli.parsing import add_config_arguments, add_gpus, add_unsandboxed, check_environment, placed_from
from spearrl.cli.terminal import say

if TYPE_CHECKING:
    from spearrl.cli.signals import Stop
    from spearrl.start.origin import Report
    from spearrl.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    add_unsandboxed(parser)
    add_gpus(parser)
    parser.add_argument("--resume", metavar="RUN", help="continue this run directory from its newest valid checkpoint")
    fork_help = (
        "with --resume RUN: begin a new run of this name beside RUN, with RUN's settings, those given here, and "
    )
    fork_help += "the weights of its newest checkpoint; steps, optimiser and buffers begin anew"
    parser.add_argument("--fork", metavar="NAME", help=fork_help)
    grace_help = "seconds that SIGTERM and SIGHUP allow for ending the step and saving (default: 25)"
    parser.add_argument("--grace", type=float, default=25.0, metavar="SECONDS", help=grace_help)
    parser.add_argument("--help-columns", action="store_true", help="explain the columns of the progress line")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from spearrl.cli.progress import explain_columns, watched
    from spearrl.errors import ConfigError

    if args.help_columns:
        say(explain_columns())
        return 0
    if args.resume and (args.env or args.algo or args.model or args.preset):
        hint = "leave --env, --algo, --model and --preset out"
        raise ConfigError("--resume takes its settings from the run", where="command line", hint=hint)
    if args.fork and not args.resume:
        raise ConfigError("--fork needs a run to begin from", where="command line", hint="add --resume RUN")
    from spearrl.launch.launcher import serve_rank

    if (code := serve_rank()) is not None:
        return code
    from spearrl.cli.signals import Stop

    stop = Stop(args.grace)
    try:
        with stop, watched("starting"):
            return _train(args, stop)
    except KeyboardInterrupt:
        left = f"the run is as it was last saved: {stop.trainer.run.path}" if stop.trainer else "nothing was begun"
        say(f"stopped; {left}", file=sys.stderr)
        return stop.exit_code


def _train(args: argparse.Namespace, stop: Stop) -> int:
    from spearrl.cli.progress import Progress
    from spearrl.config.foreign import to_repeat

    if args.fork:
        from spearrl.run.resume import config_file, fork_settings

        folder = Path(args.resume)
        args.overrides = [str(config_file(folder)), *fork_settings(folder, args.fork), *args.overrides]
    elif args.resume and (text := _nothing_left(args)):
        say(text)
        return 0
    resumed = args.resume and not args.fork
    with _resumed(args, Progress().report) if resumed else _new(args, Progress().report) as trainer:
        stop.trainer = trainer
        path = trainer.run.path
        say(f"run  {path}  (config.toml, events.jsonl, trajectories/, checkpoints/, tb/)", file=sys.stderr)
        result = trainer.train()
        if lost := getattr(sys.stderr, "dropped", 0):
            text = f"{lost} times nothing could be written to standard error"
            trainer.run.event("warning", trainer.step, {"text": text})
    again = to_repeat(trainer.config)
    if stop.received:
        command = f"Continue with:  spearrl train --resume {path}{again}"
        say(f"stopped after step {trainer.step}, saved. {command}", file=sys.stderr)
        return stop.exit_code
    if args.json:
        say(json.dumps({"run": str(path), "eval": result.as_json() if result else None}))
    else:
        say(f"done: {path}" + (f"  success {result.success} on {result.split}" if result else ""))
        say(f"play the panel again with:  spearrl eval {path} --split {trainer.config.eval.split}{again}")
    return 0


def _new(args: argparse.Namespace, report: Report) -> Trainer:
    """The trainer of a new run. Which GPUs do what is said before anything starts."""
    from spearrl.launch.describe import describe
    from spearrl.launch.devices import detect

    resolved, placement = placed_from(args, detect)
    check_environment(resolved)
    say(describe(placement), file=sys.stderr)
    from spearrl.trainer import Trainer

    return Trainer(resolved.config, report=report, unsandboxed_tools=args.unsandboxed)


def _overrides(args: argparse.Namespace) -> list[str]:
    return [*args.overrides, *([f"placement.gpus={args.gpus}"] if args.gpus else [])]


def _nothing_left(args: argparse.Namespace) -> str:
    from spearrl.run.resume import nothing_left

    return nothing_left(Path(args.resume), _overrides(args))


def _resumed(args: argparse.Namespace, report: Report) -> Trainer:
    from spearrl.config import diff, load_config, resolve
    from spearrl.launch.describe import describe
    from spearrl.launch.devices import detect
    from spearrl.launch.placement import place
    from spearrl.run.resume import config_file, refuse_fixed
    from spearrl.trainer import Trainer

    overrides, file = _overrides(args), config_file(Path(args.resume))
    config = load_config(file.parent, overrides)
    refuse_fixed(file.parent, diff(resolve(file, shown=True).config, config))
    say(describe(place(config, detect())), file=sys.stderr)
    return Trainer.resume(args.resume, report=report, overrides=overrides, unsandboxed_tools=args.unsandboxed)
