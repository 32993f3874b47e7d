"""tests/golden/README.md says of every file where it comes from and which function answers it."""

from __future__ import annotations

import pkgutil
import re

from tests.support.shared_data import GOLDEN

README = (GOLDEN / "README.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^- (`.*(?:\n  .*)*)", README[README.index("## Which function") :], re.MULTILINE)


def test_every_file_has_its_entry_and_every_entry_its_file():
    named = {name for entry in ENTRIES for name in re.findall(r"`([\w.]+)`", entry.split(": ")[0].split(":\n")[0])}
    files = {path.name.removesuffix(".gz").removesuffix(".json") for path in GOLDEN.glob("*.gz")}
    assert named == files


def test_the_functions_that_answer_exist():
    names = [name for entry in ENTRIES for name in re.findall(r"`(spearrl\.[\w.]+)`", entry)]
    assert len(names) > 30
    for name in names:
        pkgutil.resolve_name(name)


def test_the_files_stay_small():
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 1_500_000
