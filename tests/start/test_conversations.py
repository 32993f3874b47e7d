"""Cold start from conversation files: what is read, what is learnt, what is refused, through the command line too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spearrl.cli.main import main
from spearrl.config import advice, load_config
from spearrl.config.sections import SftSection
from spearrl.envs.tool import ToolEnvironment, call
from spearrl.errors import ConfigError
from spearrl.learner.optimizer import learning_rate
from spearrl.models import load_model, load_tokenizer
from spearrl.rollout import ChatEncoder
from spearrl.start.sft import encode
from spearrl.start.transcripts import read_conversations
from spearrl.types import Message, Reply
from tests.learner.test_learner import settings as learner_settings
from tests.models.test_chat import encoder_of, tokenizer_of
from tests.support.small_run import SETTINGS

PARAMETERS = {"type": "object", "properties": {"code": {"type": "string"}}}
SCHEMA = {"type": "function", "function": {"name": "run", "description": "Run code.", "parameters": PARAMETERS}}
CALL = {"id": "c", "type": "function", "function": {"name": "run", "arguments": '{"code": "2+3 # é"}'}}
CALLED = {"role": "assistant", "content": "let me see", "tool_calls": [CALL]}
ONE = {
    "messages": [
        {"role": "system", "content": "You help."},
        {"role": "user", "content": "one two"},
        CALLED,
        {"role": "tool", "content": "five", "tool_call_id": "c"},
        {"role": "assistant", "content": "three", "tool_calls": None},
    ],
    "tools": [SCHEMA],
}
TALK = (("user", "find a lamp"), ("assistant", "buy now"), ("user", "more"), ("assistant", "no"))
TWO = {"messages": [{"role": role, "content": content} for role, content in TALK]}
SAID = 'let me see\n<tool_call>\n{"name": "run", "arguments": {"code": "2+3 # é"}}\n</tool_call>'


def write(folder: Path, *rows: object, name: str = "talk.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
    return path


def test_a_conversation_becomes_turns(tmp_path):
    first, second = read_conversations(str(write(tmp_path, ONE, "", TWO)))
    assert (
        first.task.id == "talk.jsonl:1"
        and second.task.id == "talk.jsonl:3"
        and first.tools == [SCHEMA]
        and second.tools == []
    )
    assert [[(m.role, m.text) for m in step.messages] for step in first.steps] == [
        [("system", "You help."), ("user", "one two")],
        [("tool", "five")],
    ]
    assert [step.reply for step in first.steps] == [SAID, "three"] and all(
        step.imitate for step in (*first.steps, *second.steps)
    )
    assert [step.reply for step in second.steps] == ["buy now", "no"]


def test_tool_calls_are_written_as_the_models_own_template_writes_them():
    """Qwen2.5's template renders a call so; an environment with tools reads it back."""
    own = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
        "{% for c in m.tool_calls or [] %}"
        '{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + (c.function.arguments | '
        "tojson) + '}\n</tool_call>' }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    )
    parsed = {**CALLED, "tool_calls": [{"function": {"name": "run", "arguments": {"code": "2+3 # é"}}}]}
    rendered = tokenizer_of("qwen2.5").apply_chat_template([parsed], chat_template=own, tokenize=False)
    assert rendered == f"<|im_start|>assistant\n{SAID}<|im_end|>\n"
    assert ToolEnvironment.parse(object.__new__(_Runner), Reply(SAID, (), "stop")).text == call(
        "run", {"code": "2+3 # é"}
    )


class _Runner(ToolEnvironment):
    """Reads calls only."""


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_only_what_the_assistant_said_is_learnt(tmp_path, family):
    encoder = encoder_of(family)
    encoder.verify()
    examples = encode(
        read_conversations(str(write(tmp_path, ONE, TWO))),
        encoder,
        style="chat",
        context_tokens=500,
        settings=SftSection(observation_weight=0.0),
        seed=0,
    )
    assert examples.too_long == 0 and set(examples.weights.tolist()) == {0.0, 1.0}
    rows, said = examples.rows, []
    for start, end in zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist(), strict=True):
        learnt = rows.token_ids[start:end][examples.weights[start:end] > 0].tolist()
        text = encoder.tokenizer.decode(learnt, skip_special_tokens=False)
        said += [part for part in text.split("<|im_end|>") if part]
    assert sorted(said) == sorted([SAID, "three", "buy now", "no"])
    whole = encoder.tokenizer.decode(rows.token_ids[: int(rows.offsets[1])].tolist(), skip_special_tokens=False)
    assert "one two" in whole and (family != "qwen2.5" or ("Run code." in whole and "<tool_response>\nfive" in whole))


