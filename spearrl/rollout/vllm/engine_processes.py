"""The processes of a vLLM engine: started with an environment of their own, marked, and gone when the engine or this
process is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from spearrl.processes import as_for_children

TAG = "SPEARRL_ENGINE"  # environment variable that marks an engine's processes
END_S = 10.0
# vLLM's engine core outlives a parent that was killed. The shell's input ends with this process, however it ends.
WATCH = 'cat > /dev/null; grep -slzxF "$0" /proc/[0-9]*/environ | cut -d/ -f3 | xargs -r kill -9'


_tracker: list[subprocess.Popen[bytes]] = []


def _start_tracker() -> None:
    """multiprocessing's own, in a session of its own: what kills this process's group must not kill what then removes
    the engine's shared memory.
    """
    tracker: Any = resource_tracker._resource_tracker
    if tracker._fd is None:
        read, tracker._fd = os.pipe()
        command = [sys.executable, "-c", f"from multiprocessing.resource_tracker import main; main({read})"]
        with open(os.devnull, "r+b") as quiet:  # that it removed something is nothing to report
            _tracker.append(
                subprocess.Popen(
                    command, pass_fds=(read,), stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
                )
            )
        os.close(read)


class Processes:
    """Finds an engine's processes, grandchildren too, by a mark in their environment."""

    def __init__(self) -> None:
        self.tag = uuid.uuid4().hex
        self._watch: subprocess.Popen[bytes] | None = None
        if sys.platform.startswith("linux"):
            command = ["sh", "-c", WATCH, f"{TAG}={self.tag}"]
            self._watch = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    @contextmanager
    def environment(self, variables: Mapping[str, str]) -> Iterator[None]:
        """The environment that the engine's processes start with; afterwards all variables are as before, those that
        vLLM changed too (it preloads libraries, which no other process should).
        """
        _start_tracker()  # shared by everything that uses multiprocessing: not to be marked
        # vLLM renames its processes; without the latter that wipes the mark
        with as_for_children({**variables, TAG: self.tag, "SPT_NOENV": "1"}):
            yield

    def ids(self) -> list[int]:
        """Process ids of what is left of the engine."""
        mark, ids = f"{TAG}={self.tag}".encode(), []
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in file.read_bytes().split(b"\0") and int(file.parent.name) != os.getpid():
                    ids.append(int(file.parent.name))
            except OSError:  # ended meanwhile, or another user's
                continue
        return ids

    def close(self, wait_s: float = END_S) -> None:
        """Wait for the engine's processes to end, kill the others and what those start meanwhile, dismiss the watch."""
        begun = time.monotonic()
        while (left := self.ids()) and (late_s := time.monotonic() - begun - wait_s) < END_S:
            for process in left if late_s >= 0 else ():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)
        if self._watch is not None and self._watch.stdin is not None:
            self._watch.stdin.close()
            self._watch.wait(END_S)
            self._watch = None
