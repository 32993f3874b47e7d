"""Learner processes that die, hang, fail or never start: rank 0 says which, in time, and leaves nobody behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from spearrl.errors import ConfigError, WorkerError
from spearrl.learner import DeepSpeedLearner
from spearrl.learner.deepspeed.signing import BYTES, VARIABLE, Signer
from spearrl.losses import Objective
from tests.engines.test_deepspeed import batches_without_critic, saved, settings
from tests.learner.test_learner import tiny
from tests.support.gates import wait_gone

ROOT = Path(__file__).resolve().parents[2]
LONG_S, SHORT_S = 240.0, 20.0  # learner.timeout_s


def loss_that_fails_on_rank_1(
    logprobs, old_logprobs, advantages, action_mask, *, aggregation, horizon, denominator, drop
):
    if os.environ.get("RANK") == "1":
        raise ValueError("no such luck")
    return -(logprobs * advantages).sum() / denominator, {}


def loss_that_wants_determinism(
    logprobs, old_logprobs, advantages, action_mask, *, aggregation, horizon, denominator, drop
):
    if not torch.are_deterministic_algorithms_enabled():
        raise ValueError("rank " + os.environ.get("RANK", "0"))
    return -(logprobs * advantages).sum() / denominator, {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tiny(), tmp_path_factory.mktemp("policy"))


@pytest.fixture
def learner(folder):
    started = DeepSpeedLearner(folder, settings(3, processes=2, timeout_s=LONG_S))
    yield started
    started.close()
    assert started.ranks.children[1].process.returncode is not None, "a process is left behind"


def update(learner: DeepSpeedLearner, objective: Objective) -> None:
    learner.update(batches_without_critic(learner)[0], None, gamma=0.0, objectives=[objective], seed=0)


def test_a_killed_rank_is_named_at_once(learner):
    update(learner, Objective("policy"))
    os.kill(learner.ranks.children[1].process.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1: the process ended during .*signal SIGKILL"):
        update(learner, Objective("policy"))
    assert time.monotonic() - started < LONG_S / 2
    with pytest.raises(WorkerError, match="are gone"):
        learner.probe([1, 2])


def test_a_rank_that_fails_says_why(learner):
    with pytest.raises(WorkerError, match="rank 1: 'step' failed: ValueError: no such luck"):
        update(learner, Objective("policy", surrogate="tests.engines.test_deepspeed_faults:loss_that_fails_on_rank_1"))


def test_what_torch_is_asked_for_holds_on_every_rank(folder):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        learner = DeepSpeedLearner(folder, settings(3, processes=2, timeout_s=LONG_S))
        update(
            learner, Objective("policy", surrogate="tests.engines.test_deepspeed_faults:loss_that_wants_determinism")
        )
        learner.close()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_rank_that_hangs_is_named_within_the_bound(folder):
    learner = DeepSpeedLearner(folder, settings(2, processes=2, timeout_s=SHORT_S))
    os.kill(learner.ranks.children[1].process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1: the process does not respond \(command 'probe'\)"):
        learner.probe([1, 2, 3])
    assert time.monotonic() - started < SHORT_S + LONG_S / 2
    assert learner.ranks.children[1].process.returncode == -signal.SIGKILL


def test_a_rank_that_cannot_start_is_named(folder):
    broken = [{}, {"PYTHONPATH": "", "PYTHONHOME": "/nowhere"}]
    with pytest.raises(WorkerError, match="rank 1: the process ended: exit code"):
        DeepSpeedLearner(folder, settings(3, processes=2), environments=broken)


def test_a_model_that_cannot_be_trained_is_told_as_by_one_process(tmp_path):
    model = tiny()
    path = saved(model, tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no causal language model"):
        DeepSpeedLearner(path, settings(3, processes=2))


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_weights_are_not_made_up(tmp_path, change):
    """transformers may fill what a sharded model lacks with random numbers."""
    from safetensors.torch import load_file, save_file

    path, name = saved(tiny(), tmp_path), "model.layers.1.mlp.up_proj.weight"
    stored = load_file(path / "model.safetensors")
    stored = {key: tensor for key, tensor in stored.items() if key != name} | (
        {name: torch.zeros(3, 3)} if change == "misshapen" else {}
    )
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="up_proj"):
        DeepSpeedLearner(path, settings(3))


def test_ranks_end_with_the_trainer(folder):
    code = f"""
