"""Self-imitation on replayed tokens."""

from __future__ import annotations

from torch import Tensor

from spearrl.losses.policy import clipped_policy_loss


def sil_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token-mean",
    horizon: float | None = None,
    denominator: float | None = None,
    drop: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """J_SIL of SPEAR (arXiv:2509.22601): the clipped surrogate of max(A, 0), so only what beat the baseline is imitated (SIL, arXiv:1806.05635 eq. 2).

    Args (all [B, T]): as `clipped_policy_loss`; old_logprobs are those of the step the tokens were sampled in, advantages the recalibrated ones.
        dual_clip acts on negative advantages only and so never here; it is accepted to share the policy loss's settings.
    """
    return clipped_policy_loss(
        logprobs,
        old_logprobs,
        advantages.clamp(min=0),
        action_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        aggregation=aggregation,
        horizon=horizon,
        denominator=denominator,
        drop=drop,
    )
