"""The run directory: lock, resolved config, events, TensorBoard, trajectories.

Written when a run begins:
    config.toml     every setting, resolved; written anew where a resumed run changes one
    command.txt     the command line
    versions.json   Python, machine, packages
    start/          the model it began with, where other processes load it
    reference/      the frozen model, where a KL divergence or adapters need one
While it trains:
    events.jsonl    one JSON object an event: "step", "eval", "checkpoint", "warning", ... (docs/metrics.md)
    tb/             the same numbers for TensorBoard (run.tensorboard)
    trajectories/   episodes: step-000020.jsonl every run.trajectories_every steps, eval-<split>-000020.jsonl
    checkpoints/    step-000020/, see run/checkpoint.py
    worker-0.log    what a rollout worker prints
    lock            held, and named after its process, for as long as a process trains the run
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import IO, Any

from spearrl.config import RunConfig, to_toml
from spearrl.errors import RefusedError, StorageError
from spearrl.processes import version_of
from spearrl.types import Group, Trajectory

PACKAGES = ("spearrl", "torch", "transformers", "tokenizers", "numpy", "pydantic")  # whose versions a run notes


class Run:
    """An open run directory; holds its lock until `close()`.

    Raises:
        RefusedError: another process has it open.
    """

    def __init__(self, path: Path, *, tensorboard: bool = False):
        self.path, self.checkpoints = path, path / "checkpoints"
        self._lock = _lock(path)
        self._events = (path / "events.jsonl").open("a", buffering=1)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(path / "tb"))

    @classmethod
    def create(cls, config: RunConfig) -> Run:
        """Make the directory of a new run.

        Raises:
            RefusedError: a run of that name exists.
            StorageError: the folder cannot be made.
        """
        path = _new_path(config)
        try:
            path.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"cannot make {path}: {error.strerror}", where="run.output_dir", hint="choose a folder you may write to"
            ) from error
        (path / "config.toml").write_text(to_toml(config))
        (path / "command.txt").write_text(shlex.join(sys.argv) + "\n")
        (path / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
        return cls(path, tensorboard=config.run.tensorboard)

    def rewrite_config(self, config: RunConfig, overrides: Sequence[str]) -> None:
        """Keep the settings of a resumed run that changed some; the event log says which."""
        temporary = self.path / ".config.toml"
        temporary.write_text(to_toml(config))
        os.replace(temporary, self.path / "config.toml")
        self.event("config", 0, {"changed": list(overrides)})

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one JSON line; numbers also go to TensorBoard."""
        event = {"event": kind, "step": step, "time": round(time.time(), 3), **_finite(values)}
        self._events.write(json.dumps(event, default=_plain) + "\n")
        for key, value in values.items() if self._board is not None else ():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._board.add_scalar(key if "/" in key else f"{kind}/{key}", value, step)

    def steps_of(self, kind: str) -> set[int]:
        """Steps at which an event of this kind was logged."""
        self._events.flush()
        return {event["step"] for event in events_of(self.path, kind)}

    def trajectories(self, step: int, groups: Sequence[Group], *, name: str = "step") -> None:
        """Write the step's episodes as readable JSON lines, one trajectory a line."""
        folder = self.path / "trajectories"
        folder.mkdir(exist_ok=True)
        write_trajectories(folder / f"{name}-{step:06d}.jsonl", groups)

    def close(self, *, discard: bool = False) -> None:
        """Release the directory; `discard` removes it (a run that never began)."""
        self._events.close()
        if self._board is not None:
            self._board.close()
        if discard:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def events_of(path: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind in a run directory."""
    lines = (path / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]  # a killed process leaves half a line
    return [event for event in events if event["event"] == kind]


def write_trajectories(path: Path, groups: Sequence[Group]) -> None:
    """One trajectory a line."""
    with path.open("w") as file:
        for trajectory in (t for group in groups for t in group.trajectories):
            file.write(json.dumps(readable(trajectory), ensure_ascii=False, default=_plain) + "\n")


def readable(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as plain JSON values: observations, replies, rewards."""
    return {
        "schema": 1,
        "task": trajectory.task.id,
        "group": trajectory.group,
        "sibling": trajectory.sibling,
        "status": trajectory.status.value,
        "reward": trajectory.reward,
        "info": _finite(trajectory.info),
        "error": trajectory.error,
        "turns": [
            {
                "observation": turn.observation,
                "reply": turn.reply,
                "action": turn.action.text,
                "valid": turn.action.valid,
                "reward": turn.reward,
                "tokens": len(turn.token_ids),
                "logprob": round(sum(turn.logprobs), 4),
                "finish": turn.finish_reason,
                "version": turn.max_version,
                **({"pictures": len(turn.images)} if turn.images else {}),
            }
            for turn in trajectory.turns
        ],
    }


def versions() -> dict[str, str]:
    """What the run runs on."""

    machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": str(os.cpu_count())}
    return machine | {package: version_of(package) or "not installed as a package" for package in PACKAGES}


def _plain(value: Any) -> Any:
    """Numbers of other libraries as Python's; anything else as its text."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: non-finite floats are written as strings."""
    return {k: (str(v) if isinstance(v, float) and not math.isfinite(v) else v) for k, v in values.items()}


def _new_path(config: RunConfig) -> Path:
    """The named one, else <environment>-<algorithm>-s<seed>, numbered where that is taken. Raises RefusedError."""
    folder = Path(config.run.output_dir)
    if config.run.name:
        path = folder / config.run.name
        if path.exists():
            raise RefusedError(
                f"{path} exists", hint=f"continue it with `spearrl train --resume {path}`, or choose another run.name"
            )
        return path
    environment = config.env.name.rpartition(":")[2].lower()
    stem = f"{environment}-{config.algo.name.replace('+', '-')}-s{config.run.seed}"
    paths = (folder / (stem if number == 1 else f"{stem}-{number}") for number in count(1))
    return next(path for path in paths if not path.exists())


def _lock(path: Path) -> IO[str]:
    file = (path / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise RefusedError(f"{path} is in use by {owner}", hint="wait for it to end, or stop it") from error
    file.seek(0)
    file.truncate()
    file.write(f"pid {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
