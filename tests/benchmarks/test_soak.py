"""make soak and kill_saves, for a minute and for two kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.faults.spearrl_process import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def result_of(*words: str) -> dict:
    """In a process of its own, since it forks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_minute_of_random_faults_loses_nothing_that_was_promised():
    result = result_of("benchmarks.soak", "--minutes", "1")
    assert result["faults"] >= 4 and result["final state of exact equal"] and not result["promises broken"]


def test_kills_while_saving_leave_good_checkpoints_and_the_same_end():
    result = result_of("benchmarks.kill_saves", "--kills", "2")
    assert result["kills"] == result["good loads"] == 2 and result["final state equal"]
