"""Atomic, verified checkpoints: a directory appears under its final name only when it is complete on disk.

Written aside as `.tmp-<step>-<pid>`, every file fsynced, then renamed to `step-<step>`. `manifest.json` inside holds
size and CRC-32 of every file; loading checks them and falls back to the checkpoint before. There is no `latest` file to
tear and no pickle anywhere: a file that the manifest does not name makes a checkpoint damaged.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from spearrl.batching.nested_tensors import fill, strip
from spearrl.errors import CheckpointError, StorageError
from spearrl.faults import strike

NAME = re.compile(r"^step-\d{6,}$")
FORMAT, MANIFEST = 1, "manifest.json"
REQUIRED = ("config.json", "training/learner.json", "training/state.json", "training/state.safetensors")
SPACE = 1.2  # free space that a checkpoint needs, in sizes of the one before
# What reading a file raises whose content is not what was written, whatever stands in it.
UNREADABLE = (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def save_checkpoint(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int,
    scores: Mapping[int, float] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint and prune old ones; returns its path.

    Args:
        write: fills the (empty) directory it is given.
        keep: newest checkpoints that stay.
        scores: by step, how well its weights did; the best of the checkpoints there are stays, too.
        about: JSON values that the manifest holds besides.
    Raises:
        StorageError: the disk is full or unwritable; nothing is left behind and older checkpoints are untouched.
    """
    return seal(written(folder, step, write), keep=keep, scores=scores, about=about)


def written(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """A checkpoint's files in a temporary directory, which `seal` makes a checkpoint. Raises StorageError."""
    temporary = folder / f".tmp-{step:06d}-{os.getpid()}"
    with _whole(temporary, step):
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder)
        temporary.mkdir()
        write(temporary)
    return temporary


def seal(
    temporary: Path,
    *,
    keep: int,
    scores: Mapping[int, float] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Add the manifest, bring all to the disk, give the final name, prune. Arguments and errors: `save_checkpoint`."""
    folder, step = temporary.parent, int(temporary.name.split("-")[1])
    final = folder / f"step-{step:06d}"
    with _whole(temporary, step):
        files = {name: _fingerprint(temporary / name) for name in _names(temporary)}
        manifest = {"format": FORMAT, "step": step, "files": files, **(about or {})}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        strike("ckpt.before_rename")
        if final.exists():
            _remove(final)
        os.rename(temporary, final)
        strike("ckpt.after_rename")
        _fsync(folder)
        _prune(folder, keep, scores or {})
    return final


class _whole:
    """Removes a temporary directory where the block raises; trouble with the disk becomes StorageError."""

    def __init__(self, temporary: Path, step: int):
        self.temporary, self.step = temporary, step

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            where, hint = str(self.temporary.parent), "free disk space, then resume the run"
            text = f"checkpoint of step {self.step} failed: {error}"
            raise StorageError(text, where=where, hint=hint) from error


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    return sorted((p for p in folder.glob("step-*") if NAME.match(p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name[5:])


def newest_checkpoint(folder: Path, accept: Callable[[Path], object] = lambda path: None) -> tuple[Path, list[str]]:
    """The newest checkpoint that verifies, and a warning for each newer one that does not.

    Args:
        accept: reads one that verifies; what it raises as CheckpointError counts as damage too.
    Raises:
        CheckpointError: none does.
    """
    problems: list[str] = []
    for path in reversed(checkpoints(folder)):
        problem = defect(path)
        if problem is None:
            try:
                accept(path)
            except CheckpointError as error:
                problem = error.message
            else:
                return path, problems
        problems.append(f"{path.name}: {problem}")
    if problems:
        text, hint = f"no valid checkpoint ({'; '.join(problems)})", "start the run again under another run.name"
    else:
        text = "no valid checkpoint: there are none, the run ended before its first one"
        hint = f"start it again with its settings: spearrl train {folder.parent / 'config.toml'} run.name=NAME"
    raise CheckpointError(text, where=str(folder), hint=hint)


def defect(path: Path) -> str | None:
    """What is wrong with a checkpoint; None where it holds exactly the files of its manifest, as they were written."""
    try:
        files = read_manifest(path)["files"]
        if missing := [name for name in REQUIRED if name not in files]:
            return f"{MANIFEST} names no {missing[0]}"
        if not any(name.startswith("model") and name.endswith(".safetensors") for name in files):
            return f"{MANIFEST} names no weights (model*.safetensors)"
        for name, expected in files.items():
            if _fingerprint(path / name) != expected:
                return f"{name} differs from what was written"
        if strange := [name for name in _names(path) if name not in files and name != MANIFEST]:
            return f"{strange[0]} is not in {MANIFEST}: nothing of spearrl wrote it"
    except CheckpointError as error:
        return error.message
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises CheckpointError where it is missing, or not one of this format and step."""

    def refuse(text: str) -> CheckpointError:
        return CheckpointError(f"{MANIFEST} {text}", where=str(path))

    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except UNREADABLE as error:
        raise refuse(f"cannot be read: {type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(manifest, dict):
        raise refuse("is no JSON object")
    stated, step, files = manifest.get("format"), manifest.get("step"), manifest.get("files")
    if type(stated) is not int or stated != FORMAT:
        raise refuse(f"has format {str(stated)[:40]}; this version reads {FORMAT}")
    if type(step) is not int or step != step_of(path):
        raise refuse(f"is of step {str(step)[:40]}")
    if not isinstance(files, dict) or not files:
        raise refuse("lists no files")
    for name, value in files.items():
        whole = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
        if not whole or "\0" in name or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise refuse(f"has a wrong entry for {name[:80]!r}")
    return manifest


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written or half-deleted. Call only while holding the run's lock."""
    for path in [*folder.glob(".tmp-*"), *folder.glob(".del-*")]:
        shutil.rmtree(path, ignore_errors=True)


def save_state(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Write a nested state of tensors and JSON values as `<name>.safetensors` and `<name>.json`."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    text, tensors = strip(state, name)
    (folder / f"{name}.json").write_text(text)
    strike("ckpt.mid_file")
    save_file(tensors, folder / f"{name}.safetensors")


def load_state(folder: Path, name: str) -> Any:
    """What `save_state` wrote. Raises CheckpointError where the files are not such."""
    from safetensors.torch import load_file

    try:
        return fill((folder / f"{name}.json").read_text(), load_file(folder / f"{name}.safetensors"))
    except UNREADABLE as error:
        text = f"{folder.name}/{name} cannot be read: {type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(text, where=str(folder)) from error


def _names(folder: Path) -> list[str]:
    """Every file below a folder, by its path there."""
    return [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if not p.is_dir()]


def _prune(folder: Path, keep: int, scores: Mapping[int, float]) -> None:
    there = checkpoints(folder)
    scored = [path for path in there if step_of(path) in scores]
    best = max(scored, key=lambda path: (scores[step_of(path)], step_of(path)), default=None)
    for path in there[:-keep]:
        if path != best:
            _remove(path)


def _check_space(folder: Path) -> None:
    """Raise OSError where the disk has no room for one more checkpoint like the newest."""
    for newest in checkpoints(folder)[-1:]:
        needed = int(SPACE * sum((newest / name).stat().st_size for name in _names(newest)))
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"No space left on device: {free} bytes are free, {needed} are needed")


def _fingerprint(path: Path) -> list[int]:
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Rename first, so that a kill in the middle of deleting leaves no torn checkpoint under a valid name."""
    doomed = path.with_name(f".del-{path.name}-{os.getpid()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
