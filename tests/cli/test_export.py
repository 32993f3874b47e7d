"""`spearrl export`: what it writes loads with transformers, trains on, and says where it came from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from spearrl import __version__
from spearrl.cli.main import main
from spearrl.config import load_config
from spearrl.models import load_model
from spearrl.run.model_card import model_card
from spearrl.trainer import Trainer
from tests.support.short_runs import cold_started, from_model
from tests.support.small_run import fingerprint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, a checkpoint of each, a panel of two tasks before the first and after the second."""
    folder = tmp_path_factory.mktemp("runs")
    settings = ("run.steps=2", "run.checkpoint_every=1", "eval.every=2")
    with Trainer(from_model(cold_started(folder), folder, *settings)) as trainer:
        trainer.train()
        return trainer.run.path


def test_an_exported_run_loads_and_trains_on(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "models" / "small"
    assert main(["export", str(run), str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: step-000002 of {run}, with its model card in README.md\n"
    names = {"README.md", "config.toml", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in output.iterdir()} - {"special_tokens_map.json"} == names | {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert fingerprint(model) == fingerprint(load_model(str(run / "checkpoints" / "step-000002")))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "want"}], return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(prompt).logits).all()
    assert main(["eval", str(output), "eval.tasks=2"]) == 0
    settings = [f"run.output_dir={tmp_path}", "run.name=on", "run.steps=1"]
    assert main(["train", str(run), "--model", str(output), *settings]) == 0
    assert f'path = "{output}"' in (tmp_path / "on" / "config.toml").read_text()


def test_the_card_has_the_facts_of_the_run(run: Path, tmp_path: Path):
    assert main(["export", str(run), str(tmp_path / "card"), "--step", "2"]) == 0
    card = (tmp_path / "card" / "README.md").read_text()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    panel = [event for event in events if event["event"] == "eval"][-1]
    rate, low, high = (f"{100 * panel[key]:.1f}" for key in ("success", "low", "high"))
    assert card.startswith("---\nlibrary_name: transformers\ntags: [")
    for fact in (
        "| environment | `tests.support.toy_envs:Fetch`, prompts in the style `chat` |",
        "| algorithm | `grpo` |",
        "| steps | 2 of 2, with the seed 0 |",
        f"| base model | `{load_config(run).model.path}` |",
        "| cold start | none |",
        f"| success | {rate} % (95 % interval {low} to {high}) of 2 tasks of the split `val` at temperature",
        f"after step 2 (panel {panel['panel']}) |",
        f"| made with | spearrl {__version__}, torch {torch.__version__}, transformers ",
    ):
        assert fact in card
    assert main(["export", str(run), str(tmp_path / "earlier"), "--step", "1"]) == 0
    earlier = (tmp_path / "earlier" / "README.md").read_text()
    assert "| steps | 1 of 2" in earlier and "after step 0" in earlier


def test_a_base_model_of_the_hub_is_named_with_its_commit(run: Path):
    config = load_config(run, [f"model.path=org/base@{'a1' * 20}", "learner.lora.rank=8"])
    card = model_card(run, config, step=2, apart=True)
    assert card.startswith("---\nlibrary_name: peft\nbase_model: org/base\n")
    assert f"| base model | `org/base`, commit `{'a1' * 20}` |" in card
    assert "| adapters | rank 8, apart |" in card


def test_adapters_apart(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In peft's format, with the base they belong to and no weights of it. They are stand-ins: peft is not needed."""
    import shutil
    import zlib

    assert main(["export", str(run), str(tmp_path / "none"), "--adapters", "apart"]) == 3
    assert "has no adapters" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    copy = shutil.copytree(run, tmp_path / "lora")
    checkpoint = copy / "checkpoints" / "step-000002"
    written = {"adapter/adapter_config.json": b'{"r": 8, "base_model_name_or_path": "x"}'}
    written["adapter/adapter_model.safetensors"] = b"stand-in"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "adapter").mkdir()
    for name, data in written.items():
        (checkpoint / name).write_bytes(data)
        manifest["files"][name] = [len(data), zlib.crc32(data)]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    text = re.sub(r'(?m)^path = ".*"', f'path = "org/base@{"a1" * 20}"', (copy / "config.toml").read_text())
    (copy / "config.toml").write_text(text)
    assert main(["export", str(copy), str(tmp_path / "apart"), "--adapters", "apart"]) == 0
    settings = json.loads((tmp_path / "apart" / "adapter_config.json").read_text())
    assert settings == {"r": 8, "base_model_name_or_path": "org/base", "revision": "a1" * 20}
    names = {path.name for path in (tmp_path / "apart").iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not names & {"config.json", "generation_config.json", "model.safetensors"}


def test_what_cannot_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("kept")
    assert main(["export", str(run), str(full)]) == 3
    assert "exists and is not an empty folder" in capsys.readouterr().err and (full / "mine").read_text() == "kept"
    assert main(["export", str(full), str(tmp_path / "x")]) == 3
    assert "is not a run directory" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "x"), "--step", "9"]) == 4
    assert "no checkpoint of step 9" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_damaged_checkpoint_is_refused_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import shutil

    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "checkpoints" / "step-000002" / "model.safetensors").write_bytes(b"torn")
    assert main(["export", str(copy), str(tmp_path / "x"), "--step", "2"]) == 4
    assert "the checkpoint is damaged: model.safetensors differs" in capsys.readouterr().err
    assert main(["export", str(copy), str(tmp_path / "x")]) == 0
    assert "| steps | 1 of 2" in (tmp_path / "x" / "README.md").read_text()
