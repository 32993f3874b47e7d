"""The records that pass between environment, collector and batching. No torch here.

A trajectory is one episode: turns in time order. A group is the siblings that played one task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a trajectory ended."""

    SUCCESS = "success"
    FAILURE = "failure"
    TURN_LIMIT = "turn_limit"  # a normal episode that ran out of turns: reward as earned, trained
    CONTEXT_LIMIT = "context_limit"  # the next prompt would not fit
    OVERLONG = "overlong"  # the episode used up its reply tokens
    ENV_ERROR = "env_error"  # not reward 0: excluded from loss, statistics and buffers
    ENGINE_ERROR = "engine_error"

    @property
    def is_error(self) -> bool:
        return self in (Status.ENV_ERROR, Status.ENGINE_ERROR)

    @property
    def code(self) -> int:
        """Position in the enum: how Rows stores a status in a tensor."""
        return list(Status).index(self)


@dataclass(slots=True, frozen=True)
class Text:
    """A piece of text inside a message."""

    text: str


@dataclass(slots=True, frozen=True)
class Image:
    """An encoded picture (PNG, JPEG) inside a message or an observation."""

    data: bytes
    media_type: str = "image/png"

    @property
    def digest(self) -> str:
        """Content hash by which rows refer to the picture."""
        return hashlib.blake2b(self.data, digest_size=16).hexdigest()


@dataclass(slots=True, frozen=True)
class Message:
    """One chat message. Example: Message("user", "WebShop [SEP] Instruction: …")."""

    role: str
    content: str | tuple[Text | Image, ...]
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    @property
    def text(self) -> str:
        """The text parts joined; what a text-only template sees."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        if isinstance(self.content, str):
            return ()
        return tuple(part for part in self.content if isinstance(part, Image))


@dataclass(slots=True, frozen=True)
class Task:
    """One thing to do. Example: Task("goal-17", "val", {"goal": 17})."""

    id: str
    split: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Reply:
    """What the policy said in one turn."""

    text: str  # decoded without special tokens
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" | "length"


@dataclass(slots=True, frozen=True)
class Action:
    """A parsed reply. An invalid one is still stepped: its text is what the environment gets."""

    text: str
    valid: bool = True
    tool_calls: int = 0


@dataclass(slots=True, frozen=True)
class Observation:
    """What the environment shows."""

    text: str
    anchor: Any = None  # hashable state key GiGPO groups by; None: the text
    admissible: tuple[str, ...] | None = None
    images: tuple[Image, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    allowed_ids: tuple[int, ...] | None = None  # token ids the next reply may consist of, stop ids besides; None: any


@dataclass(slots=True, frozen=True)
class Outcome:
    """The result of one step.

    `info["success"]` (bool) is set at the end of an episode; `info["fault"]` (true) where the machinery failed (a tool
    timed out, a backend restarted) and the episode went on: such a trajectory trains, but is never imitated.
    `tool_calls`: how many of the action's calls ran, where fewer may have than it holds; None: all of them.
    """

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)
    tool_calls: int | None = None


@dataclass(slots=True)
class Turn:
    """One prompt and the reply sampled for it, as the engine saw them (never re-tokenised)."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of token_ids, as the engine reported
    finish_reason: str
    reply: str
    observation: str  # what the environment showed before this reply
    anchor: Any
    action: Action
    reward: float = 0.0
    min_version: int = 0
    max_version: int = 0
    images: tuple[Image, ...] = ()
    allowed_ids: tuple[int, ...] | None = None  # what the reply was drawn from, stop ids included


@dataclass(slots=True)
class Trajectory:
    """One episode. `group` and `id` are unique in the run."""

    task: Task
    group: int
    sibling: int
    id: int
    turns: list[Turn] = field(default_factory=list)
    status: Status = Status.FAILURE
    info: dict[str, Any] = field(default_factory=dict)  # the environment's measures at the end
    error: str | None = None  # traceback of an env_error / engine_error, or why no prompt fitted
    faults: int = 0  # steps at which the environment reported a fault that it survived (Outcome.info["fault"])
    rewrites: int = 0  # turns whose prompt did not extend the conversation's ids

    @property
    def reward(self) -> float:
        """Episode reward: the sum over turns, as the environment paid it."""
        return float(sum(turn.reward for turn in self.turns))

    @property
    def success(self) -> bool:
        return self.status is Status.SUCCESS

    @property
    def tool_calls(self) -> int:
        return sum(turn.action.tool_calls for turn in self.turns)


@dataclass(slots=True)
class Group:
    """The siblings that played one task."""

    id: int
    task: Task
    trajectories: list[Trajectory] = field(default_factory=list)

    @property
    def valid(self) -> list[Trajectory]:
        """Siblings that may be trained on."""
        return [t for t in self.trajectories if not t.status.is_error]

    @property
    def mixed(self) -> bool:
        """Whether the siblings that may be trained on differ in reward."""
        return len({t.reward for t in self.valid}) > 1
