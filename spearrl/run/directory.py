"""The run directory: lock, resolved config, events, TensorBoard, trajectories.

Written when a run begins:
    config.toml     every setting, resolved; written anew at the first new step of a resumed run that changes one
    command.txt     the command line
    versions.json   Python, machine, packages
    start/          the model it began with, where other processes load it
    reference/      the frozen model, where a KL divergence or adapters need one
While it trains:
    events.jsonl    one JSON object an event: "step", "eval", "checkpoint", "warning", ... (docs/metrics.md);
                    where it has grown, what is older is in events-0001.jsonl.gz, and so on
    tb/             the same numbers for TensorBoard (run.tensorboard)
    trajectories/   episodes: step-000020.jsonl every run.trajectories_every steps, eval-<split>-000020.jsonl;
                    all but the newest hundred of a kind are compressed (step-000020.jsonl.gz)
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
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

from spearrl.config import RunConfig, load_config, to_toml
from spearrl.config.dump import command_line
from spearrl.errors import RefusedError, StorageError, printable
from spearrl.processes import version_of
from spearrl.run.archive import compress_older
from spearrl.run.checkpoint import clean
from spearrl.run.events import EVENTS, LineFile, read_events, skipped_lines
from spearrl.run.resume import Resumption, config_file, fixed_settings, resumption
from spearrl.run.saving import Saver
from spearrl.types import Group, Trajectory

PACKAGES = ("spearrl", "torch", "transformers", "tokenizers", "numpy", "pydantic")  # whose versions a run notes


class Run:
    """An open run directory; holds its lock until `close()`.

    What cannot be logged is dropped, counted, and said once through `warn`: no log ends a run.

    Args:
        held: the run is resumed. Until `go_on` its events are kept in memory, and nothing is written.
    Attributes:
        past: what the run is resumed with; None: it is new.
        warn: called with the text of a warning.
    Raises:
        RefusedError: another process has it open.
        StorageError: the directory is not writable.
    """

    def __init__(self, path: Path, *, tensorboard: bool = False, held: bool = False):
        self.path, self.checkpoints = path, path / "checkpoints"
        self.warn: Callable[[str], None] = lambda text: print(printable(f"warning: {text}"), file=sys.stderr)
        self.dropped: Counter[str] = Counter()
        self._held: list[tuple[str, int, Mapping[str, Any]]] = []
        self.past: Resumption | None = None
        self._tensorboard = tensorboard
        self._board: Any = None
        self._events: LineFile | None = None
        try:
            self._lock = _lock(path)
        except OSError as error:
            hint = "make it writable, or copy the run and resume the copy"
            raise StorageError(f"cannot lock the run: {error.strerror}", where=str(path), hint=hint) from error
        if not held:
            self._open()

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
            (path / "config.toml").write_text(to_toml(config))
            (path / "command.txt").write_text(command_line(sys.argv) + "\n")
            (path / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot make {path}: {error.strerror}", where="run.output_dir", hint="choose a folder you may write to"
            ) from error
        return cls(path, tensorboard=config.run.tensorboard)

    @classmethod
    def reopen(cls, path: Path, overrides: Sequence[str], resources: ExitStack) -> tuple[Run, Resumption]:
        """Open a run to resume it, and what it goes on with; nothing in it changes before `go_on`.

        Args:
            resources: closes it.
        Raises:
            SpearError: it cannot go on, or not with these overrides.
        """
        folder = config_file(path).parent
        run = cls(folder, tensorboard=load_config(folder, overrides).run.tensorboard, held=True)
        resources.callback(run.close)
        run.past = resumption(folder, overrides)
        return run, run.past

    def go_on(self) -> None:
        """Something new begins: a resumed run writes its events so far, and its settings where some were changed.

        Raises:
            StorageError: they cannot be written.
        """
        if self._events is not None or self.past is None:
            return
        clean(self.checkpoints)
        if self.past.changes:
            temporary = self.path / ".config.toml"
            try:
                temporary.write_text(to_toml(self.past.config))
                os.replace(temporary, self.path / "config.toml")
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise StorageError(f"cannot write config.toml: {error.strerror}", where=str(self.path)) from error
        self._open()
        for event in self._held:
            self.event(*event)

    def saver(self, config: RunConfig, tokenizer: str, report: Callable[[str, dict[str, Any]], None]) -> Saver:
        """What writes the checkpoints; `tokenizer` is its hash. Raises RefusedError where a resumed run had another."""
        if self.past:
            self.past.check_tokenizer(tokenizer)
        about = {"tokenizer": tokenizer, "settings": fixed_settings(config), "versions": versions()}
        saved = self.past.state["step"] if self.past else None
        return Saver(self.checkpoints, keep=config.run.keep, about=about, report=report, step=saved)

    def evaluations(self) -> list[dict[str, Any]]:
        """Events of evaluations so far."""
        events, skipped = read_events(self.path)
        if skipped:
            self.warn(skipped_lines(skipped))
        return [event for event in events if event["event"] == "eval"]

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one JSON line; numbers also go to TensorBoard."""
        if self._events is None:
            self._held.append((kind, step, values))
            return
        event = {"event": kind, "step": step, "time": round(time.time(), 3), **_finite(values)}
        try:
            self._events.add(json.dumps(event, default=_plain))
        except OSError as error:
            self._drop(EVENTS, error)
        try:
            for key, value in values.items() if self._board is not None else ():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(key if "/" in key else f"{kind}/{key}", value, step)
        except OSError as error:
            self._board = None
            self._drop("tb/", error)

    def trajectories(self, step: int, groups: Sequence[Group], *, name: str = "step") -> None:
        """Write the step's episodes as readable JSON lines, one trajectory a line."""
        folder = self.path / "trajectories"
        path = folder / f"{name}-{step:06d}.jsonl"
        try:
            folder.mkdir(exist_ok=True)
            write_trajectories(path, groups)
            compress_older(folder, f"{name}-*.jsonl")
        except OSError as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            self._drop("trajectories/", error)

    def close(self, *, discard: bool = False) -> None:
        """Release the directory; `discard` removes it (a run that never began)."""
        if self.dropped and not discard:
            self.warn(f"not written: {', '.join(f'{count} to {name}' for name, count in self.dropped.items())}")
        for log in (self._events, self._board):
            if log is not None:
                with suppress(OSError):  # it was said when it could not be written
                    log.close()
        if discard:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _open(self) -> None:
        """Open the logs."""
        try:
            self._events = LineFile(self.path / EVENTS)
        except OSError as error:
            text, hint = f"{EVENTS} cannot be opened: {error.strerror}", "make it a file that you may write to"
            raise StorageError(text, where=str(self.path), hint=hint) from error
        try:
            if self._tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.path / "tb"))
        except ImportError:
            self.warn(
                "TensorBoard is not installed: no tb/ is written (pip install tensorboard, or run.tensorboard=false)"
            )
        except OSError as error:
            self._drop("tb/", error)

    def _drop(self, name: str, error: OSError) -> None:
        """Count what was not written; the first time, say so."""
        if not self.dropped[name]:
            self.warn(f"{self.path / name} cannot be written ({error.strerror or error}); training goes on without")
        self.dropped[name] += 1


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
        if os.path.lexists(path):
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
