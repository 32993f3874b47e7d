"""What each token is worth: the estimator the settings name, on shaped rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spearrl import advantages as estimators
from spearrl.advantages import sums_by_id, sums_by_index
from spearrl.algorithm.rewards import Shaped
from spearrl.batching import Rows
from spearrl.config import AlgoSection
from spearrl.config.plugins import accepted, load_function
from spearrl.errors import ContractError
from spearrl.losses import kl_divergence
from spearrl.shaping import penalise_invalid
from spearrl.types import Status

TOKEN_ESTIMATORS = ("gae", "reinforce++")  # credit token by token; the others give a turn one number
OFFERED = ("trajectory_ids", "anchor_ids", "step_rewards", "tool_calls", "token_counts")


@dataclass(frozen=True)
class Credit:
    """Advantages of a step.

    Args:
        tokens: [B, T], what the loss sees.
        turns: [N], of each turn (the mean over its tokens, where tokens differ): what the replay buffer goes by.
        step_part: [N], GiGPO's, already in `turns`; None: there is none.
        returns: [B, T], targets of the critic; None: there is no critic.
    """

    tokens: torch.Tensor
    turns: torch.Tensor
    step_part: torch.Tensor | None = None
    returns: torch.Tensor | None = None


def needs_critic(algo: AlgoSection) -> bool:
    """Whether values of states are needed."""
    return algo.advantage == "gae"


def needs_reference(algo: AlgoSection) -> bool:
    """Whether the starting model is kept to measure the KL divergence from."""
    return algo.kl.loss_coef > 0 or algo.kl.reward_coef > 0


def check_advantage(algo: AlgoSection) -> None:
    """Raises ConfigError where algo.advantage is a function that cannot be imported or has another signature."""
    if ":" in algo.advantage:
        accepted(algo.advantage, "algo.advantage", leading=("rewards", "group_ids"), required=(), offered=OFFERED)


def assign_credit(
    shaped: Shaped,
    algo: AlgoSection,
    *,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
) -> Credit:
    """Advantages of the shaped rewards by algo.advantage.

    Args:
        old_logprobs, ref_logprobs: [B, T], for a KL divergence in the reward.
        values: [B, T] of the states before every sampled token, for "gae".
    """
    rows = shaped.rows
    kl = torch.zeros(len(rows), rows.width, dtype=torch.float64)
    if algo.kl.reward_coef and old_logprobs is not None and ref_logprobs is not None:
        divergence = kl_divergence(old_logprobs.double(), ref_logprobs.double(), algo.kl.estimator)
        kl = torch.where(rows.padded_mask, algo.kl.reward_coef * divergence, 0.0)
    if algo.advantage in TOKEN_ESTIMATORS:
        return _token_credit(shaped, algo, kl, values)
    rewards = shaped.rewards - _per_trajectory(rows, kl)
    turns, step_part = _turn_advantages(shaped, rewards, algo)
    turns = torch.where(shaped.muted, 0.0, turns)
    return Credit(rows.scatter(turns).float(), turns, step_part)


def _turn_advantages(
    shaped: Shaped, rewards: torch.Tensor, algo: AlgoSection
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[N] advantages, and GiGPO's weighted step part of them."""
    turns, settings = shaped.rows.turns, algo.groups
    options: dict[str, Any] = {
        "trajectory_ids": turns.trajectory_ids,
        "statistics": "turn" if settings.statistics == "turn" else "balanced",
        "singleton": settings.singleton,
    }
    if algo.advantage == "rloo":
        return estimators.rloo_advantages(rewards, turns.group_ids, **options), None
    if algo.advantage == "reinforce++_baseline":
        weights = _token_counts(shaped.rows)
        return estimators.reinforce_plus_plus_baseline(rewards, turns.group_ids, weights, **options), None
    if ":" in algo.advantage:
        return _users_advantages(shaped, rewards, algo), None
    episode = estimators.grpo_advantages(rewards, turns.group_ids, normalize_std=settings.normalize_std, **options)
    if algo.advantage == "grpo":
        return episode, None
    step = algo.gigpo.step_weight * estimators.state_advantages(
        shaped.step_returns, turns.group_ids, turns.anchor_ids, normalize_std=settings.normalize_std
    )
    return episode + step, step


def _users_advantages(shaped: Shaped, rewards: torch.Tensor, algo: AlgoSection) -> torch.Tensor:
    """[N] finite advantages of a user's function, which gets the keywords that its signature names."""
    turns = shaped.rows.turns
    offered = {
        "trajectory_ids": turns.trajectory_ids,
        "anchor_ids": turns.anchor_ids,
        "step_rewards": turns.rewards,
        "tool_calls": turns.tool_calls,
        "token_counts": _token_counts(shaped.rows),
    }
    names = accepted(algo.advantage, "algo.advantage", leading=("rewards", "group_ids"), required=(), offered=OFFERED)
    function = load_function(algo.advantage, "algo.advantage")
    advantages = function(rewards, turns.group_ids, **{name: offered[name] for name in names})
    if isinstance(advantages, torch.Tensor) and advantages.shape == rewards.shape and advantages.isfinite().all():
        return advantages.double()
    returned = list(advantages.shape) if isinstance(advantages, torch.Tensor) else type(advantages).__name__
    hint = f"return finite advantages, a tensor of shape {[len(rewards)]}"
    raise ContractError(f"{algo.advantage} returned {returned}", where="algo.advantage", hint=hint)


