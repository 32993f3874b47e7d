"""spearrl train: start a run, or continue one."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from types import FrameType
from typing import Any

from spearrl.cli.parsing import add_config_arguments, config_from

HELP = "train an agent"
EXAMPLES = """examples:
  spearrl train --env webshop --algo grpo+spear
  spearrl train --preset tiny run.steps=20 run.seed=3
  spearrl train --env webshop env.options.data=PATH --algo grpo+spear
  spearrl train --resume runs/webshop-grpo-spear-s0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--resume", metavar="RUN", help="continue this run directory from its newest valid checkpoint")
    parser.add_argument("--help-columns", action="store_true", help="explain the columns of the progress line")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from spearrl.cli.progress import Progress, explain_columns
    from spearrl.errors import ConfigError

    if args.help_columns:
        print(explain_columns())
        return 0
    if args.resume and (args.env or args.algo or args.model or args.preset):
        raise ConfigError("--resume takes its settings from the run", where="command line", hint="leave --env, --algo, --model and --preset out")
    config = None if args.resume else config_from(args)
    from spearrl.trainer import Trainer

    report = Progress().report
    trainer = Trainer(config, report=report) if config else Trainer.resume(args.resume, report=report, overrides=args.overrides)
    caught = _stop_gently(trainer)
    path = trainer.run.path
    print(f"run  {path}  (config.toml, events.jsonl, trajectories/, checkpoints/, tb/)", file=sys.stderr)
    try:
        result = trainer.train()
    finally:
        trainer.close()
    if caught:
        print(f"stopped after step {trainer.step}, saved. Continue with:  spearrl train --resume {path}", file=sys.stderr)
        return 128 + caught[0]
    if args.json:
        print(json.dumps({"run": str(path), "eval": result.as_json() if result else None}))
    else:
        print(f"done: {path}" + (f"  success {result.success} on {result.split}" if result else ""))
        print(f"play the panel again with:  spearrl eval {path} --split {trainer.config.eval.split}")
    return 0


def _stop_gently(trainer: Any) -> list[int]:
    """First SIGINT or SIGTERM: finish the step and save; the second stops at once. Returns the list the signal lands in."""
    caught: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        trainer.stop_requested = True
        print("finishing this step and saving; press Ctrl-C again to stop now", file=sys.stderr)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return caught
