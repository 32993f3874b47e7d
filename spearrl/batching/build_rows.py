"""Groups of trajectories → rows, by one rule.

A turn whose prompt begins with the running row's ids (and pictures) extends that row, any other starts a new one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch

from spearrl.batching.allowed_tokens import AllowedIds
from spearrl.batching.anchors import anchor_id
from spearrl.batching.rows import ROWS, TOKENS, Rows
from spearrl.batching.turn_table import TurnTable, turn_dtype
from spearrl.errors import ContractError
from spearrl.types import Group, Trajectory, Turn

ROWS_PER_TRAJECTORY = 4096  # uid = trajectory * this + ordinal of the row
CODES = {torch.int64: "q", torch.float32: "f", torch.float64: "d", torch.bool: "b"}


def rows_from_groups(groups: Sequence[Group]) -> Rows:
    """Rows of all valid trajectories, in order; trajectories that ended in an error are left out.

    Only sampled tokens are action tokens: prompts, observations and template tokens never train.

    Raises:
        ContractError: an empty prompt, log-probabilities that do not match the sampled tokens, or a sampled token that
            was not allowed.
    """
    builder = _Builder()
    for trajectory in (t for group in groups for t in group.valid):
        builder.add(trajectory)
    return builder.rows()


class _Builder:
    """Collects numbers in typed arrays, whose memory torch takes over without a pass through Python objects."""

    def __init__(self) -> None:
        self.tokens: dict[str, array[Any]] = {name: array(CODES[dtype]) for name, dtype in TOKENS.items()}
        self.row_fields = {name: array("q") for name in ROWS}
        names = TurnTable.__dataclass_fields__
        self.turns: dict[str, array[Any]] = {name: array(CODES[turn_dtype(name)]) for name in names}
        self.offsets = array("q", [0])
        self.images: list[tuple[str, ...]] = []
        self.pictures: dict[str, torch.Tensor] = {}
        self.text_id = cache(anchor_id)  # siblings meet the same states
        self.allowed = array("q")  # by turn
        self.sets: dict[tuple[int, ...], tuple[int, frozenset[int]]] = {}  # number and members; siblings share them

    def add(self, trajectory: Trajectory) -> None:
        running: tuple[int, ...] = ()
        ordinal = 0
        for number, turn in enumerate(trajectory.turns):
            _check(turn, trajectory, number)
            extends = number > 0 and turn.prompt_ids[: len(running)] == running
            digests = self._digests(turn)
            if not extends or digests[: len(self.images[-1])] != self.images[-1]:
                running = ()
                self._start_row(trajectory, ordinal)
                ordinal += 1
            self._add_turn(trajectory, turn)
            self.allowed.append(self._allowed_set(turn, f"trajectory {trajectory.id}, turn {number}"))
            self._add_tokens(turn, len(running))
            self.images[-1] = digests
            running = turn.prompt_ids + turn.token_ids
        if ordinal > ROWS_PER_TRAJECTORY:
            text = f"{ordinal} rows; at most {ROWS_PER_TRAJECTORY} are numbered apart"
            raise ContractError(text, where=f"trajectory {trajectory.id}")

    def _start_row(self, trajectory: Trajectory, ordinal: int) -> None:
        self.offsets.append(self.offsets[-1])
        self.row_fields["group"].append(trajectory.group)
        self.row_fields["trajectory"].append(trajectory.id)
        self.row_fields["uid"].append(trajectory.id * ROWS_PER_TRAJECTORY + ordinal)
        self.images.append(())

    def _add_turn(self, trajectory: Trajectory, turn: Turn) -> None:
        values = {
            "group_ids": trajectory.group,
            "trajectory_ids": trajectory.id,
            "anchor_ids": self._anchor_id(turn),
            "rewards": turn.reward,
            "penalties": 0.0 if turn.action.valid else 1.0,
            "tool_calls": turn.action.tool_calls,
            "status": trajectory.status.code,
            "row": len(self.offsets) - 2,
        }
        for name, value in values.items():
            self.turns[name].append(value)

    def _anchor_id(self, turn: Turn) -> int:
        state = turn.observation if turn.anchor is None else turn.anchor
        return self.text_id(state) if isinstance(state, str) else anchor_id(state)

    def _allowed_set(self, turn: Turn, where: str) -> int:
        """Number of the set that the reply was drawn from; -1: any token could be."""
        if turn.allowed_ids is None:
            return -1
        if turn.allowed_ids not in self.sets:
            self.sets[turn.allowed_ids] = (len(self.sets), frozenset(turn.allowed_ids))
        number, members = self.sets[turn.allowed_ids]
        if not members.issuperset(turn.token_ids):
            others = sorted(set(turn.token_ids) - members)[:8]
            text = f"sampled tokens {others} are not among the {len(members)} allowed ids"
            raise ContractError(text, where=where, hint="use an engine that honours Sampling.allowed_ids")
        return number

    def _add_tokens(self, turn: Turn, known: int) -> None:
        """The prompt's new tokens, then the sampled ones."""
        shown, sampled = len(turn.prompt_ids) - known, len(turn.token_ids)
        index = len(self.turns["row"]) - 1
        tokens = self.tokens
        tokens["token_ids"].extend(turn.prompt_ids[known:])
        tokens["token_ids"].extend(turn.token_ids)
        tokens["rollout_logprobs"].extend([0.0] * shown)
        tokens["rollout_logprobs"].extend(turn.logprobs)
        _fill(tokens["action_mask"], ((0, shown), (1, sampled)))
        _fill(tokens["turn_index"], ((-1, shown), (index, sampled)))
        _fill(tokens["policy_version"], ((-1, shown), (turn.min_version, sampled)))
        self.offsets[-1] += shown + sampled

    def _digests(self, turn: Turn) -> tuple[str, ...]:
        """Content hashes of the pictures of the turn's prompt, whose bytes are kept once."""
        digests = tuple(image.digest for image in turn.images)
        for digest, image in zip(digests, turn.images, strict=True):
            if digest not in self.pictures:
                self.pictures[digest] = torch.frombuffer(bytearray(image.data), dtype=torch.uint8)
        return digests

    def rows(self) -> Rows:
        tokens = {name: _tensor(values, TOKENS[name]) for name, values in self.tokens.items()}
        turns = TurnTable(**{name: _tensor(values, turn_dtype(name)) for name, values in self.turns.items()})
        row_fields = {name: _tensor(values, torch.int64) for name, values in self.row_fields.items()}
        owner = [number for members, (number, _) in self.sets.items() for _ in members]
        ids = [id_ for members in self.sets for id_ in members]
        allowed = AllowedIds(*(torch.tensor(values, dtype=torch.int64) for values in (self.allowed, owner, ids)))
        return Rows(
            **tokens,
            **row_fields,
            offsets=_tensor(self.offsets, torch.int64),
            turns=turns,
            images=tuple(self.images),
            allowed=allowed if self.sets else None,
            pictures=self.pictures,
        )


def _check(turn: Turn, trajectory: Trajectory, number: int) -> None:
    where = f"trajectory {trajectory.id}, turn {number}"
    if not turn.prompt_ids:
        hint = "the chat encoder must give every turn at least one prompt token"
        raise ContractError("an empty prompt", where=where, hint=hint)
    if len(turn.logprobs) != len(turn.token_ids):
        text = f"{len(turn.logprobs)} log-probabilities for {len(turn.token_ids)} sampled tokens"
        raise ContractError(text, where=where)


def _fill(target: array[Any], runs: Iterable[tuple[int, int]]) -> None:
    for value, count in runs:
        target.extend(array(target.typecode, [value]) * count)


def _tensor(values: array[Any], dtype: torch.dtype) -> torch.Tensor:
    if not values:
        return torch.zeros(0, dtype=dtype)
    stored = torch.int8 if dtype == torch.bool else dtype
    return torch.frombuffer(values, dtype=stored).to(dtype).clone()
