"""Scripted-expert episodes as text: what the cold start imitates and the tiny tokenizer is trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from spearrl.envs import Environment
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Reply, Task


@dataclass
class Step:
    """One turn: the messages shown (all of them in windowed style, the new ones in chat style), the reply, and whether to imitate it."""

    messages: list[Message]
    reply: str
    imitate: bool


@dataclass
class Transcript:
    """One episode of the scripted expert."""

    task: Task
    tools: list[dict[str, Any]] = field(default_factory=list)  # function schemas for the chat template
    steps: list[Step] = field(default_factory=list)
    reward: float = 0.0
    success: bool = False


def play_expert(environment: Environment, tasks: Sequence[Task], count: int, *, noise: float, recovery: float, style: str, seed: int) -> list[Transcript]:
    """Play `count` episodes of the environment's expert on shuffled tasks.

    Args:
        noise: how imperfect the expert is (Environment.expert_noise).
        recovery: chance per turn of a random admissible action, played but marked not to be imitated.
    Raises:
        ConfigError: the environment has no expert.
    """
    slot = environment.spawn()
    slot.expert_noise, slot.max_turns = noise, environment.max_turns
    order = list(range(len(tasks)))
    random.Random(derive(seed, "expert-tasks")).shuffle(order)
    try:
        return [_episode(slot, tasks[order[i % len(order)]], recovery, style, derive(seed, "expert", i)) for i in range(count)]
    finally:
        slot.close()


def texts(transcripts: Sequence[Transcript]) -> Iterator[str]:
    """Every text that was shown or said, for training a tokenizer."""
    for transcript in transcripts:
        for step in transcript.steps:
            yield from (message.text for message in step.messages)
            yield step.reply


def _episode(slot: Environment, task: Task, recovery: float, style: str, seed: int) -> Transcript:
    transcript, draw = Transcript(task), random.Random(derive(seed, "recovery"))
    observation = slot.reset(task, seed)
    transcript.tools = slot.tools()
    history: list[tuple[Observation, Action]] = []
    for turn in range(slot.max_turns):
        wanted = slot.expert()
        if wanted is None:
            raise ConfigError(f"{type(slot).__name__} has no scripted expert", where="sft", hint="set sft.enabled=false and give --model a trained model")
        messages = slot.messages(observation, turn) if style == "chat" else slot.window(history, observation, task)
        if messages is None:
            raise ConfigError(f"{type(slot).__name__} offers no windowed prompts", where="env.style", hint='use env.style="chat"')
        blunder = bool(observation.admissible) and draw.random() < recovery
        text = draw.choice(observation.admissible) if blunder and observation.admissible else wanted
        reply = slot.format(text)
        transcript.steps.append(Step(messages, reply, imitate=not blunder))
        action = slot.parse(Reply(reply, (), "stop"))
        outcome = slot.step(action)
        history.append((observation, action))
        transcript.reward += outcome.reward
        if outcome.terminated or outcome.truncated:
            transcript.success = bool(outcome.info.get("success", False))
            break
        observation = outcome.observation
    return transcript
