"""Rows of the fault matrix that need no injection, and the table in docs/reliability.md itself."""

from __future__ import annotations

import re

from tests.faults.spearrl_process import ROOT

PAGE = ROOT / "docs" / "reliability.md"


def test_every_row_has_a_test_that_exists():
    rows = re.findall(r"^(\d+)\. .*\n((?:    .*\n)+)", PAGE.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 32))
    for number, lines in rows:
        tests = re.findall(r"^    - `(tests/[\w/]+\.py)::(\w+)`$", lines, re.MULTILINE)
        assert tests, f"row {number} has no test"
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text(), f"row {number}: {file}::{name}"


def test_row_10_only_what_is_shown_reads_the_wall_clock():
    """Deadlines and durations are of time.monotonic: a clock that is set changes none of them."""
    readers = [path for path in (ROOT / "spearrl").rglob("*.py") if re.search(r"\btime\.time\(", path.read_text())]
    assert {path.parent.name for path in readers} <= {"run"}, readers
