"""spearrl replay: make an optimiser step again that a run left out, and say what is not finite in it, and where.

A run keeps the batch of such a step in bad_batch/ (docs/reliability.md). Exit code 7: something is not finite with
these weights too; 0: everything is.

examples:
  spearrl replay runs/webshop-grpo-spear-s0 --batch runs/webshop-grpo-spear-s0/bad_batch/step-000120.safetensors
  spearrl replay RUN --batch FILE --step 100
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from spearrl.cli.terminal import say

if TYPE_CHECKING:
    from spearrl.learner import LocalLearner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run directory")
    again_help = "settings, such as those that SECURITY.md wants said again of a run's config"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=again_help)
    parser.add_argument("--batch", metavar="FILE", required=True, help="a file of its bad_batch folder")
    step_help = "weights of this step's checkpoint (default: the newest one up to the batch's step)"
    parser.add_argument("--step", type=int, help=step_help)


def run(args: argparse.Namespace) -> int:
    from spearrl.cli.progress import watched
    from spearrl.errors import NumericsError

    with watched("loading"):
        broken, sound, weights, step = _examined(args)
    say(f"batch of step {step}, weights of {weights}")
    say("\n".join(f"not finite: {line}" for line in broken) or "everything is finite with these weights")
    say("\n".join(f"finite: {line}" for line in sound))
    return NumericsError.exit_code if broken else 0


def _examined(args: argparse.Namespace) -> tuple[list[str], list[str], Path, int]:
    """What is not finite, what is, the checkpoint whose weights were used, the batch's training step."""
    from spearrl.cli.target import model_of
    from spearrl.config import load_config
    from spearrl.errors import RefusedError
    from spearrl.launch.devices import detect
    from spearrl.launch.factories import make_learner
    from spearrl.launch.placement import place
    from spearrl.learner.examine import examine
    from spearrl.models import prepare_torch
    from spearrl.run.bad_batch import load
    from spearrl.start.origin import Origin

    folder = Path(args.run)
    step, shares = load(Path(args.batch))
    alone = ("learner.backend=local", "learner.processes=1", "learner.offload=none", "placement.gpus=0")
    config = load_config(folder, [*alone, "placement.mode=auto", *args.overrides])
    named = {objective.surrogate for share in shares for objective, _ in share.objectives}
    if others := {surrogate for surrogate in named if ":" in surrogate} - {config.algo.loss}:
        hint = "a batch may be a stranger's: if you trust it, add algo.loss=…"
        raise RefusedError(f"it names code, {', '.join(others)}, that the config does not", where=args.batch, hint=hint)
    checkpoint = model_of(folder, _newest(folder, step) if args.step is None else args.step)
    device = prepare_torch(config)
    learner = make_learner(config, Origin.of(checkpoint), device, place(config, detect()), reference=None)
    learner.load(checkpoint)
    return *examine(cast("LocalLearner", learner), shares), checkpoint, step


def _newest(folder: Path, step: int) -> int | None:
    """The newest checkpoint's step that is not after `step`; None where there is none: the newest of all."""
    from spearrl.run.checkpoint import checkpoints

    return max((s for path in checkpoints(folder / "checkpoints") if (s := int(path.name[5:])) <= step), default=None)
