"""Whole runs on other engines and learners, through the command line: what the README promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gates import Gate, until, wait_gone

pytest.importorskip("vllm")
pytest.importorskip("deepspeed")

ROOT = Path(__file__).resolve().parents[2]
ENGINES = [
    "rollout.engine=vllm",
    "learner.backend=deepspeed",
    "learner.zero_stage=3",
    "learner.processes=2",
    "learner.precision=fp32",
]
SHORT = [
    "sft.episodes=200",
    "sft.epochs=1",
    "eval.tasks=8",
    "eval.every=0",
    "rollout.groups_per_step=4",
    "rollout.group_size=4",
    "run.threads=1",
    "run.tensorboard=false",
]
GAP = 1e-4  # nats, fp32


def spearrl(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "spearrl", *words]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def train(folder: Path, name: str, *settings: str) -> list[dict]:
    done = spearrl(
        folder,
        "train",
        "--env",
        "webshop",
        "--algo",
        "grpo+spear",
        f"run.output_dir={folder}",
        f"run.name={name}",
        *SHORT,
        *settings,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return events(folder / name)


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def steps(logged: list[dict]) -> list[dict]:
    return [event for event in logged if event["event"] == "step"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "whole", "run.steps=3", *ENGINES)
    return folder / "whole"


def test_vllm_and_zero_3_train_and_agree(trained: Path):
    logged = steps(events(trained))
    assert [event["step"] for event in logged] == [1, 2, 3]
    for event in logged:
        assert event["policy/updates"] + event["policy/without_signal"] >= 1 and event["policy/skipped"] == 0
        assert event["policy/sampler_gap_max"] <= GAP, "engine and learner give a token different log-probabilities"
        assert event["sync/bytes"] > 0 and event["sync/probe_gap"] <= GAP and event["sync/resent"] == 0
        assert event["policy/staleness_max"] == 0
    assert not [event for event in events(trained) if event["event"] == "warning" and "sent again" in event["text"]]


def test_such_a_run_resumes_and_its_checkpoint_is_a_plain_model(trained: Path):
    done = spearrl(trained, "train", "--resume", str(trained), "run.steps=4")
    assert done.returncode == 0, done.stderr[-3000:]
    last = steps(events(trained))[-1]
    assert last["step"] == 4 and last["policy/sampler_gap_max"] <= GAP
    evaluated = spearrl(trained, "eval", str(trained), "rollout.engine=local", "eval.tasks=4", "--json")
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert json.loads(evaluated.stdout)["success"]


def test_two_workers_run_ahead_and_stay_within_the_bound(tmp_path: Path):
    settings = [
        "rollout.engine=vllm",
        "rollout.workers=2",
        "rollout.max_staleness=1",
        "learner.precision=fp32",
        "run.steps=4",
    ]
    logged = steps(train(tmp_path, "ahead", *settings))
    ages = [event["policy/staleness_max"] for event in logged]
    assert len(logged) == 4 and max(ages) == 1, ages
    assert ages[0] == 0 and logged[0]["policy/sampler_gap_max"] <= GAP
    assert all(
        event["policy/updates"] + event["policy/without_signal"] >= 1 and event["sync/probe_gap"] <= GAP
        for event in logged
    )
    config = (tmp_path / "ahead" / "config.toml").read_text()
    assert 'mode = "tis"' in config


def test_a_worker_killed_in_mid_episode_costs_nothing(tmp_path: Path):
    """kill -9 of a worker while it plays: its episodes are played by others, with the same seeds, and every step is
    whole.
    """
    folder = tmp_path / "killed"
    gate = Gate(tmp_path / "gate")
    command = [
        sys.executable,
        "-m",
        "spearrl",
        "train",
        "--env",
        "tests.support.faulty_envs:Shop",
        "--algo",
        "grpo+spear",
        f"run.output_dir={tmp_path}",
        "run.name=killed",
    ]
    command += [
        *SHORT,
        f"env.options.gate={gate.folder}",
        "rollout.engine=vllm",
        "rollout.workers=2",
        "learner.precision=fp32",
        "run.steps=5",
    ]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    def made() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        return (folder / "events.jsonl").exists() and bool(steps(events(folder)))

    try:
        until(made, "a step is made", seconds=450)
        gate.shut()
        victim = _workers(process.pid)[0]
        gate.reached_by([victim])
        os.kill(victim, signal.SIGKILL)
        wait_gone([victim])
        gate.open()
        process.wait(480)
    finally:
        process.kill()
    assert process.returncode == 0, log.read_text()[-3000:]
    logged = steps(events(folder))
    assert [event["step"] for event in logged] == [1, 2, 3, 4, 5]
    assert sum(event["rollout/worker_deaths"] for event in logged) == 1
    assert any("signal SIGKILL" in event.get("text", "") for event in events(folder)), (
        "the run's own record does not tell"
    )
    assert all(
        event["rollout/errors"] == 0
        and event["policy/staleness_max"] == 0
        and event.get("policy/sampler_gap_max", 0.0) <= GAP  # none where no row had a pass
        for event in logged
    )


def _workers(parent: int) -> list[int]:
    """Rollout workers of a trainer."""
    numbers = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words, status = (folder / "cmdline").read_bytes().split(b"\0"), (folder / "stat").read_text()
            except OSError:
                continue
            if b"spearrl.launch.worker_process" in words and int(status.rsplit(")", 1)[1].split()[1]) == parent:
                numbers.append(int(folder.name))
    return sorted(numbers)
