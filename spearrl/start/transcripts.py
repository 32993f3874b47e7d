"""Episodes of the scripted expert, or conversations of a file, as text: what the cold start imitates and the tiny tokenizer is trained on."""

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
from spearrl.envs.tool import CLOSE, OPEN
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Message, Reply, Task

LISTED = 5  # bad lines of a file that are named
LAYOUT = 'a .jsonl or .parquet file with {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "tools": […]} a line; an assistant\'s message comes last'


@dataclass
class Step:
    """One turn: the messages shown (all of them in windowed style, the new ones in chat style), the reply, and whether to imitate it."""

    messages: list[Message]
    reply: str
    imitate: bool


@dataclass
class Transcript:
    """One episode of the scripted expert, or one conversation of a file."""

    task: Task
    tools: list[dict[str, Any]] = field(default_factory=list)  # function schemas for the chat template
    steps: list[Step] = field(default_factory=list)
    reward: float = 0.0
    success: bool = False


def play_expert(
    environment: Environment, tasks: Sequence[Task], count: int, *, noise: float, recovery: float, style: str, seed: int
) -> list[Transcript]:
    """Play `count` episodes of the environment's expert on shuffled tasks.

    Args:
        noise: how imperfect the expert is (Environment.expert_noise).
        recovery: chance per turn of a random admissible action, played but marked not to be imitated.
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
    """Conversations of a JSONL or parquet file, as ReTool's cold start (arXiv 2504.11536) has them: "messages", and "tools" where there are some.

    Roles are system, user, assistant and tool; tool calls are OpenAI's, and become text in the format that environments read (Hermes', which
    Qwen2.5's and Qwen3's chat templates write).

    Raises:
        ConfigError: no such file, nothing in it, or lines that are no conversations; the first ones are named.
    """
    file, found, problems = Path(path).expanduser(), [], []
    for number, row in read_records(file, layout=LAYOUT, where=f"sft.data={path}", on_broken_line=problems.append):
        try:
            found.append(_conversation(row, f"{file.name}:{number}"))
        except (ValueError, TypeError, RecursionError) as error:
            problems.append(f"{file}:{number}: {error}")
    if problems or not found:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ConfigError(
            "; ".join(problems[:LISTED]) + more or "no conversations in it",
            where=f"sft.data={path}",
            hint=f"expected {LAYOUT}",
        )
    return found


def texts(transcripts: Sequence[Transcript]) -> Iterator[str]:
    """Every text that was shown or said, for training a tokenizer."""
    for transcript in transcripts:
        for step in transcript.steps:
            yield from (message.text for message in step.messages)
            yield step.reply


def _episode(slot: Slot, task: Task, recovery: float, seed: int) -> Transcript:
    environment, transcript, draw = slot.environment, Transcript(task), random.Random(derive(seed, "recovery"))
    shown = slot.start(task, seed)
    transcript.tools, messages, observation = shown.tools, shown.messages, shown.observation
    for turn in range(1, environment.max_turns + 1):
        wanted = environment.expert()
        if wanted is None:
            raise ConfigError(
                f"{type(environment).__name__} has no scripted expert",
                where="sft",
                hint="set sft.enabled=false and give --model a trained model",
            )
        blunder = bool(observation.admissible) and draw.random() < recovery
        reply = environment.format(
            draw.choice(observation.admissible) if blunder and observation.admissible else wanted
        )
        transcript.steps.append(Step(messages, reply, imitate=not blunder))
        played = slot.act(Reply(reply, (), "stop"), turn == environment.max_turns)
        outcome, messages, observation = played.outcome, played.messages, played.outcome.observation
        transcript.reward += outcome.reward
        if outcome.terminated or outcome.truncated:
            transcript.success = bool(outcome.info.get("success", False))
            break
    return transcript


def _conversation(row: Any, name: str) -> Transcript:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list):
        raise ValueError('there is no list under "messages"')
    tools = row.get("tools") or []
    tools = json.loads(tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError('"tools" is not a list of function schemas')
    transcript, shown = Transcript(Task(name, "train"), tools), []
    for place, item in enumerate(messages):
        role, text = (item.get("role"), item.get("content") or "") if isinstance(item, dict) else (None, "")
        if role not in ("system", "user", "assistant", "tool") or not isinstance(text, str):
            raise ValueError(
                f"messages[{place}] is not of the roles system, user, assistant, tool with text as its content"
            )
        if role != "assistant":
            shown.append(Message(role, text))
            continue
        said = "\n".join([*([text] if text else []), *(_call(call, place) for call in item.get("tool_calls") or ())])
        if not shown or not said:
            raise ValueError(
                f"messages[{place}], an assistant's, " + ("says nothing" if shown else "answers no message")
            )
        transcript.steps.append(Step(shown, said, imitate=True))
        shown = []
    if shown or not transcript.steps:
        raise ValueError("the last message is not an assistant's")
    return transcript


def _call(call: Any, place: int) -> str:
    """A tool call as a model writes it."""
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f'messages[{place}]: a tool call is {{"function": {{"name": "…", "arguments": {{…}}}}}}')
    return f"{OPEN}\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n{CLOSE}"
