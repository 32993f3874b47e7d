"""`spearrl train` under torchrun and the deepspeed launcher, two ranks on processors: it trains, it stops gently, and
nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.gates import LIMIT_S, until

psutil = pytest.importorskip("psutil")
pytest.importorskip("deepspeed")

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "spearrl")
DEEPSPEED = (
    sys.executable,
    "-m",
    "deepspeed.launcher.runner",
    "--no_local_rank",
    "--num_accelerators",
    "2",
    "--module",
    "spearrl",
)
TOY = (
    "env.name=tests.support.toy_envs:Fetch",
    "model.tiny.layers=1",
    "model.tiny.hidden_size=32",
    "model.tiny.heads=1",
    "model.tiny.feed_forward=64",
    "model.tiny.vocab_size=400",
    "rollout.groups_per_step=2",
    "rollout.group_size=2",
    "rollout.max_reply_tokens=8",
    "rollout.context_tokens=128",
    "learner.precision=fp32",
    "learner.timeout_s=120",
    "sft.enabled=false",
    "eval.tasks=2",
    "eval.every=0",
    "run.threads=1",
    "run.tensorboard=false",
    "run.name=r",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def launched(command: tuple[str, ...], folder: Path, *settings: str) -> Iterator[tuple[subprocess.Popen, Path]]:
    """The launcher's process, and the file its output goes to. Whatever is left at the end is killed."""
    log = folder / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with log.open("w") as output:
        port = ("--master_port", str(free_port())) if command is DEEPSPEED else ()
        arguments = [
            *command[:3],
            *port,
            *command[3:],
            "train",
            "--preset",
            "tiny",
            *TOY,
            f"run.output_dir={folder}",
            *settings,
        ]
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    mine = psutil.Process(process.pid)
    everyone: list[psutil.Process] = []
    try:
        yield process, log
    finally:
        everyone = mine.children(recursive=True) if mine.is_running() else []
        for each in (mine, *everyone):
            if each.is_running():
                each.kill()
        process.wait(30)


def ranks(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """The ranks that a launcher started, by number."""
    ranks = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        words = child.cmdline()
        if (
            "train" in words
            and "RANK" in child.environ()
            and not any("torch.distributed.run" in word or "launcher" in word for word in words)
        ):
            ranks.setdefault(int(child.environ()["RANK"]), child)
    return ranks


def until_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Wait for a step's event."""
    events = folder / "r" / "events.jsonl"

    def made() -> bool:
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        return events.exists() and f'"event": "step", "step": {step},' in events.read_text()

    until(made, f"step {step} is made", seconds=300)


def all_gone(processes: dict[int, psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes.values(), timeout=LIMIT_S)
    return not alive


@pytest.mark.parametrize("command", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_ranks_train_together(command, tmp_path):
    with launched(command, tmp_path, "run.steps=2") as (process, log):
        assert process.wait(300) == 0, log.read_text()[-3000:]
    text = log.read_text()
    events = [json.loads(line) for line in (tmp_path / "r/events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2] and all(
        event["policy/updates"] + event["policy/without_signal"] == 2 and event["policy/skipped"] == 0
        for event in steps
    )
    assert text.count("2 ranks") == 1 and text.count("done: ") == 1  # rank 1 prints nothing of its own
    config = (tmp_path / "r/config.toml").read_text()
    assert 'backend = "deepspeed"' in config and "processes = 2" in config


def test_a_stop_is_gentle(tmp_path):
    with launched(TORCHRUN, tmp_path, "run.steps=4000") as (process, log):
        until_step(process, tmp_path, 1)
        both = ranks(process)
        assert sorted(both) == [0, 1]
        process.send_signal(signal.SIGTERM)  # torchrun hands it to every rank
        assert process.wait(300) != 0 and all_gone(both)
    text = log.read_text()
    assert "stopped after step" in text and "spearrl train --resume" in text, text[-3000:]
    assert any((tmp_path / "r/checkpoints").glob("step-00000[1-9]*"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run(victim, tmp_path):
    with launched(TORCHRUN, tmp_path, "run.steps=4000") as (process, log):
        until_step(process, tmp_path, 1)
        both = ranks(process)
        both[victim].send_signal(signal.SIGKILL)
        assert process.wait(300) != 0 and all_gone(both)
    if victim == 1:
        assert "learner rank 1" in log.read_text(), log.read_text()[-3000:]


def test_a_wrong_setting_is_told_once(tmp_path):
    with launched(TORCHRUN, tmp_path, "run.stepz=2") as (process, log):
        assert (
            process.wait(300) != 0
        )  # the other rank does not wait for a trainer that will not come: that would have no end
    assert log.read_text().count("did you mean run.steps") == 1 and not (tmp_path / "r").exists()
