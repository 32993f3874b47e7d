"""The parts without a model: advantages of 16,384 turns, and the replay buffer at 1,000 to 100,000 rows.

    OMP_NUM_THREADS=1 python -m benchmarks.pure [--rows 1000 10000 100000] [--json FILE]

Advantages are of 64 groups of 8 episodes of 32 turns, a quarter of the states shared. Rows have 24 prompt and 8 reply
tokens, a turn each, four of them a trajectory. Milliseconds of processor time are the median of many calls
(advantages), or of three.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import machine
from spearrl.advantages import discounted_returns, gigpo_advantages, grpo_advantages
from spearrl.batching import Rows, TurnTable
from spearrl.buffers import BaselineBuffer, ReplayBuffer
from spearrl.run.checkpoint import load_state, save_state

TURNS, GROUPS, SIBLINGS = 16_384, 64, 8
BAR_MS = 5.0  # GiGPO, which is GRPO's part and that of the states, over TURNS


def median_ms(function: Callable[[], object], calls: int) -> float:
    times = []
    for _ in range(calls):
        start = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def advantages() -> dict[str, float]:
    """Milliseconds of each estimator over TURNS turns."""
    draw = torch.Generator().manual_seed(0)
    trajectory = torch.arange(TURNS) // (TURNS // (GROUPS * SIBLINGS))
    group = trajectory // SIBLINGS
    rewards = torch.randint(0, 2, (GROUPS * SIBLINGS,), generator=draw).double()[trajectory] * 10
    steps = torch.rand(TURNS, generator=draw, dtype=torch.float64)
    anchor = torch.randint(0, 2**62, (TURNS // 4,), generator=draw)[torch.randint(0, TURNS // 4, (TURNS,))]
    returns = discounted_returns(steps, trajectory, 0.95)
    work = {
        "discounted returns": lambda: discounted_returns(steps, trajectory, 0.95),
        "GRPO": lambda: grpo_advantages(rewards, group, trajectory_ids=trajectory),
        "GRPO, balanced": lambda: grpo_advantages(rewards, group, trajectory_ids=trajectory, statistics="balanced"),
        "GiGPO": lambda: gigpo_advantages(rewards, returns, group, anchor, trajectory_ids=trajectory),
        "GiGPO, balanced": lambda: gigpo_advantages(
            rewards, returns, group, anchor, trajectory_ids=trajectory, statistics="balanced"
        ),
    }
    for function in work.values():
        function()
    return {name: median_ms(function, 50) for name, function in work.items()}


def rows_of(count: int, first: int = 0) -> Rows:
    """`count` rows of 24 prompt and 8 reply tokens, four rows a trajectory; ids from `first` on."""
    width, prompt = 32, 24
    index = torch.arange(count)
    mask = (torch.arange(width) >= prompt).repeat(count)
    zero, none = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.float64)
    trajectory = (first + index) // 4
    return Rows(
        token_ids=torch.randint(0, 2048, (count * width,), generator=torch.Generator().manual_seed(first)),
        action_mask=mask,
        turn_index=torch.where(mask, index.repeat_interleave(width), -1),
        rollout_logprobs=torch.where(mask, -1.0, 0.0),
        policy_version=torch.where(mask, 0, -1),
        offsets=torch.arange(count + 1) * width,
        group=trajectory // SIBLINGS,
        trajectory=trajectory,
        uid=first + index,
        turns=TurnTable(trajectory // SIBLINGS, trajectory, index, none, none, zero, zero, row=index),
    )


def replay(count: int) -> dict[str, float]:
    """Milliseconds of storing `count` rows in ten steps, of asking, saving, loading and drawing half of them."""
    steps = [rows_of(count // 10, first=count // 10 * step) for step in range(10)]
    baseline = BaselineBuffer(1000)
    baseline.add(0, [0.5], [0.5])
    laps = [one_life(steps, count // 8, baseline) for _ in range(3)]
    return {name: statistics.median(lap[name] for lap in laps) for name in laps[0]}


def one_life(steps: list[Rows], capacity: int, baseline: BaselineBuffer) -> dict[str, float]:
    """A buffer from its first row to its draw."""
    buffer, other = ReplayBuffer(capacity, max_age=100), ReplayBuffer(capacity, max_age=100)
    laps, last = {}, time.process_time()

    def lap(name: str) -> None:
        nonlocal last
        laps[name], last = 1e3 * (time.process_time() - last), time.process_time()

    ones = [torch.ones(len(rows), dtype=torch.float64) for rows in steps]
    logprobs = [torch.zeros(len(rows), rows.width) for rows in steps]
    with tempfile.TemporaryDirectory() as folder:
        last = time.process_time()
        for step, rows in enumerate(steps):
            buffer.add(step, rows, ones[step], ones[step], logprobs[step])
        lap("add")
        ready = buffer.ready(baseline, len(steps))
        lap("ready")
        save_state(Path(folder), "state", buffer.state_dict())
        lap("save")
        other.load_state_dict(load_state(Path(folder), "state"))
        lap("load")
        stored = len(other)
        last = time.process_time()
        drawn = other.drain(len(steps), baseline, torch.Generator().manual_seed(0))
        lap("drain")
    if not ready or stored != 2 * capacity or drawn is None or len(drawn.rows) != 4 * capacity:
        raise SystemExit(f"{stored} units stored and {len(drawn.rows) if drawn else 0} rows drawn at {capacity=}")
    return laps


def exponent(sizes: list[int], times: list[float]) -> float:
    """Slope of log time over log size between the two largest sizes: 1 is linear."""
    return math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    python, milliseconds = machine.python_ms(), advantages()
    print(f"{TURNS} turns, {torch.get_num_threads()} threads, milliseconds; a fixed piece of Python takes {python:.1f}")
    for name, value in milliseconds.items():
        print(f"  {name:<20} {value:7.2f}")
    print(f"  {'GRPO, then GiGPO':<20} {milliseconds['GRPO'] + milliseconds['GiGPO']:7.2f}")
    met = "met" if milliseconds["GiGPO"] < BAR_MS else "not met"
    print(f"  GiGPO, which is GRPO's part and that of the states: below {BAR_MS:.0f} ms: {met}")
    buffers = {count: replay(count) for count in options.rows}
    print("replay buffer, milliseconds" + "".join(f"{count:>12} rows" for count in buffers) + "   exponent")
    exponents = {}
    for name in next(iter(buffers.values())):
        times = [buffer[name] for buffer in buffers.values()]
        if len(times) > 1:
            exponents[name] = exponent(options.rows, times)
        grown = f"{exponents[name]:.2f}" if exponents else ""
        print(f"  {name:<25}" + "".join(f"{value:17.1f}" for value in times) + f"   {grown}")
    largest = buffers[options.rows[-1]]
    ratios = {
        "fixed piece of Python / GiGPO, 16,384 turns": python / milliseconds["GiGPO"],
        f"fixed piece of Python / replay, {options.rows[-1]} rows": python / (largest["add"] + largest["drain"]),
    }
    figures = {"advantages_ms": milliseconds, "replay_ms": buffers, "exponents": exponents, "python_ms": python}
    machine.write(options.json, ratios=ratios, figures=figures)


if __name__ == "__main__":
    main()
