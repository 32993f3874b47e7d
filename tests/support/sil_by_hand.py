"""Self-imitation in plain Python, from trajectories alone: rewards, advantages, rows, buffer, losses (arXiv
2509.22601).

Nothing of the package computes here.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from spearrl.config import RunConfig
from spearrl.types import Group, Trajectory, Turn


@dataclass
class Credited:
    """One turn of a step."""

    turn: Turn
    reward: float  # of the episode, + μ·bonus, − penalty of the turn
    trained: bool
    advantage: float = 0.0
    step_part: float = 0.0


@dataclass
class Played:
    """One trajectory of a step."""

    trajectory: Trajectory
    step: int
    turns: list[Credited]

    def mean(self, name: str) -> float:
        """Over the turns that train; NaN where none does."""
        values = [getattr(turn, name) for turn in self.turns if turn.trained]
        return sum(values) / len(values) if values else math.nan


@dataclass
class Row:
    """Token ids, and where in them which turn's sampled tokens are."""

    played: Played
    number: int  # in its trajectory
    ids: tuple[int, ...]
    places: list[tuple[int, Credited]] = field(default_factory=list)

    @property
    def uid(self) -> int:
        return self.played.trajectory.id * 4096 + self.number

    def tokens(self) -> list[tuple[int, Credited, float]]:
        """Position, turn and the engine's log-probability of every token in the loss."""
        return [
            (start + i, turn, p)
            for start, turn in self.places
            if turn.trained
            for i, p in enumerate(turn.turn.logprobs)
        ]


def rising(kind: str, step: int, steps: int) -> float:
    done = min(step / steps, 1.0)
    return {"cosine": (1 - math.cos(math.pi * done)) / 2, "linear": done, "constant": 1.0}[kind]


def gamma(config: RunConfig, step: int) -> float:
    schedule = config.algo.sil.gamma
    return schedule.peak * rising(schedule.kind, step, schedule.steps)


def mu(config: RunConfig, step: int) -> float:
    schedule = config.algo.intrinsic.mu
    return schedule.peak * (1 - rising(schedule.kind, step, schedule.steps)) if config.algo.intrinsic.enabled else 0.0


def credited(config: RunConfig, step: int, groups: list[Group]) -> list[list[Played]]:
    """The groups that train, with every turn's reward and advantage; each group looks at its own siblings only."""
    played = [[_played(config, step, t) for t in g.trajectories if t.error is None] for g in groups]
    played = _most_varied([members for members in played if len(members) >= 2], config.algo.filters.group_keep)
    for members in played:
        _group_part(config, members)
        if config.algo.advantage == "gigpo":
            _step_part(config, members)
    return played


def _played(config: RunConfig, step: int, trajectory: Trajectory) -> Played:
    calls = sum(turn.action.tool_calls for turn in trajectory.turns)
    total = sum(turn.reward for turn in trajectory.turns) + mu(config, step) * min(1.0, 0.1 * calls)
    filters = config.algo.filters
    turns = []
    for turn in trajectory.turns:
        out = (filters.overlong and len(turn.token_ids) >= config.rollout.max_reply_tokens) or (
            filters.void_turn and not turn.action.valid
        )
        turns.append(Credited(turn, total - config.algo.invalid_penalty * (not turn.action.valid), not out))
    return Played(trajectory, step, turns)


def _most_varied(groups: list[list[Played]], keep: float) -> list[list[Played]]:
    """By deviation of the episode rewards before penalties."""
    if keep >= 1:
        return groups
    deviations = [statistics.pstdev(max(turn.reward for turn in p.turns) for p in members) for members in groups]
    best = sorted(range(len(groups)), key=lambda i: -deviations[i])[: max(1, int(keep * len(groups)))]
    return [groups[i] for i in sorted(best)]


def _group_part(config: RunConfig, members: list[Played]) -> None:
    """Reward minus the mean of the siblings' rewards (a trajectory's: the mean over its turns)."""
    mean = statistics.fmean(statistics.fmean(t.reward for t in p.turns) for p in members)
    spread = sum(statistics.fmean((t.reward - mean) ** 2 for t in p.turns) for p in members) / (len(members) - 1)
    scale = math.sqrt(spread) + 1e-6 if config.algo.groups.normalize_std else 1.0
    for turn in (t for p in members for t in p.turns):
        turn.advantage = (turn.reward - mean) / scale


