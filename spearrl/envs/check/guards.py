"""What `check` watches while an environment runs: time, the global random state, the network."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn
from unittest.mock import patch


class TooSlow(BaseException):
    """A call passed its deadline. Not an Exception, so that no `except Exception` of the environment hides it."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the running code after `seconds`. No effect outside the main thread, which alone has timers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Modules with a global generator, and the functions that read and set its state.
GENERATORS = {
    "random": ("getstate", "setstate"),
    "numpy.random": ("get_state", "set_state"),
    "torch": ("get_rng_state", "set_rng_state"),
}


class GlobalRandom:
    """The states of the global generators of random, numpy and torch, as far as these are loaded."""

    def __init__(self) -> None:
        # numpy loads numpy.random when it is first used: that must not pass unseen
        loaded = [name for name in GENERATORS if name.partition(".")[0] in sys.modules]
        self._before = {name: getattr(import_module(name), GENERATORS[name][0])() for name in loaded}

    def touched(self) -> list[str]:
        """The generators whose state has changed since."""
        now = {name: getattr(sys.modules[name], GENERATORS[name][0])() for name in self._before}
        return [name for name, state in self._before.items() if _plain(state) != _plain(now[name])]

    def restore(self) -> None:
        """Set every generator back."""
        for name, state in self._before.items():
            getattr(sys.modules[name], GENERATORS[name][1])(state)


def _plain(state: Any) -> Any:
    """A state in lists and numbers, which compare."""
    return list(map(_plain, state)) if isinstance(state, tuple) else getattr(state, "tolist", lambda: state)()


@contextmanager
def no_network() -> Iterator[list[str]]:
    """Refuse connections and name look-ups, but not sockets in the file system; yields the list of what was tried."""
    tried: list[str] = []

    def refuse(target: Any) -> NoReturn:
        tried.append(str(target))
        raise OSError("no network while the environment is checked")

    def guarded(original: Any) -> Any:
        def method(self: socket.socket, *args: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse(args[-1])
            return original(self, *args)

        return method

    with ExitStack() as patches:
        for name in ("connect", "connect_ex", "sendto"):
            patches.enter_context(patch.object(socket.socket, name, guarded(getattr(socket.socket, name))))
        look_up = patch.object(socket, "getaddrinfo", lambda host, port, *_, **__: refuse(f"{host}:{port}"))
        patches.enter_context(look_up)
        yield tried
