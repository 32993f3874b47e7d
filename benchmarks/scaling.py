"""How cost grows with the work, on this machine: each curve and the exponent of its growth.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling [--only context-padded ...] [--json FILE]

Curves: `context` (an update over one row of so many tokens), `group` (over siblings that share a prompt), `turns` (over
growing chats, a row a turn), the last two with both ways of packing; `replay` (rows stored, saved, loaded and drawn);
`environments` (slots stepped in one process). Seconds are of the processor, the best of three; the exponent is the
slope of log seconds over log work between the two largest sizes: 1 is linear. Models are tiny: what is looked for is
the shape.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.packing import rows_of
from benchmarks.pure import replay
from spearrl.batching import Batch, Rows
from spearrl.config.sections import LearnerSection
from spearrl.envs import make
from spearrl.learner import LocalLearner
from spearrl.losses import Objective
from spearrl.types import Reply

VOCABULARY = 512
LONG_S = 8.0  # seconds after which a measurement is not repeated


@dataclass(frozen=True)
class Curve:
    """Args: work: at a size, in `unit`, by which time is divided. measure: seconds (UPDATES: rows) at a size."""

    sizes: tuple[int, ...]
    unit: str
    work: Callable[[int], int]
    measure: Callable[[int], Any]


def text(length: int, draw: torch.Generator) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=draw).tolist()


def context_rows(size: int) -> Rows:
    """One row whose last 32 tokens are sampled."""
    return rows_of([(text(size, torch.Generator().manual_seed(0)), 32)])


def group_rows(size: int) -> Rows:
    """Four prompts of 256 tokens, `size` replies of 32 each."""
    draw = torch.Generator().manual_seed(0)
    prompts = [text(256, draw) for _ in range(4)]
    return rows_of([(prompt + text(32, draw), 32) for prompt in prompts for _ in range(size)])


def turn_rows(size: int) -> Rows:
    """Four chats of `size` turns of 24 tokens with 40 of observation between them: a row a turn, with all before it."""
    draw, rows = torch.Generator().manual_seed(0), []
    for _ in range(4):
        chat = text(64, draw)
        for _ in range(size):
            chat = chat + text(24, draw)
            rows.append((chat, 24))
            chat = chat + text(40, draw)
    return rows_of(rows)


def update_seconds(rows: Rows, packing: str) -> float:
    """One optimiser step."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(**shape, intermediate_size=172, vocab_size=VOCABULARY, tie_word_embeddings=True)
    settings = LearnerSection(
        mini_batches=1, precision="fp32", packing=packing, micro_batch_tokens=max(16_384, rows.width)
    )
    learner = LocalLearner(Qwen2ForCausalLM(config), settings)
    batch = Batch(rows, rows.pad(torch.ones(len(rows.token_ids))), rows.pad(rows.rollout_logprobs))

    def step() -> None:
        learner.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=0)

    return best_of_three(step)


def environment_seconds(slots: int) -> float:
    """Eight commands of the expert in every one of `slots` WebShop slots in turn; resets are not counted."""
    shop = make("webshop", observation="compact", reply="plain")
    tasks, seconds = shop.tasks("train"), 0.0
    places = [shop.spawn() for _ in range(slots)]
    for number, place in enumerate(places):
        place.reset(tasks[number % len(tasks)], number)
    for _ in range(8):
        for place in places:
            action = place.parse(Reply(place.format(place.expert() or ""), (), "stop"))
            start = time.process_time()
            place.step(action)
            seconds += time.process_time() - start
    return seconds


def best_of_three(function: Callable[[], object]) -> float:
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < LONG_S:
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def replay_seconds(rows: int) -> float:
    """Storing, saving, loading and drawing."""
    return sum(replay(rows).values()) / 1e3


UPDATES = {
    "context": Curve((512, 2048, 8192, 32_768), "tokens", lambda n: n, context_rows),
    "group": Curve((2, 8, 32, 64), "rows", lambda n: 4 * n, group_rows),
    "turns": Curve((2, 8, 32, 64), "turns", lambda n: 4 * n, turn_rows),
}
CURVES = {
    f"{name}-{packing}": replace(curve, measure=lambda n, c=curve, p=packing: update_seconds(c.measure(n), p))
    for name, curve in UPDATES.items()
    for packing in (("padded",) if name == "context" else ("tree", "padded"))
} | {
    "replay": Curve((1_000, 10_000, 100_000), "rows", lambda n: n, replay_seconds),
    "environments": Curve((1, 64, 1024, 4096), "steps", lambda n: 8 * n, environment_seconds),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CURVES, default=[*CURVES])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = {}
    for name in options.only:
        curve = CURVES[name]
        seconds = {size: curve.measure(size) for size in curve.sizes}
        (small, fast), (large, slow) = list(seconds.items())[-2:]
        exponent = math.log(slow / fast) / math.log(large / small)
        figures[name] = {"seconds": seconds, "exponent": exponent}
        points = "  ".join(
            f"{size}: {value:.3f} s ({1e6 * value / curve.work(size):.0f} us)" for size, value in seconds.items()
        )
        print(f"{name:<15} exponent {exponent:.2f}   {points} a {curve.unit[:-1]}", flush=True)
    machine.write(options.json, ratios={}, figures=figures)


if __name__ == "__main__":
    main()