def _token_credit(shaped: Shaped, algo: AlgoSection, kl: torch.Tensor, values: torch.Tensor | None) -> Credit:
    """Credit along whole trajectories, over all their rows; tokens that a filter took out of the loss pass it on."""
    rows, mask = shaped.rows, shaped.rows.padded_mask
    layout = _TrajectoryLayout(rows)
    rewards = layout.gather(_token_rewards(shaped, algo) - kl)
    returns = None
    if algo.advantage == "reinforce++":
        tokens = layout.scatter(estimators.reinforce_plus_plus(rewards, layout.mask, gamma=algo.critic.discount))
        tokens = torch.where(mask, tokens, 0.0)
    else:
        if values is None:
            hint = "pass values=, [B, T] of the critic"
            raise ContractError('advantage "gae" without values', where="assign_credit", hint=hint)
        state_values = layout.gather(values.double())
        last = layout.mask.sum(-1, keepdim=True) - 1
        cut = torch.zeros(len(layout.mask), dtype=torch.float64)
        cut[layout.owner] = (rows.turns.status[rows.turn_index[layout.source]] == Status.CONTEXT_LIMIT.code).double()
        # The value before the last token (which ends the reply) stands for the state behind it, whose observation did
        # not fit.
        bootstrap = algo.critic.discount * cut[:, None] * state_values.gather(1, last)
        rewards = rewards.scatter_add(1, last, bootstrap)
        discounts = {"gamma": algo.critic.discount, "lam": algo.critic.lam}
        raw, targets = estimators.gae(rewards, state_values, layout.mask, **discounts)
        tokens, returns = torch.where(mask, layout.scatter(raw), 0.0), layout.scatter(targets).float()
        if algo.critic.whiten and int(mask.sum()) > 1:
            tokens = estimators.whiten(tokens, mask)
    tokens = torch.where(rows.scatter(shaped.muted.double()) > 0, 0.0, tokens)
    return Credit(tokens.float(), _turn_means(rows, tokens), returns=returns)


def _token_rewards(shaped: Shaped, algo: AlgoSection) -> torch.Tensor:
    """[B, T]: what a turn earned itself, on its last token; the episode's bonus on the trajectory's last."""
    rows, turns = shaped.rows, shaped.rows.turns
    earned = penalise_invalid(turns.rewards, turns.penalties, coefficient=algo.invalid_penalty)
    final = torch.ones(len(turns), dtype=torch.bool)
    order = torch.argsort(turns.trajectory_ids, stable=True)
    final[order[:-1]] = turns.trajectory_ids[order][1:] != turns.trajectory_ids[order][:-1]
    earned = earned + torch.where(final, shaped.bonuses, 0.0)
    ends = torch.full((len(turns),), -1, dtype=torch.int64)
    sampled = (rows.turn_index >= 0).nonzero().flatten()
    ends = ends.scatter_reduce(0, rows.turn_index[sampled], sampled, "amax")
    flat = torch.zeros(len(rows.token_ids), dtype=torch.float64)
    flat[ends[ends >= 0]] = earned[ends >= 0]
    return rows.pad(flat)


class _TrajectoryLayout:
    """Sampled tokens [B, T] of a step laid out by trajectory [K, W], in time order."""

    def __init__(self, rows: Rows):
        sampled = (rows.turn_index >= 0).nonzero().flatten()
        trajectory = rows.trajectory[rows.row_index[sampled]]
        order = torch.argsort(trajectory, stable=True)
        self.rows, self.source = rows, sampled[order]  # [S'] positions in the flat rows
        _, self.owner, counts = torch.unique(trajectory[order], return_inverse=True, return_counts=True)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
        self.column = torch.arange(len(self.source)) - starts[self.owner]
        self.mask = torch.zeros(len(counts), int(counts.max()) if len(counts) else 0, dtype=torch.bool)
        self.mask[self.owner, self.column] = True

    def gather(self, padded: torch.Tensor) -> torch.Tensor:
        """[B, T] → [K, W]."""
        laid_out = padded.new_zeros(self.mask.shape)
        laid_out[self.owner, self.column] = self.rows.unpad(padded)[self.source]
        return laid_out

    def scatter(self, laid_out: torch.Tensor) -> torch.Tensor:
        """[K, W] → [B, T], 0 elsewhere."""
        flat = laid_out.new_zeros(len(self.rows.token_ids))
        flat[self.source] = laid_out[self.owner, self.column]
        return self.rows.pad(flat)


def _token_counts(rows: Rows) -> torch.Tensor:
    """[N] tokens of each turn that are in the loss."""
    index = rows.turn_index[rows.action_mask]
    return torch.bincount(index[index >= 0], minlength=len(rows.turns)).double()


def _turn_means(rows: Rows, tokens: torch.Tensor) -> torch.Tensor:
    """[N] mean of [B, T] over each turn's tokens in the loss; 0 where it has none."""
    inside = rows.action_mask & (rows.turn_index >= 0)
    total = sums_by_index(rows.unpad(tokens).double()[inside], rows.turn_index[inside], len(rows.turns))
    return total / _token_counts(rows).clamp(min=1)


def _per_trajectory(rows: Rows, tokens: torch.Tensor) -> torch.Tensor:
    """[N] sum of [B, T] over all tokens of each turn's trajectory."""
    sampled = rows.turn_index >= 0
    sums = sums_by_index(rows.unpad(tokens)[sampled], rows.turn_index[sampled], len(rows.turns))
    return sums_by_id(sums, rows.turns.trajectory_ids)
