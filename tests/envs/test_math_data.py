"""Math problems: generated ones, files of every shape, and no test problem among those for training."""

from __future__ import annotations

import builtins
import json
import warnings

import pytest

from spearrl.envs.math import Math
from spearrl.envs.math.data import WRAPPED, open_problems
from spearrl.envs.math.generate import KINDS, generate_problems
from spearrl.envs.math.grade import is_right
from spearrl.errors import ConfigError
from spearrl.types import Task
from tests.support.shared_data import shared


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("digits", [2, 5])
def test_generated_problems_are_right_and_their_splits_have_no_numbers_in_common(digits):
    train, val = generate_problems(0, digits, "train", 800), generate_problems(0, digits, "val", 100)
    assert len({t.id for t in train}) == 800 and {t.data["stratum"] for t in val} == set(KINDS)
    assert not {t.data["steps"] for t in train} & {t.data["steps"] for t in val}
    assert (
        generate_problems(1, digits, "train", 8) != train[:8]
        and train[:8] == generate_problems.__wrapped__(0, digits, "train", 800)[:8]
    )
    assert len({t.data["problem"] for t in train}) > 700
    for task in (*train[:200], *val):  # our own templates, not a model's text
        import math

        printed: list[object] = []
        exec(task.data["steps"][0], {**vars(math), "pow": builtins.pow, "print": printed.append})
        assert str(printed[0]) == task.data["answer"], task.id


def test_a_file_of_any_usual_shape(tmp_path):
    dapo = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    )
    dapo += "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is $2+2$?\n\n"
    dapo += 'Remember to put your answer on its own line after "Answer:".'
    rows = [
        {
            "prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": dapo}],
            "reward_model": {"ground_truth": "4", "style": "rule"},
        },
        {"question": "Half of 9?", "answer": 4.5},
        {"problem": "What is $ 2+2 $?", "answer": "4"},
        {"problem": "What is $2-2$?", "answer": 0},
        {"problem": "unanswered", "answer": ""},
        {"question": "half?", "answer": "1,000/2 = <<1000/2=500>>500\n#### 500"},
        {"problem": "sum?", "answer": "72", "solution": "48/2 = <<48/2=24>>24\n48+24=<<48+24=72>>72\n#### 72"},
    ]
    with pytest.warns(
        UserWarning,
        match="1 taken out of DAPO's .*; 1 problems that came twice left out; 1 without an answer left out$",
    ):
        problems = open_problems(written(tmp_path / "mine.jsonl", *rows), "aime")
    tasks = {task.id: task.data for split in ("train", "val") for task in problems[split]}
    assert WRAPPED.match(dapo)[1] == "What is $2+2$?"
    assert tasks["mine-0"] == {"problem": "What is $2+2$?", "answer": "4"} and tasks["mine-1"]["answer"] == "4.5"
    assert set(tasks) == {"mine-0", "mine-1", "mine-3", "mine-5", "mine-6"}
    assert tasks["mine-5"] == {"problem": "half?", "answer": "500", "steps": ("print( 1000 / 2 )",)}
    assert tasks["mine-6"]["steps"] == ("print( 48 / 2 )", "print( 48 + 24 )")


