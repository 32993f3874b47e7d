"""What `check` watches while an environment runs: time, the global random state, the network."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any


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
        self._before = self._states()

    def touched(self) -> list[str]:
        """The generators whose state has changed since."""
        now = self._states()
        return [name for name, state in self._before.items() if not _same(state, now[name])]

    def restore(self) -> None:
        """Set every generator back."""
        for name, state in self._before.items():
            getattr(sys.modules[name], GENERATORS[name][1])(state)

    @staticmethod
    def _states() -> dict[str, Any]:
        # numpy loads numpy.random when it is first used: that must not pass unseen.
        loaded = [name for name in GENERATORS if name.partition(".")[0] in sys.modules]
        return {name: getattr(import_module(name), GENERATORS[name][0])() for name in loaded}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    equal = a == b
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


@contextmanager
def no_network() -> Iterator[list[str]]:
    """Refuse connections and name look-ups, but not sockets in the file system; yields the list of what was tried."""
    tried: list[str] = []
    methods = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}
    look_up = socket.getaddrinfo

    def refuse(target: Any) -> None:
        tried.append(str(target))
        raise OSError("no network while the environment is checked")

    def guarded(original: Any) -> Any:
        def method(self: socket.socket, *args: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse(args[-1])
            return original(self, *args)

        return method

    try:
        for name, original in methods.items():
            setattr(socket.socket, name, guarded(original))
        setattr(socket, "getaddrinfo", lambda host, port, *_, **__: refuse(f"{host}:{port}"))  # noqa: B010
        yield tried
    finally:
        setattr(socket, "getaddrinfo", look_up)  # noqa: B010
        for name, original in methods.items():
            setattr(socket.socket, name, original)
