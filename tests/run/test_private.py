"""A run directory leads nowhere and tells nobody: links in it are refused, its mode is 0700, secrets are not stored."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from spearrl.cli.main import main
from spearrl.config import load_config, to_toml
from spearrl.errors import ConfigError, RefusedError
from spearrl.run import Run
from spearrl.trainer import Trainer
from tests.support.small_run import small_config

SHORT = ("sft.enabled=false", "run.steps=1", "eval.tasks=1", "eval.every=0", "rollout.groups_per_step=1")
FETCH = "env.name=tests.support.toy_envs:Fetch"
SECRETS = (
    "env.name=tests.support.hostile_envs:Knowing",
    "env.options.api_key=hush-1",
    "env.options.deep.password=hush-2",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended")
    with Trainer(small_config(folder, *SHORT)) as trainer:
        trainer.train()
    return trainer.run.path


def test_a_runs_directory_is_its_users_alone(run: Path):
    assert run.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "planted",
    [
        "events.jsonl",
        "config.toml",
        "lock",
        "trajectories",
        "trajectories/step-000002.jsonl",
        "checkpoints",
        "tb",
        ".config.toml",
    ]
    + [
        "checkpoints/step-000001/model.safetensors",
        "checkpoints/step-000001/training/state.json",
        "worker-0.log",
        "start",
    ],
)
def test_a_planted_link_is_named_and_not_followed(planted: str, run: Path, tmp_path: Path, capsys):
    theirs, mine = shutil.copytree(run, tmp_path / "theirs"), tmp_path / "mine"
    mine.write_text("keep me") if "." in planted or planted == "lock" else mine.mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    if (theirs / planted).is_dir():
        shutil.rmtree(theirs / planted)
    (theirs / planted).unlink(missing_ok=True)
    (theirs / planted).symlink_to(mine)
    for command in (["train", "--resume", str(theirs), "run.steps=2"], ["eval", str(theirs), "eval.tasks=1"]):
        assert main([*command, FETCH]) in (2, 3, 4)
        said = capsys.readouterr().err
        assert str(theirs / planted.partition("/model")[0]) in said and "link" in said
    assert (mine.read_text() == "keep me") if mine.is_file() else not list(mine.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_pipes_are_refused_and_the_reference_may_be_a_link(run: Path, tmp_path: Path):
    theirs = Path(shutil.copytree(run, tmp_path / "theirs"))
    (theirs / "reference").symlink_to(tmp_path)
    Trainer.resume(theirs).close()
    os.mkfifo(theirs / "trajectories" / "step-000009.jsonl")
    with pytest.raises(RefusedError, match=r"step-000009.jsonl: it is no regular file"):
        Trainer.resume(theirs)


def test_a_link_in_the_place_of_a_new_run_is_refused(tmp_path: Path):
    (tmp_path / "small").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match="small exists"):
        Run.create(small_config(tmp_path))


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc/x", "a\x00b", "-rf", "x" * 300, ".hidden", "a/b", "A b", "\u202ea"]
)
def test_names_of_runs_are_confined(name: str):
    with pytest.raises(ConfigError, match=r"run\.name"):
        load_config(None, [f"run.name={name}"])


def test_secrets_are_in_no_file_of_a_run_and_are_given_again(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["spearrl", "train", *SECRETS])
    with Trainer(small_config(tmp_path, *SHORT, *SECRETS)) as trainer:
        trainer.train()
    folder = trainer.run.path
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert b"hush" not in path.read_bytes(), path
    assert "api_key" in (folder / "command.txt").read_text()
    for command in (
        ["config", "show", str(folder)],
        ["config", "show", str(folder), "--json"],
        ["export", str(folder)],
    ):
        assert main([*command, str(tmp_path / "out")] if command[0] == "export" else command) == 0
    assert "hush" not in capsys.readouterr().out
    assert main(["eval", str(folder), SECRETS[0]]) == 2
    assert "env.options.api_key is a secret, which was not stored" in capsys.readouterr().err
    with Trainer.resume(folder, overrides=[*SECRETS[1:], "run.steps=2"]) as resumed:
        assert resumed.config.env.options["api_key"] == "hush-1"
        resumed.train()
    assert resumed.step == 2 and b"hush" not in (folder / "events.jsonl").read_bytes()


def test_a_config_without_secrets_is_stored_whole(tmp_path: Path):
    config = small_config(tmp_path, "env.options.tasks=9")
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "c.toml") == config