import time
from spearrl.learner import DeepSpeedLearner
from tests.engines.test_deepspeed import settings
learner = DeepSpeedLearner({str(folder)!r}, settings(2, processes=2))
print(learner.ranks.children[1].process.pid, flush=True)
time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    trainer = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    pid = _first_number(trainer)
    trainer.kill()
    trainer.wait()
    wait_gone([pid])


def test_a_stranger_who_reaches_the_store_commands_nobody(learner):
    """Whatever it writes: the next command, without a seal, with another's or one of its own; an error."""
    port, next_ = learner.ranks.group.store.port, learner.ranks.commands
    stranger = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    order = json.dumps({"name": "close"})
    said = stranger.get("command/0")
    assert b'"build"' in said and learner.ranks.signer.sound("command/0", said[:BYTES], said[BYTES:])
    for value in (order, said, Signer("guess").seal(f"command/{next_}", order.encode()) + order.encode()):
        stranger.set(f"command/{next_}", value)
        time.sleep(0.3)
        assert learner.ranks.children[1].process.poll() is None
    stranger.set("error/1", "I give up")
    ids = [3, 1, 4]
    assert learner.probe(ids) == learner.probe(ids)
    stranger.set(f"command/{learner.ranks.commands}", order)
    time.sleep(0.3)
    assert learner.ranks.children[1].process.poll() is None and learner.probe(ids)


def test_a_message_that_is_not_signed_is_refused(learner, monkeypatch):
    """Of an answer that comes over gloo."""
    monkeypatch.setattr(learner.ranks.group, "signer", Signer("another"))
    with pytest.raises(WorkerError, match="learner rank 1: a message lacks this run's signature"):
        learner.probe([1, 2])


def test_the_secret_is_on_no_command_line(learner):
    child = learner.ranks.children[1].process
    secret = dict(
        line.split("=", 1) for line in Path(f"/proc/{child.pid}/environ").read_text().split("\0") if "=" in line
    )[VARIABLE]
    assert len(secret) == 64 and VARIABLE not in os.environ
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            assert secret not in line.read_text(errors="replace")


def test_a_trainer_that_waits_on_its_gpu_for_a_dead_rank_ends_and_says_so():
    """No error reaches a process that waits for a collective on a GPU; here it sleeps instead."""
    code = """
import os, time
from spearrl.learner.deepspeed.ranks import Ranks
ranks = Ranks(lambda name, common, part: time.sleep(600), 2, device="cpu", timeout_s=300)
os.kill(ranks.children[1].process.pid, 9)
ranks.call("step")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == WorkerError.exit_code
    assert "learner rank 1: the process ended during 'step': signal SIGKILL" in done.stderr


def _first_number(process: subprocess.Popen[str]) -> int:
    for line in iter(process.stdout.readline, ""):
        if line.strip().isdigit():
            return int(line)
    raise AssertionError("the trainer did not start")


SCRIPT = """
import os, sys
from spearrl.learner import DeepSpeedLearner, serve
from spearrl.processes import under_launcher
from tests.engines.test_deepspeed import settings
assert under_launcher()
if os.environ["RANK"] != "0":
    raise SystemExit(serve())
learner = DeepSpeedLearner(sys.argv[1], settings(3))
print("size", learner.ranks.size, "probe", len(learner.probe([1, 2, 3])))
learner.close()
"""


def test_under_torchrun_the_ranks_are_those_that_it_started(folder, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "train.py"),
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "size 2 probe 2" in done.stdout


def test_a_second_one_beside_it_is_refused(learner, folder):
    with pytest.raises(ConfigError, match="close it"):
        DeepSpeedLearner(folder, settings(3))
    assert len(learner.probe([1, 2, 3])) == 2


def test_closing_leaves_room_for_another(folder):
    logprobs = []
    for processes in (1, 2):
        learner = DeepSpeedLearner(folder, settings(3, processes=processes))
        logprobs.append(torch.tensor(learner.probe([4, 8, 15, 16])))
        learner.close()
        learner.close()
        assert all(child.process.returncode == 0 for child in learner.ranks.children.values())
    torch.testing.assert_close(*logprobs)
