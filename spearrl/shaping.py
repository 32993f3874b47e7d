"""What happens to rewards and turns before advantages: intrinsic bonus, quality flags, group filter, penalty."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from spearrl.advantages import above_minimum, means_by_index, numbered_by_appearance
from spearrl.errors import ContractError

_ACTION = re.compile(r"<action>.*?</action>", re.DOTALL)
# U+FFFD itself, its UTF-8 bytes read as Latin-1 or GBK, and those of the full-width question mark that some decoders
# put in its place.
_GARBAGE = ("\ufffd", "\u00ef\u00bf\u00bd", "\u951f\u65a4\u62f7", "\u00ef\u00bc\u0178", "\u00ef\u00bc\u009f")


def tool_bonus(count: int, *, per_call: float = 0.1, cap: float = 1.0) -> float:
    """Intrinsic reward of an episode with `count` tool calls, before its schedule (SPEAR, arXiv:2509.22601)."""
    return min(cap, per_call * count)


def penalise_invalid(values: Tensor, invalid: Tensor, *, coefficient: float = 0.1) -> Tensor:
    """values - coefficient on turns whose action was invalid. [N] rewards or step returns; `invalid` is bool or 0/1."""
    return values - coefficient * invalid.to(values.dtype)


def overlong(tokens: int, limit: int) -> bool:
    """Whether a reply of `tokens` tokens used up its limit (and so was cut)."""
    return tokens >= limit


def void_turn(text: str | None) -> bool:
    """Whether a reply has no `<action>…</action>` after its last `</think>`, or anywhere where it does not think.

    An empty action counts as one.
    """
    return _ACTION.search((text or "").rpartition("</think>")[2]) is None


def repetitive(token_ids: Sequence[int], *, ngram: int = 20, times: int = 10) -> bool:
    """Whether some run of `ngram` tokens occurs at least `times` times, overlaps counted.

    Raises:
        ContractError: ngram or times below 1.
    """
    if ngram < 1 or times < 1:
        hint = "the usual setting is ngram=20, times=10"
        raise ContractError(f"repetitive(ngram={ngram}, times={times}); both must be >= 1", hint=hint)
    if len(token_ids) < ngram + times - 1:
        return False
    if max(Counter(token_ids).values()) < times:  # a run repeats only if its first token does
        return False
    grams = Counter(zip(*(token_ids[start:] for start in range(ngram)), strict=False))
    return max(grams.values()) >= times


def unreadable(text: str) -> bool:
    """Whether decoded text holds a replacement character (U+FFFD), also one that was decoded wrongly a second time."""
    return any(piece in text for piece in _GARBAGE)


def filter_groups_by_std(rewards: Tensor, group_ids: Tensor, trajectory_ids: Tensor, *, keep: float = 0.75) -> Tensor:
    """The int(keep * groups) groups (at least 1) whose trajectories differ most in reward.

    A trajectory's reward is the mean over its turns; deviations have ddof 0; of equal ones the group that appears first
    is kept.

    Args:
        rewards, group_ids, trajectory_ids: [N] per turn.
        keep: share of groups; 1 or more keeps all.

    Returns:
        Their ids, in order of first appearance.
    """
    groups, group = numbered_by_appearance(group_ids)
    if keep >= 1 or len(groups) < 2:
        return groups
    trajectories, trajectory = torch.unique(trajectory_ids, return_inverse=True)
    means = means_by_index(above_minimum(rewards.double(), group, len(groups)), trajectory, len(trajectories))
    group_of_trajectory = torch.zeros_like(trajectories).scatter_(0, trajectory, group)
    centred = means - means_by_index(means, group_of_trajectory, len(groups))[group_of_trajectory]
    variance = means_by_index(centred.square(), group_of_trajectory, len(groups))
    ranked = variance.argsort(descending=True, stable=True)
    return groups[ranked[: max(1, int(keep * len(groups) + 1e-9))].sort().values]
