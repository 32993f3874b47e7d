"""The weighted objectives of an update."""

from __future__ import annotations

from typing import Any

from spearrl.algorithm.credit import needs_critic
from spearrl.config import AlgoSection
from spearrl.config.plugins import accepted
from spearrl.losses import ClipCov, Correction, KlCov, Objective
from spearrl.losses.objective import LEADING, OFFERED, REQUIRED


def objectives(algo: AlgoSection) -> list[Objective]:
    """The objectives that are on: the policy's surrogate, self-imitation, entropy bonus, KL divergence, value.

    The policy's has weight 1; the learner multiplies self-imitation by γ.

    Raises:
        ConfigError: a loss of the user's own that cannot be imported or has another signature.
    """
    if ":" in algo.loss:
        accepted(algo.loss, "algo.loss", leading=LEADING, required=REQUIRED, offered=OFFERED)
    policy, sil, rule = algo.policy, algo.sil, algo.correction
    scale: dict[str, Any] = {name: getattr(policy, name) for name in ("aggregation", "horizon", "denominator")}
    surrogate: dict[str, Any] = {
        "surrogate": algo.loss,
        **{name: getattr(policy, name) for name in ("clip_low", "clip_high", "dual_clip")},
        "correction": None if rule.mode == "none" else Correction(rule.mode, rule.level, rule.cap, rule.floor),
        **scale,
    }
    total = [Objective("policy", **_covariance(algo, replay=False), **surrogate)]
    if sil.enabled:
        weights: dict[str, Any] = {"token_weight": sil.token_weight, "token_power": sil.token_weight_power}
        total.append(Objective("sil", **weights, **_covariance(algo, replay=True), **surrogate))
    if policy.entropy_coef:
        sources = (False, True) if sil.enabled else (False,)
        total += [Objective("entropy", weight=policy.entropy_coef, replay=replay, **scale) for replay in sources]
    if algo.kl.loss_coef:
        total.append(Objective("kl", weight=algo.kl.loss_coef, estimator=algo.kl.estimator, **scale))
    if needs_critic(algo):
        total.append(Objective("value", weight=algo.critic.coef, value_clip=algo.critic.clip, **scale))
    return total


def _covariance(algo: AlgoSection, *, replay: bool) -> dict[str, Any]:
    """The covariance rule of one source of rows; each has its own numbers on replay."""
    cov, kl_cov = algo.clip_cov, algo.kl_cov
    if algo.loss == "kl_cov":
        return {"kl_cov": KlCov(kl_cov.replay_ratio if replay else kl_cov.ratio, kl_cov.coef, cov.scope)}
    if not cov.enabled:
        return {}
    bounds = (cov.replay_ratio, cov.replay_lower, cov.replay_upper) if replay else (cov.ratio, cov.lower, cov.upper)
    return {"clip_cov": ClipCov(*bounds, scope=cov.scope, log_ratio_clamp=cov.log_ratio_clamp)}
