"""`check-env`: a sound environment passes, and broken ones are found out, each by the rule it breaks, in words."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import textwrap
import threading
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field

from spearrl.cli.main import main
from spearrl.envs import Environment, ToolEnvironment, tool
from spearrl.envs.check import check, check_environment, failures, isolation
from spearrl.envs.check.check import RULES
from spearrl.envs.check.guards import GlobalRandom, TooSlow, deadline, no_network
from spearrl.envs.check.isolation import processes
from spearrl.envs.check.samples import random_calls
from spearrl.types import Reply


class Spot(BaseModel):
    x: int
    names: list[str] = []


class TypedTools(ToolEnvironment):
    @tool
    def nested(self, where: Spot, kind: Literal["a", "b"], more: list[Spot] | None = None) -> str:
        return "x"

    @tool
    def plain(
        self,
        number: Annotated[int, Field(ge=3, le=40)],
        part: float,
        on: bool,
        name: Annotated[str, Field(max_length=9)] = "",
    ) -> str:
        return "x"


BREAKERS = [
    # environment, rule, level, words of what was seen
    ("DoubledIds", "tasks", "fail", "the task id 'one' occurs 5 times"),
    ("NoTasks", "tasks", "fail", "0 tasks"),
    ("ChangingTasks", "tasks", "fail", "gives other tasks"),
    ("SharedTasks", "tasks", "fail", "the task '0' is in 'train' and in 'val'"),
    ("TasksOfAnotherSplit", "tasks", "fail", "its split is another"),
    ("AnySplit", "unknown split", "fail", "tasks('no-such-split') returned 3 tasks"),
    ("NoTurns", "max turns", "fail", "max_turns is 0"),
    ("NotANumber", "episode", "fail", "reward is nan"),
    ("TextReward", "episode", "fail", "reward is '5'"),
    ("NumberForFlag", "episode", "fail", "terminated is 0"),
    ("BothFlags", "episode", "fail", "terminated and truncated at once"),
    ("SilentEnd", "episode", "fail", 'ended with info["success"] = None'),
    ("GymTuple", "episode", "fail", "step() returned tuple"),
    ("HalfCharacter", "episode", "fail", "not Unicode text"),
    ("ListOfActions", "episode", "fail", "admissible is"),
    ("ListOfIds", "episode", "fail", "allowed_ids is [1, 2]"),
    ("TextObservation", "episode", "fail", "reset() returned str"),
    ("NoMessages", "episode", "fail", "messages() returned []"),
    ("HiddenPictures", "episode", "fail", "holds pictures, and shows_images is False"),
    ("EmptyWindow", "episode", "fail", "window() returned messages without content"),
    ("OddTools", "episode", "fail", "tools() returned"),
    ("CrashingStep", "episode", "fail", "it raised KeyError: 'shelf'"),
    ("Unseeded", "determinism", "fail", "played twice, differs at"),
    ("Leftover", "determinism", "fail", "played twice, differs at the first observation"),
    ("HashOrder", "processes", "fail", "two processes differ on task train-0, the first observation: text was"),
    ("HashTasks", "processes", "fail", "two processes list other tasks"),
    ("ChangesTask", "task data", "fail", "changed the data of task train-0"),
    ("PaysTwice", "after end", "fail", "a step after the end gave reward 5.0"),
    ("DiesAtTheEnd", "after end", "fail", "it raised AttributeError: no page"),
    ("ToolNaN", "episode", "fail", "reward is nan"),
    ("ToolUncallable", "episode", "warn", "no valid tool call could be made"),
    ("ToolPaysTwice", "after end", "fail", "a step after the end gave reward 5.0"),
    ("ToolGlobalDraw", "global random", "fail", "the global generator of random"),
    ("LatePaysTwice", "after end", "fail", "a step after the end gave reward 5.0"),
    ("TakesNumbers", "hostile", "fail", "it raised ValueError"),
    ("ParseRaises", "hostile", "fail", "it raised"),
    ("Quadratic", "hostile", "fail", "no answer within 0.5 s"),
    ("Sleeper", "episode", "fail", "no answer within 0.5 s"),
    ("OneWay", "parse format", "fail", "is 'I say"),
    ("SpawnsItself", "spawn", "fail", "spawn() returned itself"),
    ("SharedState", "spawn", "fail", "two slots played at once disturb each other"),
    ("ClosesAll", "spawn", "fail", "played twice, differs at the first observation"),
    ("SlowSpawn", "spawn", "warn", "spawn() takes "),
    ("ClosesOnce", "close", "fail", "it raised IndexError: pop from empty list"),
    ("GlobalDraw", "global random", "fail", "reset() or step() draws from, or seeds, the global generator of random"),
    ("GlobalSeed", "global random", "fail", "the global generator of numpy.random"),
    ("Phones", "network", "fail", "reaches for the network: example.org:80"),
    ("PhonesByNumber", "network", "fail", "192.0.2.1"),
    ("PhonesInAThread", "network", "warn", "reaches for the network"),
    ("Loser", "expert", "fail", "the expert does not win task train-"),
    ("NumberExpert", "expert", "fail", "expert() returned int"),
    ("SetAnchor", "anchors", "fail", "an anchor of type frozenset cannot be compared"),
    ("ListAnchor", "anchors", "fail", "unhashable type"),
    ("CannotTravel", "off loop", "fail", "it does not run in a process pool"),
    ("UnknownExecution", "off loop", "fail", "execution='gpu' is not known"),
    ("SlowStep", "speed", "warn", "all other episodes wait for it"),
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Without the rule that starts two processes, unless it is the one in question."""
    monkeypatch.setattr(check, "RULES", tuple(rule for rule in RULES if rule is not processes))


