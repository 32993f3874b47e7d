"""Faults at a known moment: what is to be killed stands at a gate meanwhile, so that no test races a timer against
work.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

LIMIT_S = 120.0  # of every wait: far over what a loaded machine needs, it only catches hangs


def until(condition: Callable[[], object], what: str, *, seconds: float = LIMIT_S) -> None:
    """Wait for an event; an AssertionError says what did not happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"within {seconds:g} s: {what}"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_gone(pids: Iterable[int]) -> None:
    until(lambda: all(map(gone, pids)), f"of the processes {list(pids)} none lives on")


class Gate:
    """A folder that processes share: the file "shut", and one for each process that stands before it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def pass_through(self) -> None:
        """For the environment: where the gate is shut leave a note and wait."""
        if (self.folder / "shut").exists():
            (self.folder / str(os.getpid())).touch()
            until(lambda: not (self.folder / "shut").exists(), "the gate is opened")

    def shut(self) -> None:
        self.folder.mkdir(exist_ok=True)
        for note in self.folder.iterdir():
            note.unlink()
        (self.folder / "shut").touch()

    def open(self) -> None:
        (self.folder / "shut").unlink(missing_ok=True)

    def reached_by(self, pids: Iterable[int]) -> None:
        """Wait until every one of these processes has come to the shut gate."""
        until(
            lambda: all((self.folder / str(pid)).exists() for pid in pids),
            f"the processes {list(pids)} have begun a step",
        )


@contextmanager
def killed_in_mid_episode(fleet, gate: Gate, kill: Callable[[], object], *, deaths: int):
    """While the body plays: once every worker is in mid-episode, `kill` is called; steps go on when the fleet has
    missed `deaths` workers.
    """
    pids, before, faults = [worker.pid for worker in fleet], fleet.totals()["rollout/worker_deaths"], []

    def run() -> None:
        try:
            gate.reached_by(pids)
            kill()
            until(
                lambda: fleet.totals()["rollout/worker_deaths"] == before + deaths, f"the fleet misses {deaths} workers"
            )
        except BaseException as error:
            faults.append(error)
        finally:
            gate.open()

    gate.shut()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        gate.open()
        thread.join()
    assert not faults, faults
