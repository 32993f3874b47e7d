"""One training step of spearrl and of TRL on the same work, a process a side, their steps in turns.

    python -m benchmarks.step [--sides spearrl trl ...] [--steps 2] [--threads 2] [--json FILE]

The work is a Qwen2 model of 3.7 M parameters with random weights, 16 prompts of 256 tokens, 8 completions of 32 tokens
each, the same reward, one optimiser step. `make bench-peers` builds TRL's environment; without it TRL's sides are left
out, which is said. The first step of each side warms up; medians of the others are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.step_work import PHASES, Work, write_model

PEERS = Path(os.environ.get("PEERS", machine.ROOT / ".venv-peers")) / "bin" / "python"


@dataclass(frozen=True)
class Side:
    """Who makes the step, and with which settings."""

    module: str
    about: str
    settings: Any


def passes_of(rows: int, **settings: Any) -> dict[str, Any]:
    """TRL's settings for passes of so many rows."""
    parts = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": Work().rows // rows}
    return {**parts, **settings}


KEPT = {"gradient_checkpointing": False}  # activations are kept: faster, more memory
SIDES = {
    "spearrl": Side("spearrl", "fp32", ["learner.precision=fp32", "rollout.dtype=fp32"]),
    "spearrl-best": Side("spearrl", "types chosen by itself", []),
    "trl": Side("trl", "fp32, its defaults: passes of 8 rows, gradient checkpointing", passes_of(8, bf16=False)),
    "trl-whole": Side("trl", "fp32, one pass of 128 rows, activations kept", passes_of(128, bf16=False, **KEPT)),
    "trl-small": Side("trl", "fp32, passes of 8 rows, activations kept", passes_of(8, bf16=False, **KEPT)),
    "trl-best": Side("trl", "bf16 autocast, passes of 64 rows, activations kept", passes_of(64, **KEPT)),
    "trl-bf16": Side(
        "trl",
        "weights in bf16 too, in which small steps are lost",
        passes_of(64, **KEPT, model_init_kwargs={"dtype": "bfloat16"}),
    ),
    "trl-batching": Side(
        "trl",
        "trl-best with transformers' continuous batching",
        passes_of(64, **KEPT, use_transformers_continuous_batching=True),
    ),
}
DEFAULT = ("spearrl", "trl", "trl-whole", "trl-small", "spearrl-best", "trl-best")
AGAINST = {"spearrl": ("trl", "trl-whole", "trl-small"), "spearrl-best": ("trl-best", "trl-bf16", "trl-batching")}


@dataclass
class Player:
    """A side's process."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)

    def hear(self) -> None:
        """Wait for its next report."""
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{self.name} ended with code {self.process.wait()}:\n{tail}")
        report = json.loads(line)
        self.memory = {key: report[key] for key in ("peak_mib", "after_imports_mib")}
        if report["step"] is not None:
            self.steps.append(report["step"])

    def play(self) -> None:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.hear()

    def summary(self) -> dict[str, Any]:
        """Medians over the steps after the first; counts of the last; peak memory of the process."""
        counted, last = self.steps[1:], self.steps[-1]
        times = {
            kind: {name: statistics.median(step[kind][name] for step in counted) for name in last[kind]}
            for kind in ("seconds", "cpu")
        }
        rest = {key: value for key, value in last.items() if key not in times}
        above = self.memory["peak_mib"] - self.memory["after_imports_mib"]
        return {**times, **rest, **self.memory, "above_imports_mib": above}


def start(name: str, model: Path, work: Work, threads: int) -> Player:
    side = SIDES[name]
    python = PEERS if side.module == "trl" else Path(sys.executable)
    command = [str(python), "-m", f"benchmarks.step_{side.module}", f"--model={model}"]
    command += [f"--work={json.dumps(work.__dict__)}", f"--settings={json.dumps(side.settings)}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(machine.ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    log = model.parent / f"{name}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=machine.ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    return Player(name, process, log)


def measure(names: list[str], work: Work, *, steps: int, threads: int) -> dict[str, dict[str, Any]]:
    """Play `steps` steps of every side after a warm-up, in turns; returns each side's summary.

    Raises SystemExit: a side ended, or did other work than the rest.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, work)
        players = []
        try:
            for name in names:
                players.append(start(name, model, work, threads))
                players[-1].hear()
            for number in range(steps + 1):
                for player in players:
                    player.play()
                    took = player.steps[-1]["seconds"]["step"]
                    print(f"step {number} of {player.name}: {took:.2f} s", file=sys.stderr, flush=True)
        finally:
            for player in players:
                player.process.stdin.close()
                player.process.kill()
                player.process.wait()
                player.process.stdout.close()
        for player in players:
            check_same(player, players[0], work)
        return {player.name: player.summary() for player in players}


