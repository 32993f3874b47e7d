"""The run directory: lock, resolved config, events, TensorBoard, trajectories.

config.toml  command.txt  versions.json  events.jsonl  trajectories/step-000001.jsonl  tb/  checkpoints/step-000020/
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
from pathlib import Path
from typing import Any

from spearrl.config import RunConfig, to_toml
from spearrl.errors import RefusedError, StorageError
from spearrl.types import Group, Trajectory


class Run:
    """An open run directory; holds its lock until `close()`."""

    def __init__(self, path: Path, *, tensorboard: bool = False):
        self.path = path
        self._lock = _lock(path)
        self._events = (path / "events.jsonl").open("a", buffering=1)
        self._board = _summary_writer(path / "tb") if tensorboard else None

    @classmethod
    def create(cls, config: RunConfig) -> Run:
        """Make the directory of a new run. Raises RefusedError where a run of that name exists."""
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
        """A resumed run's settings changed: the directory holds the new ones from now on, and the event log says what changed."""
        temporary = self.path / ".config.toml"
        temporary.write_text(to_toml(config))
        os.replace(temporary, self.path / "config.toml")
        self.event("config", 0, {"changed": list(overrides)})

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one JSON line; finite numbers also go to TensorBoard."""
        self._events.write(
            json.dumps({"event": kind, "step": step, "time": round(time.time(), 3), **_finite(values)}, default=_plain)
            + "\n"
        )
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(f"{kind}/{key}" if "/" not in key else key, value, step)

    def steps_of(self, kind: str) -> set[int]:
        """Steps at which an event of this kind was logged."""
        self._events.flush()
        lines = (self.path / "events.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return {event["step"] for event in events if event["event"] == kind}

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


def write_trajectories(path: Path, groups: Sequence[Group]) -> None:
    """One trajectory a line."""
    with path.open("w") as file:
        for trajectory in (t for group in groups for t in group.trajectories):
            file.write(json.dumps(readable(trajectory), ensure_ascii=False, default=_plain) + "\n")


def readable(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as plain JSON values: what was shown, what was said, what it earned."""
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
    """What the run ran on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "machine": platform.machine(), "cpus": str(os.cpu_count())}
    for package in ("spearrl", "torch", "transformers", "tokenizers", "numpy", "pydantic"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _plain(value: Any) -> Any:
    """Numbers of other libraries as Python's; anything else as its text."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)


def _new_path(config: RunConfig) -> Path:
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
    taken = [stem, *(f"{stem}-{number}" for number in range(2, 10_000))]
    return next(folder / name for name in taken if not (folder / name).exists())


def _lock(path: Path) -> Any:
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


def _summary_writer(path: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path))


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: non-finite floats are written as strings."""
    return {k: (str(v) if isinstance(v, float) and not math.isfinite(v) else v) for k, v in values.items()}
