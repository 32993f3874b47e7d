"""`spearrl train` as a process that a fault strikes: a few steps of the Fetch toy from a cold-started model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from spearrl.sync.buckets import folder_name
from tests.support.small_run import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("sft.enabled=false", "eval.every=0", "eval.tasks=2", "run.steps=4", "run.checkpoint_every=1", "run.keep=2")


def command(model: Path, folder: Path, *changes: str, name: str = "run") -> list[str]:
    settings = (*SETTINGS, *QUICK, f"model.path={model}", f"run.output_dir={folder}", f"run.name={name}")
    spearrl = [sys.executable, "-m", "spearrl", "train", "--preset", "tiny", "--algo", "grpo+sil"]
    return [*spearrl, *settings, "rollout.temperature=1.5", *changes]


def spearrl(*words: str, fault: str = "", limit_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run it to its end, with SPEARRL_FAULT=fault."""
    environment = {**os.environ, "SPEARRL_FAULT": fault, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)


def train(model: Path, folder: Path, *changes: str, fault: str = "", name: str = "run"):
    return spearrl(*command(model, folder, *changes, name=name), fault=fault)


def resume(run: Path, *changes: str, fault: str = ""):
    again = "env.name=tests.support.toy_envs:Fetch"  # a run's directory may be a stranger's
    return spearrl(sys.executable, "-m", "spearrl", "train", "--resume", str(run), again, *changes, fault=fault)


def events(run: Path, kind: str) -> list[dict]:
    lines = [line for line in (run / "events.jsonl").read_text().splitlines() if line.endswith("}")]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def shared_memory(run: Path) -> bool:
    """Whether this run has some; other tests have theirs at the same time."""
    return Path("/dev/shm", folder_name(run)).exists()
