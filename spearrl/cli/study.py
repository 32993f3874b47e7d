"""spearrl study: measurements that need more than one run. `cost`: what an algorithm costs beside another one."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spearrl.cli.parsing import add_config_arguments, config_from, resolved_from
from spearrl.cli.target import empty_folder
from spearrl.config import tables

if TYPE_CHECKING:
    from spearrl.config import RunConfig
    from spearrl.study import Cost

_ROWS: dict[str, str] = tables.table(__file__, "study.toml")
STUDIES = ("cost",)
STEPS = 20
BARS = {
    "without replay": 0.10,
    "all": 0.25,
}  # what an algorithm may cost beside another: a step in which nothing is replayed, and any step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study",
        choices=STUDIES,
        metavar="STUDY",
        help="cost: extra time and FLOPs of --algo over --against, on the same rollouts",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--against", metavar="NAME", default="grpo", help="the algorithm to compare with (default: grpo)"
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=int,
        default=STEPS,
        help=f"steps to count, after one that is not (default: {STEPS})",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="keep the run directories here (default: a temporary folder, removed at the end)",
    )
    parser.add_argument("--json", action="store_true", help="print every step and the summaries as JSON")


def run(args: argparse.Namespace) -> int:
    config, against = _configs(args)
    from spearrl.study import cost

    with ExitStack() as stack:
        folder = (
            empty_folder(args.output)
            if args.output
            else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spearrl-study-")))
        )
        found = cost(config, against, steps=args.steps, folder=folder, report=_report())
    print(json.dumps({**found.as_json(), "bars": verdicts(found)}) if args.json else table(found))
    return 0


def verdicts(cost: Cost) -> dict[str, Any]:
    """Each bar with what was measured of it: "limit", "wall", "flops" (shares), "met"; None where no step says anything about it."""
    summaries, found = cost.summaries(), {}
    for kind, limit in BARS.items():
        summary = summaries.get(kind)
        told = summary is not None and (kind != "all" or "with replay" in summaries)
        met = summary is not None and max(summary.extra, summary.extra_flops) <= limit
        found[kind] = (
            {"limit": limit, "wall": summary.extra, "flops": summary.extra_flops, "met": met}
            if summary is not None and told
            else None
        )
    return found


def table(cost: Cost) -> str:
    """For people: a column per kind of step, then the bars."""
    summaries = cost.summaries()
    values = [
        {name: 100 * value if "extra" in name else value for name, value in asdict(summary).items()}
        for summary in summaries.values()
    ]
    rows = [("steps of kind", *summaries)]
    rows += [
        (name.format(algo=cost.algo, against=cost.against), *map(show.format_map, values))
        for name, show in _ROWS.items()
    ]
    first, width = max(len(row[0]) for row in rows) + 2, 16
    lines = [f"{cost.algo} over {cost.against}, learning from the same rollouts", ""]
    lines += [row[0].ljust(first) + "".join(cell.rjust(width) for cell in row[1:]) for row in rows]
    return "\n".join([*lines, "", *(_verdict(kind, found) for kind, found in verdicts(cost).items())])


def _verdict(kind: str, found: dict[str, Any] | None) -> str:
    name = {"without replay": "steps without replay", "all": "all steps"}[kind]
    if found is None:
        return f"bar  {name}: no verdict, " + (
            "no such step was played" if kind != "all" else "nothing was replayed: play more --steps"
        )
    verdict = "met" if found["met"] else "NOT met"
    return f"bar  {name}: at most {100 * found['limit']:+.0f} %: wall time {100 * found['wall']:+.1f} %, FLOPs {100 * found['flops']:+.1f} %: {verdict}"


def _configs(args: argparse.Namespace) -> tuple[RunConfig, RunConfig]:
    """The studied config, and the same settings with the other algorithm. Raises ConfigError."""
    config = config_from(args)
    resolved = resolved_from(argparse.Namespace(**{**vars(args), "algo": args.against}))
    return config, resolved.config


def _report() -> Any:
    """Progress on standard error: the cold start, a line per step."""
    from spearrl.cli.progress import Progress

    progress = Progress()

    def report(kind: str, values: dict[str, Any]) -> None:
        if kind == "cost":
            mine, other = values["studied"], values["against"]
            text = f"rollout {values['rollout_seconds']:.2f}s  learn {mine['seconds']:.2f}s against {other['seconds']:.2f}s  replayed {values['replayed']}"
            print(f"{values['step']:>4}/{values['steps']}  {text}", file=sys.stderr, flush=True)
        elif kind == "count":
            print("counting FLOPs: the same steps once more", file=sys.stderr, flush=True)
        elif kind != "checkpoint":
            progress.report(kind, values)

    return report