def one_question(*replies, **fields):
    """A conversation of one question, and what follows it."""
    messages = [{"role": "user", "content": "one"}, *({"role": "assistant", **reply} for reply in replies)]
    return {"messages": messages, **fields}


def told_of(path):
    """Conversations, and the one line in which it is told what was changed."""
    with pytest.warns(UserWarning, match="^sft data: ") as caught:
        transcripts = read_conversations(str(path))
    (line,) = [str(warning.message) for warning in caught]
    return transcripts, line.partition("; ")[2]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_content_is_learnt_as_a_thought(tmp_path, name):
    (first,), told = told_of(write(tmp_path, one_question({"content": "two", name: "after one\n"})))
    assert [step.reply for step in first.steps] == ["<think>\nafter one\n</think>\n\ntwo"]
    assert told == "1 thoughts from a field of their own written as <think>"
    (same,) = read_conversations(str(write(tmp_path, one_question({"content": "<think>so</think>two", name: "so"}))))
    assert same.steps[0].reply == "<think>so</think>two"


RETOOL = "add\n<code>print(2+3)</code>\n<interpreter>\n5\n</interpreter>\nso 5"


def test_what_a_tool_said_inside_a_reply_is_not_learnt(tmp_path):
    (first,), told = told_of(write(tmp_path, one_question({"content": RETOOL})))
    assert [step.reply for step in first.steps] == ["add\n<code>print(2+3)</code>", "so 5"]
    assert [(m.role, m.text) for m in first.steps[1].messages] == [("tool", "5")]
    assert told == "1 outputs of tools taken out of replies"
    tora = one_question({"content": "```python\nprint(5)\n```\n```output\n5\n```\nso 5"})
    search = one_question({"content": "<search>a</search><information>b</information><answer>c</answer>"})
    (first, second), _ = told_of(write(tmp_path, tora, search))
    assert [step.reply for step in first.steps] == ["```python\nprint(5)\n```", "so 5"]
    assert [step.reply for step in second.steps] == ["<search>a</search>", "<answer>c</answer>"]
    assert second.steps[1].messages == [Message("user", "<information>b</information>")]
    (cut,), _ = told_of(
        write(tmp_path, one_question({"content": RETOOL.removesuffix("so 5")}))
    )  # nothing answers the output
    assert [step.reply for step in cut.steps] == ["add\n<code>print(2+3)</code>"]


def test_replies_of_weight_0_are_seen_and_not_learnt(tmp_path):
    row = one_question(
        {"content": "no", "weight": 0}, {"content": "two", "weight": 1}, {"content": "three", "weight": None}
    )
    row["messages"][2:2] = [{"role": "user", "content": "again"}]
    row["messages"][4:4] = [{"role": "user", "content": "on"}]
    (first,), told = told_of(write(tmp_path, row))
    assert [(step.reply, step.imitate) for step in first.steps] == [("no", False), ("two", True), ("three", True)]
    assert told == "1 replies of weight 0 not imitated"
    with pytest.raises(ConfigError, match="none with a reply to imitate"):
        read_conversations(str(write(tmp_path, one_question({"content": "no", "weight": 0}))))


def test_nulls_that_parquet_fills_in_are_left_out(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    calls = [{"function": {"name": "run", "arguments": {"code": "x"}}}]
    other = [{"function": {"name": "search", "arguments": {"query": "y"}}}]
    path = tmp_path / "talk.parquet"
    rows = [one_question({"content": "", "tool_calls": called}, tools=[SCHEMA]) for called in (calls, other)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (first, second), told = told_of(path)
    assert [t.steps[0].reply for t in (first, second)] == [
        '<tool_call>\n{"name": "run", "arguments": {"code": "x"}}\n</tool_call>',
        '<tool_call>\n{"name": "search", "arguments": {"query": "y"}}\n</tool_call>',
    ]
    assert told == "2 null arguments of tool calls left out" and first.tools == [SCHEMA]
    null = {"function": {"name": "run", "arguments": {"code": None}}}  # in JSON it was meant
    (transcript,) = read_conversations(str(write(tmp_path, one_question({"content": "", "tool_calls": [null]}))))
    assert '"code": null' in transcript.steps[0].reply


BROKEN = [
    ("{", "Expecting"),
    ([1], '"messages"'),
    ({"text": "x"}, '"messages"'),
    ({"messages": []}, "last message"),
    ({"messages": [{"role": "user", "content": "a"}]}, "last message"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "answers no message"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "says nothing"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "roles"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "text as its content"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "run"}]}]},
        "a tool call is",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "run", "arguments": "{"}}]},
            ]
        },
        "Expecting",
    ),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": 3}]}, "not iterable"),
    ({**TWO, "tools": {"name": "x"}}, "function schemas"),
    (one_question({"content": "<interpreter>5</interpreter>so"}), "begins with a tool's output"),
    (one_question({"content": "a<interpreter>5"}), "without its end"),
    (one_question({"content": "<think>a</think>b", "reasoning": "c"}), "and another one"),
    (one_question({"content": "a", "weight": 0.5}), "weight"),
    ("[" * 100_000, "recursion"),
]


