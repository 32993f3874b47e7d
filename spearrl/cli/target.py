"""What verbs are pointed at: an environment, a config file, a run directory, a model; and folders they write into."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spearrl.config import RunConfig

TARGET_HELP = 'built-in environment, "my_pkg.mod:Class" of your own, or a config file or run directory that names one'
OVERRIDES_HELP = "settings, e.g. env.options.seed=3"


def config_of(target: str, overrides: Sequence[str], *, model: str | None = None) -> RunConfig:
    """The config of a file or a run directory; of a name, the overrides above every default, without a preset.

    Raises ConfigError.
    """
    from spearrl.config import load_config

    if target.endswith(".toml") or Path(target).is_dir():
        return load_config(target, overrides, model=model)
    return load_config(None, overrides, env=target, model=model or "tiny")


def model_of(directory: str | Path, step: int | None = None) -> Path:
    """The model directory of a run (its newest checkpoint, or that of `step`); any other directory or name as it is.

    Raises CheckpointError.
    """
    from spearrl.config.foreign import refuse_links
    from spearrl.errors import CheckpointError
    from spearrl.run.checkpoint import defect, newest_checkpoint

    folder = Path(directory, "checkpoints")
    if not folder.is_dir():
        return Path(directory)
    refuse_links(directory)
    if step is None:
        return newest_checkpoint(folder)[0]
    path = folder / f"step-{step:06d}"
    if not path.is_dir():
        names = ", ".join(checkpoint.name for checkpoint in sorted(folder.glob("step-*")))
        raise CheckpointError(f"no checkpoint of step {step} (there are: {names})", where=str(directory))
    if problem := defect(path):
        hint = "leave --step out: the newest sound checkpoint is taken"
        raise CheckpointError(f"the checkpoint is damaged: {problem}", where=str(path), hint=hint)
    return path


def refuse_full(folder: Path) -> None:
    """Raise RefusedError where `folder` is there and not an empty folder."""
    from spearrl.errors import RefusedError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RefusedError(f"{folder} exists and is not an empty folder", hint="give a new one; nothing was written")


def empty_folder(output: str) -> Path:
    """The folder that --output names, made if it is not there. Raises RefusedError if it is not empty, StorageError."""
    from spearrl.errors import StorageError

    refuse_full(folder := Path(output))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror}", where="--output") from error
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place when the block ends; where that fails, nothing is left.

    Raises:
        RefusedError: `folder` is there and not an empty folder. StorageError: it cannot be written.
    """
    from safetensors import SafetensorError

    from spearrl.errors import StorageError

    refuse_full(folder)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"cannot write {folder}: {error}", hint="free disk space, or choose a folder you may write to"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
