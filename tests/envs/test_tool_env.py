"""Tools as environments: schemas, checked arguments, mistakes as observations, Hermes-style replies, prompts."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from spearrl.config.sections import ModelSection
from spearrl.envs import Done, ToolEnvironment, call, tool
from spearrl.errors import ConfigError, ContractError
from spearrl.models.formats import open_format
from spearrl.rollout import Collector
from spearrl.types import Action, Observation, Outcome, Reply, Status, Task
from tests.models.test_chat import encoder_of
from tests.rollout.test_collector import parts
from tests.support.scripted_engine import ScriptedEngine

TASK = Task("t0", "train")


class Point(BaseModel):
    x: int
    y: int = 0


class Shop(ToolEnvironment):
    """Tools of every kind."""

    class Options(ToolEnvironment.Options):
        goal: int = 7

    def tasks(self, split):
        return [TASK]

    def begin(self, task, draw):
        self.calls: list[Any] = []
        return f"find {self.options.goal}, not {draw.randrange(100)}"

    @tool
    def add(self, a: int, b: int = 1) -> int:
        """Add two numbers.

        Carries over
        by itself.

        Args:
            a: the first one,
                which may be negative
            b (int): the second one
        Returns:
            the sum
        """
        self.calls.append((a, b))
        return a + b

    @tool
    def move(self, to: Point, kind: Literal["walk", "run"] = "walk", names: list[str] | None = None) -> dict[str, Any]:
        """Go somewhere."""
        return {"x": to.x + 1, "kind": kind, "names": names}

    @tool
    def title(self, title: str, copy: bool, json: float) -> Point:
        """Parameters that pydantic's models have attributes of the same name as."""
        self.calls.append((title, copy, json))
        return Point(x=1)

    @tool
    def fail(self, how: str) -> str:
        if how == "contract":
            raise ContractError("mine", hint="mend")
        raise {"value": ValueError, "key": KeyError, "zero": ZeroDivisionError}[how]("no such thing")

    @tool
    def look(self) -> Observation:
        """Look around."""
        return Observation("a room", anchor=("room", 1))

    @tool
    def raw(self, end: bool) -> Outcome:
        return Outcome(Observation("raw"), 2.5, end, info={"success": True, "mine": 1})

    @tool
    def answer(self, value: int) -> Done:
        """Give the number."""
        return Done(10.0 * (value == self.options.goal))

    def helper(self) -> str:
        return "not a tool"


def started(**options) -> Shop:
    env = Shop(**options)
    env.reset(TASK, 0)
    return env


def said(env: ToolEnvironment, reply: str) -> Outcome:
    return env.step(env.parse(Reply(reply, (1,), "stop")))


def shown(env: ToolEnvironment, reply: str) -> str:
    return said(env, reply).observation.text


def test_schemas_come_from_hints_and_docstrings():
    schemas = {s["function"]["name"]: s["function"] for s in Shop().schemas()}
    assert list(schemas) == ["add", "move", "title", "fail", "look", "raw", "answer"]
    assert schemas["add"] == {
        "name": "add",
        "description": "Add two numbers.\n\nCarries over\nby itself.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "the first one, which may be negative"},
                "b": {"type": "integer", "default": 1, "description": "the second one"},
            },
            "required": ["a"],
        },
    }
    assert schemas["look"]["parameters"] == {"type": "object", "properties": {}, "required": []}
    assert schemas["move"]["parameters"]["properties"]["kind"] == {
        "type": "string",
        "enum": ["walk", "run"],
        "default": "walk",
    }
    assert schemas["move"]["parameters"]["$defs"]["Point"]["properties"]["x"] == {"type": "integer"}
    assert (
        set(schemas["title"]["parameters"]["properties"])
        == {"title", "copy", "json"}
        == set(schemas["title"]["parameters"]["required"])
    )
    assert all(s["type"] == "function" for s in Shop().schemas())
    json.dumps(Shop().schemas())


def test_arguments_are_checked_and_converted():
    env = started()
    assert shown(env, call("add", {"a": "41"})) == "42" and env.calls == [(41, 1)]
    assert (
        shown(env, call("move", {"to": {"x": 4}, "kind": "run", "names": ["é"]}))
        == '{"x": 5, "kind": "run", "names": ["é"]}'
    )
    assert shown(env, call("title", {"title": "t", "copy": True, "json": 1})) == '{"x":1,"y":0}' and env.calls[-1] == (
        "t",
        True,
        1.0,
    )
    assert shown(env, call("look")) == "a room"
    assert said(env, call("look")).observation.anchor == ("room", 1)


