"""No line of prose or of code is wider than the page."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
CODE = sorted(
    path for folder in ("spearrl", "tests", "benchmarks", "examples") for path in ROOT.glob(f"{folder}/**/*.py")
)
COLUMNS = 120
WIDE_TABLES = {"docs/config.md"}  # generated, a row for every setting; Markdown cannot break a table's row


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_are_120_columns_wide(path: Path):
    tables = str(path.relative_to(ROOT)) in WIDE_TABLES
    wide = [
        f"{path.name}:{number}: {len(line)} columns"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > COLUMNS and not (tables and line.startswith("|"))
    ]
    assert not wide, "\n".join(wide)
