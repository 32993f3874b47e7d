"""What tests of several folders begin with."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from tests.support import short_runs


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the small model after its cold start: made once, also where several processes run the tests."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    note = folder / "cold-started"
    with open(folder / "cold-started.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not note.exists():
            note.write_text(str(short_runs.cold_started(folder / "cold")))
    return Path(note.read_text())
