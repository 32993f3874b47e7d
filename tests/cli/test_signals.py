"""Signals to real processes: what is saved, how soon they end, and with which code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from spearrl.run.checkpoint import defect, newest_checkpoint
from tests.support.small_run import SETTINGS

ROOT = Path(__file__).resolve().parents[2]


def started(folder: Path, *words: str, shown: str, settings: Sequence[str] = ()) -> subprocess.Popen:
    """`spearrl train` once a line of its standard error begins with `shown`."""
    settings = [*SETTINGS, f"run.output_dir={folder}", "run.name=r", "run.steps=4000", "eval.every=0", *settings]
    command = [sys.executable, "-m", "spearrl", "train", "--preset", "tiny", *words, *settings]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (line := process.stderr.readline()).lstrip().startswith(shown):
        assert process.poll() is None, line
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_scheduler_that_asks_finds_the_step_saved(model, tmp_path, number):
    process = started(tmp_path, "--model", str(model), shown="3/", settings=["sft.enabled=false"])
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "within 25 s" in rest and "Continue with" in rest
    path, problems = newest_checkpoint(tmp_path / "r/checkpoints")
    assert int(path.name[5:]) >= 3 and problems == []


def test_a_signal_in_a_cold_start_leaves_nothing(tmp_path):
    process = started(tmp_path, shown="cold start", settings=["sft.epochs=400"])
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped; nothing was begun" in rest and "Traceback" not in rest
    assert not (tmp_path / "r").exists()


def hung(folder: Path, model: Path, *words: str) -> subprocess.Popen:
    """A run whose environment never comes back from its second step."""
    settings = ["sft.enabled=false", "env.name=tests.support.faulty_envs:Stuck", "run.checkpoint_every=1"]
    process = started(folder, "--model", str(model), *words, shown="1/", settings=settings)
    time.sleep(1)
    return process


def test_a_second_ctrl_c_ends_a_run_that_hangs(model, tmp_path):
    process = hung(tmp_path, model)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert time.monotonic() - begun < 3.0 and process.returncode == 130  # 2 s where nothing else runs
    assert defect(newest_checkpoint(tmp_path / "r/checkpoints")[0]) is None


def test_a_step_that_does_not_end_within_the_grace_is_abandoned(model, tmp_path):
    process = hung(tmp_path, model, "--grace", "1")
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=10)
    assert 1.0 < time.monotonic() - begun < 4.0 and process.returncode == 143
    assert "not saved within 1 s; the last checkpoint stays" in rest
    assert defect(newest_checkpoint(tmp_path / "r/checkpoints")[0]) is None


@pytest.mark.parametrize("closed", [False, True])
def test_standard_error_that_takes_nothing_ends_nothing(model, tmp_path, closed):
    settings = [*SETTINGS, f"run.output_dir={tmp_path}", "run.name=r", "run.steps=2", "sft.enabled=false"]
    command = [sys.executable, "-m", "spearrl", "train", "--preset", "tiny", "--model", str(model), *settings]
    if closed:
        done = subprocess.run(
            ["sh", "-c", 'exec "$0" "$@" 2>&-', *command], cwd=ROOT, stdout=subprocess.PIPE, timeout=120
        )
    else:
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=full, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(b"done: ")
    assert os.path.getsize(tmp_path / "r/lock") < 200  # nothing was printed into a file of the run
    assert closed or "written to standard error" in (tmp_path / "r/events.jsonl").read_text()


def test_standard_output_that_is_full_is_one_message(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "spearrl", "config", "show", "--preset", "tiny"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 5 and "ENOSPC" in done.stderr and "Traceback" not in done.stderr
