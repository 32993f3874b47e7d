"""The process that steps environments for a pool: a `ProcessWorker` starts it and speaks to it over one socket.

A message is a list of calls (method, slot number, arguments); the first message of all is [(import path, options,
style, characters of a text)].
Each call is answered by itself: (value, None), or (None, the error to raise).
Only the records of `spearrl.types` travel; the environment itself is built here, from its import path and options.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from spearrl.envs.pool.slot import Slot
from spearrl.envs.registry import make
from spearrl.processes import connection_to_parent, pickled, portable


class SlotServer:
    """The slots of one worker process, all spawned from one environment, so that read-only data is loaded once."""

    def __init__(self, path: str, options: dict[str, Any], style: str, text_chars: int):
        self._environment, self._style, self._text_chars = make(path, **options), style, text_chars
        self._slots: dict[int, Slot] = {}

    def call(self, method: str, number: int, arguments: tuple[Any, ...]) -> Any:
        """Call `start`, `act` or `close` of a slot.

        A slot begins with `start`; one that is not there is closed already.
        """
        if method == "close":
            slot = self._slots.pop(number, None)
            return slot.close() if slot else None
        if method == "start" and number not in self._slots:
            self._slots[number] = Slot(self._environment.spawn(), self._style, self._text_chars)
        return getattr(self._slots[number], method)(*arguments)

    def close(self) -> None:
        """Release every slot and the data they share."""
        for slot in self._slots.values():
            slot.close()
        self._environment.close()


def main() -> None:
    """Serve until the other end closes."""
    connection = connection_to_parent()
    server: SlotServer | None = None
    while True:
        try:
            calls = connection.recv()
        except (EOFError, ConnectionError):
            break
        for call in calls:
            try:
                answer = pickled((server.call(*call) if server else None, None))
                server = server or SlotServer(*call)
            except Exception as error:
                answer = pickled((None, portable(error)))
            with suppress(ConnectionError):  # nobody waits any more; the next receive ends the loop
                connection.send_bytes(answer)
    if server is not None:
        server.close()


if __name__ == "__main__":
    main()
