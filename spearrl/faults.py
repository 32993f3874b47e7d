"""Faults on purpose, so that tests meet them where they happen: SPEARRL_FAULT="point:action@n" strikes at passage n.

Several are separated by commas, passages are counted in each process, and "@n+" strikes at every one from n on. Without
the variable a point costs one look into an empty table.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from spearrl.errors import ConfigError

VARIABLE, STRUCK = "SPEARRL_FAULT", "fault on purpose:"
POINTS = {
    "ckpt.mid_file": "a file of a checkpoint is written, the next ones are not",
    "ckpt.before_rename": "a checkpoint is complete under its temporary name",
    "ckpt.after_rename": "a checkpoint has its name, older ones are not removed yet",
    "log.write": "a line of events.jsonl is about to be written",
    "env.reset": "an environment is about to be reset",
    "env.step": "an environment is about to be stepped; nan: its reward",
    "engine.generate": "a reply is about to be sampled; nan: its log-probabilities",
    "sync.publish": "weights are about to be brought to what samples",
    "learner.backward": "a backward pass is about to be made; nan: its loss",
    "rank.step": "a learner rank that was started here is about to make an optimiser step",
}
ACTIONS = ("kill9", "raise", "hang", "nan", "enospc")
SPOILT = ("env.step", "engine.generate", "learner.backward")  # points with a value for "nan" to spoil


@dataclass
class Fault:
    """`action` at passage `number`, or at all from there on; `passed`: passages so far."""

    action: str
    number: int = 1
    on: bool = False
    passed: int = 0


def parse(text: str) -> dict[str, list[Fault]]:
    """The faults of each point. Raises ConfigError for a point or an action that there is not."""
    plan: dict[str, list[Fault]] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        point, _, rest = entry.partition(":")
        action, at, number = rest.partition("@")
        on, number = number.endswith("+"), number.removesuffix("+")
        problem = hint = ""
        if point not in POINTS:
            problem, hint = f"no point {point!r}", f"use one of {', '.join(POINTS)}"
        elif action not in ACTIONS or (action == "nan" and point not in SPOILT):
            usable = [name for name in ACTIONS if name != "nan" or point in SPOILT]
            problem, hint = f"no action {action!r} at {point}", f"use one of {', '.join(usable)}"
        elif at and not (number.isdecimal() and int(number)):
            problem, hint = f"passage {number!r}", "use a number from 1 on, as in learner.backward:nan@3"
        if problem:
            raise ConfigError(f"{problem} in {entry!r}", where=VARIABLE, hint=hint)
        plan.setdefault(point, []).append(Fault(action, int(number or 1), on))
    return plan


@cache
def planned() -> Mapping[str, list[Fault]]:
    """What the environment variable asks for. Raises ConfigError as `parse`."""
    return parse(os.environ.get(VARIABLE, ""))


_LOCK = threading.Lock()


def strike(point: str, error: type[Exception] = RuntimeError) -> bool:
    """A passage of a point; whether the value there is to be spoilt (action "nan").

    Args:
        error: what action "raise" raises there.
    """
    faults = planned().get(point)
    if faults is None:
        return False
    with _LOCK:
        for fault in faults:
            fault.passed += 1
        due = [f.action for f in faults if f.passed == f.number or (f.on and f.passed > f.number)]
    for action in due:
        print(f"{STRUCK} {point}:{action}", file=sys.stderr, flush=True)
        if action == "kill9":
            os.kill(os.getpid(), signal.SIGKILL)
        while action in ("kill9", "hang"):
            time.sleep(3600)
        if action == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{VARIABLE} at {point}")
        if action == "raise":
            raise error(f"{VARIABLE} at {point}")
    return "nan" in due