def read(tmp_path, *rows):
    """The tasks of a file in its order, and the one line in which it was told what was left out or changed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problems = open_problems.__wrapped__(written(tmp_path / "mine.jsonl", *rows), "")
    tasks = sorted((t for tasks in problems.values() for t in tasks), key=lambda t: int(t.id.rpartition("-")[2]))
    told = [str(warning.message) for warning in caught]
    assert len(told) <= 1 and all(line.startswith(f"math data: {len(tasks)} problems in ") for line in told)
    return [task.data for task in tasks], told[0].partition("; ")[2] if told else ""


def chat(*messages):
    return [{"role": role, "content": content} for role, content in messages]


def test_a_prefilled_reply_is_not_the_problem(tmp_path):
    """Else all rows are one problem, "<think>"."""
    rows = [{"prompt": chat(("user", f"a{n}"), ("assistant", "<think>")), "answer": n} for n in range(3)]
    data, told = read(tmp_path, *rows)
    assert [task["problem"] for task in data] == ["a0", "a1", "a2"] and told == "3 prefilled replies left out"


def test_system_and_earlier_messages_are_told(tmp_path):
    turns = chat(("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"))
    data, told = read(tmp_path, {"prompt": turns, "answer": 4}, {"problem": "3+3?", "answer": 6})
    assert [task["problem"] for task in data] == ["2+2?", "3+3?"]
    assert told == "1 system messages left out; 2 earlier messages left out"


ASKED = [
    ('How many? Let\'s think step by step and output the final answer after "####".', "How many?"),  # verl's GSM8K
    ("Put your final answer after ####.\n\nHow many?", "How many?"),
    ("Find $x$. You must put your answer inside <answer> </answer> tags, i.e., <answer> 7 </answer>.", "Find $x$."),
    ('Find $x$. End your reply with "Answer: <number>".', "Find $x$."),
    ("A circle. Find its area, and write the answer after ####.", "A circle. Find its area"),
    ("Please find the area of a circle and put the answer after ####.", "Please find the area of a circle"),
]


@pytest.mark.parametrize(("problem", "bare"), ASKED)
def test_orders_to_answer_in_another_form_are_left_out(tmp_path, problem, bare):
    data, told = read(tmp_path, {"problem": problem, "answer": 5})
    assert data == [{"problem": bare, "answer": "5"}]
    assert told == "1 with an order to answer in another form, left out"


KEPT = [
    "Find $x$. Please reason step by step, and put your final answer within \\boxed{}.",  # what is asked for here too
    "Find $\\boxed{3}+4$. Write your answer as a fraction.",
    "Find the sum of all areas.Output the remainder when the answer is divided by 100.",  # AMC
    "Enter your answer in the form $(r,\\theta)$.",
]


@pytest.mark.parametrize("problem", KEPT)
def test_other_words_about_the_answer_stay(tmp_path, problem):
    assert read(tmp_path, {"problem": problem, "answer": 5}) == ([{"problem": problem, "answer": "5"}], "")


def test_an_order_that_is_not_understood_is_told(tmp_path):
    problem = "Give the area of a circle after ####."
    data, told = read(tmp_path, {"problem": problem, "answer": 5})
    assert data[0]["problem"] == problem and told == "1 that ask for #### or <answer> in a way that is not understood"


def test_a_test_problem_is_known_by_whatever_order_follows_it(tmp_path):
    written(tmp_path / "aime24.jsonl", {"problem": "What is 2+2?", "answer": "4"})
    question = "What is 2+2? Please reason step by step, and put your final answer within \\boxed{}."
    written(tmp_path / "own.jsonl", {"problem": question, "answer": "4"}, {"problem": "What is 3+2?", "answer": "5"})
    with pytest.warns(UserWarning, match="1 training problems that are in a test file too left out"):
        assert len(open_problems(str(tmp_path), "own")["train"]) == 1


def test_problems_without_an_answer_are_left_out(tmp_path):
    answers = ["proof", "notfound", "Not found", "", None, float("nan"), "5"]
    data, told = read(tmp_path, *({"problem": f"a{n}", "answer": answer} for n, answer in enumerate(answers)))
    assert [task["problem"] for task in data] == ["a6"] and told == "6 without an answer left out"


@pytest.mark.parametrize(
    ("stored", "answer"),
    [
        ('["5"]', "5"),  # Skywork-OR1's, as text
        ('["\\\\frac{1}{2}"]', r"\frac{1}{2}"),
        (r'["\frac{1}{2}"]', r"\frac{1}{2}"),
        ("['5']", "5"),
        (["5"], "5"),
        (r"\boxed{5}", "5"),
        (r'["\\boxed{5}"]', "5"),
    ],
)
def test_answers_come_out_of_lists_and_boxes(tmp_path, stored, answer):
    (task,), told = read(tmp_path, {"problem": "a", "answer": stored})
    assert task["answer"] == answer and told == r"1 answers taken out of a list or \boxed{}"
    assert is_right(answer, task["answer"], None)


@pytest.mark.parametrize(("gold", "reply"), [("5,", "5"), ("5", "5,"), (r"\boxed{5}", "5"), ("[1,2]", "[1,2]")])
def test_answers_in_plain_dress_are_right_without_a_judge(tmp_path, gold, reply):
    (task,), _ = read(tmp_path, {"problem": "a", "answer": gold})
    assert is_right(reply, task["answer"], None) and not is_right("6", task["answer"], None)


def test_several_answers_are_left_out(tmp_path):
    answers = ('["5", "6"]', ["5", "6"], "5")
    data, told = read(tmp_path, *({"problem": f"a{n}", "answer": answer} for n, answer in enumerate(answers)))
    assert [task["problem"] for task in data] == ["a2"] and told == "2 with several answers left out"


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        ("Find f(1,2).", "Find f(12).", 2),
        ("Find f(a, b).", "Find f(ab).", 2),
        ("A ratio of 1:2", "A ratio of 12", 2),
        ("Add 1 2", "Add 12", 2),
        ("Let x = 1.5", "Let x = 15", 2),
        ("Find f(1, 2).", "find $f(1,2)$", 1),
        ("1,000 men", "$1000$ men", 1),
        ("If x=2, then?", "If x=2 then", 1),
    ],
)
def test_punctuation_that_matters_tells_problems_apart(tmp_path, first, second, count):
    data, told = read(tmp_path, {"problem": first, "answer": 1}, {"problem": second, "answer": 2})
    assert len(data) == count and told == ("1 problems that came twice left out" if count == 1 else "")


def test_a_single_file_holds_some_out_and_the_same_ones_every_time(tmp_path):
    path = written(tmp_path / "mine.jsonl", *({"problem": f"What is {n} + 1?", "answer": n + 1} for n in range(400)))
    problems = open_problems(path, "aime")
    assert 5 < len(problems["val"]) < 60 and len(problems["val"]) + len(problems["train"]) == 400
    assert [t.id for t in open_problems.__wrapped__(path, "aime")["val"]] == [t.id for t in problems["val"]]


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_a_small_file_still_holds_one_out(tmp_path, count):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(f'{{"problem": "Compute {i}*{i}.", "answer": {i * i}}}' for i in range(count)))
    splits = open_problems(str(path), "")
    assert len(splits["val"]) == 1 and len(splits["train"]) == count - 1


def test_training_never_sees_a_test_problem(tmp_path):
    written(
        tmp_path / "aime24.jsonl", {"problem": "Let $x = \\dfrac{1}{2}$. Find $\\left(x\\right)^2$.", "answer": "1/4"}
    )
    written(
        tmp_path / "aime_1983_2023_train.jsonl",
        {"problem": "let $x=\\frac{1}{2}$. Find $(x)^2$", "answer": "1/4"},
        {"problem": "Let $x = \\frac{1}{2}$. Find $(x)^3$.", "answer": "1/8"},
    )
    written(
        tmp_path / "own.jsonl", {"problem": "Let x = 1.5", "answer": "1.5"}, {"problem": "Let x = 15", "answer": "15"}
    )
    with pytest.warns(UserWarning, match="1 training problems .* left out"):
        problems = open_problems(str(tmp_path), "aime, own")
    assert [t.id for t in problems["train"]] == ["aime_1983_2023_train-1", "own-0", "own-1"]
    assert [t.split for t in problems["aime24"]] == ["aime24"]
    with pytest.warns(UserWarning, match="1 training problems .* left out"):
        beside = open_problems(str(tmp_path / "aime_1983_2023_train.jsonl"), "")
    assert set(beside) == {"train", "aime24"}


def test_integer_answers_only_where_the_source_says_so(tmp_path):
    written(
        tmp_path / "math_train.jsonl",
        {"problem": "a", "answer": "-7", "type": "Algebra"},
        {"problem": "b", "answer": "\\frac{1}{2}"},
    )
    with pytest.warns(UserWarning, match="1 whose answer is no integer left out"):
        problems = open_problems(str(tmp_path), "math")
    assert {"a"} == {t.data["problem"] for split in problems.values() for t in split}
    assert {"a", "b"} == {
        t.data["problem"] for split in open_problems(str(tmp_path), "math_train").values() for t in split
    }


def test_parquet(tmp_path, monkeypatch):
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {n}?"}], "reward_model": {"ground_truth": str(n)}}
        for n in range(40)
    ]
    path = tmp_path / "mine.parquet"
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert {t.data["answer"] for split in open_problems(str(path), "").values() for t in split} == {
        str(n) for n in range(40)
    }


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "mine.parquet").write_bytes(b"PAR1")
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *rest: (_ for _ in ()).throw(ImportError(name)) if name == "pyarrow" else real(name, *rest),
    )
    with pytest.raises(ConfigError, match="pyarrow") as told:
        open_problems(str(tmp_path / "mine.parquet"), "")
    assert "spearrl[envs]" in told.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"problem": "a"}', "answer, ground_truth"),
        ('{"text": "a", "answer": "b"}', "problem, question"),
        ('{"problem": "a", "answer": {"b": 1}}', "answer"),
        ("[1]", "JSON object"),
        ('{"prompt": [{"role": "assistant", "content": "a"}], "answer": 1}', "without a message of its user"),
        ("{", "cannot be read"),
        ("\n", "no problems"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as told:
        open_problems(str(path), "")
    assert "bad.jsonl" in f"{told.value.where} {told.value}"


def test_broken_json_is_named_with_its_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "a", "answer": 1}\n\n{"problem":\n')
    with pytest.raises(ConfigError) as told:
        open_problems(str(path), "")
    assert told.value.where == f"{path}:3"


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        open_problems(str(tmp_path / "none"), "aime")
    (tmp_path / "aime24.jsonl").write_text('{"problem": "a", "answer": 1}')
    with pytest.raises(ConfigError, match="gsm8k_train") as told:
        open_problems(str(tmp_path), "gsm8k")
    assert "(aime24)" in told.value.hint
    assert {name: len(tasks) for name, tasks in open_problems(str(tmp_path), "").items()} == {
        "train": 0,
        "aime24": 1,
    }


def test_the_real_files():
    with pytest.warns(UserWarning, match="315 problems that came twice left out; 5 training problems .* left out"):
        problems = open_problems(str(shared("data/math")), "aime,math")
    sizes = {name: len(tasks) for name, tasks in problems.items()}
    assert sizes == {"train": sizes["train"], "aime24": 30, "aime25": 30, "amc": 83, "math500": 500, "gsm8k_test": 1319}
    assert sizes["train"] == 5356  # of 975 AIME and 4701 MATH rows with an integer answer
    steps = [t for t in open_problems(str(shared("data/math")), "gsm8k")["train"] if t.data.get("steps")]
    assert len(steps) > 7000


def test_training_files_without_data_are_refused():
    with pytest.raises(ConfigError, match="env.options.train='gsm8k' names files, but env.options.data is not set"):
        Math(train="gsm8k", grader="plain")


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_the_expert_answers_what_was_solved_without_a_calculation(noise):
    """Some of GSM8K's solutions have no calculator note."""
    slot = Math(grader="plain", sandbox={"kind": "none", "unsandboxed": True, "packages": []})
    slot.expert_noise = noise
    for seed in range(40):
        slot.reset(
            Task(
                "train/0", "train", {"problem": "Of his 7 cats none left. How many stayed?", "answer": "7", "steps": ()}
            ),
            seed,
        )
        answer = slot.expert()
        assert answer.startswith("\\boxed{") and (answer == "\\boxed{7}" or noise)