@pytest.mark.parametrize("breaker, rule, level, words", BREAKERS, ids=[case[0] for case in BREAKERS])
def test_each_broken_rule_is_found_and_said_in_words(
    breaker: str, rule: str, level: str, words: str, monkeypatch: pytest.MonkeyPatch
):
    chosen = tuple(
        r
        for r in RULES
        if r.__name__ in ("tasks", rule.replace(" ", "_")) or (rule == "speed" and r.__name__ == "episode")
    )
    monkeypatch.setattr(check, "RULES", chosen)
    findings = {
        finding.rule: finding
        for finding in check_environment(
            f"tests.support.contract_breakers:{breaker}", deadline_s=0.5 if "within 0.5 s" in words else 60.0
        )
    }
    finding = findings[rule]
    assert (finding.level, words in finding.seen) == (level, True), str(finding)
    assert finding.where.startswith(breaker) and finding.fix
    assert all(other.level == "ok" for name, other in findings.items() if name != rule)
    assert f"[{level}]" in str(finding) and "fix: " in str(finding) and "where: " in str(finding)


def test_every_rule_has_an_environment_that_breaks_it():
    assert {rule.__name__.replace("_", " ") for rule in RULES} == {rule for _, rule, _, _ in BREAKERS}


def test_a_sound_environment_passes_every_rule(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(isolation, "SLOW_SPAWN_S", 30.0)  # this machine may be busy
    findings = check_environment("tests.support.contract_breakers:Sound")
    levels = {finding.rule: finding.level for finding in findings}
    assert levels.pop("off loop") == "skip" and set(levels.values()) == {"ok"}, "\n".join(map(str, findings))
    told = {finding.rule: finding.seen for finding in findings}
    assert told["tasks"] == "train 5, val 5; ids unique and stable" and "other seeds differ" in told["determinism"]
    assert "wins 5 of 5 tasks in at most 2 turns" in told["expert"]


def test_tools_without_an_expert_are_called(quick: None):
    by_rule = {finding.rule: finding for finding in check_environment("tests.support.contract_breakers:Unscripted")}
    assert not failures(list(by_rule.values())) and by_rule["after end"].level == "ok"
    assert int(by_rule["episode"].seen.rpartition("; ")[2].partition(" ")[0]) >= 6, str(by_rule["episode"])


def test_the_end_that_only_the_expert_finds(quick: None):
    by_rule = {finding.rule: finding for finding in check_environment("tests.support.contract_breakers:LateWin")}
    assert (by_rule["expert"].level, by_rule["after end"].level) == ("ok", "ok"), str(by_rule["after end"])


def test_drawn_calls_keep_to_their_schemas():
    env, draw = TypedTools(), random.Random(0)
    drawn = [text for _ in range(50) for text in random_calls(env.schemas(), "take 12 from shelf", draw)]
    assert all(env.parse(Reply(text, (1,), "stop")).tool_calls == 1 for text in drawn)
    assert (
        len(set(drawn)) > 60
        and any('"number": 12' in text for text in drawn)
        and any("shelf" in text for text in drawn)
    )
    again = random.Random(0)
    assert drawn == [text for _ in range(50) for text in random_calls(env.schemas(), "take 12 from shelf", again)]


@pytest.mark.parametrize(
    "name, split, said",
    [("tests.support.contract_breakers:Sound", "vall", "is not one of train, val"), ("alfworld", "val", "valid_seen")],
)
def test_a_split_that_was_asked_for_must_be_there(name: str, split: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["check-env", name, "--split", split]) == 1
    out = capsys.readouterr().out
    assert f"[fail] tasks          no split '{split}'" in out and said in out and "keeps its contract" not in out


def test_an_environment_that_cannot_be_built_is_a_finding():
    (finding,) = check_environment("tests.support.contract_breakers:NotBuilt")
    assert (
        (finding.rule, finding.level) == ("build", "fail")
        and "FileNotFoundError: catalogue.json" in finding.seen
        and "contract_breakers.py:" in finding.where
    )


def test_where_names_the_line_that_raised(quick: None):
    finding = next(f for f in check_environment("tests.support.contract_breakers:CrashingStep") if f.rule == "episode")
    assert "CrashingStep.step, task train-" in finding.where and "tests/support/contract_breakers.py:" in finding.where


def test_checking_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch):
    states = random.getstate(), np.random.get_state()[1].tolist()
    handler, connect, look_up = signal.getsignal(signal.SIGALRM), socket.socket.connect, socket.getaddrinfo
    for breaker, name in (("GlobalDraw", "global_random"), ("Phones", "network")):
        monkeypatch.setattr(check, "RULES", tuple(rule for rule in RULES if rule.__name__ in ("tasks", name)))
        check_environment(f"tests.support.contract_breakers:{breaker}")
    assert signal.getsignal(signal.SIGALRM) is handler
    assert (socket.socket.connect, socket.getaddrinfo) == (connect, look_up)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_guards():
    with pytest.raises(TooSlow), deadline(0.05):
        while True:
            threading.Event().wait(0.01)
    with deadline(5):
        pass
    ran: list[str] = []

    def elsewhere():
        with deadline(0.01):
            ran.append("no timer, no error")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ran
    state = GlobalRandom()
    assert state.touched() == []
    random.random()
    np.random.rand()
    assert state.touched() == ["random", "numpy.random"]
    state.restore()
    assert state.touched() == []
    with no_network() as tried:
        with pytest.raises(OSError):
            socket.getaddrinfo("localhost", 1)
        with socket.socket() as line, pytest.raises(OSError):
            line.connect(("127.0.0.1", 1))
        with socket.socket(socket.AF_UNIX) as line, pytest.raises(FileNotFoundError):
            line.connect("/no/such/socket")
    assert len(tried) == 2


