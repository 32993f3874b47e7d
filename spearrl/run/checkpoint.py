"""Atomic, verified checkpoints: a directory appears under its final name only when it is complete on disk.

Written aside as `.tmp-<step>-<pid>`, every file fsynced, then renamed to `step-<step>`. `manifest.json` inside holds
size and CRC-32 of every file; loading checks them and falls back to the checkpoint before. There is no `latest` file to
tear and no pickle anywhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from spearrl.batching.nested_tensors import fill, strip
from spearrl.errors import CheckpointError, StorageError

NAME = re.compile(r"^step-\d{6,}$")
FORMAT = 1


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Write a checkpoint and prune old ones; returns its path.

    Args:
        write: fills the (empty) directory it is given.
        keep: newest checkpoints that stay.
    Raises:
        StorageError: the disk is full or unwritable; nothing is left behind and older checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary, final = folder / f".tmp-{step:06d}-{os.getpid()}", folder / f"step-{step:06d}"
    try:
        temporary.mkdir()
        write(temporary)
        files = {str(p.relative_to(temporary)): _fingerprint(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
        manifest = {"format": FORMAT, "step": step, "files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        if final.exists():
            _remove(final)
        os.rename(temporary, final)
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        hint = "free disk space, then resume the run"
        raise StorageError(f"checkpoint of step {step} failed: {error}", where=str(folder), hint=hint) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in checkpoints(folder)[:-keep]:
        _remove(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    return sorted((p for p in folder.glob("step-*") if NAME.match(p.name)), key=lambda p: int(p.name[5:]))


def newest_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that verifies, and a warning for each newer one that does not.

    Raises:
        CheckpointError: none does.
    """
    problems: list[str] = []
    for path in reversed(checkpoints(folder)):
        if (problem := defect(path)) is None:
            return path, problems
        problems.append(f"{path.name}: {problem}")
    text = f"no valid checkpoint ({'; '.join(problems) or 'there are none'})"
    raise CheckpointError(text, where=str(folder), hint="start the run again under another run.name")


def defect(path: Path) -> str | None:
    """What is wrong with a checkpoint; None where its manifest parses and each file has the size and CRC-32 in it."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        for name, expected in files.items():
            if _fingerprint(path / name) != expected:
                return f"{name} differs from what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


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
    save_file(tensors, folder / f"{name}.safetensors")


def load_state(folder: Path, name: str) -> Any:
    """What `save_state` wrote."""
    from safetensors.torch import load_file

    return fill((folder / f"{name}.json").read_text(), load_file(folder / f"{name}.safetensors"))


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
