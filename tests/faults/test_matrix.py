"""Rows of the fault matrix (docs/reliability.md) on `spearrl train` as a process that SPEARRL_FAULT strikes."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from tests.faults.spearrl_process import events, resume, spearrl, train

pytestmark = pytest.mark.faults
LAST = 4


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = train(model, folder)
    assert done.returncode == 0, done.stderr
    return state(folder / "run")


def state(run: Path) -> str:
    """Weights, optimiser, buffers and counters after the last step."""
    folder, digest = run / "checkpoints" / f"step-{LAST:06d}", hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("training/*")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    "fault",
    [
        "ckpt.mid_file:kill9@3",  # in the middle of a save
        "ckpt.before_rename:kill9@3",
        "ckpt.after_rename:kill9@4",
        "learner.backward:kill9@6",  # in an update
        "env.step:kill9@90",  # in a rollout
    ],
)
def test_row_1_kill_9_and_resume_equal_an_undisturbed_run(model, tmp_path, undisturbed, fault):
    killed = train(model, tmp_path, fault=fault)
    assert killed.returncode == -9, killed.stderr
    done = resume(tmp_path / "run")
    assert done.returncode == 0 and "resumed from" in done.stderr, done.stderr
    assert state(tmp_path / "run") == undisturbed
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_row_4_a_full_disk_costs_one_checkpoint(model, tmp_path, undisturbed):
    done = train(model, tmp_path, fault="ckpt.mid_file:enospc@3")
    assert done.returncode == 0 and "ENOSPC" in done.stderr and "next try at step" in done.stderr, done.stderr
    assert state(tmp_path / "run") == undisturbed


def test_row_4_three_failed_saves_in_a_row_end_the_run(model, tmp_path):
    done = train(model, tmp_path, "run.steps=9", fault="ckpt.before_rename:enospc@2+")
    assert done.returncode == 5, done.stderr
    assert resume(tmp_path / "run", "run.steps=4").returncode == 0


def test_row_5_logs_that_cannot_be_written_change_nothing(model, tmp_path, undisturbed):
    done = train(model, tmp_path, fault="log.write:enospc@4+")
    assert done.returncode == 0, done.stderr
    assert state(tmp_path / "run") == undisturbed


def test_row_14_an_environment_that_always_raises_ends_the_run(model, tmp_path):
    done = train(model, tmp_path, fault="env.step:raise@1+")
    assert done.returncode == 6 and "SPEARRL_FAULT at env.step" in done.stderr, done.stderr
    assert "done:" not in done.stdout and "resume the run" in done.stderr


def test_rows_14_and_25_single_errors_cost_nothing_but_their_episode(model, tmp_path):
    done = train(model, tmp_path, fault="env.step:raise@7,env.reset:raise@20,engine.generate:raise@30")
    assert done.returncode == 0 and done.stderr.count("fault on purpose") == 3, done.stderr
    assert len(events(tmp_path / "run", "step")) == LAST


def test_row_16_workers_that_die_again_and_again_end_the_run(model, tmp_path):
    rogue = ("env.name=tests.support.faulty_envs:Rogue", "rollout.env_workers=1", "rollout.env_restarts=2")
    done = train(model, tmp_path, *rogue, "eval.split=train", fault="env.step:kill9@2+")
    assert done.returncode == 6 and "SIGKILL" in done.stderr and "replaced 2 times" in done.stderr, done.stderr


def test_row_17_a_reward_that_is_not_a_number_names_its_place(model, tmp_path):
    done = train(model, tmp_path, fault="env.step:nan@5")
    assert done.returncode == 2 and "reward nan" in done.stderr and "seed" in done.stderr, done.stderr


def test_row_27_log_probabilities_that_are_not_finite_are_left_out(model, tmp_path):
    done = train(model, tmp_path, fault="engine.generate:nan@5+")
    assert done.returncode == 0, done.stderr
    counts = [line.get("guard/nonfinite_rollout_logprobs", 0) for line in events(tmp_path / "run", "step")]
    assert all(counts)


def test_row_28_a_loss_that_is_never_finite_ends_the_run_with_the_batch(model, tmp_path):
    done = train(model, tmp_path, "run.steps=9", fault="learner.backward:nan@1+")
    assert done.returncode == 7 and "bad_batch/step-" in done.stderr, done.stderr
    words = done.stderr.rpartition("spearrl replay ")[2].splitlines()[0].split()
    replayed = spearrl(sys.executable, "-m", "spearrl", "replay", *words)
    assert replayed.returncode == 0 and "everything is finite with these weights" in replayed.stdout