def test_the_command(capsys: pytest.CaptureFixture[str], quick: None, tmp_path):
    assert main(["check-env", "tests.support.contract_breakers:Sound"]) == 0
    assert capsys.readouterr().out.endswith("tests.support.contract_breakers:Sound keeps its contract\n")
    assert main(["check-env", "tests.support.contract_breakers:Loser", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["environment"]) == (False, "tests.support.contract_breakers:Loser")
    assert [finding["rule"] for finding in report["findings"] if finding["level"] == "fail"] == ["expert"]
    assert main(["check-env", "tests.support.contract_breakers:PaysTwice"]) == 1
    assert "1 of 17 rules broken" in capsys.readouterr().out
    (tmp_path / "run.toml").write_text('[env]\nname = "tests.support.contract_breakers:AnySplit"\n')
    assert main(["check-env", str(tmp_path / "run.toml"), "--split", "train"]) == 1
    assert "[fail] unknown split" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere"], "environment 'nowhere' is not built in"),
        (["tests.support.contract_breakers:Sond"], "cannot be imported"),
        (["tests.support.contract_breakers:Sound", "env.options.x=1"], "env.options.x is not a setting of Sound"),
        (["tests.support.contract_breakers:Sound", "x"], "is not a setting"),
        (["math", "env.options.sandbox.timout_s=3"], "did you mean env.options.sandbox.timeout_s?"),
        (["math", "env.options.sandbox.kind=docker"], "env.options.sandbox.kind='docker': "),
        (["search", "env.options.corpus=x"], "env.options: corpus or retriever_url"),
        (["tests.support.contract_breakers:Sound", "--deadline", "0"], "--deadline 0 is not a time"),
        (["nowhere.toml"], "the config file does not exist"),
    ],
)
def test_wrong_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["check-env", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out


def example_of_the_docs() -> str:
    page = (Path(__file__).resolve().parents[2] / "docs" / "environments.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "(ToolEnvironment)" in block)
    return code


def example_of_the_interface() -> str:
    return textwrap.dedent(Environment.__doc__.partition("    Example:\n")[2])


@pytest.mark.parametrize(
    "example, name, ending",
    [
        (example_of_the_docs, "Calculator", "in at most 2 turns"),
        (example_of_the_interface, "GuessNumber", "in at most 4 turns"),
    ],
)
def test_documented_examples_run_as_they_stand(
    example, name: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = f"documented_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(example())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    findings = {finding.rule: finding for finding in check_environment(f"{module}:{name}")}
    levels = {finding.level for rule, finding in findings.items() if rule != "off loop"}
    assert levels == {"ok"}, "\n".join(map(str, findings.values()))
    assert findings["expert"].seen.endswith(ending)
