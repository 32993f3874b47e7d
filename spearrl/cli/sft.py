"""spearrl sft: the cold start alone; writes a model directory that `train --model` takes.

examples:
  spearrl sft --env webshop --output models/shop
  spearrl sft --preset tiny sft.episodes=1000 --output models/small
  spearrl sft --model DIR --data conversations.jsonl --output models/started
  spearrl train --preset tiny --model models/shop sft.enabled=false
"""

from __future__ import annotations

import argparse
import sys

from spearrl.cli.parsing import add_config_arguments, add_unsandboxed, config_from
from spearrl.cli.target import empty_folder
from spearrl.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    add_unsandboxed(parser)
    data_help = "conversations to clone instead of expert episodes (.jsonl or .parquet); the same as sft.data=FILE"
    parser.add_argument("--data", metavar="FILE", help=data_help)
    parser.add_argument("--output", metavar="DIR", required=True, help="where the model directory is written")


def run(args: argparse.Namespace) -> int:
    from spearrl.cli.progress import watched

    with watched("starting"):
        return _start(args)


def _start(args: argparse.Namespace) -> int:
    from spearrl.cli.progress import Progress

    args.overrides += ["sft.enabled=true", *([f"sft.data={args.data}"] if args.data else [])]
    config = config_from(args)
    from spearrl.config import to_toml
    from spearrl.config.foreign import warn_unsandboxed
    from spearrl.evaluation import evaluate
    from spearrl.launch.factories import make_environment
    from spearrl.models import prepare_torch
    from spearrl.start.origin import starting_model, with_pinned_model

    warn_unsandboxed(config.env.options, args.unsandboxed)
    environment = make_environment(config)
    config = with_pinned_model(config, environment)
    output = empty_folder(args.output)
    device = prepare_torch(config)
    starting_model(config, environment, device, None, Progress().report).keep(output)
    (output / "config.toml").write_text(to_toml(config))
    say("evaluating", file=sys.stderr)
    result = evaluate(config.with_settings({"model.path": str(output)}), unsandboxed_tools=args.unsandboxed)
    say(f"{output}: success {result.success} on {result.split} at temperature {result.temperature}")
    return 0
