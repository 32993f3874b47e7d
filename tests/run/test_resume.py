"""What a resumed run may change, what it refuses, and that a refusal leaves the run as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from spearrl.cli.main import main
from spearrl.errors import CheckpointError, ConfigError, RefusedError
from spearrl.run.checkpoint import checkpoints, seal
from spearrl.trainer import Trainer
from tests.support.short_runs import from_model, run
from tests.support.small_run import fingerprint


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    return run(from_model(model, folder, "run.steps=2", "run.checkpoint_every=1", algo="grpo+sil", name="r")).run.path


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs/r"))


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file but the lock, which names its last owner."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    "setting",
    [
        "env.style=windowed",
        "env.options.tasks=5",
        "run.seed=9",
        "model.thinking=off",
        "algo.advantage=rloo",
        "sft.lr=1",
    ],
)
def test_a_setting_that_makes_another_run_is_refused_and_nothing_is_written(copy, capsys, setting):
    before, key = content(copy), setting.partition("=")[0]
    assert main(["train", "--resume", str(copy), "run.steps=3", setting]) == 3
    said = capsys.readouterr().err
    assert key in said and " -> " in said and f"--fork NAME {key}=" in said and "Traceback" not in said
    assert content(copy) == before


def test_a_wrong_setting_and_a_failing_start_leave_the_run_as_it_was(copy, monkeypatch):
    before = content(copy)
    assert main(["train", "--resume", str(copy), "run.steps=3", "learner.lr=fast"]) == 2

    def fail(*_, **__):
        raise ConfigError("no engine today")

    with monkeypatch.context() as patched:
        patched.setattr("spearrl.trainer.assemble", fail)
        assert main(["train", "--resume", str(copy), "run.steps=3", "learner.lr=2e-3"]) == 2
    with pytest.raises(ConfigError, match="reference"):
        Trainer.resume(copy, overrides=["algo.kl.loss_coef=0.1"])
    with Trainer.resume(copy, overrides=["run.steps=3"]):
        pass  # nothing new began
    assert content(copy) == before
    assert main(["train", "--resume", str(copy), "run.steps=3"]) == 0


def test_what_may_change_is_shown_and_kept_from_the_first_new_step(copy, capsys):
    settings = ["run.steps=3", "learner.lr=2e-3", "eval.tasks=3", "run.checkpoint_every=3"]
    assert main(["train", "--resume", str(copy), *settings]) == 0
    said = capsys.readouterr().err
    assert "run.steps             2 -> 3" in said and "learner.lr            0.001 -> 0.002" in said and "3/3" in said
    kept = (copy / "config.toml").read_text()
    assert "steps = 3\n" in kept and "lr = 0.002\n" in kept
    changed = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines() if '"config"' in line]
    assert changed[0]["changed"]["run.steps"] == [2, 3]
    assert checkpoints(copy / "checkpoints")[-1].name == "step-000003"


def test_an_edited_config_is_compared_with_the_checkpoint(copy):
    file = copy / "config.toml"
    file.write_text(file.read_text().replace('style = "chat"', 'style = "windowed"'))
    with pytest.raises(RefusedError, match=r"env.style +\"chat\" -> \"windowed\""):
        Trainer.resume(copy, overrides=["run.steps=3"])


def test_nothing_left_to_train_is_said(copy, capsys):
    before = content(copy)
    assert main(["train", "--resume", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "nothing left to train" in said and "step 2 of 2" in said and f"--resume {copy} run.steps=4" in said
    assert main(["train", "--resume", str(copy), "run.steps=1"]) == 0
    assert content(copy) == before


def test_a_run_that_is_not_there_is_answered_with_those_that_are(copy, capsys, monkeypatch):
    monkeypatch.chdir(copy.parent.parent)
    assert main(["train", "--resume", "runs/nosuch"]) == 2
    said = capsys.readouterr().err
    assert "runs/nosuch is no run directory" in said and "runs/r" in said and "Traceback" not in said


def test_a_run_that_ended_before_its_first_checkpoint_says_so(copy, capsys):
    shutil.rmtree(copy / "checkpoints")
    assert main(["train", "--resume", str(copy)]) == 4
    said = capsys.readouterr().err
    assert "ended before its first one" in said and f"spearrl train {copy}/config.toml run.name=" in said


def test_a_fork_begins_with_the_weights_and_other_settings(copy, capsys):
    before = content(copy)
    settings = ["run.steps=1", "env.style=windowed", "run.seed=5"]
    assert main(["train", "--resume", str(copy), "--fork", "other", *settings]) == 0
    fork = copy.parent / "other"
    assert content(copy) == before
    assert 'style = "windowed"' in (fork / "config.toml").read_text()
    with Trainer.resume(fork, overrides=["run.steps=1"]) as trainer, Trainer.resume(copy) as parent:
        assert trainer.step == 1 and parent.step == 2
    first, last = fork / "checkpoints/step-000000", copy / "checkpoints/step-000002"
    assert (first / "model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()
    assert main(["train", "--fork", "other"]) == 2
    assert main(["train", "--resume", str(copy), "--fork", "other"]) == 3  # it exists


def test_a_fork_keeps_its_reference_when_the_run_is_gone(copy):
    settings = ["run.steps=1", "algo.kl.loss_coef=0.1"]
    assert main(["train", "--resume", str(copy), "--fork", "other", *settings]) == 0
    weights = (copy / "checkpoints/step-000002/model.safetensors").read_bytes()
    shutil.rmtree(copy)
    assert (copy.parent / "other/reference/model.safetensors").read_bytes() == weights
    assert main(["train", "--resume", str(copy.parent / "other"), "run.steps=2"]) == 0


def remade(checkpoint: Path) -> None:
    """Write the manifest of a changed checkpoint anew, as if all were well."""
    about = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").unlink()
    aside = checkpoint.with_name(f".tmp-{checkpoint.name[5:]}-1")
    checkpoint.rename(aside)
    seal(aside, keep=9, about={key: about[key] for key in ("tokenizer", "settings")})


def test_another_tokenizer_is_refused(copy):
    newest = checkpoints(copy / "checkpoints")[-1]
    tokenizer = json.loads((newest / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (newest / "tokenizer.json").write_text(json.dumps(tokenizer))
    remade(newest)
    with pytest.raises(RefusedError, match="tokenizer or chat template"):
        Trainer.resume(copy, overrides=["run.steps=3"])


def test_ids_beyond_the_models_vocabulary_are_refused_at_the_start(copy, tmp_path):
    from transformers import AutoTokenizer

    model = checkpoints(copy / "checkpoints")[-1]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"frobnicate{number}" for number in range(500)])
    shutil.copytree(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = from_model(tmp_path / "model", tmp_path, "run.steps=1")
    with pytest.raises(ConfigError, match=r"beyond the model's vocabulary .* 'frobnicate"):
        Trainer(config)
    assert not (tmp_path / "run").exists()


def test_a_state_that_cannot_be_used_counts_as_damage(copy):
    newest = checkpoints(copy / "checkpoints")[-1]
    file = newest / "training/state.json"
    state = json.loads(file.read_text())
    del state["memory"]["baseline"]
    file.write_text(json.dumps(state))
    remade(newest)
    with Trainer.resume(copy) as trainer:
        assert trainer.step == 1
    shutil.rmtree(copy / "checkpoints/step-000001")
    with pytest.raises(CheckpointError, match="step-000002: training/state cannot be used: KeyError"):
        Trainer.resume(copy)


def test_the_best_checkpoint_on_the_panel_is_kept(model, tmp_path):
    trainer = Trainer(
        from_model(model, tmp_path, "run.steps=4", "run.checkpoint_every=1", "eval.every=1", "run.keep=1")
    )
    rates = iter((0.1, 0.9, 0.2, 0.9, 0.3))
    play = trainer.evaluate_policy

    def evaluate():
        result = play()
        trainer.saver.scores[trainer.step] = next(rates)
        return result

    trainer.evaluate_policy = evaluate
    with trainer:
        trainer.train()
    assert [path.name for path in checkpoints(trainer.run.checkpoints)] == ["step-000003", "step-000004"]
    assert fingerprint(trainer.parts.model)
