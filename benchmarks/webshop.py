"""Time of a WebShop step and reset: median and 99th percentile, beside the original simulator's 25 ms a step.

python -m benchmarks.webshop [--episodes 300] [--json FILE] [--data FOLDER]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

from benchmarks import machine
from spearrl.envs import make
from spearrl.types import Action, Reply

ORIGINAL_MS = 25.0  # the original's Flask, Jinja and BeautifulSoup, per step
SHARED = (
    Path(os.environ.get("SPEARRL_SHARED", Path(__file__).resolve().parents[1] / ".." / "shared")) / "data" / "webshop"
)


def play(data: str | None, observation: str, episodes: int) -> float:
    """Play the noisy expert and print one line; returns the mean of a step in milliseconds."""
    start = time.perf_counter()
    shop = make("webshop", data=data, observation=observation, reply="plain")
    tasks = shop.tasks("train")
    slot = shop.spawn()
    slot.reset(tasks[0], 0)
    slot.step(Action("search[anything]"))  # builds the index
    loading = 1e3 * (time.perf_counter() - start)
    slot.expert_noise = 0.3
    resets, steps, searches = [], [], []
    for number in range(-20, episodes):  # the first twenty warm the caches and are not counted
        start = time.perf_counter()
        slot.reset(tasks[number % len(tasks)], number + 20)
        resets.append(1e3 * (time.perf_counter() - start))
        for _ in range(slot.max_turns):
            action = slot.parse(Reply(slot.format(slot.expert() or ""), (), "stop"))
            start = time.perf_counter()
            outcome = slot.step(action)
            (searches if action.text.startswith("search") else steps).append(1e3 * (time.perf_counter() - start))
            if outcome.terminated:
                break
        if number < 0:
            resets, steps, searches = [], [], []
    every = steps + searches
    figures = "  ".join(
        f"{name} {summary(times)}"
        for name, times in (("step", every), ("search", searches), ("click", steps), ("reset", resets))
    )
    mean = statistics.fmean(every)
    name = "generated" if data is None else "data"
    print(
        f"{name:9} {observation:9} load {loading:5.0f}  {figures}  "
        f"mean step {mean:.3f} = original / {ORIGINAL_MS / mean:.0f}"
    )
    return mean


def summary(times: list[float]) -> str:
    """Median and 99th percentile in milliseconds."""
    return f"{statistics.median(times):.3f}/{statistics.quantiles(times, n=100)[98]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument(
        "--data",
        default=str(SHARED) if SHARED.exists() else None,
        help="folder of WebShop's data; none: only the generated catalogue",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; milliseconds, median/p99")
    steps = {}
    for data in (None, arguments.data) if arguments.data else (None,):
        for observation in ("text", "text_rich", "compact"):
            steps[f"{'generated' if data is None else 'data'} {observation}"] = play(
                data, observation, arguments.episodes
            )
    python = machine.python_ms()
    ratios = {f"fixed piece of Python / step, {name}": python / mean for name, mean in steps.items()}
    missing = [] if arguments.data else ["WebShop's own products: no --data"]
    machine.write(arguments.json, ratios=ratios, figures={"step_ms": steps, "python_ms": python}, missing=missing)


if __name__ == "__main__":
    main()
