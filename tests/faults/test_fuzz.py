"""Files of a run and texts of a model, damaged at random from a seed: nothing but the documented errors comes out.

SPEARRL_FUZZ=100000 tries as many inputs in all (make fuzz); trajectories have no reader in spearrl.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spearrl import envs
from spearrl.config import load_config
from spearrl.envs.text.tagged_replies import projection
from spearrl.envs.tool_calls import read_calls
from spearrl.errors import CheckpointError, ConfigError, ContractError, RefusedError
from spearrl.learner.optimizer import COUNTERS, load_counters
from spearrl.models.layouts import LAYOUTS, call_text, parts_of
from spearrl.run.checkpoint import checkpoints, newest_checkpoint, seal
from spearrl.run.events import EVENTS, read_events
from spearrl.run.resume import resumption
from spearrl.start.transcripts import read_conversations
from spearrl.types import Reply
from tests.support.short_runs import from_model, run

KINDS = 8
COUNT = max(1, int(os.environ.get("SPEARRL_FUZZ", "2400")) // KINDS)
PIECES = [
    *(
        b"null",
        b"NaN",
        b"-1",
        b"1e999",
        b"9" * 4400,
        b"true",
        b'"',
        b"\\",
        b"\0",
        b"\xff\xfe",
        b"\n",
        b"\r",
        b"{}",
        b"[]",
    ),
    *(
        b'{"__tensor__": "state"}',
        b'{"__tensor__": []}',
        b'{"event": []}',
        b'"format": 99',
        b"[" * 20000,
        b'{"a":' * 3000,
    ),
    *(
        b"../../etc/passwd",
        b"/etc/passwd",
        b"</tool_call>",
        b"<tool_call>",
        b"<think>",
        b"<|channel|>",
        b"inf",
        b"2026-01-01",
    ),
]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """With one to four changes: bytes, pieces put in, cut out, doubled, moved, or the end gone."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + int(2 ** draw.uniform(0, 8)))
        match draw.randrange(6):
            case 0 if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
            case 1:
                data[start:end] = draw.choice(PIECES)
            case 2:
                data[start:start] = draw.choice(PIECES)
            case 3:
                del data[start:end]
            case 4:
                data[start:start] = data[start:end]
            case _:
                del data[start:]
    return bytes(data)


def inputs(name: str, content: bytes) -> Iterator[bytes]:
    """COUNT damaged ones of a kind."""
    draw = random.Random(f"fuzz {name}")
    return (damaged(content, draw) for _ in range(COUNT))


def attempt(read: Callable[[], object], *documented: type[Exception]) -> bool:
    """Whether it was read; a documented error is the other right end."""
    try:
        read()
    except documented:
        return False
    return True


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> Path:
    settings = ("run.steps=4", "run.checkpoint_every=0", "env.options.tasks=4")
    return run(from_model(model, tmp_path_factory.mktemp("fuzz"), *settings, algo="grpo+sil")).run.path


@pytest.fixture
def small(trained: Path, tmp_path: Path) -> Path:
    """A copy whose newest checkpoint is small."""
    copy = Path(shutil.copytree(trained, tmp_path / "r", ignore=shutil.ignore_patterns("start", "step-000000")))
    newest = checkpoints(copy / "checkpoints")[-1]
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size > 50_000 and path.parent.name != "training":
            path.write_bytes(b"{}")
    (newest / "training/optimizer.safetensors").write_bytes(b"{}")
    mended(newest)
    return copy


def mended(checkpoint: Path) -> None:
    """Have the manifest say that all files are as they were written."""
    (checkpoint / "manifest.json").unlink()
    aside = checkpoint.with_name(f".tmp-{checkpoint.name[5:]}-1")
    checkpoint.rename(aside)
    seal(aside, keep=9)


def test_events(trained, tmp_path):
    for data in inputs("events", (trained / EVENTS).read_bytes()):
        (tmp_path / EVENTS).write_bytes(data)
        events, skipped = read_events(tmp_path)
        assert all(isinstance(event["event"], str) and type(event["step"]) is int for event in events)
        assert len(events) + skipped <= data.count(b"\n") + 1


def test_manifests(small):
    newest = checkpoints(small / "checkpoints")[-1]
    whole = (newest / "manifest.json").read_bytes()
    for data in inputs("manifest", whole):
        (newest / "manifest.json").write_bytes(data)
        sound = attempt(lambda: newest_checkpoint(small / "checkpoints"), CheckpointError)
        assert not sound or json.loads(data)["files"] == json.loads(whole)["files"]


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_states_with_a_mended_manifest(small, name, monkeypatch):
    monkeypatch.setattr("spearrl.run.checkpoint._fsync", lambda path: None)
    newest = checkpoints(small / "checkpoints")[-1]
    repeated = ["env.name=tests.support.toy_envs:Fetch"]
    for data in list(inputs(name, (newest / "training" / name).read_bytes()))[: COUNT // 2]:
        (newest / "training" / name).write_bytes(data)
        mended(newest)
        attempt(lambda: resumption(small, repeated), CheckpointError)


def test_counters_of_the_learner(trained, tmp_path):
    (tmp_path / COUNTERS).parent.mkdir()
    for data in inputs("counters", (checkpoints(trained / "checkpoints")[-1] / COUNTERS).read_bytes()):
        (tmp_path / COUNTERS).write_bytes(data)
        attempt(lambda: load_counters(tmp_path), CheckpointError)


def test_configs(trained, tmp_path):
    for data in inputs("config", (trained / "config.toml").read_bytes()):
        (tmp_path / "config.toml").write_bytes(data)
        attempt(lambda: load_config(tmp_path / "config.toml"), ConfigError, RefusedError)


def test_tool_calls():
    calls = "\n".join(call_text(name, {"a": 1, "b": ["x", {"c": None}]}) for name in ("add", "say"))
    functions = "<function=add>\n<parameter=a>\n1\n</parameter>\n</function>"
    other = '<|channel|>commentary to=functions.add <|message|>{"a": 1}<|call|><|tool_call>call:add{a:1}<tool_call|>'
    for data in inputs("calls", f"<think>so</think> {calls}{functions}{other}".encode()):
        text = data.decode(errors="replace")
        read_calls(text)
        parts_of(text)
        for layout in LAYOUTS:
            layout.canonical(text, {"add": {"a": "integer"}})


def test_actions():
    built = [envs.make("sokoban"), envs.make("tests.support.toy_envs:Fetch")]
    for data in inputs(
        "actions", b"<think>the box is left</think><action>up</action> search[red shoes] click[buy now]"
    ):
        text = data.decode(errors="replace")
        projection(text, 30)
        for environment in built:
            attempt(lambda env=environment, said=text: env.parse(Reply(said, (), "stop")), ContractError)


def test_conversations(tmp_path, recwarn):
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    path = tmp_path / "conversations.jsonl"
    for data in inputs("conversations", (json.dumps({"messages": said}) + "\n").encode() * 3):
        path.write_bytes(data)
        attempt(lambda: read_conversations(str(path)), ConfigError, ContractError)
