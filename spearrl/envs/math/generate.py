"""Word problems from a seed that need the tool: numbers too large for the head, asked in varied words."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from functools import lru_cache

from spearrl.config.tables import table
from spearrl.seeds import derive
from spearrl.types import Task

_TABLE = table(__file__, "math.toml")
KINDS = _TABLE["kinds"]
THINGS, HOLDERS = (_TABLE["words"][name].split() for name in ("things", "holders"))
# What the code of each kind prints, computed without running text.
ANSWERS: dict[str, Callable[[dict[str, int]], int]] = {
    "product": lambda n: n["a"] * n["b"],
    "sum": lambda n: n["a"] * n["b"] + n["c"] * n["d"],
    "rest": lambda n: n["a"] * n["b"] - n["c"],
    "remainder": lambda n: n["a"] * n["b"] % n["m"],
    "power": lambda n: pow(n["a"], n["k"], n["m"]),
    "divisor": lambda n: math.gcd(n["a"] * n["k"], n["b"] * n["k"]),
    "multiples": lambda n: sum(range(n["k"], n["n"], n["k"])),
    "counting": lambda n: (n["a"] + n["n"] - 1) // n["m"] - (n["a"] - 1) // n["m"],
}
TEST_SHARE = 8  # one in so many sets of numbers is for val
LOOP = 9999  # a fifth of the longest loop that an answer takes
PATIENCE = 1000  # draws for a set that is new; small numbers run out of them, and one comes twice


@lru_cache(maxsize=8)
def generate_problems(seed: int, digits: int, split: str, count: int) -> tuple[Task, ...]:
    """`count` problems with numbers of `digits` digits, the kinds in turn. No set of numbers is in both splits."""
    draw, kinds, tasks, codes = random.Random(derive(seed, "math", split)), tuple(KINDS), [], set()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        for attempt in itertools.count():
            numbers = _numbers(draw, digits)
            code = KINDS[kind]["code"].format(**numbers)
            own = (derive("math-split", code) % TEST_SHARE == 0) == (split == "val")
            if own and (code not in codes or attempt > PATIENCE):
                break
        codes.add(code)
        words = {"x": draw.choice(THINGS), "y": draw.choice(HOLDERS)}
        text = draw.choice(KINDS[kind]["texts"]).format(**numbers, **words)
        data = {"problem": text, "answer": str(ANSWERS[kind](numbers)), "steps": (code,), "stratum": kind}
        tasks.append(Task(f"{split}/{kind}-{number}", split, data))
    return tuple(tasks)


def _numbers(draw: random.Random, digits: int) -> dict[str, int]:
    low, high = 10 ** (digits - 1), 10**digits - 1
    large = {name: draw.randint(low, high) for name in ("a", "b", "c", "d")}
    bound = min(high, LOOP)
    return {**large, "k": draw.randint(3, 9), "m": draw.randint(11, 99), "n": draw.randint(bound // 2, 5 * bound)}