def check_same(player: Player, first: Player, work: Work) -> None:
    """Refuse to compare sides that did not do the same work."""
    unique = work.prompts * work.prompt_tokens
    expected = {
        "prompts": first.steps[0]["prompts"],
        "prompt_tokens": work.completions * unique,
        "unique_prompt_tokens": unique,
        "completion_tokens": work.rows * work.completion_tokens,
        "updates": 1,
    }
    for step in player.steps:
        for key, value in expected.items():
            if step[key] != value:
                raise SystemExit(f"{player.name}: {key} is {step[key]}, not {value}")
        # A row whose reward is its group's mean has no advantage: a few of them may be.
        if not 0.75 * expected["completion_tokens"] < step["trained"] <= expected["completion_tokens"]:
            raise SystemExit(f"{player.name}: {step['trained']} tokens were trained on")
        for key in ("grad_norm", "entropy"):
            if not 0.5 < step[key] / first.steps[0][key] < 2:
                raise SystemExit(f"{player.name}: {key} is {step[key]}, where {first.name} has {first.steps[0][key]}")


def ratios_of(sides: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times longer TRL takes, and how many times its memory, at fp32 and with both at their best."""
    ratios = {}
    for own, others in AGAINST.items():
        for other in others:
            if own in sides and other in sides:
                ours, theirs = sides[own], sides[other]
                ratios[f"{other} / {own}: step"] = theirs["seconds"]["step"] / ours["seconds"]["step"]
                ratios[f"{other} / {own}: processor time"] = theirs["cpu"]["step"] / ours["cpu"]["step"]
                ratios[f"{other} / {own}: peak memory"] = theirs["peak_mib"] / ours["peak_mib"]
    return ratios


def table(sides: dict[str, dict[str, Any]], ratios: dict[str, float]) -> str:
    lines = ["| side | step s | cpu s | rollout s | old s | update s | learner tokens | peak MiB | above imports |"]
    lines.append("|---" * 9 + "|")
    for name, side in sides.items():
        seconds, computed = side["seconds"], side["computed"]
        cells = [f"{seconds['step']:.2f}", f"{side['cpu']['step']:.2f}"]
        cells += [f"{seconds[phase]:.2f}" for phase in PHASES]
        cells += [str(computed["old"] + computed["update"]), f"{side['peak_mib']:.0f}"]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{side['above_imports_mib']:.0f}"]) + " |")
    lines += [f"{name}: {SIDES[name].about}" for name in sides]
    first = next(iter(sides.values()))
    lines.append(
        f"every side: {first['prompt_tokens']} prompt tokens, {first['unique_prompt_tokens']} different; "
        f"{first['completion_tokens']} sampled; one optimiser step; entropy and gradient norm "
        + ", ".join(f"{name} {side['entropy']:.3f} {side['grad_norm']:.4f}" for name, side in sides.items())
    )
    return "\n".join(lines + [f"{name}: {value:.2f}" for name, value in ratios.items()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*DEFAULT])
    parser.add_argument("--steps", type=int, default=2, help="after the warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names, missing = options.sides, []
    if not PEERS.exists():
        names, missing = [n for n in names if SIDES[n].module != "trl"], ["TRL: no .venv-peers; make bench-peers"]
    sides = measure(names, Work(), steps=options.steps, threads=options.threads)
    ratios = ratios_of(sides)
    print(table(sides, ratios))
    print("".join(f"left out: {text}\n" for text in missing), end="")
    memory = {f"peak of {name}": side["peak_mib"] for name, side in sides.items()}
    machine.write(options.json, ratios=ratios, memory_mib=memory, figures=sides, missing=missing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
