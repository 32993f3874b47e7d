"""The weighted objectives of an update."""

from __future__ import annotations

from typing import Any

from spearrl.algorithm.credit import needs_critic
from spearrl.config import AlgoSection
from spearrl.losses import ClipCov, Correction, KlCov, Objective


def objectives(algo: AlgoSection) -> list[Objective]:
    """The policy's surrogate (weight 1), self-imitation (the learner multiplies by γ), entropy bonus, KL divergence, value: those that are on.

    Raises:
        ConfigError: a loss of the user's own that cannot be imported or has another signature.
    """
    policy, sil = algo.policy, algo.sil
    place: dict[str, Any] = {"aggregation": policy.aggregation, "horizon": policy.horizon, "divisor": policy.divisor}
    surrogate: dict[str, Any] = {
        **place,
        "surrogate": algo.loss,
        "clip_low": policy.clip_low,
        "clip_high": policy.clip_high,
        "dual_clip": policy.dual_clip,
        "correction": _correction(algo),
    }
    total = [Objective("policy", **_covariance(algo, replay=False), **surrogate)]
    if sil.enabled:
        weights: dict[str, Any] = {"token_weight": sil.token_weight, "token_power": sil.token_weight_power}
        total.append(Objective("sil", **weights, **_covariance(algo, replay=True), **surrogate))
    if policy.entropy_coef:
        sources = (False, True) if sil.enabled else (False,)
        total += [Objective("entropy", weight=policy.entropy_coef, replay=replay, **place) for replay in sources]
    if algo.kl.loss_coef:
        total.append(Objective("kl", weight=algo.kl.loss_coef, estimator=algo.kl.estimator, **place))
    if needs_critic(algo):
        total.append(Objective("value", weight=algo.critic.coef, value_clip=algo.critic.clip, **place))
    return total


def _covariance(algo: AlgoSection, *, replay: bool) -> dict[str, Any]:
    """Covariance rules of one source of rows; each has its own numbers on replay."""
    cov, kl_cov = algo.clip_cov, algo.kl_cov
    if algo.loss == "kl_cov":
        return {"kl_cov": KlCov(kl_cov.replay_ratio if replay else kl_cov.ratio, kl_cov.coef, cov.scope)}
    if not cov.enabled:
        return {}
    bounds = (cov.replay_ratio, cov.replay_lower, cov.replay_upper) if replay else (cov.ratio, cov.lower, cov.upper)
    return {"clip_cov": ClipCov(*bounds, scope=cov.scope, log_ratio_clamp=cov.log_ratio_clamp)}


def _correction(algo: AlgoSection) -> Correction | None:
    rule = algo.correction
    return None if rule.mode == "none" else Correction(rule.mode, rule.level, rule.cap, rule.floor)