@pytest.mark.parametrize(
    "reply, words",
    [
        (call("add"), ("error: add: a: Field required", "it is add(a: int, b: int = 1): Add two numbers.")),
        (call("add", {"a": "x"}), ("error: add: a: Input should be a valid integer",)),
        (call("add", {"a": 1, "c": 2}), ("error: add: c: Extra inputs are not permitted",)),
        (call("move", {"to": {"x": "?"}}), ("error: move: to.x",)),
        (call("title", {"title": "t", "copy": True, "json": float("nan")}), ("error: title: json", "finite")),
        (call("helper"), ("error: there is no tool 'helper'", "add, move")),
        (call("reset", {"task": 1, "seed": 2}), ("error: there is no tool 'reset'",)),
        (call("fail", {"how": "value"}), ("error: ValueError: no such thing",)),
        (call("fail", {"how": "key"}), ("error: KeyError",)),
        (call("fail", {"how": "zero"}), ("error: ZeroDivisionError",)),
        ("just talk", ("error: no tool was called; reply with <tool_call>",)),
        ("", ("error: no tool was called",)),
        ("<tool_call>{not json</tool_call>", ("error: the tool call is not JSON",)),
        (
            '<tool_call>{"name": "add", "arguments": {"a": 1',
            ("error: the tool call is not JSON", "</tool_call> is missing"),
        ),
        ('<tool_call>["add"]</tool_call>', ('error: a tool call is {"name"',)),
        ('<tool_call>{"name": "a b", "arguments": {}}</tool_call>', ('error: a tool call is {"name"',)),
        (
            '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
            ("error: the arguments of add must be a JSON object",),
        ),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", ("error: the tool call is not JSON",)),
    ],
)
def test_mistakes_are_told_to_the_model(reply: str, words: tuple[str, ...]):
    env = started()
    outcome = said(env, reply)
    assert all(word in outcome.observation.text for word in words), outcome.observation.text
    assert (outcome.reward, outcome.terminated, outcome.info) == (0.0, False, {"success": False, "tool_errors": 1})
    assert env.parse(Reply(reply, (), "stop")).tool_calls == int(call("fail", {"how": ""})[:25] in reply)


def test_the_contract_s_own_errors_are_not_the_model_s():
    with pytest.raises(ContractError, match="mine"):
        said(started(), call("fail", {"how": "contract"}))
    with pytest.raises(ContractError, match="before reset"):
        Shop().step(Action("x"))


@pytest.mark.parametrize("goal, reward", [(7, 10.0), (8, 0.0)])
def test_done_ends_the_episode_once(goal: int, reward: float):
    env = started(goal=goal)
    outcome = said(env, call("answer", {"value": 7}))
    assert (outcome.terminated, outcome.reward, outcome.info["success"]) == (True, reward, reward > 0)
    again = said(env, call("answer", {"value": 7}))
    assert (again.terminated, again.reward) == (True, 0.0)
    env.reset(TASK, 1)
    assert not said(env, call("look")).terminated


def test_done_may_say_otherwise_and_outcomes_pass_untouched():
    class Odd(Shop):
        @tool
        def stop(self, success: bool) -> Done:
            return Done(-1.0, success, "so it ends")

    env = Odd()
    env.reset(TASK, 0)
    outcome = said(env, call("stop", {"success": True}))
    assert (outcome.reward, outcome.info["success"], outcome.observation.text) == (-1.0, True, "so it ends")
    env.reset(TASK, 0)
    outcome = said(env, call("raw", {"end": True}))
    assert (outcome.reward, outcome.terminated, outcome.info) == (2.5, True, {"success": True, "mine": 1})
    assert said(env, call("look")).terminated


def test_several_calls_run_in_order_until_the_end():
    env = started()
    reply = (
        "<think>add, then look</think>\n" + call("add", {"a": 1}) + "\n and " + call("add", {"a": "x"}) + call("look")
    )
    action = env.parse(Reply(reply, (), "stop"))
    assert (action.valid, action.tool_calls, action.text.count("<tool_call>")) == (True, 2, 3)
    outcome = env.step(action)
    assert (
        outcome.observation.text.splitlines()[0] == "2"
        and outcome.observation.text.endswith("\na room")
        and "error: add: a" in outcome.observation.text
    )
    outcome = said(env, call("raw", {"end": False}) + call("add", {"a": 1}))
    assert outcome.observation.text == "raw\n2"
    outcome = said(env, call("answer", {"value": 7}) + call("add", {"a": 5}))
    assert outcome.terminated and env.calls == [(1, 1), (1, 1)]


def test_parse_reads_what_format_writes():
    env = Shop()
    for text in (
        call("add", {"a": 1, "b": -2}),
        call("move", {"to": {"x": 1}}),
        call("look"),
        call("unknown", {"é": "ü"}),
        call("add", {"a": 1}) + "\n" + call("look"),
    ):
        action = env.parse(Reply(env.format(text), (), "stop"))
        assert (action.text, action.valid) == (text, True)
    assert env.format('add(a=1, b = [1, "x)"])') == call("add", {"a": 1, "b": [1, "x)"]})
    assert env.format("look()") == call("look")
    for text in ("look(", "add(1)", "helper()", "add(a=1 b=2)", "add(a=)", "add(a=x)", "plain"):
        assert env.format(text) == text


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=40),
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5),
    ),
)
def test_anything_may_be_said(text: str, arguments: dict[str, Any]):
    env = started()
    for reply in (
        text,
        f"<tool_call>{text}</tool_call>",
        call("add") + text,
        call("add").replace("{}", json.dumps(arguments)),
    ):
        action = env.parse(Reply(reply, (), "stop"))
        assert env.parse(Reply(env.format(action.text), (), "stop")).text == action.text.strip()
        assert isinstance(env.step(action).observation.text, str)


