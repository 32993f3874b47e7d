"""The process that steps environments for a pool: started by `lanes`, speaks over one socket, serves many slots one call at a time.

A message is a list of calls (operation, slot, payload), the first one of all [(path, options, style)]. Each call is answered by itself:
("ok", value), ("error", class, message, where, hint) or ("raised", traceback).
Only the records of `spearrl.types` travel; the environment itself is built here, from its import path and options.
"""

from __future__ import annotations

import traceback
from multiprocessing.connection import Connection
from typing import Any

from spearrl.envs.base import Environment, make
from spearrl.envs.pool.slot import Seat
from spearrl.errors import SpearError
from spearrl.processes import connection_to_parent


class Server:
    """Seats of one worker process, all spawned from one environment, so that read-only data is loaded once."""

    def __init__(self, path: str, options: dict[str, Any], style: str):
        self._root: Environment = make(path, **options)
        self._style = style
        self._seats: dict[int, Seat] = {}

    def serve(self, operation: str, slot: int, payload: tuple[Any, ...]) -> Any:
        """Carry out one call."""
        if operation == "start":
            if slot not in self._seats:
                self._seats[slot] = Seat(self._root.spawn(), self._style)
            return self._seats[slot].start(*payload)
        if operation == "act":
            return self._seats[slot].act(*payload)
        return self.close(slot)

    def close(self, slot: int) -> None:
        """Release a slot; one that is not there is released already."""
        seat = self._seats.pop(slot, None)
        if seat is not None:
            seat.close()

    def close_all(self) -> None:
        for slot in list(self._seats):
            self.close(slot)
        self._root.close()


def main() -> None:
    """Serve until the other end closes."""
    connection = connection_to_parent()
    server: Server | None = None
    while True:
        try:
            calls = connection.recv()
        except (EOFError, ConnectionError):
            break
        for call in calls:
            try:
                answer: tuple[Any, ...] = ("ok", server.serve(*call) if server else None)
                server = server or Server(*call)
            except SpearError as error:
                answer = ("error", type(error).__name__, error.message, error.where, error.hint)
            except Exception:
                answer = ("raised", traceback.format_exc())
            _send(connection, answer)
    if server is not None:
        server.close_all()


def _send(connection: Connection, answer: tuple[Any, ...]) -> None:
    try:
        connection.send(answer)
    except (EOFError, ConnectionError):
        return  # nobody waits any more; the next receive ends the loop
    except Exception as error:  # what pickle raises on a value of the environment's own
        hint = "put plain values into Observation.anchor and Outcome.info: numbers, text, tuples, dicts"
        connection.send(
            ("error", "ContractError", f"what the environment returned cannot leave its process: {error}", None, hint)
        )


if __name__ == "__main__":
    main()
