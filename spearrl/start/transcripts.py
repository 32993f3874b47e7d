"""Demonstrations as text: what the cold start imitates, and what the tiny tokenizer is trained on.

They are episodes of an environment's scripted expert, or conversations of a file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spearrl.envs import Environment
from spearrl.envs.pool.slot import Slot
from spearrl.envs.text.records import read_records
from spearrl.envs.tool_calls import CLOSE, OPEN
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Message, Reply, Task

LISTED = 5  # bad lines of a file that are named
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
    try:
        return [_episode(slot, tasks[order[i % len(order)]], recovery, derive(seed, "expert", i)) for i in range(count)]
    finally:
        slot.close()


def read_conversations(path: str) -> list[Transcript]:
    """Conversations of a JSONL or parquet file: "messages", and "tools" where there are any.

    ReTool's cold start (arXiv 2504.11536) has this layout. Tool calls are OpenAI's, and become text in the format that
    environments read (Hermes', which Qwen2.5's and Qwen3's chat templates write).

    Raises:
        ConfigError: no such file, nothing in it, or lines that are no conversations; the first ones are named.
    """
    file, where = Path(path).expanduser(), f"sft.data={path}"
    transcripts: list[Transcript] = []
    problems: list[str] = []
    for number, record in read_records(file, layout=LAYOUT, where=where, on_broken_line=problems.append):
        try:
            transcripts.append(_conversation(record, f"{file.name}:{number}"))
        except (ValueError, TypeError, RecursionError) as error:
            problems.append(f"{file}:{number}: {error}")
    if problems or not transcripts:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        text = "; ".join(problems[:LISTED]) + more or "no conversations in it"
        raise ConfigError(text, where=where, hint=f"expected {LAYOUT}")
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
            hint = "set sft.enabled=false and give --model a trained model"
            raise ConfigError(text, where="sft", hint=hint)
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


def _conversation(record: Any, name: str) -> Transcript:
    """Raises ValueError or TypeError where the record is none."""
    items = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(items, list):
        raise ValueError('there is no list under "messages"')
    tools = record.get("tools") or []
    tools = json.loads(tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError('"tools" is not a list of function schemas')
    transcript, messages = Transcript(Task(name, "train"), tools), []
    for index, item in enumerate(items):
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
        transcript.steps.append(Step(messages, reply))
        messages = []
    if messages or not transcript.steps:
        raise ValueError("the last message is not an assistant's")
    return transcript


def _call(call: Any, index: int) -> str:
    """A tool call as a model writes it."""
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f'messages[{index}]: a tool call is {{"function": {{"name": "…", "arguments": {{…}}}}}}')
    return f"{OPEN}\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n{CLOSE}"
