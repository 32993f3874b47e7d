"""How the controller reaches a rollout worker.

Here: a process of this machine, over a socket; Ray actors: spearrl.launch.ray.
"""

from __future__ import annotations

import pickle
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from spearrl.processes import Child
from spearrl.rollout.workers.messages import Start

TAIL_LINES, TAIL_BYTES = 8, 4000  # of a worker's log, in error messages


class Link(Protocol):
    """One worker's end of the wire; messages are bytes (see messages).

    Sending and receiving may be done from different threads.
    """

    def send(self, data: bytes) -> None:
        """Raises ConnectionError where the worker is gone."""
        ...

    def receive(self) -> bytes:
        """The next message, however long it takes.

        Raises ConnectionError where the worker is gone; `kill` from another thread has that effect.
        """
        ...

    def kill(self) -> None:
        """End the worker and everything it started. May be called again."""
        ...

    def ending(self) -> str:
        """Exit status and last log lines, once it has ended."""
        ...


Launcher = Callable[[int], Link]  # starts the worker of an index


class ProcessLink:
    """A worker process of this machine, `python -m module`, that logs to a file.

    It ends with this process, whatever happens to that.
    """

    def __init__(self, module: str, start: Start, log: Path, environment: Mapping[str, str]):
        self._log, self._lock = log, threading.Lock()
        variables = {"PYTHONUNBUFFERED": "1", **environment}
        with log.open("ab") as output:
            self._child = Child(module, variables, output=output, errors=subprocess.STDOUT)
        self.send(pickle.dumps(("start", start)))

    def send(self, data: bytes) -> None:
        with self._lock:
            try:
                self._child.connection.send_bytes(data)
            except OSError as error:
                raise ConnectionError(str(error)) from error

    def receive(self) -> bytes:
        try:
            return self._child.connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise ConnectionError(str(error)) from error

    def kill(self) -> None:
        self._child.kill()

    def ending(self) -> str:
        return f"{self._child.ending()}{log_tail(self._log)}"


def log_tail(log: Path) -> str:
    """The last lines of a worker's log, to be added to an error message."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    return "".join([f"; the end of {log}:", *(f"\n  | {line}" for line in lines)])
