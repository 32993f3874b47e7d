"""The math environment: the tool, its results, answers and rewards, replies both ways, faults, and a run of it."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spearrl.algorithm import episode_bonuses
from spearrl.algorithm.rewards import shape
from spearrl.batching import rows_from_groups
from spearrl.config import AlgoSection, load_config, resolve, to_toml
from spearrl.envs import call, make
from spearrl.envs.math import Math
from spearrl.envs.math.env import EMPTY, FAILED, SUFFIX
from spearrl.errors import ConfigError
from spearrl.rollout import Collector
from spearrl.sandbox import RunResult
from spearrl.types import Action, Group, Reply, Status, Task, Trajectory, Turn
from tests.models.test_chat import encoder_of
from tests.support.scripted_engine import ScriptedEngine

TRUSTED = {"kind": "none", "unsandboxed": True, "packages": ["numpy"], "concurrency": 1}
TASK = Task("t", "train", {"problem": "What is 6 times 7?", "answer": "42"})


def env(**options) -> Math:
    return Math(**{"grader": "plain", "sandbox": TRUSTED, **options})


def played(environment: Math, *replies: str, task: Task = TASK):
    environment.reset(task, 0)
    return [environment.step(environment.parse(Reply(reply, (), "stop"))) for reply in replies]


def code(text: str) -> str:
    return call("code_interpreter", {"code": text})


# the tool


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("print(6 * 7)", "42"),
        ("```python\nprint(6 * 7)\n```", "42"),
        ("```py\nprint(1)\nprint(2)```", "1\n2"),
        ("```\nprint(3)\n```\n", "3"),
        (
            "print(pow(3, 5, 7), gcd(12, 18), comb(5, 2), Fraction(1, 3), list(permutations('ab', 2))[0])",
            "5 6 10 1/3 ('a', 'b')",
        ),
        ("print(np.arange(3).sum(), numpy.pi > 3)", "3 True"),
        ("6 * 7", EMPTY),
        ("print('seen')\n1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", FAILED),
        ("def f(:", "SyntaxError"),
    ],
)
def test_what_comes_back(text, shown):
    (outcome,) = played(env(), code(text))
    printed = outcome.observation.text
    assert (
        (printed == shown)
        if shown in (EMPTY, FAILED) or shown[0].isdigit()
        else (shown in printed and printed.endswith(FAILED) and printed.count("\n") <= 2)
    )
    assert not outcome.terminated and outcome.reward == 0 and "seen" not in printed and "fault" not in outcome.info


def test_every_call_starts_afresh_and_a_session_does_not():
    assert "NameError" in played(env(), code("x = 6"), code("print(7 * x)"))[1].observation.text
    session = env(sandbox={**TRUSTED, "session": True})
    assert played(session, code("x = 6"), code("print(7 * x)"))[1].observation.text == "42"
    assert "NameError" in played(session, code("print(7 * x)"))[0].observation.text  # another episode
    session.close()
    session.close()


def test_a_long_result_loses_its_middle():
    (outcome,) = played(env(max_result_chars=40), code("print('a' * 50 + 'b' * 50)"))
    assert outcome.observation.text == "a" * 20 + "\n[... 60 characters cut]\n" + "b" * 20


def test_time_runs_out():
    (outcome,) = played(env(sandbox={**TRUSTED, "timeout_s": 1.0}), code("while True: pass"))
    assert outcome.observation.text == "error: stopped after 1 s" and not outcome.terminated


def test_a_sandbox_that_fails_is_a_fault_and_no_exception(monkeypatch):
    environment = env()
    monkeypatch.setattr(
        environment,
        "_sandbox",
        type("Down", (), {"run": lambda self, text: RunResult("unavailable", stderr="server away")})(),
    )
    (outcome,) = played(environment, code("print(1)"))
    assert (
        outcome.info["fault"] is True
        and "server away" in outcome.observation.text
        and not outcome.terminated
        and outcome.reward == 0
    )


def test_it_runs_in_the_jail():
    try:
        environment = make("math", grader="plain")
    except ConfigError as reason:
        pytest.skip(f"no isolation here: {reason.message}")
    assert (
        played(environment, code("import os; print(os.path.exists('/root/.ssh'), 6 * 7)"))[0].observation.text
        == "False 42"
    )


# answers


def test_answers_and_rewards():
    for reply, reward in (
        (r"It is \boxed{42}.", 1.0),
        (r"\boxed{042}", 1.0),
        (r"\boxed{43}", -1.0),
        ("42", -1.0),
        (r"\boxed{", -1.0),
    ):
        (outcome,) = played(env(), reply)
        assert (outcome.reward, outcome.terminated, outcome.info["success"]) == (reward, True, reward > 0), reply
    assert (
        played(env(grader="release"), r"\boxed{042}")[0].reward == -1
        and played(env(grader="release"), r"\boxed{42}")[0].reward == 1
    )
    first, last = played(env(), code("print(6 * 7)") + r" so \boxed{42}", r"\boxed{42}")
    assert not first.terminated and last.reward == 1  # a call goes first


def test_mathematics_is_judged_elsewhere():
    pytest.importorskip("math_verify")
    assert played(env(grader="math_verify"), r"\boxed{\frac{84}{2}}")[0].reward == 1


def test_a_reply_is_valid_with_a_call_or_a_box():
    environment = env()
    cases = {
        code("print(1)"): (True, 1),
        "<think>hm</think>\n" + code("1") + code("2"): (True, 1),
        r"\boxed{1}": (True, 0),
        r"<think>\boxed{1}</think>": (True, 0),
        "forty-two": (False, 0),
        "": (False, 0),
        "<tool_call>{": (False, 0),
        call("other", {}): (True, 0),
        call("code_interpreter", {"text": "1"}): (True, 0),
    }
    for text, (valid, calls) in cases.items():
        action = environment.parse(Reply(text, (), "stop"))
        assert (action.valid, action.tool_calls) == (valid, calls), text
    both = environment.parse(Reply(code("a\nb") + "\n" + code("2"), (), "stop"))
    assert both.text == code("a\nb")  # the first of several, as released


TEXTS = st.text(max_size=80)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_format_is_parses_inverse(text):
    for reply in ("hermes", "plain"):
        environment = PARSERS[reply]
        for wanted in (
            code(text.strip() or "1"),
            f"\\boxed{{{text.replace('{', '').replace('}', '').replace('<tool_call>', '').strip()}}}",
        ):
            action = environment.parse(Reply(environment.format(wanted), (), "stop"))
            if reply == "hermes" or "\\boxed" not in text:
                assert action.text == wanted and action.valid, (reply, wanted)
        action = environment.parse(Reply(text, (), "stop"))
        again = environment.parse(Reply(environment.format(action.text), (), "stop"))
        assert again.text == action.text


PARSERS = {reply: env(reply=reply) for reply in ("hermes", "plain")}


def test_plain_replies_for_tiny_models():
    environment = env(reply="plain", describe="none")
    assert environment.reset(TASK, 0).text == "What is 6 times 7?"
    action = environment.parse(Reply(" print( 6 * 7 )", (), "stop"))
    assert action == Action(code("print( 6 * 7 )"), True, 1) and environment.format(action.text) == "print( 6 * 7 )"
    assert (
        environment.step(action).observation.text == "42"
        and environment.step(environment.parse(Reply(r"\boxed{42}", (), "stop"))).reward == 1
    )


def test_the_expert_and_its_noise():
    def won(noise: float) -> list[tuple[bool, int]]:
        results = []
        for seed, task in enumerate(environment.tasks("train")[:60]):
            environment.expert_noise, calls = noise, 0
            environment.reset(task, seed)
            for _ in range(environment.max_turns):
                action = environment.parse(Reply(environment.format(environment.expert()), (), "stop"))
                calls += action.tool_calls
                if (outcome := environment.step(action)).terminated:
                    break
            results.append((outcome.info["success"], calls))
        return results

    environment = env(digits=2, describe="none", reply="plain")
    assert won(0.0) == [(True, 1)] * 60 == won(0.0)
    noisy = won(0.4)
    assert noisy == won(0.4) and 15 < sum(ok for ok, _ in noisy) < 50 and {calls for _, calls in noisy} == {0, 1, 2}
    assert sum(calls for _, calls in won(1.0)) == 0


def test_splits():
    environment = env(problems=80)
    assert (len(environment.tasks("train")), len(environment.tasks("val"))) == (80, 10)
    with pytest.raises(ConfigError, match="train, val"):
        environment.tasks("aime24")
    assert environment.reset(TASK, 0).text == TASK.data["problem"] + SUFFIX


# in a run


def conversation(replies, **limits):
    """An episode of a scripted model with Qwen2.5's template: its trajectory, and the text of every prompt."""
    encoder = encoder_of("qwen2.5")
    engine = ScriptedEngine(lambda request: encoder.reply_ids(replies[len(engine.requests) - 1]))
    settings = {"max_turns": 8, "max_reply_tokens": 400, "max_response_tokens": 0, "context_tokens": 8000, **limits}
    collector = Collector(engine, encoder, env(), style="chat", **settings)
    try:
        (group,) = collector.collect([TASK], 1, run_seed=0, step=0, first_group_id=0)
    finally:
        collector.close()
    return group.trajectories[0], [encoder.tokenizer.decode(r.token_ids) for r in engine.requests]


