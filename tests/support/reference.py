"""The mathematics once more, in plain Python floats and explicit loops, from the papers and not from the package.

Rows are lists, tokens are read only where the mask is true. Losses accept complex log-probabilities: `gradient`
differentiates by a complex step (doi:10.1145/838250.838251), which has no cancellation, so a gradient here is exact to
machine precision and no derivative is worked out by hand. Comparisons (max, clip) look at the real part; `frozen` stops
a gradient.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence

Number = complex
Row = Sequence[float]
Table = Sequence[Row]
Mask = Sequence[Sequence[bool]]

STEP = 1e-40
LIMIT = 20.0  # of |log ratio|
GUARD = 1e-8  # in the divisor of a mean over tokens (spear.md, 1.3)


# Advantages: one number per turn


def mean(values: Row) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Row) -> float:
    """Standard deviation with ddof 1."""
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def members(ids: Sequence, wanted) -> list[int]:
    return [index for index, name in enumerate(ids) if name == wanted]


def moments(rewards: Row, inside: list[int], trajectories: Sequence[int], statistics: str) -> tuple[int, float, float]:
    """(how many count, mean, deviation) of one group; deviation 0 for fewer than two."""
    turns_of: dict[int, list[int]] = {}
    for index in inside:
        turns_of.setdefault(trajectories[index], []).append(index)
    if statistics == "balanced":
        return balanced_moments(rewards, list(turns_of.values()))
    counted = inside if statistics == "turn" else [turns[0] for turns in turns_of.values()]
    values = [rewards[index] for index in counted]
    return len(values), mean(values), deviation(values) if len(values) > 1 else 0.0


def balanced_moments(rewards: Row, trajectories: list[list[int]]) -> tuple[int, float, float]:
    count = len(trajectories)
    middle = math.fsum(rewards[turn] / len(turns) for turns in trajectories for turn in turns) / count
    spread = math.fsum((rewards[turn] - middle) ** 2 / len(turns) for turns in trajectories for turn in turns)
    return count, middle, math.sqrt(spread / (count - 1)) if count > 1 else 0.0


def grpo(rewards, groups, trajectories, *, normalize_std, statistics, singleton, eps=1e-6) -> list[float]:
    out = []
    for index, reward in enumerate(rewards):
        inside = members(groups, groups[index])
        count, middle, spread = moments(rewards, inside, trajectories, statistics)
        if count == 1:
            out.append(0.0 if singleton == "zero" else reward / (1 + eps) if normalize_std else reward)
        elif all(rewards[other] == reward for other in inside):
            out.append(0.0)
        else:
            out.append((reward - middle) / (spread + eps) if normalize_std else reward - middle)
    return out


def state(returns, groups, anchors, *, normalize_std, eps=1e-6) -> list[float]:
    """GiGPO's step part: turns of a group in the same state, every turn counted."""
    pairs = list(zip(groups, anchors, strict=True))
    alone = list(range(len(returns)))
    return grpo(returns, pairs, alone, normalize_std=normalize_std, statistics="turn", singleton="zero", eps=eps)


def gigpo(
    rewards, returns, groups, anchors, trajectories, *, step_weight, normalize_std, statistics, singleton, eps=1e-6
) -> list[float]:
    episode = grpo(
        rewards, groups, trajectories, normalize_std=normalize_std, statistics=statistics, singleton=singleton, eps=eps
    )
    step = state(returns, groups, anchors, normalize_std=normalize_std, eps=eps)
    return [first + step_weight * second for first, second in zip(episode, step, strict=True)]


def rloo(rewards, groups, trajectories, *, statistics, singleton) -> list[float]:
    out = []
    for index, reward in enumerate(rewards):
        count, middle, _ = moments(rewards, members(groups, groups[index]), trajectories, statistics)
        alone = 0.0 if singleton == "zero" else reward
        out.append((reward - middle) * count / (count - 1) if count > 1 else alone)
    return out


def discounted(rewards, trajectories, gamma) -> list[float]:
    """Each return summed forward from its own turn."""
    out = []
    for index, name in enumerate(trajectories):
        later = [other for other in members(trajectories, name) if other >= index]
        out.append(math.fsum(gamma**distance * rewards[other] for distance, other in enumerate(later)))
    return out


def recalibrated(rewards, baselines, deviations=None, *, eps=1e-6) -> list[float]:
    differences = [reward - baseline for reward, baseline in zip(rewards, baselines, strict=True)]
    if deviations is None:
        return differences
    return [difference / (spread + eps) for difference, spread in zip(differences, deviations, strict=True)]


# Advantages: one number per token


def gae(rewards: Table, values: Table, mask: Mask, *, gamma, lam) -> tuple[list[list[float]], list[list[float]]]:
    """The sum of (gamma lam)^k d_{t+k} over a row's action tokens, written out."""
    advantages, returns = ([[0.0] * len(row) for row in mask] for _ in range(2))
    for b, row in enumerate(mask):
        at = [t for t, acted in enumerate(row) if acted]
        following = [values[b][t] for t in at[1:]] + [0.0]
        errors = [rewards[b][t] + gamma * after - values[b][t] for t, after in zip(at, following, strict=False)]
        for first, t in enumerate(at):
            advantages[b][t] = math.fsum((gamma * lam) ** k * error for k, error in enumerate(errors[first:]))
            returns[b][t] = advantages[b][t] + values[b][t]
    return advantages, returns


