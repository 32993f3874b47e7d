"""Compare algorithms from one cold-started model: arms x seeds, two runs at a time, one torch thread each.

    python -m benchmarks.compare --model models/shop --steps 60 --seeds 1 2 3 --output runs/compare [key=value …]
    python -m benchmarks.compare eval.every=4 learner.precision=fp32 --model models/shop --steps 12 \\
        --output runs/engines --arms local+local vllm+deepspeed

Prints the evaluation curve of every run, the mean per arm, the optimiser steps each arm took and the wall time. The
third arm gives GRPO more on-policy mini-batches, so that it takes at least as many optimiser steps as self-imitation
does with its replay steps.
"""

from __future__ import annotations

import argparse
import time

from benchmarks.arms import mean, of_every_seed, parser_of, trained

ARMS = {
    "grpo": ("grpo", []),
    "grpo+spear": ("grpo+spear", []),
    "grpo, 3 mini-batches": ("grpo", ["learner.mini_batches=3"]),
}
# The same algorithm on other engines (make engines): they sample other tokens, so the curves agree in distribution, not
# number by number.
ENGINES = {
    "local+local": ("grpo+spear", []),
    "vllm+deepspeed": (
        "grpo+spear",
        ["rollout.engine=vllm", "learner.backend=deepspeed", "learner.zero_stage=3", "learner.processes=2"],
    ),
}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # Student's t by number of seeds


def main() -> None:
    parser = parser_of(__doc__, steps=60, output="runs/compare")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *ENGINES], default=list(ARMS))
    args = parser.parse_args()
    start = time.monotonic()
    results = of_every_seed(args, args.arms, _run)
    _print(args, results, time.monotonic() - start)


def _run(args: argparse.Namespace, arm: str, seed: int) -> dict:
    algo, changes = (ARMS | ENGINES)[arm]
    name = f"{arm.replace(',', '').replace(' ', '-').replace('+', '-')}-s{seed}"
    events = trained(args, name, seed, "--preset", "tiny", "--algo", algo, *changes)
    steps = [e for e in events if e["event"] == "step"]
    return {
        "curve": {e["step"]: e["success"] for e in events if e["event"] == "eval"},
        "score": {e["step"]: e.get("task_score", 0.0) for e in events if e["event"] == "eval"},
        "optimiser_steps": sum(e.get("policy/updates", 0) for e in steps),
        "train_success": mean([e["rollout/success"] for e in steps[-10:]]),
        "seconds": sum(e["time/step"] for e in steps),
    }


def _print(args: argparse.Namespace, results: dict, seconds: float) -> None:
    points = sorted(next(iter(results.values()))["curve"])
    print(
        "| arm | seed | "
        + " | ".join(f"step {p}" for p in points)
        + " | optimiser steps | train, last 10 steps | seconds |"
    )
    print("|" + "---|" * (len(points) + 5))
    for (arm, seed), r in results.items():
        cells = " | ".join(f"{100 * r['curve'][p]:.1f}" for p in points)
        print(
            f"| {arm} | {seed} | {cells} | {r['optimiser_steps']:.0f} | {100 * r['train_success']:.1f} | "
            f"{r['seconds']:.0f} |"
        )
    for arm in args.arms:
        rows = [r for (name, _), r in results.items() if name == arm]
        cells = " | ".join(f"{100 * mean([r['curve'][p] for r in rows]):.1f}" for p in points)
        steps, train = mean([r["optimiser_steps"] for r in rows]), 100 * mean([r["train_success"] for r in rows])
        print(f"| **{arm}** | mean | {cells} | {steps:.0f} | {train:.1f} | {mean([r['seconds'] for r in rows]):.0f} |")
        curves = [mean([r["curve"][p] for p in points]) for r in rows]
        print(
            f"| {arm} | mean of curve | {100 * mean(curves):.1f} {_interval(curves)} (per seed "
            f"{', '.join(f'{100 * c:.1f}' for c in curves)}) |"
        )
    print(f"\n{len(results)} runs, {args.jobs} at a time, {seconds:.0f} s in all")


def _interval(values: list[float]) -> str:
    """± half the 95 % interval of the mean over seeds, in per cent; "" where there are too few or unusually many."""
    if len(values) not in T_95:
        return ""
    deviation = (sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"± {100 * T_95[len(values)] * deviation / len(values) ** 0.5:.1f}"


if __name__ == "__main__":
    main()