def test_an_episode_with_a_real_chat_template():
    trajectory, prompts = conversation([f"Let me see. {code('print(6*7)')}", r"So \boxed{42}."])
    assert (
        '"name": "code_interpreter"' in prompts[0]
        and "Only what it prints comes back" in prompts[0]
        and SUFFIX in prompts[0]
    )
    assert prompts[1].endswith("<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert prompts[1].startswith(prompts[0]) and trajectory.status is Status.SUCCESS
    assert (trajectory.reward, trajectory.tool_calls, len(trajectory.turns)) == (1.0, 1, 2)


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        ({"max_turns": 2}, "turn_limit"),
        ({"max_response_tokens": 120}, "overlong"),
        ({"context_tokens": 700}, "context_limit"),
    ],
)
def test_an_episode_that_is_cut_off_is_a_wrong_one(limits, status):
    trajectory, _ = conversation([code("print(6*7)")] * 9, **limits)
    assert trajectory.status.value == status and trajectory.reward == -1.0 and trajectory.turns[-1].reward == -1.0


def episode(number: int, tool_calls: list[int], *, right: bool) -> Trajectory:
    turns = [Turn((1,), (2,), (0.0,), "stop", "a", "b", None, Action("a", True, calls)) for calls in tool_calls]
    turns[-1].reward = 1.0 if right else -1.0
    return Trajectory(TASK, 0, number, number, turns, Status.SUCCESS if right else Status.FAILURE)


