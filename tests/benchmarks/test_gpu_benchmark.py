"""benchmarks/gpu where there is no GPU: it says so; a check that fails or hangs is a row of the table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as script
from benchmarks.gpu.checks import CHECKS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert script.main([]) == 3
    said = capsys.readouterr()
    assert said.out == "" and "nothing was measured" in said.err


def test_what_holds_what_cannot_run_and_what_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # every check is a process of its own, which finds the benchmarks there
    engines = importlib.util.find_spec("vllm") is not None  # without vLLM its check fails, and no other
    names = ["learner local", "throughput 0.5b", "sleep", "transfer nccl"]
    code = script.main(["--tiny", "--device", "cpu", "--only", *names, "--json", str(tmp_path / "g.json")])
    table = capsys.readouterr().out
    assert code == (0 if engines else 1), table
    report = json.loads((tmp_path / "g.json").read_text())
    rows = {row["check"]: row for row in report["checks"]}
    assert rows["learner local 0.5b"]["figures"]["tokens/s"] > 0 and report["machine"]["torch"] == torch.__version__
    assert rows["sleep"]["result"] == "not run" and rows["transfer nccl"]["error"] == "needs 2 GPUs, there are 0"
    assert engines or "| throughput 0.5b | FAILED | ConfigError" in table
    assert len(table.splitlines()) == 2 + 2 + 4
    with pytest.raises(SystemExit, match="no check begins with zzz"):
        script.run_all(argparse.Namespace(only=["zzz"]), 0)


def test_a_check_that_hangs_is_ended(monkeypatch, tmp_path):
    def hung(command, **options):
        return started(
            [sys.executable, "-c", "import time; print('still loading', flush=True); time.sleep(600)"], **options
        )

    started = subprocess.Popen
    monkeypatch.setattr(script.subprocess, "Popen", hung)
    begun = time.monotonic()
    row = script.run_check(argparse.Namespace(device="cpu", tiny=True, folder=str(tmp_path), timeout=2.0), "sleep")
    assert row["result"] == "FAILED" and row["error"] == "no result within 2 s" and row["log"] == ["still loading"]
    assert time.monotonic() - begun < 30 and "| sleep | FAILED | no result within 2 s |" in script.line(row)


def test_every_check_has_a_figure_to_hold():
    assert {check.gpus for check in CHECKS.values()} == {0, 1, 2} and len(CHECKS) == 11
