"""The GPU script end to end on processors, with toy shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("deepspeed")
ROOT = Path(__file__).resolve().parents[2]


def test_the_script_runs_here(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--tiny",
        "--device",
        "cpu",
        "--only",
        "parity fp32",
        "transfer",
        "learner zero3 0.5b",
        "sleep",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "g.json")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["check"]: row for row in json.loads((tmp_path / "g.json").read_text())["checks"]}
    assert rows["parity fp32"]["figures"]["largest gap"] <= 1e-4 and rows["parity fp32"]["figures"]["tokens"] == 64
    sent = rows["transfer shared_memory"]["figures"]
    assert sent["GiB"] > 0 and sent["probe gap"] <= 1e-3 and sent["sent again"] == 0
    assert rows["learner zero3 0.5b"]["figures"]["ranks"] == 2
    assert {name for name, row in rows.items() if row["result"] == "not run"} == {
        "transfer ipc",
        "transfer nccl",
        "sleep",
    }
