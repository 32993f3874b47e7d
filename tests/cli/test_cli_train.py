"""The command line as a user types it: sft, train, resume, eval, in processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.small_run import SETTINGS

ROOT = Path(__file__).resolve().parents[2]


def spearrl(*args: str, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "spearrl", *args], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def test_sft_then_train_then_eval(tmp_path):
    model = tmp_path / "model"
    done = spearrl("sft", "--preset", "tiny", *SETTINGS, "sft.epochs=1", "sft.episodes=100", "--output", str(model))
    assert "success" in done.stdout and (model / "model.safetensors").exists()

    settings = [*SETTINGS, f"run.output_dir={tmp_path}", "run.name=r", "sft.enabled=false"]
    done = spearrl("train", "--preset", "tiny", "--model", str(model), "--algo", "grpo+spear", *settings)
    assert "done" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.lstrip().startswith(("1/4", "2/4", "3/4", "4/4"))]
    assert len(lines) == 4

    run = tmp_path / "r"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    last = [e for e in events if e["event"] == "eval"][-1]
    result = json.loads(spearrl("eval", str(run), "--split", "val", SETTINGS[0], "--json").stdout)
    assert result["panel"] == last["panel"] and result["success"]["rate"] == last["success"]
    assert result["success"]["low"] <= result["success"]["rate"] <= result["success"]["high"]
    episode = json.loads((run / "trajectories/step-000001.jsonl").read_text().splitlines()[0])
    assert episode["turns"][0]["observation"] and "reply" in episode["turns"][0]


def begun(model: Path, folder: Path, line: str) -> subprocess.Popen:
    """A long run from a model directory, once its progress shows the line."""
    settings = (f"run.output_dir={folder}", "run.name=r", "run.steps=4000", "sft.enabled=false", "eval.tasks=2")
    command = [
        sys.executable,
        "-m",
        "spearrl",
        "train",
        "--preset",
        "tiny",
        "--model",
        str(model),
        *SETTINGS,
        *settings,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (shown := process.stderr.readline()).lstrip().startswith(line):
        assert process.poll() is None, shown
    return process


def test_ctrl_c_saves_and_the_run_resumes(model, tmp_path):
    process = begun(model, tmp_path, "3/")
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=300)
    assert process.returncode == 130 and "Continue with" in rest
    done = spearrl("train", "--resume", str(tmp_path / "r"), SETTINGS[0], "run.steps=6")
    assert "resumed from" in done.stderr and "6/6" in done.stderr


def test_kill_9_loses_nothing_before_the_last_checkpoint(model, tmp_path):
    process = begun(model, tmp_path, "5/")
    process.kill()
    process.communicate()
    done = spearrl("train", "--resume", str(tmp_path / "r"), SETTINGS[0], "run.steps=6")
    assert "resumed from" in done.stderr and "6/6" in done.stderr


def test_errors_are_one_clear_message(tmp_path):
    done = spearrl("train", "--env", "no.such:Thing", f"run.output_dir={tmp_path}", check=False)
    assert done.returncode == 2 and "no.such:Thing" in done.stderr and "Traceback" not in done.stderr
    done = spearrl("eval", str(tmp_path / "nothing"), check=False)
    assert done.returncode == 3 and "fix:" in done.stderr
    done = spearrl("train", "--resume", str(tmp_path / "nothing"), check=False)
    assert done.returncode in (2, 3) and "Traceback" not in done.stderr
