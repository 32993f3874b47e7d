"""What every built-in text environment must do: keep the contract, take any reply, project replies as verl-agent does,
refuse a step before the first reset, and train."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spearrl.config import load_config
from spearrl.envs import Environment, make
from spearrl.envs.check import check, check_environment
from spearrl.envs.check.isolation import processes
from spearrl.errors import ContractError
from spearrl.trainer import Trainer
from spearrl.types import Action, Reply
from tests.support.shared_data import golden

COMPACT = {"observation": "compact", "reply": "plain"}
PLAIN_CODE = {"kind": "none", "unsandboxed": True, "packages": ["numpy"], "concurrency": 1}
# name, options; the first of a name is checked in fresh processes too
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("webshop", {}),
    ("webshop", COMPACT),
    ("alfworld", {"size": "small"}),
    ("alfworld", COMPACT),
    ("search", {"size": 100}),
    ("search", {"size": 100, **COMPACT}),
    ("sokoban", {}),
    ("sokoban", {"vision": True}),
    ("sokoban", {"boxes": 2, **COMPACT}),
    ("math", {"grader": "plain", "sandbox": PLAIN_CODE, "problems": 64}),
]
TEXT = ("webshop", "alfworld", "search", "sokoban")
TEXT_VARIANTS = [variant for variant in VARIANTS if variant[0] in TEXT]
MARKS = ["<action>", "</action>", "<search>", "</search>", "<answer>", "</answer>", "<think></think>", "{question}"]
MARKS += [
    "search[",
    "click[",
    "]",
    "[",
    "buy now",
    "1",
    "lamp",
    "go to ",
    "take ",
    "desk 1",
    "in/on",
    "help",
    "examine ",
]
MARKS += ["search ", "answer ", "up", "{o}", "\n", "\x00", "\ud800", "我", "İ"]
LONG = {
    "brackets": "<action>search[" + "[" * 100_000 + "]</action>",
    "a long query": "<action>search[" + "lamp " * 20_000 + "]</action>",
    "a long command": "<action>" + "go to " * 200_000 + "</action>",
    "open tags": "<action>" * 100_000,
    "open searches": "<search>" * 200_000,
    "a long search": "<search>" + "whale " * 200_000 + "</search>",
    "no tag": "search " * 200_000,
}


@cache
def opened(name: str, options: str) -> Environment:
    return make(name, **json.loads(options))


def environment_of(name: str, options: dict[str, Any]) -> Environment:
    """A slot of an environment that is built once."""
    return opened(name, json.dumps(options)).spawn()


def first_task(environment: Environment):
    split = "valid_seen" if type(environment).__name__ == "ALFWorld" else "val"
    return environment.tasks(split)[0]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_check_env_finds_nothing(name: str, options: dict, monkeypatch: pytest.MonkeyPatch):
    if options != next(settings for other, settings in VARIANTS if other == name):
        monkeypatch.setattr(check, "RULES", tuple(rule for rule in check.RULES if rule is not processes))
    findings = check_environment(name, options, deadline_s=120)  # a busy machine opens a sandbox slowly
    warned = () if name == "math" else ("warn",)  # a model that cannot play writes no code: no tool is tried
    wrong = [f for f in findings if f.level in ("fail", *warned) and f.rule not in ("speed", "spawn")]
    assert not wrong, "\n".join(map(str, wrong))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=8)), max_size=6), max_size=6),
    st.sampled_from(
        [variant for variant in VARIANTS if variant[0] in TEXT] + [("webshop", {"observation": "text_rich"})]
    ),
)
def test_no_reply_raises(replies: list[list[str]], variant: tuple[str, dict]):
    environment = environment_of(*variant)
    task = first_task(environment)
    observation, history = environment.reset(task, 0), []
    for pieces in replies:
        action = environment.parse(Reply("".join(pieces), (), "stop"))
        outcome = environment.step(action)
        history.append((observation, action))
        observation = outcome.observation
        assert math.isfinite(outcome.reward) and environment.window(history, observation, task)
        assert environment.messages(observation, 1)


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize(("name", "options"), TEXT_VARIANTS, ids=str)
def test_long_input_is_an_ordinary_turn(name: str, options: dict, text: str):
    environment = environment_of(name, options)
    environment.reset(first_task(environment), 0)
    outcome = environment.step(environment.parse(Reply(f"<think>so</think>{text}", (), "stop")))
    assert (outcome.reward, outcome.terminated) == (0.0, False)


@pytest.mark.parametrize("name", ["webshop", "alfworld"])
def test_tagged_replies_are_projected_as_upstream(name: str):
    cases = [case for case in golden("projection_upstream")["cases"] if case["env"] == name]
    for case in cases:
        action = environment_of(name, {}).parse(Reply(case["text"], (), "stop"))
        assert (action.text, action.valid) == (case["action"], bool(case["valid"])), case
    assert len(cases) == 9


@pytest.mark.parametrize("name", TEXT)
def test_a_step_before_reset_is_an_error(name: str):
    with pytest.raises(ContractError, match="reset"):
        environment_of(name, {}).step(Action("up"))


@pytest.mark.parametrize("preset", ["tiny-search", "tiny-sokoban", "tiny-sokoban-vision"])
def test_a_run_trains(tmp_path, preset: str):
    words = ["hidden_size=16", "heads=2", "layers=1", "feed_forward=16", "vocab_size=300"]
    changes = [f"model.tiny.{word}" for word in words] + ["sft.episodes=20", "sft.epochs=1", "run.steps=2"]
    changes += ["rollout.groups_per_step=2", "rollout.group_size=4", "run.threads=1", "eval.tasks=8"]
    changes += ["run.tensorboard=false", f"run.output_dir={tmp_path}", "run.name=r"]
    Trainer(load_config(None, changes, preset=preset, algo="gigpo+spear")).train()
    events = map(json.loads, (tmp_path / "r/events.jsonl").read_text().splitlines())
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == 2 and all(math.isfinite(event["rollout/reward"]) for event in steps)
