"""spearrl study: measurements that need more than one run. `cost`: what an algorithm costs beside another one.

examples:
  spearrl study cost --preset tiny --algo grpo+spear --against grpo
  spearrl study cost run.toml --steps 40 run.threads=1 --json
  spearrl study cost --algo grpo --against grpo     how much of a difference is noise
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spearrl.cli.parsing import add_config_arguments, add_unsandboxed, config_from, resolved_from
from spearrl.cli.target import empty_folder
from spearrl.cli.terminal import say

if TYPE_CHECKING:
    from spearrl.study import Cost

_ROWS = {  # label -> template: of every kind of step, from its summary; shares are in per cent
    "steps": "{steps}",
    "seconds of the rollout": "{rollout_seconds:.3f}",
    "seconds of a step, {against}: mean (median)": "{seconds_against:.3f} ({median_seconds_against:.3f})",
    "seconds of a step, {algo}": "{seconds:.3f} ({median_seconds:.3f})",
    "extra wall time of a step: of means (median)": "{extra:+.1f} % ({extra_median:+.1f})",
    "extra wall time of learning alone": "{learn_extra:+.1f} % ({learn_extra_median:+.1f})",
    "extra processor time of a step": "{extra_cpu:+.1f} %",
    "extra processor time of learning alone": "{learn_extra_cpu:+.1f} %",
    "extra FLOPs of a step (rollout estimated)": "{extra_flops:+.1f} %",
    "extra FLOPs of learning alone": "{learn_extra_flops:+.1f} %",
    "extra seconds until the batch is ready": "{prepare_more:+.3f}",
    "extra seconds of the update": "{update_more:+.3f}",
    "extra seconds of the rest": "{rest_more:+.3f}",
}
STUDIES = ("cost",)
STEPS = 20
# What an algorithm may cost beside another: a step in which nothing is replayed, and any step.
BARS = {"without replay": 0.10, "all": 0.25}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cost_help = "cost: extra time and FLOPs of --algo over --against, on the same rollouts"
    parser.add_argument("study", choices=STUDIES, metavar="STUDY", help=cost_help)
    add_config_arguments(parser)
    add_unsandboxed(parser)
    parser.add_argument(
        "--against", metavar="NAME", default="grpo", help="the algorithm to compare with (default: grpo)"
    )
    steps_help = f"steps to count, after one that is not (default: {STEPS})"
    parser.add_argument("--steps", metavar="N", type=int, default=STEPS, help=steps_help)
    output_help = "keep the run directories here (default: a temporary folder, removed at the end)"
    parser.add_argument("--output", metavar="DIR", help=output_help)
    parser.add_argument("--json", action="store_true", help="print every step and the summaries as JSON")


def run(args: argparse.Namespace) -> int:
    config = config_from(args)
    against = resolved_from(argparse.Namespace(**{**vars(args), "algo": args.against})).config
    from spearrl.study import cost

    with ExitStack() as stack:
        if args.output:
            folder = empty_folder(args.output)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spearrl-study-")))
        measured = cost(
            config, against, steps=args.steps, folder=folder, report=_report(), unsandboxed_tools=args.unsandboxed
        )
    say(json.dumps({**measured.as_json(), "bars": verdicts(measured)}) if args.json else table(measured))
    return 0


def verdicts(cost: Cost) -> dict[str, Any]:
    """Each bar with what was measured: "limit", "wall", "flops" (shares), "met"; None where no step says anything."""
    summaries, bars = cost.summaries(), dict.fromkeys(BARS)
    for kind, limit in BARS.items():
        summary = summaries.get(kind)
        if summary is not None and (kind != "all" or "with replay" in summaries):
            met = max(summary["extra"], summary["extra_flops"]) <= limit
            bars[kind] = {"limit": limit, "wall": summary["extra"], "flops": summary["extra_flops"], "met": met}
    return bars


def table(cost: Cost) -> str:
    """For people: a column per kind of step, then the bars."""
    summaries = cost.summaries()
    columns = [
        {name: 100 * value if "extra" in name else value for name, value in summary.items()}
        for summary in summaries.values()
    ]
    rows = [("steps of kind", *summaries)]
    for label, template in _ROWS.items():
        rows.append((label.format(algo=cost.algo, against=cost.against), *map(template.format_map, columns)))
    first, width = max(len(row[0]) for row in rows) + 2, 16
    lines = [f"{cost.algo} over {cost.against}, learning from the same rollouts", ""]
    lines += [row[0].ljust(first) + "".join(cell.rjust(width) for cell in row[1:]) for row in rows]
    return "\n".join([*lines, "", *(_verdict(kind, bar) for kind, bar in verdicts(cost).items())])


def _verdict(kind: str, bar: dict[str, Any] | None) -> str:
    name = {"without replay": "steps without replay", "all": "all steps"}[kind]
    if bar is None:
        why = "nothing was replayed: play more --steps" if kind == "all" else "no such step was played"
        return f"bar  {name}: no verdict, {why}"
    measured = f"wall time {100 * bar['wall']:+.1f} %, FLOPs {100 * bar['flops']:+.1f} %"
    return f"bar  {name}: at most {100 * bar['limit']:+.0f} %: {measured}: {'met' if bar['met'] else 'NOT met'}"


def _report() -> Callable[[str, dict[str, Any]], None]:
    """Progress on standard error: the cold start, a line per step."""
    from spearrl.cli.progress import Progress

    progress = Progress()

    def report(kind: str, values: dict[str, Any]) -> None:
        if kind == "cost":
            learn = f"{values['studied']['seconds']:.2f}s against {values['against']['seconds']:.2f}s"
            rollout = f"rollout {values['rollout_seconds']:.2f}s  learn {learn}  replayed {values['replayed']}"
            say(f"{values['step']:>4}/{values['steps']}  {rollout}", file=sys.stderr)
        elif kind == "count":
            say("counting FLOPs: the same steps once more", file=sys.stderr)
        elif kind != "checkpoint":
            progress.report(kind, values)

    return report
