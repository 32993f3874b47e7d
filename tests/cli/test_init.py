"""`spearrl init`: what it writes is small, keeps its contract, passes its test and trains; nothing is overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spearrl.cli.main import main
from spearrl.config import load_config
from spearrl.envs import make
from spearrl.types import Action

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.partition(".")[0].startswith("agent_"):
            del sys.modules[name]


def shell(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=settings, capture_output=True, text=True, timeout=300
    )


def test_it_writes_a_small_working_example(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["init", "agent_one"]) == 0
    said = capsys.readouterr().out
    assert "spearrl train agent_one/config.toml" in said and "cd " not in said
    assert sorted(p.name for p in (here / "agent_one").iterdir()) == [
        "README.md",
        "config.toml",
        "env.py",
        "test_env.py",
    ]
    assert not any("$" in p.read_text() for p in (here / "agent_one").iterdir())
    code = (here / "agent_one" / "env.py").read_text()
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 30 and "class AgentOne(Environment)" in code
    assert main(["check-env", "agent_one/config.toml"]) == 0
    assert capsys.readouterr().out.count("[ok]") == 17
    test = shell("pytest", "-q", "agent_one", folder=here)
    assert test.returncode == 0 and "2 passed" in test.stdout, test.stdout + test.stderr


def test_the_example_plays_by_its_rules(here: Path):
    main(["init", "agent_two", "--name", "Guess"])
    env = make("agent_two.env:Guess")
    env.reset(env.tasks("val")[3], 5)
    env.secret = 4
    observations = [env.step(Action(text)).observation.text for text in ("9", "2", "x", "16", "4")]
    assert observations == ["lower", "higher", "a number, please", "a number, please", "found"]
    again = env.step(Action("4"))
    assert (again.reward, again.terminated, again.info["success"]) == (0.0, True, True)
    wins = 0
    for task in env.tasks("train"):
        env.reset(task, 1)
        wins += any(env.step(Action(env.expert())).terminated for _ in range(env.max_turns))
    assert wins == 200


@pytest.mark.slow
def test_it_trains_as_it_is(here: Path):
    main(["init", "agent_three"])
    short = [
        "run.steps=2",
        "sft.episodes=60",
        "sft.epochs=1",
        "eval.tasks=10",
        "rollout.groups_per_step=2",
        "run.tensorboard=false",
    ]
    done = shell("spearrl", "train", "agent_three/config.toml", *short, folder=here)
    assert done.returncode == 0 and "done: runs/agent-three" in done.stdout, done.stderr
    again = shell("spearrl", "eval", "runs/agent-three", "env.name=agent_three.env:AgentThree", "--json", folder=here)
    assert json.loads(again.stdout)["success"]["tasks"] == 10, again.stderr


def test_the_config_says_what_the_readme_says(here: Path):
    main(["init", "agent_four", "--name", "Lamp"])
    config = load_config("agent_four/config.toml")
    assert (config.env.name, config.run.name, config.sft.enabled) == ("agent_four.env:Lamp", "agent-four", True)
    readme = (here / "agent_four" / "README.md").read_text()
    assert readme.startswith("# Lamp\n") and f"runs/{config.run.name}" in readme


def test_elsewhere_it_says_where_to_go(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "deep").mkdir()
    assert main(["init", "deep/agent_five", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": "deep/agent_five",
        "environment": "agent_five.env:AgentFive",
        "files": ["env.py", "config.toml", "test_env.py", "README.md"],
    }
    assert main(["init", "deep/agent_six"]) == 0
    assert f"cd {here / 'deep'}" in capsys.readouterr().out
    assert main(["check-env", "deep/agent_six/config.toml"]) == 2
    assert "run in the folder that holds the package" in capsys.readouterr().err


def test_nothing_is_overwritten(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["init", "agent_seven"]) == 0
    before = {p.name: p.read_text() for p in (here / "agent_seven").iterdir()}
    (here / "agent_seven" / "env.py").write_text("mine")
    assert main(["init", "agent_seven"]) == 3
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in (here / "agent_seven").iterdir()} == {**before, "env.py": "mine"}
    (here / "agent_file").write_text("x")
    assert main(["init", "agent_file"]) == 3 and (here / "agent_file").read_text() == "x"
    (here / "agent_empty").mkdir()
    assert main(["init", "agent_empty"]) == 0


@pytest.mark.parametrize(
    "words, said, fix",
    [
        (["my-agent"], "'my-agent' cannot be the name of a Python package", "my_agent"),
        (["2nd"], "cannot be the name", "nd"),
        (["class"], "cannot be the name", "class_env"),
        (["agent_ü"], "cannot be the name", "agent"),
        (["json"], "there is a Python module 'json' already", "json_env"),
        (["agent_x", "--name", "lower"], "'lower' cannot be the name of the class", "MyEnvironment"),
        (["agent_x", "--name", "Environment"], "cannot be the name of the class", "MyEnvironment"),
        (["agent_x", "--name", "A(object): pass #"], "cannot be the name of the class", "MyEnvironment"),
    ],
)
def test_names_that_python_would_not_take_are_refused(
    words: list[str], said: str, fix: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["init", *words]) == 3
    error = capsys.readouterr().err
    assert said in error and fix in error
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("folder", ["examples/calculator", "examples/gym_text"])
def test_the_examples_keep_their_contract(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    if "gym" in folder:
        pytest.importorskip("gymnasium")
    assert main(["check-env", f"{folder}/config.toml"]) == 0, capsys.readouterr().out
    assert load_config(f"{folder}/config.toml").run.name in (ROOT / folder / "README.md").read_text()


def test_without_gymnasium_the_example_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    assert main(["check-env", "examples/gym_text/config.toml"]) == 2
    assert "the package gymnasium is not installed\n  fix: pip install gymnasium" in capsys.readouterr().err


def test_the_calculator_example_is_small_and_can_be_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    env = make("examples.calculator.env:Calculator", describe="none")
    code = (ROOT / "examples/calculator/env.py").read_text()
    assert sum(bool(line.strip()) for line in code[code.index("class") :].splitlines()) <= 33
    env.reset(env.tasks("train")[0], 3)
    wrong = env.a * env.b + env.c + 1
    outcome = env.step(Action(env.format(f"answer(value={wrong})")))
    assert outcome.terminated and outcome.reward == 0 and outcome.info["success"] is False
