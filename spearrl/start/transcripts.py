"""Demonstrations as text: what the cold start imitates, and what the tiny tokenizer is trained on.

They are episodes of an environment's scripted expert, or conversations of a file.
"""

from __future__ import annotations

import json
import logging
import random
import re
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spearrl.envs import Environment
from spearrl.envs.pool.slot import Slot
from spearrl.envs.text.records import read_records, tell
from spearrl.envs.tool_calls import CLOSE, OPEN, THINK, THOUGHT
from spearrl.errors import ConfigError, EnvironmentFault, SpearError
from spearrl.seeds import derive
from spearrl.types import Message, Reply, Task

LOG = logging.getLogger(__name__)
LISTED = 5  # bad lines of a file that are named
# What a tool said, in the middle of an assistant's message: ReTool's <interpreter>, Search-R1's <information>, ToRA's.
OUTPUT = re.compile(
    r"<(interpreter|information|tool_response|observation)>(.*?)</\1>|^```output[ \t]*\n(.*?)\n?^```[ \t]*$",
    re.S | re.M,
)
REASONING = ("reasoning_content", "reasoning", "thinking")
ROLES = ("system", "user", "assistant", "tool")
LAYOUT = (
    'a .jsonl or .parquet file with {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": '
    '"…"}], "tools": […]} a line; an assistant\'s message comes last'
)


@dataclass
class Step:
    """One turn.

    Args:
        messages: those before the reply: all of them (windowed style), or those since the last one (chat style).
        imitate: whether the reply is trained on.
    """

    messages: list[Message]
    reply: str
    imitate: bool = True


