"""Checkpoints appear whole or not at all, and a damaged one is named and passed over."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from spearrl.errors import CheckpointError, StorageError
from spearrl.run.checkpoint import (
    REQUIRED,
    checkpoints,
    clean,
    load_state,
    newest_checkpoint,
    save_checkpoint,
    save_state,
)


def write(value: int):
    def fill(folder):
        (folder / "a.txt").write_text(str(value) * 1000)
        (folder / "training").mkdir()
        for name in (*REQUIRED, "model.safetensors"):
            (folder / name).write_text("{}")
        save_state(folder, "state", {"value": value, "nested": [{"t": torch.full((3,), value)}]})

    return fill


def test_state_round_trip(tmp_path):
    state = {"n": 3, "list": [1, 2.5, None], "deep": {"x": torch.arange(4), "y": [torch.ones(2, dtype=torch.bfloat16)]}}
    save_state(tmp_path, "s", state)
    back = load_state(tmp_path, "s")
    assert back["n"] == 3 and back["list"] == [1, 2.5, None]
    assert torch.equal(back["deep"]["x"], torch.arange(4)) and back["deep"]["y"][0].dtype == torch.bfloat16


def test_the_newest_is_used_and_old_ones_go(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, write(step), keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    path, problems = newest_checkpoint(tmp_path)
    assert path.name == "step-000003" and problems == []
    assert load_state(path, "state")["value"] == 3


@pytest.mark.parametrize("name", ["a.txt", "state.json", "state.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, name, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, write(step), keep=2)
    victim = tmp_path / "step-000002" / name
    data = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    else:
        data[len(data) // 2] ^= 1
        victim.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    path, problems = newest_checkpoint(tmp_path)
    assert path.name == "step-000001" or (name == "manifest.json" and damage == "flip" and path.name == "step-000002")
    if path.name == "step-000001":
        assert "step-000002" in problems[0]


def test_no_valid_checkpoint_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        newest_checkpoint(tmp_path)


def test_a_failing_write_leaves_nothing(tmp_path):
    save_checkpoint(tmp_path, 1, write(1), keep=2)

    def full(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space"):
        save_checkpoint(tmp_path, 2, full, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001"]


def test_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path):
    """A process that saves without pause is killed; what is left always verifies."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.run.test_checkpoint import write\n"
        "from spearrl.run.checkpoint import save_checkpoint\n"
        "folder = Path(sys.argv[1]); save_checkpoint(folder, 1, write(1), keep=2); print('ready', flush=True)\n"
        "for step in range(2, 10**6): save_checkpoint(folder, step, write(step), keep=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.7)
    process.kill()
    process.communicate()
    path, problems = newest_checkpoint(tmp_path)
    assert problems == [] and load_state(path, "state")["value"] == int(path.name[5:])
    clean(tmp_path)
    assert all(p.name.startswith("step-") for p in tmp_path.iterdir())
