"""Processes of this machine that run a module of ours and speak over a socket: how they begin, and how they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import IO, Any

PARENT_CHECK_S = 1.0


class Child:
    """`python -m <module>` in a session of its own, at the other end of `connection`.

    The module's first call is `connection_to_parent`.

    Args:
        environment: variables besides those of this process.
        output, errors: where these go; None: as those of this process.
    """

    def __init__(
        self, module: str, environment: Mapping[str, str], *, output: int | IO[bytes], errors: int | None = None
    ):
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**child_environment(), **environment},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self._killing = threading.Lock()

    def kill(self) -> None:
        """End it and everything it started. May be called again, and from any thread."""
        # The group outlives its leader (an engine's core). While nobody has waited for the leader, the group's number
        # belongs to nobody else.
        with self._killing:
            if self.process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def ending(self, wait_s: float = 0.0) -> str:
        """How it ended, in words, within `wait_s`."""
        try:
            code = self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return "its connection broke"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def child_environment() -> dict[str, str]:
    """Environment variables with which a Python process finds the modules that this one finds."""
    paths = [os.path.abspath(entry) for entry in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def under_launcher(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or the deepspeed launcher started this process."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def connection_to_parent(end: Callable[[], Any] = lambda: os._exit(1)) -> Connection:
    """For the process of a Child: its socket. Ctrl-C is left to the parent.

    Once the parent has gone, `end` is called, whatever this process is doing then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_S)
        end()

    threading.Thread(target=watch, daemon=True).start()
    return Connection(int(sys.argv[1]))
