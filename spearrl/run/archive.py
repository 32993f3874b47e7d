"""Older files of a run's logs, compressed: a long run takes little of the disk, and nothing is lost."""

from __future__ import annotations

import gzip
import os
import shutil
from contextlib import suppress
from pathlib import Path

PLAIN = 100  # newest files of one kind that stay as they were written


def compress(path: Path) -> None:
    """Put `path`.gz, of the same content, in a file's place. Raises OSError: the file is as it was."""
    packed = path.with_name(f"{path.name}.gz")
    temporary = path.with_name(f".{packed.name}")
    try:
        with (
            path.open("rb") as source,
            temporary.open("wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as target,
        ):
            shutil.copyfileobj(source, target)
        os.replace(temporary, packed)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    path.unlink()


def compress_older(folder: Path, pattern: str) -> None:
    """Compress all but the PLAIN newest of the files that match; what the disk refuses is tried again later."""
    for path in sorted(folder.glob(pattern))[:-PLAIN]:
        with suppress(OSError):
            compress(path)
