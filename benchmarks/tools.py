"""Does the intrinsic reward do its work? Tool calls per episode over training, with the bonus (μ > 0) and without, from
one cold-started model.

    spearrl sft --env math sft.noise=0.65 --output models/guesser run.threads=1      # a model that mostly guesses
    python -m benchmarks.tools --model models/guesser --output runs/tools [section.key=value …]

Trains both arms on every seed, prints a table and writes docs/tool-calls.svg. A run that is there already is not run
again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arms import mean, of_every_seed, parser_of, trained

ARMS = {"with the bonus": [], "without (μ = 0)": ["algo.intrinsic.mu.kind=constant", "algo.intrinsic.mu.peak=0"]}
COLORS = ("#b3541e", "#2b5f8a")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 320, 48, 36
SHOWN = ("rollout/tool_calls", "rollout/success")


def main() -> None:
    parser = parser_of(__doc__, steps=40, output="runs/tools")
    parser.add_argument("--picture", default="docs/tool-calls.svg")
    args = parser.parse_args()
    curves = of_every_seed(args, ARMS, run)
    print(table(curves, args.seeds, args.steps))
    calls = {arm: [curves[arm, seed]["rollout/tool_calls"] for seed in args.seeds] for arm in ARMS}
    Path(args.picture).write_text(picture(calls, "tool calls per episode"))


def run(args: argparse.Namespace, arm: str, seed: int) -> dict[str, list[float]]:
    """Each shown metric by step, and the evaluations' success rates under "eval"."""
    name = f"{'none' if ARMS[arm] else 'bonus'}-s{seed}"
    events = trained(args, name, seed, "--preset", "tiny-math", "--algo", "grpo+spear", *ARMS[arm])
    curves = {key: [event[key] for event in events if event["event"] == "step"] for key in SHOWN}
    return {**curves, "eval": [event["success"] for event in events if event["event"] == "eval"]}


def table(curves: dict[tuple[str, int], dict[str, list[float]]], seeds: Sequence[int], steps: int) -> str:
    """Means over quarters of the training, per run and per arm."""
    quarters = [(steps * i // 4, steps * (i + 1) // 4) for i in range(4)]
    lines = [
        "| | seed | "
        + " | ".join(f"calls, steps {a + 1}–{b}" for a, b in quarters)
        + " | success before | success after |",
        "|" + "---|" * 8,
    ]
    for arm in ARMS:
        rows = []
        for seed in seeds:
            curve = curves[arm, seed]
            rows.append(
                [
                    *(mean(curve["rollout/tool_calls"][a:b]) for a, b in quarters),
                    100 * curve["eval"][0],
                    100 * curve["eval"][-1],
                ]
            )
            lines.append(f"| {arm} | {seed} | {_cells(rows[-1])} |")
        lines.append(f"| **{arm}** | mean | {_cells([mean(column) for column in zip(*rows, strict=True)])} |")
    return "\n".join(lines)


def picture(curves: dict[str, list[list[float]]], label: str) -> str:
    """An SVG: thin lines are seeds, thick ones their mean."""
    steps = max(len(line) for lines in curves.values() for line in lines)
    top = max(value for lines in curves.values() for line in lines for value in line) * 1.05

    def points(line: Sequence[float]) -> str:
        spot = [
            (LEFT + i * (WIDTH - LEFT - 12) / max(1, steps - 1), (HEIGHT - BOTTOM) * (1 - v / top) + 8)
            for i, v in enumerate(line)
        ]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in spot)

    style = "font-family:sans-serif;font-size:12px;fill:#444"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 12}" style="{style}">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for i in range(5):
        y = (HEIGHT - BOTTOM) * (1 - i / 4) + 8
        parts.append(
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - 12}" stroke="#ddd"/><text x="{LEFT - 6}" y="{y + 4:.1f}" '
            f'text-anchor="end">{top * i / 4:.2f}</text>'
        )
    for (arm, lines), color in zip(curves.items(), COLORS, strict=True):
        parts += [
            f'<polyline points="{points(line)}" fill="none" stroke="{color}" stroke-opacity="0.3"/>' for line in lines
        ]
        means = [mean(values) for values in zip(*lines, strict=False)]
        parts.append(f'<polyline points="{points(means)}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        parts.append(
            f'<text x="{LEFT + 12 + 150 * COLORS.index(color)}" y="{HEIGHT + 4}" style="fill:{color}">{arm}</text>'
        )
    parts.append(
        f'<text x="{WIDTH - 12}" y="{HEIGHT + 4}" text-anchor="end">{label}, training steps 1–{steps}</text></svg>'
    )
    return "\n".join(parts) + "\n"


def _cells(values: Sequence[float]) -> str:
    return " | ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    main()
