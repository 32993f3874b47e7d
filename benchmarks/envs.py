"""Times of the built-in environments: a step and a reset with 1 to 4096 slots in one process; ALFWorld's own engine.

python benchmarks/envs.py [--slots 1 64 1024 4096] [--steps 20000] [--original 5] [--expert]

ALFWorld's own engine is measured where the packages alfworld and textworld are installed (extra `alfworld`) and real
games are at hand, on the same games and commands. `--expert` lets the scripted expert play every real game and compares
its plans with the recorded ones of the original planner.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import platform
import resource
import statistics
import time
from collections import Counter
from pathlib import Path

from spearrl.envs import Environment, make
from spearrl.types import Action, Reply, Task

SHARED = Path(os.environ.get("SPEARRL_SHARED", Path(__file__).resolve().parents[1] / ".." / "shared")) / "data"
WEBSHOP_ORIGINAL_MS = 25.0  # a step of the original's Flask, Jinja and BeautifulSoup
SPLITS = ("train", "valid_seen", "valid_unseen")


def summary(seconds: list[float]) -> str:
    """Median and 99th percentile in microseconds."""
    return f"{1e6 * statistics.median(seconds):8.1f} {1e6 * statistics.quantiles(seconds, n=100)[98]:8.1f}"


def slots_line(name: str, environment: Environment, count: int, steps: int) -> None:
    """Step `count` slots in turn with the noisy expert's commands, and print one line.

    Only reset() and step() are timed.
    """
    tasks = environment.tasks("train")
    slots = [environment.spawn() for _ in range(count)]
    resets, times, turns, episodes = [], [], [0] * count, 0

    def start(index: int) -> None:
        nonlocal episodes
        task = tasks[episodes % min(len(tasks), 512)]
        begun = time.perf_counter()
        slots[index].reset(task, episodes)
        resets.append(time.perf_counter() - begun)
        episodes, turns[index] = episodes + 1, 0

    for index in range(count):
        slots[index].expert_noise = 0.3
        start(index)
    resets.clear()  # the first ones compile games and fill caches
    for number in range(max(steps, 4 * count)):
        index = number % count
        slot = slots[index]
        action = slot.parse(Reply(slot.format(slot.expert() or ""), (), "stop"))
        begun = time.perf_counter()
        outcome = slot.step(action)
        times.append(time.perf_counter() - begun)
        turns[index] += 1
        if outcome.terminated or turns[index] >= environment.max_turns:
            start(index)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{name:26} {count:6d} {summary(times)} {summary(resets)} {1 / statistics.fmean(times):10.0f} {memory:8.0f}")


def beside_original(data: str, games: int) -> None:
    """The same games and commands in both engines."""
    native, original = make("alfworld", data=data), make("alfworld", data=data, backend="textworld")
    tasks = native.tasks("valid_unseen")
    times: dict[str, dict[str, list[float]]] = {name: {"reset": [], "step": []} for name in ("native", "original")}
    native.expert_noise = 0.3

    def timed(name: str, kind: str, environment: Environment, argument: Task | Action) -> object:
        begun = time.perf_counter()
        result = environment.reset(argument, 0) if isinstance(argument, Task) else environment.step(argument)
        times[name][kind].append(time.perf_counter() - begun)
        return result

    for task in tasks[:: max(1, len(tasks) // games)][:games]:
        same = timed("native", "reset", native, task) == timed("original", "reset", original, task)
        for _ in range(native.max_turns):
            command = native.expert()
            if command is None:
                break
            action = Action(command)
            same &= timed("native", "step", native, action) == timed("original", "step", original, action)
        if not same:
            print(f"DIFFERENT TEXTS: {task.id}")
    original.close()
    print(f"\nALFWorld, {games} games of valid_unseen, median milliseconds: native (with compilation), original, ratio")
    for kind in ("reset", "step"):
        fast, slow = (1e3 * statistics.median(times[name][kind]) for name in ("native", "original"))
        print(f"{kind:6} {fast:10.4f} {slow:10.1f} {slow / fast:10.0f}x")


def expert_lengths(data: str) -> None:
    """Every real game once: solved or not, steps, and the difference from the original planner's plans."""
    with gzip.open(Path(data) / "golden_transcripts.jsonl.gz", "rt", encoding="utf-8") as lines:
        plans = {record["id"]: len(record["expert_plan"]) for record in map(json.loads, lines)}
    environment = make("alfworld", data=data)
    difference: Counter[int] = Counter()
    for split in SPLITS:
        lengths = []
        for task in environment.tasks(split):
            environment.reset(task, 0)
            steps, outcome = 0, None
            while steps < environment.max_turns and (outcome is None or not outcome.terminated):
                outcome, steps = environment.step(Action(environment.expert() or "")), steps + 1
            if outcome is not None and outcome.terminated:
                lengths.append(steps)
            if task.id in plans:
                difference[steps - plans[task.id]] += 1
        total = len(environment.tasks(split))
        print(
            f"{split:13} {len(lengths)} of {total} games solved, "
            f"steps: mean {statistics.fmean(lengths):.2f}, most {max(lengths)}"
        )
    print(
        f"steps more than the original planner on its {len(plans)} recorded games: {dict(sorted(difference.items()))}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 64, 1024, 4096])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument(
        "--alfworld",
        default=str(SHARED / "alfworld") if (SHARED / "alfworld").exists() else None,
        help="folder of real games; none: generated",
    )
    parser.add_argument(
        "--original", type=int, default=5, help="games played in the original engine, where it is installed; 0: none"
    )
    parser.add_argument("--expert", action="store_true", help="the expert on every real game")
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        "microseconds: median, 99th percentile"
    )
    print(f"{'':26}  slots     step      p99    reset      p99    steps/s   MiB max")
    for count in arguments.slots:
        if arguments.alfworld:
            slots_line("alfworld, real games", make("alfworld", data=arguments.alfworld), count, arguments.steps)
        slots_line("alfworld, generated", make("alfworld"), count, arguments.steps)
        slots_line("alfworld, compact", make("alfworld", observation="compact", reply="plain"), count, arguments.steps)
        slots_line("webshop, generated", make("webshop"), count, arguments.steps)
    print(f"(a step of the original WebShop: about {WEBSHOP_ORIGINAL_MS:.0f} ms)")
    if arguments.alfworld and arguments.original and importlib.util.find_spec("alfworld"):
        beside_original(arguments.alfworld, arguments.original)
    elif arguments.original:
        print("ALFWorld's own engine is not measured: it needs real games and the extra `alfworld`")
    if arguments.expert and arguments.alfworld:
        expert_lengths(arguments.alfworld)


if __name__ == "__main__":
    main()
