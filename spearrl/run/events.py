"""The event log of a run: written a line at a time, read whatever stands in it.

A file that has grown is renamed to events-0001.jsonl, and so on, and compressed.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from spearrl.faults import strike
from spearrl.run.archive import compress

EVENTS = "events.jsonl"
EARLIER = "events-[0-9]*.jsonl*"
LARGEST = 32 * 2**20  # bytes of events.jsonl after which the next line begins a new file


class LineFile:
    """A file that lines are added to, unbuffered. A line that could not be written whole spoils no other one."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)
        self._torn = self._file.tell() > 0 and not _ends_a_line(path)

    def add(self, line: str) -> None:
        """Raises OSError where the line cannot be written."""
        if self._file.tell() > LARGEST:
            self._rotate()
        data = ("\n" * self._torn + line + "\n").encode(errors="replace")
        self._torn = True
        strike("log.write")
        written = self._file.write(data)
        if written != len(data):  # a full disk takes what fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False

    def close(self) -> None:
        self._file.close()

    def _rotate(self) -> None:
        """Go on in an empty file; this one becomes the next of the earlier ones."""
        number = 1 + max((int(path.name[7:11]) for path in self._path.parent.glob(EARLIER)), default=0)
        full = self._path.with_name(f"events-{number:04d}.jsonl")
        os.replace(self._path, full)
        empty = self._path.open("ab", buffering=0)
        self._file.close()
        self._file, self._torn = empty, False
        with suppress(OSError):  # it is read as it is
            compress(full)


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a run directory, and how many lines are none (a killed process leaves half a line)."""
    earlier = sorted(file for file in path.glob(EARLIER) if not file.with_name(f"{file.name}.gz").exists())
    lines = [line for file in (*earlier, path / EVENTS) for line in _lines(file)]
    events = [event for event in map(_event, lines) if event is not None]
    return events, len(lines) - len(events)


def _lines(file: Path) -> Iterator[bytes]:
    """Lines of a log that are not empty; those before the damage where a compressed one is damaged, and one more."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as log:
            yield from (line for line in log if line.strip())
    except FileNotFoundError:
        return
    except (OSError, EOFError, zlib.error):
        if file.suffix != ".gz":
            raise
        yield b"damaged"


def skipped_lines(count: int) -> str:
    """The warning for lines that are no events."""
    return f"{count} line{'s' * (count > 1)} of {EVENTS} cannot be read and {'are' if count > 1 else 'is'} left out"


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(event, dict) and isinstance(event.get("event"), str) and type(event.get("step")) is int
    return event if sound else None


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
