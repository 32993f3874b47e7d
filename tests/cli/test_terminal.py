"""What a model or an environment says drives no terminal, whatever verb shows it."""

from __future__ import annotations

import ast
import io
import unicodedata
from pathlib import Path

import pytest

from spearrl.cli.main import main
from spearrl.config.sections import TinySection
from spearrl.errors import printable
from spearrl.models import build_tiny, save_model
from tests.support.hostile_envs import DRIVING
from tests.support.small_run import SETTINGS

SHOUTING = "tests.support.hostile_envs:Shouting"
SHORT = ["sft.enabled=false", "run.steps=1", "eval.every=0", "eval.tasks=1", "run.name=r", "rollout.temperature=5"]


def driving(text: str) -> str:
    """Characters of a text that are control, format, separator or surrogate characters, but line breaks and tabs."""
    return "".join(c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") and c not in "\n\t")


def safe(captured: pytest.CaptureResult[str]) -> str:
    """Both streams, once nothing in them drives a terminal."""
    for text in (captured.out, captured.err):
        assert not driving(text), driving(text)
    return captured.out + captured.err


def test_what_is_escaped_and_what_stays():
    assert len(driving(DRIVING)) == 9 and not driving(printable(DRIVING)) and "\\u001b[2J" in printable(DRIVING)
    for text in ("plain\n\ttext", "naïve Ω 漢字\u3000", "👩\u200d🚀", "\N{NO-BREAK SPACE}"):
        assert printable(text) == text
    assert printable("\ud800\U000e0041\r\n") == "\\ud800\ufffd\\u000d\n"


def test_play_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{DRIVING}\n".replace("\r", "") + "look\nlook\n"))
    assert main(["play", SHOUTING]) == 2  # it raises on what was typed
    assert "no such thing as \\u001b[2J" in safe(capsys.readouterr())


def loud_model(folder: Path) -> str:
    """A model whose vocabulary is such text, so that it says little else."""
    shape = TinySection(layers=1, hidden_size=8, heads=1, feed_forward=8, vocab_size=300)
    save_model(*build_tiny([DRIVING] * 50, shape, 0), folder / "model")
    return str(folder / "model")


def test_play_by_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["play", SHOUTING, "--model", loud_model(tmp_path), "rollout.max_reply_tokens=64"]) == 0
    said = safe(capsys.readouterr())
    assert "\\u001b" in said and "no such thing" in said


def test_a_failing_environment_under_train_and_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = [*SETTINGS, *SHORT, f"run.output_dir={tmp_path}", f"model.path={loud_model(tmp_path)}"]
    assert main(["train", "--preset", "tiny", "--env", SHOUTING, *settings[1:]]) == 6
    assert "ValueError: no such thing as \\u001b[2J" in safe(capsys.readouterr())
    assert main(["eval", str(tmp_path / "r"), f"env.name={SHOUTING}"]) == 0
    assert main(["check-env", SHOUTING]) == 1
    assert "\\u001b[2J" in safe(capsys.readouterr())


def test_settings_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.toml").write_text('[env.options]\nnote = "\u202e\x9b"\n[run]\nnam = "\u202e"\n')
    assert main(["config", "show", str(tmp_path / "mine.toml")]) == 2
    assert main(["train", "--env", f"no.such:{DRIVING}"]) == 2
    assert main(["config", "show", "--preset", "tiny", "env.name=x:y", "run.output_dir=\u202e"]) == 2
    assert main([f"ver{DRIVING}b"]) == 2
    safe(capsys.readouterr())


def test_one_function_prints():
    """Else somebody's text reaches the terminal as it is."""
    for path in sorted(Path("spearrl/cli").glob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        printers = {ast.unparse(call) for call in calls} & {"print", "sys.stdout.write", "sys.stderr.write"}
        assert printers == ({"print"} if path.name == "terminal.py" else set()), path