def whiten(values: Row, weights: Row) -> list[float]:
    """Weighted by integer counts, with the released guards; 0 where the weight is 0.

    Not for a single token, which has no deviation.
    """
    total = math.fsum(weights)
    if not total:
        return [0.0] * len(values)
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight]
    middle = math.fsum(weight * value for value, weight in pairs) / (total + GUARD)
    spread = math.fsum(weight * (value - middle) ** 2 for value, weight in pairs) / (total + GUARD)
    spread *= total / (total - 1)
    return [
        (value - middle) / math.sqrt(spread + 1e-8) if weight else 0.0
        for value, weight in zip(values, weights, strict=True)
    ]


def reinforce_plus_plus(rewards: Table, mask: Mask, *, gamma, gaps) -> list[list[float]]:
    where, returns = [], []
    for b, row in enumerate(mask):
        run = 0.0
        for t in reversed(range(len(row))):
            if row[t]:
                run = rewards[b][t] + gamma * run
                where.append((b, t))
                returns.append(run)
            elif gaps == "reset":
                run = 0.0
    out = [[0.0] * len(row) for row in mask]
    for (b, t), value in zip(where, whiten(returns, [1.0] * len(returns)), strict=True):
        out[b][t] = value
    return out


def reinforce_plus_plus_baseline(rewards, groups, counts, trajectories, *, statistics, singleton) -> list[float]:
    centred = grpo(rewards, groups, trajectories, normalize_std=False, statistics=statistics, singleton=singleton)
    return whiten(centred, counts)


# Losses


def frozen(x: Number) -> float:
    return complex(x).real


def clip(x: Number, low: float, high: float) -> Number:
    return low if frozen(x) < low else high if frozen(x) > high else x


def larger(x: Number, y: Number) -> Number:
    return x if frozen(x) >= frozen(y) else y


def smaller(x: Number, y: Number) -> Number:
    return x if frozen(x) <= frozen(y) else y


def tokens(mask: Mask) -> list[tuple[int, int]]:
    return [(b, t) for b, row in enumerate(mask) for t, acted in enumerate(row) if acted]


def aggregate(value: Callable[[int, int], Number], mask: Mask, mode: str, *, horizon=None, denominator=None) -> Number:
    """`value(b, t)` of every action token over the divisor of `mode`, or over `denominator`."""
    rows = [[t for t, acted in enumerate(row) if acted] for row in mask]
    if mode == "seq-mean-token-mean":
        top = sum(sum(value(b, t) for t in row) / len(row) for b, row in enumerate(rows) if row)
    else:
        top = sum(value(b, t) for b, row in enumerate(rows) for t in row)
    own = {
        "token-mean": sum(len(row) for row in rows) + GUARD,
        "seq-mean-token-sum": len(rows),
        "seq-mean-token-mean": len(rows),
        "seq-mean-token-sum-norm": horizon,
    }[mode]
    return top / (own if denominator is None else denominator)


def share(condition: Callable[[int, int], float], mask: Mask) -> float:
    """Mean of a number or truth value over the action tokens, with the released guard."""
    at = tokens(mask)
    return math.fsum(float(condition(b, t)) for b, t in at) / (len(at) + GUARD)


def gradient(loss: Callable[[list[list[Number]]], Number], at: Table, mask: Mask) -> list[list[float]]:
    """d loss / d at[b][t] at every action token, 0 elsewhere."""
    out = [[0.0] * len(row) for row in at]
    moved = [list(row) for row in at]
    for b, t in tokens(mask):
        moved[b][t] = complex(at[b][t], STEP)
        out[b][t] = complex(loss(moved)).imag / STEP
        moved[b][t] = at[b][t]
    return out


def log_ratio(x: Number, old: float, limit: float | None = LIMIT) -> Number:
    return x - old if limit is None else clip(x - old, -limit, limit)


def surrogate(x, old, advantage, *, clip_low, clip_high, limit=LIMIT) -> tuple[Number, Number]:
    """(unclipped, clipped) loss of one token."""
    ratio = cmath.exp(log_ratio(x, old, limit))
    return -advantage * ratio, -advantage * clip(ratio, 1 - clip_low, 1 + clip_high)


def clipped_token(x, old, advantage, *, clip_low, clip_high, dual_clip=None, limit=LIMIT) -> Number:
    loss = larger(*surrogate(x, old, advantage, clip_low=clip_low, clip_high=clip_high, limit=limit))
    return smaller(loss, -advantage * dual_clip) if dual_clip is not None and advantage < 0 else loss


def clipped_away(x, old, advantage, *, clip_low, clip_high) -> bool:
    plain, bounded = surrogate(x, old, advantage, clip_low=clip_low, clip_high=clip_high)
    return frozen(bounded) > frozen(plain)