@pytest.mark.parametrize("row, complaint", BROKEN, ids=range(len(BROKEN)))
def test_a_bad_line_is_named(tmp_path, row, complaint):
    path = write(tmp_path, ONE, row, TWO)
    with pytest.raises(ConfigError, match="talk.jsonl:2: ") as error:
        read_conversations(str(path))
    assert (
        complaint in str(error.value)
        and '"role": "assistant"' in error.value.hint
        and ":1:" not in str(error.value)
        and ":3:" not in str(error.value)
    )


def test_many_bad_lines_no_lines_and_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"talk.jsonl:5: .*; and 4 more"):
        read_conversations(str(write(tmp_path, *["x"] * 9)))
    with pytest.raises(ConfigError, match="no conversations"):
        read_conversations(str(write(tmp_path, "")))
    with pytest.raises(ConfigError, match=r"cannot be read.*\n?.*sft.data|sft.data"):
        read_conversations(str(tmp_path / "nowhere.jsonl"))


def test_parquet(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "talk.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{**ONE, "tools": json.dumps(ONE["tools"])}, TWO]), path)
    (first, second), (first_of_jsonl, second_of_jsonl) = (
        read_conversations(str(path)),
        read_conversations(str(write(tmp_path, ONE, TWO))),
    )
    assert (
        first.steps == first_of_jsonl.steps
        and first.tools == first_of_jsonl.tools
        and second.steps == second_of_jsonl.steps
        and first.task.id == "talk.parquet:1"
    )
    path.write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_conversations(str(path))


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="parquet files need pyarrow"):
        read_conversations(str(write(tmp_path, ONE, name="talk.parquet")))


def test_cosine_decay_of_the_rate():
    options = learner_settings(lr=1.0, warmup_steps=4)
    rates = [learning_rate(step, options, 14, decay="cosine") for step in (0, 4, 9, 14, 20)]
    assert rates == pytest.approx([0.2, 1.0, 0.5, 0.0, 0.0]) and learning_rate(
        6, options, 14, decay="cosine"
    ) > learning_rate(6, options, 14)
    assert learning_rate(6, options, None, decay="cosine") == 1.0


def test_data_without_a_cold_start_is_pointed_out(capsys):
    problems = advice(load_config(None, ["sft.data=x.jsonl", "sft.enabled=false"], preset="tiny"))
    assert [problem for problem in problems if 'sft.data="x.jsonl" is not read' in problem.message]


def test_sft_from_a_file_through_the_command_line(tmp_path):
    """A model built and trained on the file alone says what the file taught it; a bad line stops before anything is
    written.
    """
    words = {"red": "up", "green": "down", "blue": "left", "white": "right"}
    rows = [
        {"messages": [{"role": "user", "content": color}, {"role": "assistant", "content": way}]}
        for color, way in words.items()
    ] * 16
    path, output = write(tmp_path, *rows), tmp_path / "model"
    command = [
        "sft",
        "--preset",
        "tiny",
        *SETTINGS,
        "sft.epochs=8",
        "sft.decay=cosine",
        "--data",
        str(path),
        "--output",
        str(output),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "spearrl", *command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "64 conversations" in done.stderr and f'data = "{path}"' in (output / "config.toml").read_text()
    model, encoder = load_model(str(output)), ChatEncoder(load_tokenizer(str(output)))
    for color, way in words.items():
        ids = list(encoder.start([Message("user", color)]))
        with torch.no_grad():
            for _ in range(len(encoder.reply_ids(way))):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert encoder.decode(ids[-len(encoder.reply_ids(way)) :]) == way
    broken = write(tmp_path, ONE, "{}", name="broken.jsonl")
    assert main(["sft", "--preset", "tiny", *SETTINGS, "--data", str(broken), "--output", str(tmp_path / "other")]) == 2
