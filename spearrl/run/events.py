"""The event log of a run: written a line at a time, read whatever stands in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from spearrl.faults import strike

EVENTS = "events.jsonl"


class LineFile:
    """A file that lines are added to, unbuffered. A line that could not be written whole spoils no other one."""

    def __init__(self, path: Path):
        self._file = path.open("ab", buffering=0)
        self._torn = self._file.tell() > 0 and not _ends_a_line(path)

    def add(self, line: str) -> None:
        """Raises OSError where the line cannot be written."""
        data = ("\n" * self._torn + line + "\n").encode(errors="replace")
        self._torn = True
        strike("log.write")
        written = self._file.write(data)
        if written != len(data):  # a full disk takes what fits
            raise OSError(28, os.strerror(28))
        self._torn = False

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a run directory, and how many lines are none (a killed process leaves half a line)."""
    try:
        lines = [line for line in (path / EVENTS).read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return [], 0
    events = [event for event in map(_event, lines) if event is not None]
    return events, len(lines) - len(events)


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