@dataclass
class Transcript:
    """One episode of the scripted expert, or one conversation of a file. `tools`: schemas for the chat template."""

    task: Task
    tools: list[dict[str, Any]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    success: bool = False


def play_expert(
    environment: Environment, tasks: Sequence[Task], count: int, *, noise: float, recovery: float, style: str, seed: int
) -> list[Transcript]:
    """Play `count` episodes of the environment's expert on shuffled tasks.

    Args:
        noise: how imperfect the expert is (Environment.expert_noise).
        recovery: chance per turn of a random admissible action, played but marked not to be imitated.
        style: "chat" or "windowed".
    Raises:
        ConfigError: the environment has no expert.
    """
    player = environment.spawn()
    player.expert_noise, player.max_turns = noise, environment.max_turns
    order = list(range(len(tasks)))
    random.Random(derive(seed, "expert-tasks")).shuffle(order)
    slot = Slot(player, style)
    transcripts = []
    try:
        for i in range(count):
            LOG.info("expert: episode %d of %d", i + 1, count)
            task, episode_seed = tasks[order[i % len(order)]], derive(seed, "expert", i)
            try:
                transcripts.append(_episode(slot, task, recovery, episode_seed))
            except SpearError:
                raise
            except Exception as error:  # whatever a user's environment raises
                name = f"{type(environment).__module__}:{type(environment).__name__}"
                text = f"the environment raised in an expert's episode (seed {episode_seed}):\n{traceback.format_exc()}"
                hint = f"mend it; `spearrl check-env {name}` tries it without a run"
                raise EnvironmentFault(text.rstrip(), where=f"{name}, task {task.id}", hint=hint) from error
    finally:
        slot.close()
    return transcripts


def read_conversations(path: str) -> list[Transcript]:
    """Conversations of a JSONL or parquet file: "messages", and "tools" where there are any.

    ReTool's cold start (arXiv 2504.11536) has this layout. Tool calls are OpenAI's, and become text in the format that
    environments read (Hermes', which Qwen2.5's and Qwen3's chat templates write). What was changed on the way is told
    in a warning.

    Raises:
        ConfigError: no such file, nothing in it, or lines that are no conversations; the first ones are named.
    """
    file, where = Path(path).expanduser(), f"sft.data={path}"
    transcripts: list[Transcript] = []
    problems: list[str] = []
    told: Counter[str] = Counter()
    for number, record in read_records(file, layout=LAYOUT, where=where, on_broken_line=problems.append):
        try:
            if file.suffix == ".parquet":
                record = _without_nulls(record, told)
            transcripts.append(_conversation(record, f"{file.name}:{number}", told))
        except (ValueError, TypeError, RecursionError) as error:
            problems.append(f"{file}:{number}: {error}")
    if problems or not any(step.imitate for transcript in transcripts for step in transcript.steps):
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        text = "; ".join(problems[:LISTED]) + more or "no conversations in it, or none with a reply to imitate"
        raise ConfigError(text, where=where, hint=f"expected {LAYOUT}")
    tell(f"sft data: {len(transcripts):,} conversations in {file}", told)
    return transcripts


def texts(transcripts: Sequence[Transcript]) -> Iterator[str]:
    """Every text of messages and replies, for training a tokenizer."""
    for transcript in transcripts:
        for step in transcript.steps:
            yield from (message.text for message in step.messages)
            yield step.reply


def _episode(slot: Slot, task: Task, recovery: float, seed: int) -> Transcript:
    environment, draw = slot.environment, random.Random(derive(seed, "recovery"))
    start = slot.start(task, seed)
    transcript, messages, admissible = Transcript(task, start.tools), start.messages, start.observation.admissible
    for turn in range(1, environment.max_turns + 1):
        action = environment.expert()
        if action is None:
            text = f"{type(environment).__name__} has no scripted expert"
            raise ConfigError(text, where="sft", hint="set sft.enabled=false and give --model a trained model")
        if blunder := bool(admissible) and draw.random() < recovery:
            action = draw.choice(admissible or ())
        reply = environment.format(action)
        transcript.steps.append(Step(messages, reply, imitate=not blunder))
        result = slot.act(Reply(reply, (), "stop"), turn == environment.max_turns)
        messages, admissible = result.messages, result.outcome.observation.admissible
        if result.outcome.terminated or result.outcome.truncated:
            transcript.success = bool(result.outcome.info.get("success", False))
            break
    return transcript


def _conversation(record: Any, name: str, told: Counter[str]) -> Transcript:
    """Raises ValueError or TypeError where the record is none."""
    items = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(items, list):
        raise ValueError('there is no list under "messages"')
    tools = record.get("tools") or []
    tools = json.loads(tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError('"tools" is not a list of function schemas')
    transcript, messages = Transcript(Task(name, "train"), tools), []
    parts = ((index, part) for index, item in enumerate(items) for part in _parts(item, index + 1 == len(items), told))
    for index, item in parts:
        role, text = (item.get("role"), item.get("content") or "") if isinstance(item, dict) else (None, "")
        if role not in ROLES or not isinstance(text, str):
            raise ValueError(f"messages[{index}] is not of the roles {', '.join(ROLES)} with text as its content")
        if role != "assistant":
            messages.append(Message(role, text))
            continue
        calls = [_call(call, index) for call in item.get("tool_calls") or ()]
        reply = "\n".join([text, *calls] if text else calls)
        if not messages or not reply:
            problem = "says nothing" if messages else "answers no message"
            raise ValueError(f"messages[{index}], an assistant's, {problem}")
        if item.get("weight") not in (None, 0, 1):
            raise ValueError(f'messages[{index}]: "weight" is 1, or 0 for a reply that is not imitated')
        told["replies of weight 0 not imitated"] += (imitate := item.get("weight") != 0) is False
        transcript.steps.append(Step(messages, reply, imitate))
        messages = []
    if messages or not transcript.steps:
        raise ValueError("the last message is not an assistant's")
    return transcript


def _parts(item: Any, last: bool, told: Counter[str]) -> list[Any]:
    """A message with its reasoning in it; an assistant's in which tools speak, as several messages.

    Raises:
        ValueError: reasoning beside another thought, or a tool's output before the assistant has said anything.
    """
    if not isinstance(item, dict) or item.get("role") != "assistant" or not isinstance(item.get("content") or "", str):
        return [item]
    text = item.get("content") or ""
    reasoning = next((item[name].strip() for name in REASONING if isinstance(item.get(name), str)), "")
    if reasoning and reasoning not in text:
        if THOUGHT in text:
            raise ValueError(f"an assistant's message has a thought in it, and another one: {reasoning[:40]!r}")
        told["thoughts from a field of their own written as <think>"] += 1
        text = f"{THINK}\n{reasoning}\n{THOUGHT}\n\n{text}"
    parts, begin = list[Any](), 0
    for output in OUTPUT.finditer(text):
        if said := text[begin : output.start()].strip():
            parts.append({**item, "content": said, "tool_calls": None})
        if not parts:
            raise ValueError(f"an assistant's message begins with a tool's output: {output[0][:40]!r}")
        told["outputs of tools taken out of replies"] += 1
        searched = output[1] == "information"  # as the environment shows it
        role, content = ("user", output[0]) if searched else ("tool", (output[2] or output[3] or "").strip())
        parts.append({"role": role, "content": content})
        begin = output.end()
    if "<interpreter>" in (rest := text[begin:]):
        raise ValueError("an assistant's message has an <interpreter> without its end")
    if not parts or rest.strip() or item.get("tool_calls"):
        return [*parts, {**item, "content": rest.strip() if parts else rest}]
    while last and parts[-1]["role"] != "assistant":  # nothing answers it
        parts.pop()
    return parts


def _without_nulls(value: Any, told: Counter[str], key: str = "") -> Any:
    """A row of a parquet file without the nulls with which its columns fill missing keys."""
    if isinstance(value, list):
        return [_without_nulls(part, told) for part in value]
    if not isinstance(value, dict):
        return value
    told["null arguments of tool calls left out"] += sum(part is None for part in value.values()) * (key == "arguments")
    return {name: _without_nulls(part, told, name) for name, part in value.items() if part is not None}


def _call(call: Any, index: int) -> str:
    """A tool call as a model writes it."""
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f'messages[{index}]: a tool call is {{"function": {{"name": "…", "arguments": {{…}}}}}}')
    return f"{OPEN}\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n{CLOSE}"