def gspo_log_ratio(row: Sequence[Number], old: Row, acted: Sequence[bool]) -> float:
    """Logarithm of the geometric mean of the row's token ratios."""
    return mean([frozen(x) - y for x, y, on in zip(row, old, acted, strict=True) if on])


def gspo_token(x, row_log_ratio, advantage, *, clip_low, clip_high) -> Number:
    """Of the row's ratio; through the clamp at ±20 no gradient flows."""
    moved = cmath.exp(clip(row_log_ratio + x - frozen(x), -LIMIT, LIMIT))
    return larger(-advantage * moved, -advantage * clip(moved, 1 - clip_low, 1 + clip_high))


def cispo_token(x, old, advantage, *, clip_low, clip_high) -> Number:
    weight = clip(math.exp(frozen(log_ratio(x, old))), 1 - clip_low, 1 + clip_high)
    return -frozen(weight) * advantage * x


def kl_cov_token(x, old, advantage, penalised: bool, *, kl_coef) -> Number:
    """Neither clipped nor clamped."""
    difference = x - old
    size = difference if frozen(difference) >= 0 else -difference
    return -advantage * cmath.exp(difference) + (kl_coef * size if penalised else 0.0)


def kl_token(x: Number, ref: float, estimator: str) -> Number:
    difference = x - ref
    if estimator == "k1":
        return difference
    if estimator == "abs":
        return difference if frozen(difference) >= 0 else -difference
    if estimator == "k2":
        return difference * difference / 2
    return clip(cmath.exp(-difference) + difference - 1, -10.0, 10.0)


def value_token(value: Number, old: float, target: float, *, bound: float) -> tuple[Number, Number]:
    """(unclipped, clipped) halved squared error of one token."""
    plain, bounded = value - target, clip(value, old - bound, old + bound) - target
    return plain * plain / 2, bounded * bounded / 2


# Covariance: which tokens


def covariances(logprobs: Table, advantages: Table, mask: Mask) -> dict[tuple[int, int], float]:
    at = tokens(mask)
    if not at:
        return {}
    middle_a, middle_x = mean([advantages[b][t] for b, t in at]), mean([logprobs[b][t] for b, t in at])
    return {(b, t): (advantages[b][t] - middle_a) * (logprobs[b][t] - middle_x) for b, t in at}


def quantile(values: Row, q: float) -> float:
    """Linear interpolation between the two neighbours in rank."""
    ordered = sorted(values)
    rank = q * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def bound(value: float | str, values: Row) -> float:
    return quantile(values, float(value.removeprefix("quantile:"))) if isinstance(value, str) else value


def eligible(logprobs: Table, advantages: Table, mask: Mask, *, lower, upper, exclude: Mask) -> list[tuple[int, int]]:
    """Tokens that may be drawn, in row-major order."""
    by_token = covariances(logprobs, advantages, mask)
    if not by_token:
        return []
    low, high = (bound(value, list(by_token.values())) for value in (lower, upper))
    return [at for at in sorted(by_token) if low < by_token[at] < high and not exclude[at[0]][at[1]]]


def quota(ratio: float, mask: Mask, candidates: int) -> int:
    return min(max(int(ratio * len(tokens(mask))), 1), candidates)


def highest(
    logprobs: Table, advantages: Table, mask: Mask, *, ratio, keys: Sequence[Sequence[int]]
) -> set[tuple[int, int]]:
    """The tokens that kl_cov penalises; of equal ones those with the smallest key."""
    by_token = covariances(logprobs, advantages, mask)
    return set(
        sorted(by_token, key=lambda at: (-by_token[at], keys[at[0]][at[1]]))[: quota(ratio, mask, len(by_token))]
    )


# Engine against learner


def importance(old: Table, rollout: Table, mask: Mask, *, mode, level, cap, floor) -> list[list[float]]:
    out = []
    for b, row in enumerate(mask):
        known = [t for t, acted in enumerate(row) if acted and math.isfinite(rollout[b][t])]
        together = math.fsum(old[b][t] - rollout[b][t] for t in known)
        weights = [0.0] * len(row)
        for t in known:
            weight = math.exp(clip(together if level == "sequence" else old[b][t] - rollout[b][t], -LIMIT, LIMIT))
            weights[t] = min(weight, cap) if mode == "tis" else weight if floor <= weight <= cap else 0.0
        out.append(weights)
    return out


# Schedules: step and total in training steps


def progress(kind: str, step: float, total: float) -> float:
    """From 0 to 1."""
    if step >= total:
        return 1.0
    if step <= 0:
        return 0.0
    return step / total if kind == "linear" else (1 - math.cos(math.pi * step / total)) / 2


def schedule(kind: str, step: float, total: float, *, rising: bool) -> float:
    if kind == "constant":
        return 1.0
    return progress(kind, step, total) if rising else 1.0 - progress(kind, step, total)


def adaptive(kind: str, value: float, low: float, high: float) -> float:
    done = min(max((value - low) / (high - low), 0.0), 1.0)
    return done if kind == "success" else 1.0 - done
