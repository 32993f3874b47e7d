"""Answers of math problems: boxes, numbers, the released rule, and judging processes that hostile text cannot hurt."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spearrl.envs.math import judge as judging
from spearrl.envs.math.answers import LONGEST, boxed, number
from spearrl.envs.math.grade import is_right, is_right_as_released
from spearrl.envs.math.judge import COUNT, Judges
from spearrl.errors import ConfigError, EnvironmentFault
from spearrl.sandbox import RunResult, SandboxOptions, open_sandbox
from tests.support.shared_data import golden

TRUSTED = SandboxOptions(kind="none", unsandboxed=True)


@pytest.fixture(scope="module")
def judges():
    pytest.importorskip("math_verify")
    try:
        opened = Judges(SandboxOptions(), deadline_s=1.5)
    except ConfigError as reason:
        pytest.skip(f"no isolation here: {reason.message}")
    yield opened
    opened.close()
    opened.close()


def test_boxes():
    assert boxed(r"so \boxed{42}.") == "42" and boxed(r"\boxed{1} no, \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed("42") is None and boxed(r"\boxed{\frac{1}{2}") is None and boxed(r"\boxed{}") == ""
    assert boxed(r"\boxed{" + "{" * 100_000) is None


def test_the_released_rule_gives_the_releases_scores():
    for case in golden("math_dapo_score_math")["cases"]:
        assert is_right_as_released(case["solution"], case["gt"]) is case["strict"]["acc"], case


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("042", 42),
        ("1,000", 1000),
        ("$1,234,567$", 1234567),
        (r"\$5.00", 5),
        ("-3", -3),
        (" 7. ", 7),
        ("42.0", 42),
        ("+.5", 0.5),
        (r"10\%", 10),
        (r"3\,000", 3000),
    ],
)
def test_plain_numbers(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    ["", ".", "-", "1,00", "9**9", "1/2", "4 2", "x", "nan", "1,0000", "9" * 41, "٣", "1" + " " * LONGEST],
)
def test_what_is_no_plain_number(text):
    assert number(text) is None


@given(st.integers(-(10**30), 10**30))
def test_integers_are_read_exactly(value):
    assert number(str(value)) == value and number(f"{value:,}") == value and is_right(f"${value:,}$", str(value), None)
    assert not is_right(str(value + 1), str(value), None)


def test_the_released_rule():
    """spear.md 5.1: the last box within the last 100 characters, equal as text."""
    assert (
        is_right_as_released(r"The answer is \boxed{42}.", "42")
        and not is_right_as_released(r"\boxed{042}", "42")
        and not is_right_as_released(r"\boxed{42.0}", "42")
    )
    assert is_right_as_released(r"\boxed{42}" + "." * 90, "42") and not is_right_as_released(
        r"\boxed{42}" + "." * 91, "42"
    )
    assert not is_right_as_released("42", "42") and not is_right_as_released(r"\boxed{42} or \boxed{43}", "42")
    assert (
        not is_right(None, "42", None) and is_right(r"p - q", "p-q", None) and not is_right(r"\frac{84}{2}", "42", None)
    )


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        (r"\frac{84}{2}", "42", True),
        ("q - p", "p-q", False),
        (r"-q+p", "p - q", True),
        (r"\left(3,\frac{\pi}{2}\right)", r"\left( 3, \pi/2 \right)", True),
        (r"\dfrac{14}{6}", r"\frac{7}{3}", True),
        ("43", r"\frac{84}{2}", False),
    ],
)
def test_equal_in_mathematics(judges, prediction, answer, same):
    assert is_right(prediction, answer, judges) is same


def test_hostile_answers_are_wrong_and_hurt_nobody(judges, tmp_path):
    """Nothing they say is run outside the jail; what takes too long is cut off; the next answer is judged as ever."""
    marks = [tmp_path / "a", tmp_path / "b"]
    tmp_path.chmod(0o777)
    hostile = [
        "9**9**9**9",
        "9^{9^{9^{9}}}",
        "10!!!!!!!",
        f"__import__('os').system('touch {marks[0]}')",
        f"\\text{{__import__('pathlib').Path('{marks[1]}').touch()}}",
        r"\frac{1}{" * 100 + "1" + "}" * 100,
        "x" * 200_000,
        "{" * 900,
        "\x00\ud800",
        "True\n",
        "') or print(True) or ('",
    ]
    with ThreadPoolExecutor(COUNT) as threads:
        assert not any(threads.map(lambda text: is_right(text, "42", judges), hostile))
    assert not any(mark.exists() for mark in marks)
    assert all(is_right(r"\frac{84}{2}", "42", judges) for _ in range(4))  # every judge is back


def test_without_a_jail_answers_are_judged_in_another_process_all_the_same():
    pytest.importorskip("math_verify")
    trusting = Judges(TRUSTED)
    assert is_right(r"\frac{84}{2}", "42", trusting) and not is_right("q-p", "p-q", trusting)
    trusting.close()


def test_a_judge_that_is_not_there_is_a_fault_of_the_machine(judges, monkeypatch):
    class Down:
        def run(self, code):
            return RunResult("unavailable", stderr="no jail")

        def close(self):
            closed.append(self)

    closed = []
    held = [judges._free.get() for _ in range(COUNT)]
    judges._free.put((Down(), 0))
    with pytest.raises(EnvironmentFault, match="no jail"):
        judges.equal("a", "b")
    assert len(closed) == 1 and judges.equal("1/2", "0.5")  # another took its place
    judges._free.get()[0].close()
    for pair in held:
        judges._free.put(pair)


def test_an_answer_whose_judge_was_killed_is_judged_again(judges):
    class Killed:
        def run(self, code):
            return RunResult("killed", exit_code=-9)

        def close(self):
            pass

    held = [judges._free.get() for _ in range(COUNT)]
    judges._free.put((Killed(), 0))
    assert judges.equal("1/2", "0.5")
    judges._free.get()[0].close()
    for pair in held:
        judges._free.put(pair)


def test_a_judge_is_renewed_now_and_then(judges, monkeypatch):
    assert all([judges.equal("2/4", "1/2") for _ in range(COUNT)])  # all of them have begun
    monkeypatch.setattr(judging, "MOST", 2)
    before = [judges._free.get() for _ in range(COUNT)]
    judges._free.put((before[0][0], 0))
    assert judges.equal("1/2", "0.5") and judges.equal("1/3", "2/6")
    session, judged = judges._free.get()
    assert session is not before[0][0] and judged == 0
    for pair in ((session, 0), *before[1:]):
        judges._free.put(pair)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(judging, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="math-verify") as told:
        Judges(TRUSTED)
    assert "spearrl[envs]" in told.value.hint and "grader=plain" in told.value.hint


def test_with_a_remote_sandbox_the_judges_are_jailed_here_where_that_can_be(monkeypatch):
    pytest.importorskip("math_verify")
    opened = []

    def open_one(options):
        opened.append((options.kind, options.unsandboxed))
        if options.kind == "bubblewrap":
            raise ConfigError("no namespaces here", hint="none")
        return open_sandbox(options)

    monkeypatch.setattr("spearrl.envs.math.judge.open_sandbox", open_one)
    with pytest.warns(UserWarning, match="in no jail: no namespaces here"):
        judges = Judges(SandboxOptions(kind="fusion", url="http://127.0.0.1:1"))
    try:
        assert opened == [("bubblewrap", False), ("none", True)] and judges.equal(r"\frac{84}{2}", "42")
    finally:
        judges.close()
    with pytest.raises(ConfigError, match="no namespaces here"):  # a jail that was asked for is not done without
        Judges(SandboxOptions())
