"""spearrl export: a model directory ready to serve or to upload, from a run's checkpoint.

examples:
  spearrl export runs/webshop-grpo-spear-s0 models/shop
  spearrl export runs/webshop-grpo-spear-s0 models/shop --step 40
  spearrl export runs/math-lora models/adapters --adapters apart
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spearrl.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument("output", metavar="DIR", type=Path, help="a new folder")
    parser.add_argument("--step", type=int, help="checkpoint of this step instead of the newest")
    adapters_help = "of a run with adapters: in the weights (default), or alone, in peft's format"
    parser.add_argument("--adapters", choices=("merged", "apart"), default="merged", help=adapters_help)


def run(args: argparse.Namespace) -> int:
    from spearrl.cli.target import model_of, whole_folder
    from spearrl.errors import RefusedError
    from spearrl.run.model_card import export_checkpoint

    if not (args.run / "checkpoints").is_dir():
        raise RefusedError(f"{args.run} is not a run directory", hint="give the folder that `spearrl train` printed")
    checkpoint = model_of(args.run, args.step)
    with whole_folder(args.output) as temporary:
        base = export_checkpoint(args.run, checkpoint, temporary, apart=args.adapters == "apart")
    say(f"{args.output}: {checkpoint.name} of {args.run}, with its model card in README.md")
    if args.adapters == "apart":
        say(f"its adapters belong to the model {base}", file=sys.stderr)
    return 0
