"""How the controller reaches a rollout worker.

Here it is a `processes.Child` of this machine; Ray actors: spearrl.launch.ray.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Link(Protocol):
    """One worker's end of the wire; messages are bytes (see messages).

    Sending and receiving may be done from different threads.
    """

    def send(self, data: bytes) -> None:
        """Raises ConnectionError where the worker is gone."""

    def receive(self) -> bytes:
        """The next message, however long it takes.

        Raises ConnectionError where the worker is gone; `kill` from another thread has that effect.
        """

    def kill(self) -> None:
        """End the worker and everything it started. May be called again."""

    def ending(self) -> str:
        """Exit status and last log lines, once it has ended."""


Launcher = Callable[[int], Link]  # starts the worker of an index
