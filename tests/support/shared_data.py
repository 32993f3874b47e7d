"""Where tests find the shared reference data; cases that need it are skipped where it is absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(os.environ.get("SPEARRL_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))


def shared(relative: str) -> Path:
    """Path of a file in the shared folder; skips the calling test if it is not there."""
    path = ROOT / relative
    if not path.exists():
        pytest.skip(f"reference data not found at {path} (set SPEARRL_SHARED)")
    return path


def golden(name: str) -> Any:
    """A golden JSON file with its non-finite numbers restored."""
    return _restore(json.loads(shared(f"golden/{name}.json").read_text()))


def _restore(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restore(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
