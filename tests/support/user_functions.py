"""A user's own loss and advantage, right ones and wrong ones."""

from __future__ import annotations

import torch

from spearrl.losses import clipped_policy_loss

calls: list[str] = []


def clip_again(
    logprobs,
    old_logprobs,
    advantages,
    action_mask,
    *,
    aggregation,
    horizon,
    denominator,
    drop,
    clip_low,
    clip_high,
    dual_clip,
):  # the built-in surrogate by another name
    calls.append("clip_again")
    edges = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    return clipped_policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        action_mask,
        aggregation=aggregation,
        horizon=horizon,
        denominator=denominator,
        drop=drop,
        **edges,
    )


def cubed(
    logprobs, old_logprobs, advantages, action_mask, *, aggregation, horizon, denominator, drop, rollout_logprobs=None
):
    """Written out, with the engine's log-probabilities as asked for."""
    calls.append(
        "cubed"
        if rollout_logprobs is not None and rollout_logprobs.shape == logprobs.shape
        else "cubed without what it asked for"
    )
    ratio = torch.where(action_mask, logprobs - old_logprobs, 0.0).exp()
    loss = -torch.where(action_mask, ratio * advantages**3, 0.0).sum() / (denominator or 1.0)
    return loss, {"cubed": float(loss.detach())}


def only_best(rewards, group_ids, *, tool_calls, trajectory_ids):
    """1 for the turns of each group's best episodes, less a little per call."""
    calls.append("only_best")
    best = torch.stack([rewards[group_ids == g].max() for g in group_ids])
    return (rewards == best).double() - 0.01 * tool_calls * (trajectory_ids >= 0)


def no_keywords(logprobs, old_logprobs, advantages, action_mask):
    return logprobs.sum(), {}


def other_order(old_logprobs, logprobs, advantages, action_mask, *, aggregation, horizon, denominator, drop):
    return logprobs.sum(), {}


def wants_more(logprobs, old_logprobs, advantages, action_mask, *, aggregation, horizon, denominator, drop, moon_phase):
    return logprobs.sum(), {}


def only_a_tensor(logprobs, old_logprobs, advantages, action_mask, *, aggregation, horizon, denominator, drop):
    return (logprobs * action_mask).sum()


def a_vector(logprobs, old_logprobs, advantages, action_mask, *, aggregation, horizon, denominator, drop):
    return logprobs.sum(-1), {}


def not_finite(logprobs, old_logprobs, advantages, action_mask, *, aggregation, horizon, denominator, drop):
    return (logprobs * torch.nan).sum(), {}


def swapped(group_ids, rewards):
    return rewards


def wants_weather(rewards, group_ids, *, weather):
    return rewards


def too_short(rewards, group_ids):
    return rewards[1:]


def a_list(rewards, group_ids):
    return rewards.tolist()


def undefined(rewards, group_ids):
    return rewards * torch.nan


NUMBER = 3
