"""What processes of a run know of its user's environment: an allow-list, and no secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spearrl.errors import is_secret
from spearrl.launch.worker_process import processes
from spearrl.processes import as_for_children, child_environment
from spearrl.rollout.workers.fleet import Fleet
from spearrl.rollout.workers.messages import Start
from spearrl.trainer import Trainer
from spearrl.types import Task
from tests.support.small_run import small_config
from tests.support.worker_fleet import config_of, saved_model

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted",
    "AWS_PROFILE": "planted",
    "HF_TOKEN": "planted",
    "VLLM_API_KEY": "planted",
    "SPEARRL_RANK_SECRET": "planted",
    "MY_SERVICE": "planted",
    "https_proxy": "http://me:planted@proxy:3128",
}
KEPT = {"HF_HOME": "/somewhere", "OMP_PROC_BIND": "false", "SPEARRL_HOME": "/else", "http_proxy": "http://proxy:3128"}
SHORT = ("run.steps=1", "sft.enabled=false", "eval.tasks=1", "eval.every=0", "rollout.env_workers=1")


def seen_by(environment: str, folder: Path, *changes: str) -> dict[str, str]:
    """The variables that the environment of a run sees."""
    name, file = f"env.name=tests.support.hostile_envs:{environment}", f"env.options.file={folder / 'seen'}"
    config = small_config(folder, *SHORT, name, file, *changes)
    with Trainer(config) as trainer:
        trainer.play(1)
    return json.loads((folder / "seen").read_text())


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**PLANTED, **KEPT, "SPEARRL_ENGINE_TOKEN": "planted-token"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("planted")
def test_an_environment_worker_sees_no_secret(tmp_path: Path):
    seen = seen_by("Telling", tmp_path)
    assert "planted" not in json.dumps(seen)
    assert KEPT.items() <= seen.items() and {"PATH", "HOME", "PYTHONPATH"} <= seen.keys()


@pytest.mark.usefixtures("planted")
def test_a_rollout_worker_gets_the_token_of_its_servers_and_no_other(tmp_path: Path):
    file = f"env.options.file={tmp_path / 'seen'}"
    config = config_of(tmp_path, "env.name=tests.support.hostile_envs:TellingInline", file, "rollout.workers=1")
    launcher = processes(Start(config.with_settings({"vllm.servers": "http://a"}), saved_model(tmp_path)), tmp_path)
    # The engine is the local one: only what the worker is started with counts here.
    fleet = Fleet(config, launcher)
    try:
        fleet.collector(1.0, 1.0).collect(
            [Task("fetch-1", "train", {"index": 1})], 1, run_seed=0, step=1, first_group_id=0
        )
    finally:
        fleet.close()
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen.pop("SPEARRL_ENGINE_TOKEN") == "planted-token" and "planted" not in json.dumps(seen)


@pytest.mark.usefixtures("planted")
def test_without_servers_it_gets_none(tmp_path: Path):
    seen = seen_by("Telling", tmp_path, "rollout.workers=1", "rollout.cache_mib=64")
    assert "planted" not in json.dumps(seen)


def test_what_is_named_passes(monkeypatch: pytest.MonkeyPatch, planted):
    monkeypatch.setenv("SPEARRL_PASS_VARIABLES", "MY_SERVICE, HF_TOKEN")
    child = child_environment()
    assert (child["MY_SERVICE"], child["HF_TOKEN"]) == ("planted", "planted") and "AWS_PROFILE" not in child


def test_a_librarys_processes_inherit_the_same(monkeypatch: pytest.MonkeyPatch, planted):
    """vLLM and Ray start processes from this one."""
    import os

    before = dict(os.environ)
    with as_for_children({"VLLM_PORT": "5", "HF_HOME": "/other"}):
        assert "planted" not in json.dumps(dict(os.environ)) and os.environ["HF_HOME"] == "/other"
        os.environ["LD_PRELOAD"] = "something"
    assert dict(os.environ) == before


def test_what_looks_like_a_secret():
    for name in ("HF_TOKEN", "openai_api_key", "apikey", "db.password", "AWS_SECRET_ACCESS_KEY", "ssh-key", "passwd"):
        assert is_secret(name), name
    for name in ("TOKENIZERS_PARALLELISM", "monkey", "keyboard", "observation", "PATH"):
        assert not is_secret(name), name