def _step_part(config: RunConfig, members: list[Played]) -> None:
    """GiGPO: discounted return against the siblings' turns that saw the same."""
    by_state: dict[str, list[tuple[Credited, float]]] = defaultdict(list)
    for played in members:
        later = 0.0
        for turn in reversed(played.turns):
            later = turn.turn.reward + config.algo.gigpo.discount * later
            by_state[turn.turn.observation].append(
                (turn, later - config.algo.invalid_penalty * (not turn.turn.action.valid))
            )
    for same in by_state.values():
        values = [value for _, value in same]
        scale = (
            (statistics.stdev(values) if len(values) > 1 else 0.0) + 1e-6 if config.algo.groups.normalize_std else 1.0
        )
        for turn, value in same:
            turn.step_part = (value - statistics.fmean(values)) / scale
            turn.advantage += turn.step_part


def rows_of(config: RunConfig, played: Played) -> list[Row]:
    """Chat: one row, the whole conversation. Windowed: a row a turn."""
    turns = [(turn, turn.turn.prompt_ids + turn.turn.token_ids) for turn in played.turns]
    if config.env.style == "windowed":
        return [Row(played, i, ids, [(len(turn.turn.prompt_ids), turn)]) for i, (turn, ids) in enumerate(turns)]
    for (_, earlier), (later, _) in zip(turns, turns[1:], strict=False):
        assert later.turn.prompt_ids[: len(earlier)] == earlier
    return [Row(played, 0, turns[-1][1], [(len(turn.turn.prompt_ids), turn) for turn, _ in turns])]


class Buffer:
    """Replay buffer and baselines, step by step."""

    def __init__(self, config: RunConfig):
        self.settings = config.algo.sil
        self.stored: list[Played] = []
        self.means: list[float] = []

    def level(self) -> float:
        return statistics.median(self.means)

    def pass_on(self, step: int, groups: list[list[Played]], *, flushed: bool) -> None:
        """What a step leaves behind: an empty buffer where it was flushed, then its own groups."""
        self.stored = [] if flushed else self.usable(step)
        for members in groups:
            self.means.append(statistics.fmean(statistics.fmean(t.reward for t in p.turns) for p in members))
            self.stored += [p for p in members if p.trajectory.faults == 0 and p.mean("advantage") > 0]

    def usable(self, step: int) -> list[Played]:
        return [p for p in self.stored if step - p.step <= self.settings.max_age]

    def better(self, step: int) -> list[Played]:
        """Usable trajectories that beat the median of all group means so far."""
        return [p for p in self.usable(step) if p.mean("reward") > self.level()]

    def due(self, step: int) -> bool:
        return bool(self.means) and len(self.better(step)) > self.settings.fill_factor * self.settings.capacity

    def advantages(self, played: Played) -> list[float]:
        """Of a trajectory's turns, recalibrated now."""
        part = 1.0 if self.settings.keep_step_part else 0.0
        return [
            (turn.reward - self.level()) / self.settings.reward_scale + part * turn.step_part for turn in played.turns
        ]


def logprobs(model: torch.nn.Module, ids: tuple[int, ...], temperature: float) -> torch.Tensor:
    """[len(ids)] of each token given those before it (0 for the first), from the model's own logits."""
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1] / temperature
    logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[0, 1:, None])[:, 0]
    return torch.cat([logprobs.new_zeros(1), logprobs])


def surrogate(
    model: torch.nn.Module, rows: Iterable[tuple[Row, list[float], torch.Tensor]], config: RunConfig
) -> torch.Tensor:
    """− mean over tokens (or sum over rows · horizon) of min(r A, clip(r) A).

    Args:
        rows: (row, advantage of each token in the loss, old log-probabilities of all its tokens).
    """
    policy, total, count = config.algo.policy, torch.zeros(()), 0
    by_rows = policy.aggregation == "seq-mean-token-sum-norm"
    for row, advantages, old in rows:
        positions = [position for position, _, _ in row.tokens()]
        ratio = (logprobs(model, row.ids, config.rollout.temperature) - old)[positions].exp()
        worth = torch.tensor(advantages, dtype=torch.float32)
        total = (
            total - torch.minimum(ratio * worth, ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high) * worth).sum()
        )
        count += policy.horizon if by_rows else len(positions)
    return total / count
