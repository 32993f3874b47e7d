"""Environments that show what they can see, and say what no terminal should be told. Imports no torch."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from spearrl.types import Action, Observation, Outcome, Task
from tests.support.toy_envs import Fetch


class Telling(Fetch):
    """Writes the environment variables of the process that steps it into a file."""

    execution = "process"

    class Options(Fetch.Options):
        file: str = Field("", description="Where they are written.")

    options: Options

    def step(self, action: Action) -> Outcome:
        Path(self.options.file).write_text(json.dumps(dict(os.environ)))
        return super().step(action)


class TellingInline(Telling):
    """The same in the process that plays episodes: a rollout worker's, where there are any."""

    execution = "inline"


class Boasting(Fetch):
    """Its info has the names of what evaluations and events say themselves."""

    claims = {
        "reward": 123.0,
        "turns": 99,
        "low": 2,
        "tasks": 5000,
        "step": 7,
        "steps": 1,
        "seconds": -1.0,
        "errors": 8,
    }
    claims |= {"panel": "mine", "event": "step", "time": "then", "success val": 1.0, "rollout/reward": 77.0}

    def step(self, action: Action) -> Outcome:
        outcome = super().step(action)
        return replace(outcome, info={**outcome.info, **self.claims})


# Clears the screen and writes a title, steps back over a line, turns the direction of writing, and a bell in one byte.
DRIVING = "\x1b[2J\x1b]0;title\x07 back\rover \u202eesrever\u2066 \x9b31m \u200b\ufeff"


class Shouting(Fetch):
    """Its texts drive terminals: what it shows, what it is asked, and what it raises on "say"."""

    execution = "thread"

    def reset(self, task: Task, seed: int) -> Observation:
        start = super().reset(task, seed)
        return replace(start, text=f"{start.text} {DRIVING}")

    def step(self, action: Action) -> Outcome:
        if action.text != "look":
            raise ValueError(f"no such thing as {DRIVING}")
        outcome = super().step(action)
        return replace(outcome, info={**outcome.info, "note": DRIVING})


class Knowing(Fetch):
    """Has settings that are secret."""

    class Options(Fetch.Options):
        api_key: str = Field("", description="Of a service.")
        deep: dict[str, str] = Field({}, description="More of them.")
