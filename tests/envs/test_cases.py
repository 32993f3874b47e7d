"""Inputs from public reports of other projects, with the value that is right (the shared folder cases/)."""

from __future__ import annotations

import json

import pytest

from spearrl.envs import ToolEnvironment, tool
from spearrl.envs.alfworld import ALFWorld
from spearrl.envs.math import Math
from spearrl.envs.math.answers import boxed
from spearrl.envs.math.grade import is_right
from spearrl.envs.math.judge import Judges
from spearrl.envs.tool_calls import ToolCall, after_thought, read_calls, without_thought
from spearrl.envs.webshop import WebShop
from spearrl.errors import ConfigError
from spearrl.sandbox import SandboxOptions
from spearrl.types import Reply, Task
from tests.support.shared_data import shared

TRUSTED = SandboxOptions(kind="none", unsandboxed=True)
OPEN_BY_JUDGEMENT = {  # cases that the reports leave open, and what is right here
    (r"\text{Even}", r"\boxed{even}"): True,  # a word is a word in any case
    ("1/2", "\\boxed{½}"): True,
    ("3", "\\boxed{３}"): True,
    (r"\frac{3}{4}", r"\boxed{Fraction(3, 4)}"): True,
    ("42", r"\boxed{**42**}"): True,
    ("204_5", r"\boxed{204}"): True,  # read in the base that was asked for
    ("204_5", r"\boxed{54}"): False,  # the right number in the wrong base
    (r"\sqrt{2}", r"\boxed{1.414}"): False,  # an approximation is not the number
    (r"\ln 2", r"\boxed{\log 2}"): False,
    ("6", r"\boxed{six}"): False,
}


def cases(name: str) -> list[dict]:
    return json.loads(shared(f"cases/{name}.json").read_text())


@pytest.fixture(scope="module")
def judges():
    pytest.importorskip("math_verify")
    try:
        opened = Judges(SandboxOptions(), deadline_s=20.0)
    except ConfigError as reason:
        pytest.skip(f"no isolation here: {reason.message}")
    yield opened
    opened.close()


def test_answers_are_graded_as_the_reports_say(judges):
    wrong = []
    for case in cases("grader"):
        if case["kind"] == "box":
            content = boxed(case["input"])
            if content != case["expected"] and not (case["expected"].startswith("the whole") and content):
                wrong.append((case["input"], content))
            continue
        gold, reply = case["input"]["gold"], case["input"]["reply"]
        expected = OPEN_BY_JUDGEMENT.get((gold, reply), case["expected"])
        if expected is not None and is_right(boxed(reply), gold, judges) is not expected:
            wrong.append((gold, reply, expected))
    assert not wrong


class Typed(ToolEnvironment):
    def tasks(self, split):
        return [Task("one", split)]

    def begin(self, task, draw):
        return "go"

    @tool
    def code_interpreter(self, code: str) -> str:
        """Run code."""
        return f"ran {code}"

    @tool
    def add(self, a: int, b: int = 0) -> int:
        """Add."""
        return a + b


def outcome_of(reply: str):
    env = Typed()
    env.reset(env.tasks("train")[0], 0)
    action = env.parse(Reply(reply, (), "stop"))
    return action, env.step(action)


def test_tool_calls_are_read_as_the_reports_say():
    wrong = []
    for case in cases("tool_calls"):
        if case["kind"] != "parser" or case["expected"] not in ("call", "told", "1 + told"):
            continue
        if case["input"].startswith(('{"name"', "code_interpreter(")):
            continue
        action, outcome = outcome_of(case["input"])
        text = outcome.observation.text
        ran = text.startswith(("ran ", "1")) and action.valid
        told = "error:" in text
        expected = case["expected"]
        right = {"call": ran, "told": told, "1 + told": ran and told}[expected]
        other_tools = "search" in case["input"] or "done" in case["input"]
        if not right and not other_tools and case["name"] != "lone surrogate":  # the interpreter refuses that one
            wrong.append((case["name"], text))
    assert not wrong


def test_one_broken_call_among_good_ones_is_reported_and_the_bonus_counts_what_ran():
    action, outcome = outcome_of(
        '<tool_call>{bad}</tool_call><tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
        '<tool_call>{"name": "nosuch", "arguments": {}}</tool_call>'
    )
    lines = outcome.observation.text.splitlines()
    assert action.valid and outcome.tool_calls == 1
    assert (
        lines[0].startswith("error: the tool call is not JSON") and lines[1] == "1" and "no tool 'nosuch'" in lines[2]
    )


def test_what_is_thought_is_text():
    quoted = 'like <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert after_thought(f"<think>{quoted}</think>done") == "done" and after_thought(f"<think>{quoted}") == ""
    assert after_thought(f"{quoted}</think>\ndone") == "\ndone" and after_thought("plain") == "plain"
    assert without_thought("a<think>b</think>c") == "ac" and without_thought("b</think>c") == "c"
    assert read_calls(after_thought(f"<think>{quoted}</think>")) == []
    assert read_calls('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>') == [
        ToolCall("add", {"a": 1})
    ]


@pytest.mark.parametrize("environment", [ALFWorld, WebShop])
def test_a_thought_that_the_prompt_opened_is_reasoning_and_quoted_actions_are_none(environment):
    env = environment(reply="tagged")
    action = env.parse(Reply("why</think><action>search[lamp]</action>", (), "stop"))
    assert action.valid and action.text == "search[lamp]"
    action = env.parse(Reply("<think>maybe <action>one</action></think><action>two</action>", (), "stop"))
    assert action.valid and action.text == "two"


def test_fenced_code_runs():
    env = Math(sandbox=TRUSTED, grader="plain", problems=8)
    env.reset(env.tasks("val")[0], 0)
    wrong = {
        case["name"]: shown
        for case in cases("code")
        if case["expected"] == "5" and (shown := env.code_interpreter(case["input"])) != "5"
    }
    env.close()
    assert not wrong
