"""What tests compare with: golden files, which travel with the tests, and the shared data sets, which do not."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SHARED = Path(os.environ.get("SPEARRL_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))


def golden(name: str) -> Any:
    """The numbers of tests/golden/NAME.json.gz, with those that are not finite restored."""
    return _restore(json.loads("\n".join(read_lines(GOLDEN / f"{name}.json.gz"))))


def golden_lines(name: str) -> list[str]:
    """The lines of a recording in tests/golden, for example "webshop_episodes.jsonl"."""
    return read_lines(GOLDEN / f"{name}.gz")


def shared(relative: str) -> Path:
    """Path of a file or folder of the shared data; skips the calling test if it is not there."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"reference data not found at {path} (set SPEARRL_SHARED)")
    return path


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, packed by gzip or xz or not, without their ends. Only a newline ends a line."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8", newline="\n") as lines:
        return [line.rstrip("\n") for line in lines]


def _restore(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restore(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
