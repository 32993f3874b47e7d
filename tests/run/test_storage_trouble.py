"""A disk that is full, logs that cannot be written, files that are something else: training goes on, or one message."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable

import pytest
import torch

from spearrl.cli.main import main
from spearrl.errors import ConfigError, StorageError
from spearrl.faults import VARIABLE, planned
from spearrl.models import load_model
from spearrl.run.checkpoint import checkpoints
from spearrl.run.events import read_events
from spearrl.trainer import Trainer
from tests.support.short_runs import from_model, run
from tests.support.small_run import fingerprint

SAVING = ("run.steps=4", "run.checkpoint_every=1")


@pytest.fixture
def fault(monkeypatch) -> Callable[[str], None]:
    def plan(text: str) -> None:
        monkeypatch.setenv(VARIABLE, text)
        planned.cache_clear()

    yield plan
    monkeypatch.delenv(VARIABLE, raising=False)
    planned.cache_clear()


def said_by(config) -> tuple[Trainer, list[str]]:
    """A finished run, and its warnings."""
    warnings: list[str] = []
    with Trainer(config, report=lambda kind, v: warnings.append(v["text"]) if kind == "warning" else None) as trainer:
        trainer.train()
    return trainer, warnings


def names(trainer: Trainer) -> list[str]:
    return sorted(path.name for path in trainer.run.checkpoints.iterdir())


def test_a_checkpoint_that_fails_is_tried_again(model, tmp_path, fault):
    whole = run(from_model(model, tmp_path, *SAVING, name="whole"))
    fault("ckpt.mid_file:enospc@2,ckpt.before_rename:enospc@3")
    trainer, warnings = said_by(from_model(model, tmp_path, *SAVING))
    assert [text for text in warnings if "checkpoint" in text] == [
        "checkpoint failed (ENOSPC), next try at step 2",  # while its files were written, before step 2
        "checkpoint failed (ENOSPC), next try at step 4",  # in the thread, beside step 4
    ]
    assert names(trainer) == ["step-000002", "step-000004"]
    assert fingerprint(trainer.parts.model) == fingerprint(whole.parts.model)


def test_a_checkpoints_event_is_of_its_own_step(model, tmp_path):
    """Though it is complete while a later step is under way."""
    trainer = run(from_model(model, tmp_path, *SAVING))
    events = [event for event in read_events(trainer.run.path)[0] if event["event"] == "checkpoint"]
    assert [event["step"] for event in events] == [0, 1, 2, 3, 4]
    assert [int(event["path"][-6:]) for event in events] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("faults", ["ckpt.mid_file:enospc@2+", "ckpt.before_rename:enospc@2+"])
def test_the_third_in_a_row_ends_the_run(model, tmp_path, fault, faults):
    fault(faults)
    trainer = Trainer(from_model(model, tmp_path, *SAVING, "run.steps=9"))
    with pytest.raises(StorageError, match="3 checkpoints in a row failed"), trainer:
        trainer.train()
    assert names(trainer) == ["step-000000"] and trainer.step in (3, 4)


def test_the_last_one_must_not_fail(model, tmp_path, fault):
    fault("ckpt.mid_file:enospc@2+")
    trainer = Trainer(from_model(model, tmp_path, "run.steps=2", "run.checkpoint_every=0"))
    with pytest.raises(StorageError, match=r"checkpoint of step 2 failed.*No space"), trainer:
        trainer.train()
    assert names(trainer) == ["step-000000"]


def test_nothing_is_written_where_there_is_too_little_room(model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    trainer = Trainer(from_model(model, tmp_path, *SAVING, "run.steps=2"))
    size = sum(path.stat().st_size for path in (trainer.run.checkpoints / "step-000000").rglob("*"))
    free = iter((int(1.1 * size), 10 * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, next(free)))
    with trainer:
        trainer.train()
    warnings = [event["text"] for event in read_events(trainer.run.path)[0] if event["event"] == "warning"]
    assert warnings[0] == "checkpoint failed (ENOSPC), next try at step 2"
    assert names(trainer) == ["step-000000", "step-000002"]


def test_a_run_that_cannot_save_at_all_never_begins(model, tmp_path, fault):
    fault("ckpt.mid_file:enospc@1")
    with pytest.raises(StorageError, match="checkpoint of step 0 failed"):
        Trainer(from_model(model, tmp_path))
    assert not (tmp_path / "run").exists()


def test_events_that_cannot_be_written_are_dropped_and_counted(model, tmp_path, fault):
    whole = run(from_model(model, tmp_path, "run.steps=2", name="whole"))
    fault("log.write:enospc@3+")
    trainer, warnings = said_by(from_model(model, tmp_path, "run.steps=2"))
    assert len([text for text in warnings if "events.jsonl cannot be written (No space left" in text]) == 1
    lost = trainer.run.dropped["events.jsonl"]
    assert lost >= 3 and f"not written: {lost} to events.jsonl" in warnings[-1]
    assert len(read_events(trainer.run.path)[0]) == 2
    assert fingerprint(trainer.parts.model) == fingerprint(whole.parts.model)


def test_a_full_device_takes_no_events_and_one_that_has_room_again_takes_whole_lines(tmp_path):
    from spearrl.run.events import LineFile

    log = LineFile(tmp_path / "events.jsonl")
    log.add('{"event": "step", "step": 1}')
    whole = log._file
    with open("/dev/full", "ab", buffering=0) as log._file, pytest.raises(OSError) as seen:
        log.add('{"event": "step", "step": 2}')
    assert seen.value.errno == errno.ENOSPC
    log._file = whole
    whole.write(b'{"event": "st')  # what a disk took before it was full
    log.add('{"event": "step", "step": 3}')
    log.close()
    events, skipped = read_events(tmp_path)
    assert [event["step"] for event in events] == [1, 3] and skipped == 1


def test_folders_that_are_files_cost_their_logs_only(model, tmp_path):
    first = run(from_model(model, tmp_path, "run.steps=1", "run.trajectories_every=1")).run.path
    shutil.rmtree(first / "trajectories")
    for name in ("trajectories", "tb"):
        (first / name).write_text("a file")
    warnings: list[str] = []
    overrides = ["run.steps=2", "run.tensorboard=true"]
    report = lambda kind, v: warnings.append(v["text"]) if kind == "warning" else None  # noqa: E731
    with Trainer.resume(first, overrides=overrides, report=report) as trainer:
        trainer.train()
    assert sum("trajectories cannot be written" in text for text in warnings) == 1
    assert sum("/tb cannot be written" in text for text in warnings) == 1
    assert "2 to trajectories" in warnings[-1] and trainer.step == 2


def test_tensorboard_that_is_missing_is_said(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trainer = run(from_model(model, tmp_path, "run.steps=1", "run.tensorboard=true"))
    assert trainer.step == 1 and "TensorBoard is not installed" in capsys.readouterr().err


def test_a_torn_last_line_is_left_out_with_one_warning(model, tmp_path):
    first = run(from_model(model, tmp_path, "run.steps=1")).run.path
    with (first / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "eval", "st')
    warnings: list[str] = []
    report = lambda kind, v: warnings.append(v["text"]) if kind == "warning" else None  # noqa: E731
    with Trainer.resume(first, overrides=["run.steps=2"], report=report) as trainer:
        trainer.train()
    assert warnings == ["1 line of events.jsonl cannot be read and is left out"]
    lines = (first / "events.jsonl").read_text().splitlines()
    broken = [line for line in lines if not line.endswith("}")]
    assert broken == ['{"event": "eval", "st'] and json.loads(lines[-1])["step"] == 2


def test_a_run_directory_that_cannot_be_locked_is_one_message(model, tmp_path, capsys):
    first = run(from_model(model, tmp_path, "run.steps=1")).run.path
    (first / "lock").unlink()
    (first / "lock").mkdir()
    assert main(["train", "--resume", str(first), "run.steps=2"]) == 5
    said = capsys.readouterr().err
    assert "cannot lock the run" in said and "Traceback" not in said


def test_weights_in_pickles_are_never_loaded(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    torch.save(load_model(str(copy)).state_dict(), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="never loaded"):
        load_model(str(copy))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training/optimizer-00002-of-00002.safetensors", ".metadata"])
def test_a_file_that_nothing_of_spearrl_wrote_makes_a_checkpoint_damaged(model, tmp_path, name):
    first = run(from_model(model, tmp_path, "run.steps=1", "run.checkpoint_every=1")).run
    (checkpoints(first.checkpoints)[-1] / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    with Trainer.resume(first.path) as trainer:
        assert trainer.step == 0
