"""A long run's logs: older files are compressed, and every line is still there."""

from __future__ import annotations

import gzip
import json

import pytest

from spearrl.config import load_config
from spearrl.run import Run, archive, events
from spearrl.run.events import EVENTS, read_events
from spearrl.types import Group, Task, Trajectory


@pytest.fixture
def run(tmp_path):
    opened = Run.create(load_config(None, [f"run.output_dir={tmp_path}", "run.name=long", "run.tensorboard=false"]))
    yield opened
    opened.close()


def test_a_grown_event_log_is_rotated_and_read_whole(run, monkeypatch):
    monkeypatch.setattr(events, "LARGEST", 2000)
    for step in range(200):
        run.event("step", step, {"reward": step / 2})
    read, skipped = read_events(run.path)
    assert [event["step"] for event in read] == list(range(200)) and not skipped
    earlier = sorted(run.path.glob("events-*"))
    assert len(earlier) >= 3 and all(path.name.endswith(".jsonl.gz") for path in earlier)
    assert (run.path / EVENTS).stat().st_size <= 2200


def test_a_damaged_part_costs_its_own_lines_only(run, monkeypatch):
    monkeypatch.setattr(events, "LARGEST", 2000)
    for step in range(200):
        run.event("step", step, {})
    first = min(run.path.glob("events-*"))
    lines = gzip.decompress(first.read_bytes()).count(b"\n")
    first.write_bytes(first.read_bytes()[:-20])
    read, skipped = read_events(run.path)
    steps = [event["step"] for event in read]
    assert skipped >= 1 and steps[-1] == 199 and set(range(lines, 200)) <= set(steps)


def test_a_log_whose_compression_was_interrupted_is_read_once(run, monkeypatch):
    """Killed between the rename of the compressed file and the removal of the plain one."""
    monkeypatch.setattr(events, "LARGEST", 2000)
    for step in range(60):
        run.event("step", step, {})
    packed = min(run.path.glob("events-*.gz"))
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    assert [event["step"] for event in read_events(run.path)[0]] == list(range(60))


def test_older_trajectory_files_are_compressed(run, monkeypatch):
    monkeypatch.setattr(archive, "PLAIN", 3)
    for step in range(1, 8):
        task = Task(f"task-{step}", "train", {})
        run.trajectories(step, [Group(0, task, [Trajectory(task, 0, 0, 0, [])])])
    folder = run.path / "trajectories"
    plain, packed = sorted(folder.glob("*.jsonl")), sorted(folder.glob("*.jsonl.gz"))
    assert [path.name for path in plain] == [f"step-{step:06d}.jsonl" for step in (5, 6, 7)]
    assert [json.loads(gzip.decompress(p.read_bytes()))["task"] for p in packed] == [f"task-{n}" for n in range(1, 5)]
    assert not list(folder.glob(".*"))


def test_a_disk_that_takes_no_compressed_file_loses_nothing(run, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(events, "LARGEST", 2000)
    monkeypatch.setattr(archive.shutil, "copyfileobj", full)
    for step in range(100):
        run.event("step", step, {})
    assert [event["step"] for event in read_events(run.path)[0]] == list(range(100)) and not run.dropped
    assert not list(run.path.glob("*.gz")) and not list(run.path.glob(".events*"))
