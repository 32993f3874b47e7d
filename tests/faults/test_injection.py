"""SPEARRL_FAULT itself: what it takes, where it strikes, that it costs nothing unset."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from spearrl import faults
from spearrl.cli.main import main
from spearrl.errors import ConfigError, EngineError


@pytest.fixture
def plan(monkeypatch):
    def planned(text: str) -> None:
        monkeypatch.setenv(faults.VARIABLE, text)
        faults.planned.cache_clear()

    yield planned
    monkeypatch.undo()
    faults.planned.cache_clear()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("env.stpe:raise", "no point 'env.stpe'"),
        ("env.step:explode@3", "no action 'explode' at env.step"),
        ("ckpt.mid_file:nan", "no action 'nan' at ckpt.mid_file"),
        ("env.step", "no action ''"),
        ("env.step:raise@0", "passage '0'"),
        ("env.step:raise@x", "passage 'x'"),
        ("env.step:raise@", "passage ''"),
    ],
)
def test_what_is_misspelt_is_an_error_at_the_start(plan, capsys, text, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        faults.parse(text)
    plan(f"env.step:raise,{text}")
    assert main(["train", "--help"]) == 2
    assert faults.VARIABLE in capsys.readouterr().err


def test_it_strikes_at_its_passage_and_no_other(plan, capsys):
    plan("env.step:raise@2, env.step:nan@3 ,engine.generate:raise@2+,log.write:enospc")
    assert faults.strike("env.step") is False
    with pytest.raises(RuntimeError, match="SPEARRL_FAULT at env.step"):
        faults.strike("env.step")
    assert faults.strike("env.step") is True and faults.strike("env.step") is False
    assert faults.strike("engine.generate", EngineError) is False
    for _ in range(2):
        with pytest.raises(EngineError):
            faults.strike("engine.generate", EngineError)
    with pytest.raises(OSError) as full:
        faults.strike("log.write")
    assert full.value.errno == errno.ENOSPC
    assert capsys.readouterr().err.count(faults.STRUCK) == 5


def test_unset_it_does_nothing(plan):
    plan("")
    assert not any(faults.strike(point) for point in faults.POINTS) and not faults.planned()


def test_every_point_is_somewhere_and_none_is_unknown():
    package = Path(faults.__file__).parent
    text = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "faults.py")
    assert set(re.findall(r'strike\("([a-z_.]+)"', text)) == set(faults.POINTS)
