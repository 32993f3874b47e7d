"""Where the time of an agent's step goes: WebShop and ALFWorld, one growing chat or a windowed prompt a turn.

    python -m benchmarks.agent_step [--only webshop-chat ...] [--steps 4] [--sft 400] [--json FILE]

The presets tiny and tiny-alfworld after a short cold start; the first step warms up. Shares of a step's wall time:
the engine's passes, the environments, what else the rollout does, preparing (rows, shaping, log-probabilities before
the update, advantages), the update, publishing. `fill`: tokens of the engine's decoding passes over those that as many
sequences as there are slots, or episodes that go on, would have had. `computed`: tokens that the engine computed over
the different ones of prompts and replies, where 1 means that none was computed twice.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from spearrl.config import load_config
from spearrl.trainer import Trainer
from spearrl.types import Group

RUNS = {
    f"{name}-{style}": {"preset": preset, "settings": [f"env.style={style}"]}
    for name, preset in (("webshop", "tiny"), ("alfworld", "tiny-alfworld"))
    for style in ("chat", "windowed")
}
PARTS = ("engine", "env", "rollout's rest", "prepare", "update", "sync", "rest")


@dataclass
class Fill:
    """Counts the engine's decoding passes, each of which gives a sequence one token.

    Args:
        slots: sequences the engine takes at a time. playing: episodes that go on.
    """

    slots: int
    playing: Any
    tokens: int = 0
    room: int = 0
    _begun: set[tuple[int, ...]] = field(default_factory=set)
    _pass: set[tuple[int, ...]] = field(default_factory=set)

    def on_token(self, request: Any, token: int) -> None:
        if request.id not in self._begun:  # the first one comes with the prompt's pass
            self._begun.add(request.id)
            self.end_pass()
            return
        if request.id in self._pass:
            self.end_pass()
        if not self._pass:
            self._possible = min(self.slots, self.playing())
        self._pass.add(request.id)

    def end_pass(self) -> None:
        if self._pass:
            self.tokens += len(self._pass)
            self.room += max(len(self._pass), self._possible)
            self._pass = set()

    @property
    def share(self) -> float:
        return self.tokens / max(1, self.room)


def different_tokens(groups: list[Group]) -> int:
    """Nodes of the prefix tree over all prompts and replies; a reply's last token is never an engine's input."""
    known: dict[int, set[int]] = {}
    nodes = 0
    for group in groups:
        for trajectory in group.trajectories:
            for turn in trajectory.turns:
                key = 0
                for token in (*turn.prompt_ids, *turn.token_ids[:-1]):
                    following = known.setdefault(key, set())
                    key = hash((key, token))
                    nodes += key not in following
                    following.add(key)
    return nodes


def measure(name: str, steps: int, sft: int) -> dict[str, float]:
    """Medians over the steps after the first."""
    run = RUNS[name]
    settings = [*run["settings"], "run.tensorboard=false", "run.trajectories_every=0", "eval.every=0"]
    settings += [f"sft.episodes={sft}", "sft.epochs=1", "run.checkpoint_every=0"]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, [*settings, f"run.output_dir={folder}"], preset=run["preset"])
        with Trainer(config) as trainer:
            measured = [one_step(trainer, step) for step in range(1, steps + 2)]
    return {key: statistics.median(step[key] for step in measured[1:]) for key in measured[0]}


def one_step(trainer: Trainer, step: int) -> dict[str, float]:
    collector, engine, rollout = trainer.parts.players.collector, trainer.parts.players.engine, trainer.config.rollout
    ended, before = collector.counts()[0], dict(engine.counters)
    total = rollout.groups_per_step * rollout.group_size
    fill = Fill(rollout.slots, lambda: total - (collector.counts()[0] - ended))
    engine.on_token, played = fill.on_token, []
    play = Trainer.play

    def kept(number: int) -> Any:
        groups, metrics = play(trainer, number)
        played.extend(groups)
        return groups, metrics

    trainer.play, trainer.step = kept, step
    metrics = trainer.train_step(step)
    engine.on_token = None
    fill.end_pass()
    seconds = {name: metrics[f"time/{name}"] for name in ("engine", "env", "prepare", "update", "sync")}
    seconds["rollout's rest"] = metrics["time/rollout"] - seconds["engine"] - seconds["env"]
    seconds["rest"] = metrics["time/step"] - sum(metrics[f"time/{n}"] for n in ("rollout", "prepare", "update", "sync"))
    computed = sum(engine.counters[n] - before[n] for n in ("prefilled_tokens", "sampled_tokens"))
    turns = sum(len(t.turns) for group in played for t in group.trajectories)
    return {
        **{part: seconds[part] / metrics["time/step"] for part in PARTS},
        "step_s": metrics["time/step"],
        "fill": fill.share,
        "computed": (computed - turns) / different_tokens(played),  # a reply's last token is drawn, not computed
        "turns": metrics["rollout/turns"],
        "tokens": metrics["rollout/tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[*RUNS])
    parser.add_argument("--steps", type=int, default=4, help="after the warm-up")
    parser.add_argument("--sft", type=int, default=400, help="expert episodes of the cold start")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print("| run | step s | " + " | ".join(PARTS) + " | env + rollout's rest | fill | computed | turns | tokens |")
    print("|---" * (len(PARTS) + 7) + "|")
    results = {}
    for name in options.only:
        r = results[name] = measure(name, options.steps, options.sft)
        ours = r["env"] + r["rollout's rest"] + r["rest"]
        cells = [f"{r['step_s']:.2f}", *(f"{100 * r[part]:.1f} %" for part in PARTS), f"{100 * ours:.1f} %"]
        cells += [f"{100 * r['fill']:.0f} %", f"{r['computed']:.2f}", f"{r['turns']:.1f}", f"{r['tokens']:.0f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    ratios = {f"{name}: engine's batch, share of what there was": r["fill"] for name, r in results.items()}
    ratios |= {f"{name}: different tokens / computed ones": 1 / r["computed"] for name, r in results.items()}
    machine.write(options.json, ratios=ratios, figures=results)


if __name__ == "__main__":
    main()