class Asks(ToolEnvironment):
    """No tools: a plain answer ends it."""

    def tasks(self, split):
        return [TASK]

    def begin(self, task, draw):
        return Observation("1+1?", anchor="q")

    def answer_text(self, text):
        return Done(1.0) if text == "2" else "no" if text else ValueError


def test_plain_answers():
    env = Asks()
    assert env.reset(TASK, 0).anchor == "q"
    assert env.parse(Reply(" 2\n", (), "stop")) == Action("2", True, 0)
    assert not env.parse(Reply("", (), "stop")).valid
    assert (shown(env, "3"), said(env, "2").info["success"]) == ("no", True)


def test_long_and_broken_results_are_cut_and_cleaned():
    class Long(Shop):
        @tool
        def long(self) -> str:
            return "é" * 50

        @tool
        def broken(self) -> str:
            return "a\udc80b"

    env = Long(max_result_chars=16)
    env.reset(TASK, 0)
    assert shown(env, call("long")) == "é" * 16 + "… (34 more characters)"
    assert shown(env, call("broken")) == "a?b"


def bad(**members: Any) -> type[ToolEnvironment]:
    return type("Bad", (ToolEnvironment,), members)


def untyped(self, a): ...


def starred(self, *a: int): ...


def strange(self, a: threading_lock): ...  # type: ignore[name-defined]  # noqa: F821


def function_typed(self, a: "socket.socket"): ...  # type: ignore[name-defined]  # noqa: F821, UP037


async def waiting(self, a: int): ...


class Locked:
    pass


def opaque(self, a: Locked): ...


@pytest.mark.parametrize(
    "method, words",
    [
        (untyped, "Bad.untyped: parameter 'a' has no type hint"),
        (starred, "cannot be passed by name"),
        (strange, "cannot be resolved"),
        (waiting, "a tool is a plain function"),
        (opaque, "a parameter's type has no schema"),
    ],
)
def test_wrong_signatures_are_refused_when_the_environment_is_made(method: Any, words: str):
    with pytest.raises(ContractError, match=words) as caught:
        bad(**{method.__name__: tool(method)})()
    assert caught.value.hint


def test_wrong_classes_are_refused():
    with pytest.raises(ContractError, match="no method is marked @tool"):
        bad()()
    from spearrl.envs import Environment

    with pytest.raises(ContractError, match="ToolEnvironment.Options"):
        bad(Options=type("Options", (Environment.Options,), {}), look=tool(lambda self: "x"))()


def play(env: ToolEnvironment, encoder: Any, reply: str) -> Any:
    engine = ScriptedEngine(lambda request: encoder.reply_ids(reply))
    limits = {"max_turns": 3, "max_reply_tokens": 400, "max_response_tokens": 0, "context_tokens": 9000}
    collector = Collector(engine, encoder, env, style="chat", **limits)
    return collector.collect([TASK], 1, run_seed=0, step=0, first_group_id=0)[0].trajectories[0]


@pytest.mark.parametrize("family", ["tiny", "qwen2.5", "llama3"])
def test_prompts_suit_every_template(family: str):
    encoder = parts()[1] if family == "tiny" else encoder_of(family)

    def text(ids: Any) -> str:
        return encoder.tokenizer.decode(list(ids))

    episode = play(Shop(), encoder, call("add", {"a": 1}))
    first = text(episode.turns[0].prompt_ids)
    assert (
        "add(a: int, b: int = 1): Add two numbers." in first
        and 'Call one with <tool_call>{"name"' in first
        and first.count("answer(value: int)") == 1
    )
    assert [turn.action.tool_calls for turn in episode.turns] == [1, 1, 1] and episode.status is Status.TURN_LIMIT
    assert "Tools:" not in text(episode.turns[0].prompt_ids[:0]) and text(episode.turns[1].prompt_ids).count(
        "Tools:"
    ) == first.count("Tools:")
    quiet = play(Shop(describe="none"), encoder, call("add", {"a": 1}))
    assert "add(" not in text(quiet.turns[0].prompt_ids)
    if family == "qwen2.5":
        episode = play(Shop(describe="template"), encoder, call("add", {"a": 1}))
        prompt = text(episode.turns[1].prompt_ids)
        assert (
            '"function"' in prompt and "add(a: int" not in prompt and "<tool_response>\n2\n</tool_response>" in prompt
        )
    else:
        with pytest.raises(ConfigError, match="the chat template does not show the environment's tools") as caught:
            open_format(encoder.tokenizer, ModelSection(), Shop(describe="template").tools())
        assert "env.options.describe=prompt" in caught.value.hint
