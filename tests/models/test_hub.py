"""Models by name: downloaded from a server that speaks the hub's API, pinned to a commit, refused with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spearrl.cli.main import main
from spearrl.config.sections import TinySection
from spearrl.errors import ConfigError
from spearrl.launch.devices import parameters_of
from spearrl.models import build_tiny, directory_of, load_model, load_tokenizer, pinned, save_model
from spearrl.trainer import Trainer
from tests.support.hub_server import TOKEN, Hub
from tests.support.short_runs import events, from_model
from tests.support.small_run import fingerprint

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = "a1" * 20, "b2" * 20
NAME = "org/tiny"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    settings = TinySection(layers=1, hidden_size=32, heads=2, feed_forward=32, vocab_size=300)
    model, tokenizer = build_tiny(["want: look or say red blue green pink gold gray end nothing"], settings, seed=1)
    save_model(model, tokenizer, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model in two versions, and a cache of its own; the same for child processes."""
    from huggingface_hub import constants

    with Hub().serving() as hub:
        hub.add(NAME, FIRST, files)
        cache = {"HF_HUB_CACHE": str(tmp_path / "home" / "hub"), "HF_XET_CACHE": str(tmp_path / "home" / "xet")}
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        addresses = {"ENDPOINT": hub.address, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        for name, value in {**cache, **addresses, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        yield hub


def test_a_name_is_downloaded_once_and_loads(hub: Hub, files: dict[str, bytes]):
    folder = directory_of(NAME)
    assert folder.name == FIRST and {path.name for path in folder.iterdir()} == set(files)
    assert all((folder / name).read_bytes() == data for name, data in files.items())
    hub.asked.clear()
    model, tokenizer = load_model(f"{NAME}@{FIRST}"), load_tokenizer(f"{NAME}@{FIRST}")
    assert hub.asked == [] and len(tokenizer) == 300 <= model.config.vocab_size and parameters_of(str(folder)) > 0


def test_a_name_is_pinned_to_the_commit_of_its_revision(hub: Hub, files: dict[str, bytes]):
    assert pinned(NAME) == f"{NAME}@{FIRST}"
    hub.add(NAME, SECOND, {**files, "README.txt": b"newer"})
    hub.add(NAME, FIRST, files, branch="v1")
    assert pinned(NAME) == f"{NAME}@{SECOND}" and pinned(f"{NAME}@v1") == f"{NAME}@{FIRST}"
    assert pinned(f"{NAME}@{FIRST}") == f"{NAME}@{FIRST}"
    assert not (directory_of(f"{NAME}@{FIRST}") / "README.txt").exists()


def test_a_directory_of_that_name_goes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    assert directory_of(NAME) == Path(NAME) and pinned(NAME) == NAME and hub.asked == []


def test_code_pickles_and_other_formats_stay_where_they_are(hub: Hub, files: dict[str, bytes]):
    others = ("modeling_own.py", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.json", "a/b.safetensors")
    hub.add(NAME, FIRST, {**files, **dict.fromkeys(others, b"no")})
    assert {path.name for path in directory_of(NAME).iterdir()} == set(files)
    assert not {name.rpartition("/")[2] for name in others} & hub.downloaded()


@pytest.mark.parametrize("names", [["config.json", "pytorch_model.bin"], ["model.safetensors"], ["index"]])
def test_a_repository_without_safetensors_is_refused(names: list[str], hub: Hub, files: dict[str, bytes]):
    index = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}).encode()
    shards = {**files, "model.safetensors.index.json": index}
    hub.add(NAME, FIRST, shards if names == ["index"] else {name: files.get(name, b"") for name in names})
    with pytest.raises(ConfigError, match="all of its weights as safetensors, and nothing else is loaded"):
        directory_of(NAME)
    assert "pytorch_model.bin" not in hub.downloaded()


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    hub.break_after = [1000, 500]
    weights = directory_of(NAME) / "model.safetensors"
    assert weights.read_bytes() == files["model.safetensors"]
    ranges = [wanted for method, path, wanted in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert ranges == ["", "bytes=1000-", "bytes=1500-"]


def test_private_and_gated_repositories(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.private, expected = {NAME}, "the hub shows no repository org/tiny.*private repository needs HF_TOKEN"
    with pytest.raises(ConfigError, match=f"(?s)is no directory on this machine, and {expected}"):
        directory_of(NAME)
    hub.private, hub.gated = set(), {NAME}
    with pytest.raises(ConfigError, match="(?s)org/tiny is gated.*accept its licence on its page, then set HF_TOKEN"):
        directory_of(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match="(?s)the hub refuses its files.*check HF_TOKEN"):
        directory_of(NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert directory_of(NAME).name == FIRST
    assert set(hub.cdn_authorization) == {None}  # the token stays with the hub


def test_names_and_revisions_that_are_not_there(hub: Hub):
    with pytest.raises(ConfigError, match="the hub shows no repository models/shop"):
        directory_of("models/shop")
    with pytest.raises(ConfigError, match="org/tiny has no revision 'v7'"):
        directory_of(f"{NAME}@v7")
    with pytest.raises(ConfigError, match="org/tiny has no revision"):
        directory_of(f"{NAME}@{'c3' * 20}")


def test_offline_what_is_here_is_used_and_what_is_not_says_how_to_go_on(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    name = pinned(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert directory_of(name).name == directory_of(NAME).name == FIRST
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for other in ("org/other", f"org/other@{FIRST}"):
            with pytest.raises(ConfigError, match="(?s)cannot be downloaded .*without a connection, download org/o"):
                directory_of(other)


def test_models_made_on_this_machine_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPEARRL_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="(?s)'smollm2-135m' is neither a directory .* `spearrl fetch smollm2-135m`"):
        directory_of("smollm2-135m")
    (folder := tmp_path / "models" / "smollm2-135m").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert directory_of("smollm2-135m") == folder and pinned("smollm2-135m") == "smollm2-135m"


def test_a_run_keeps_its_commit(hub: Hub, files: dict[str, bytes], tmp_path: Path):
    """With a KL divergence, so that the frozen model is loaded too; resumed where the hub has gone on, and is gone."""
    config = from_model(Path(NAME), tmp_path, "run.steps=1", "algo.kl.loss_coef=0.1")
    with Trainer(config) as trainer:
        trainer.train()
        path, trained = trainer.run.path, fingerprint(trainer.parts.model)
    assert f'path = "{NAME}@{FIRST}"' in (path / "config.toml").read_text() and not (path / "reference").exists()
    hub.add(NAME, SECOND, {**files, "model.safetensors": b"another"})
    hub.asked.clear()
    with Trainer.resume(path, overrides=["run.steps=2"]) as resumed:
        assert fingerprint(resumed.parts.model) == trained
        resumed.train()
        assert len(events(resumed, "step")) == 2 and hub.asked == []


def test_a_run_of_no_model_makes_no_directory(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = ["--env", "tests.support.toy_envs:Fetch", "--model", "org/other", f"run.output_dir={tmp_path / 'runs'}"]
    assert main(["train", *settings]) == 2
    assert "the hub shows no repository org/other" in capsys.readouterr().err and not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="org/other"):
        Trainer(from_model(Path("org/other"), tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_weights_come_only_once_the_format_is_known_to_do(hub: Hub, tmp_path: Path):
    tools = ("env.name=tests.envs.test_tool_env:Shop", "env.options.describe=template", "sft.enabled=false")
    with pytest.raises(ConfigError, match="does not show the environment's tools"):
        Trainer(from_model(Path(NAME), tmp_path / "runs", *tools))
    assert "tokenizer.json" in hub.downloaded()
    assert not (tmp_path / "runs").exists() and main(["doctor", "--model", NAME, "--format", "template"]) == 0
    assert not any("model.safetensors" in path for _, path, _ in hub.asked)
    assert directory_of(NAME).is_dir() and any("model.safetensors" in path for _, path, _ in hub.asked)


@pytest.mark.slow
def test_workers_load_the_same_snapshot_by_name(hub: Hub, tmp_path: Path):
    """In a process of its own, which reads HF_ENDPOINT and HF_HOME, as its worker does."""
    config = from_model(Path(NAME), tmp_path, "run.steps=1", "rollout.workers=1")
    code = (
        "import sys\nfrom spearrl.config import load_config\nfrom spearrl.trainer import Trainer\n"
        "if __name__ == '__main__':\n    with Trainer(load_config(sys.argv[1])) as trainer:\n        trainer.train()\n"
    )
    from spearrl.config import to_toml

    (tmp_path / "run.py").write_text(code)
    (tmp_path / "run.toml").write_text(to_toml(config))
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "run.toml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Fetching" in done.stderr  # the hub's own progress bar
    downloads = [path for method, path, _ in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert len(downloads) == 1 and (tmp_path / "home" / "hub").is_dir()
