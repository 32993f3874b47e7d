"""An environment that hangs, dies or raises where its task's id says so.

Imports no torch, so that worker processes start quickly.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from spearrl.envs import Environment
from spearrl.envs.webshop import WebShop
from spearrl.errors import ContractError
from spearrl.types import Action, Message, Observation, Outcome, Task
from tests.support.gates import LIMIT_S, Gate
from tests.support.toy_envs import Fetch


class Rogue(Environment):
    """Three turns, reward 1 each. A task "hang-2" misbehaves at its second step.

    With "once" in its id a task misbehaves only the first time on this machine.
    """

    execution = "process"
    max_turns = 5

    class Options(Environment.Options):
        marks: str = Field("", description="Folder where a fault that happened is noted.")
        pause_s: float = Field(0.0, description="Seconds each step takes.")
        gate: str = Field(
            "",
            description="Folder of a tests.support.gates.Gate: steps note their process there, and wait while shut.",
        )

    options: Options

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(f"fine-{i}", split) for i in range(4)]

    def reset(self, task: Task, seed: int) -> Observation:
        self._task, self._turn, self._draw = task, 0, random.Random(seed)
        return Observation(f"show {task.id} {self._draw.randrange(100)}", anchor=("start", seed))

    def step(self, action: Action) -> Outcome:
        self._turn += 1
        if self.options.gate:
            Gate(self.options.gate).pass_through()
        time.sleep(self.options.pause_s * self._draw.random())
        if self._turn == 2:
            self._misbehave()
        return Outcome(
            Observation(f"turn {self._turn} {self._draw.randrange(100)}"),
            1.0,
            self._turn == 3,
            info={"success": True, "pid": os.getpid()},
        )

    def window(self, history, observation, task):
        return [Message("user", " ".join([task.id, *(f"{o.text} {a.text}" for o, a in history), observation.text]))]

    def _misbehave(self) -> None:
        kind, _, _ = self._task.id.partition("-")
        if "once" in self._task.id:
            mark = Path(self.options.marks, self._task.id)
            if mark.exists():
                return
            mark.touch()
        if kind == "hang":
            while True:
                self._turn += 0
        if kind == "sleep":
            time.sleep(3600)
        if kind == "stuck":  # in C code, which holds the interpreter: no other thread of the process runs
            re.match(r"(a*)*b", "a" * 60)
        if kind == "quit":
            sys.exit(0)
        if kind == "interrupt":
            raise KeyboardInterrupt
        if kind == "exit":
            os._exit(3)
        if kind == "crash":
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "raise":
            raise RuntimeError("the shelf fell down")
        if kind == "contract":
            raise ContractError("the rule was broken", where="Rogue", hint="mend it")


class Unsendable(Rogue):
    """Its outcomes cannot be pickled."""

    def step(self, action: Action) -> Outcome:
        return Outcome(Observation("one", anchor=lambda: 0), 0.0, False)


class Threaded(Rogue):
    """The same in threads (exits and crashes would end the test run)."""

    execution = "thread"


class Meeting(Threaded):
    """A step is over when sixteen of them are under way: one after the other they would never end."""

    together = threading.Barrier(16)

    def step(self, action: Action) -> Outcome:
        self.together.wait(LIMIT_S)
        return super().step(action)


class Shop(WebShop):
    """The shop, with a gate before each step."""

    class Options(WebShop.Options):
        gate: str = Field("", description="As of Rogue.")

    options: Options

    def step(self, action: Action) -> Outcome:
        Gate(self.options.gate).pass_through()
        return super().step(action)


class Inline(Rogue):
    """The same on the event loop: what it does to its process, it does to whoever plays with it."""

    execution = "inline"


class Stuck(Fetch):
    """Its episodes never end from the second training step on: a loop in C that lets other threads run."""

    started = 0

    def reset(self, task: Task, seed: int) -> Observation:
        Stuck.started += 1
        if Stuck.started > 16:
            threading.Event().wait()
        return super().reset(task, seed)