def test_the_tool_bonus_of_the_releases():
    """spear.md 5.1: qwen2.5 pays μ·min(1, 0.1 b) right or wrong; qwen3 pays all of μ to a right answer after a call."""
    cases = [([0], True), ([1, 1, 0], True), ([1, 0], False), ([1] * 12 + [0], False)]
    group = Group(0, TASK, [episode(n, calls, right=right) for n, (calls, right) in enumerate(cases)])
    rows = rows_from_groups([group])

    def scores(**intrinsic):
        algo = AlgoSection.model_validate(
            {"name": "grpo+intrinsic", "fidelity": "release_math", "intrinsic": intrinsic}
        )
        assert algo.intrinsic.count == "tool_calls" and algo.intrinsic.condition == "always"
        shaped = shape(rows, [group], algo, mu=0.5, max_reply_tokens=9, group_size=4, seed=0)
        last = [sum(len(t.turns) for t in group.trajectories[: n + 1]) - 1 for n in range(4)]
        assert len(episode_bonuses([group], algo)) == len(shaped.rewards)
        return [round(float(shaped.rewards[i]), 6) for i in last]

    assert scores() == [1.0, 1.1, -0.95, -0.5]
    assert scores(flat_when_right=True) == [1.0, 1.5, -0.95, -0.5]


def test_release_fidelities_choose_the_released_grader(tmp_path):
    resolved = resolve(None, ["algo.fidelity=release_math"], env="math")
    assert (
        resolved.config.env.options["grader"] == "release"
        and resolved.sources["env.options.grader"] == "fidelity release_math"
    )
    saved = tmp_path / "run.toml"
    saved.write_text(to_toml(resolved.config))
    assert load_config(saved).env.options["grader"] == "release"
    assert "grader" not in load_config(saved, ["algo.fidelity=default"]).env.options
    assert (
        load_config(None, ["algo.fidelity=release_math", "env.options.grader=math_verify"], env="math").env.options[
            "grader"
        ]
        == "math_verify"
    )
    assert "grader" not in load_config(None, ["algo.fidelity=release_math"], env="webshop").env.options


def test_options_are_named_in_errors():
    with pytest.raises(ConfigError, match="grader"):
        Math(grader="eval")
    if find_spec("math_verify") is None:
        with pytest.raises(ConfigError, match="math-verify"):
            Math(sandbox=TRUSTED)
    with pytest.raises(ConfigError, match="unsandboxed"):
        Math(grader="plain", sandbox={"kind": "none"})
    assert json.dumps(env().schemas())
