"""Losses and covariance rules against tests/support/reference.py on random inputs: values, gradients, metrics; 1e-9."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from spearrl import losses
from tests.support import reference as ref
from tests.support.random_inputs import Tokens, checked, compare, seeds, shapes, token_tables

modes = st.sampled_from(losses.AGGREGATIONS)
denominators = st.one_of(st.none(), st.floats(1, 500))
HORIZON = 12.5


def compare_loss(table, got, value, *, metrics, at="logprobs", denominator=None, mode="token-mean"):
    """`got` = (loss, metrics, leaf) of the package; `value(x, b, t)` is the token loss where `x` is the whole table."""
    loss, reported, leaf = got
    mask = table.mask.tolist()

    def total(x):
        return ref.aggregate(lambda b, t: value(x, b, t), mask, mode, horizon=HORIZON, denominator=denominator)

    points = getattr(table, at).tolist()
    size = float(
        complex(
            ref.aggregate(lambda b, t: abs(value(points, b, t)), mask, mode, horizon=HORIZON, denominator=denominator)
        ).real
    )
    compare(loss, complex(total(points)).real, floor=1e-14 * max(size, 1.0))
    (slope,) = torch.autograd.grad(loss, leaf)
    compare(slope, ref.gradient(total, points, mask), floor=1e-30)
    for name, condition in metrics.items():
        compare(reported[name], ref.share(condition, mask))


def options_of(mode, denominator):
    return {"aggregation": mode, "horizon": HORIZON, "denominator": denominator}


clips = st.tuples(st.floats(0.05, 0.4), st.floats(0.05, 0.6))


@checked
@given(token_tables, modes, denominators)
def test_aggregate(table, mode, denominator):
    leaf = table.leaf()
    loss = losses.aggregate(leaf, torch.tensor(table.mask), mode, horizon=HORIZON, denominator=denominator)
    compare_loss(table, (loss, {}, leaf), lambda x, b, t: x[b][t], metrics={}, mode=mode, denominator=denominator)


@checked
@given(token_tables, modes, denominators, clips, st.sampled_from([None, 1.5, 3.0, 10.0]), st.booleans())
def test_clipped_policy_loss(table, mode, denominator, edges, dual_clip, dropping):
    low, high = edges
    old, advantages, mask, drop = table.tensors("old", "advantages", "mask", "drop")
    leaf = table.leaf()
    settings_ = {"clip_low": low, "clip_high": high, "dual_clip": dual_clip, "drop": drop if dropping else None}
    loss, reported = losses.clipped_policy_loss(
        leaf, old, advantages, mask, **settings_, **options_of(mode, denominator)
    )
    dropped = table.drop & dropping

    def value(x, b, t):
        token = ref.clipped_token(
            x[b][t], table.old[b][t], table.advantages[b][t], clip_low=low, clip_high=high, dual_clip=dual_clip
        )
        return 0.0 if dropped[b][t] else token

    def away(b, t):
        return ref.clipped_away(
            table.logprobs[b][t], table.old[b][t], table.advantages[b][t], clip_low=low, clip_high=high
        )

    def dual(b, t):
        a = table.advantages[b][t]
        plain = ref.larger(*ref.surrogate(table.logprobs[b][t], table.old[b][t], a, clip_low=low, clip_high=high))
        return dual_clip is not None and a < 0 and ref.frozen(plain) > -a * dual_clip

    metrics = {
        "clip_fraction": away,
        "dual_clip_fraction": dual,
        "approx_kl": minus_log_ratio(table),
        "dropped_fraction": lambda b, t: dropped[b][t],
    }
    compare_loss(table, (loss, reported, leaf), value, metrics=metrics, mode=mode, denominator=denominator)
    assert torch.equal(
        losses.clipped_tokens(leaf, old, advantages, mask, clip_low=low, clip_high=high), truth(table, away)
    )


def truth(table, condition) -> torch.Tensor:
    out = np.zeros(table.shape, dtype=bool)
    for b, t in ref.tokens(table.mask.tolist()):
        out[b, t] = condition(b, t)
    return torch.tensor(out)


def minus_log_ratio(table, limit=ref.LIMIT):
    return lambda b, t: -ref.frozen(ref.log_ratio(table.logprobs[b][t], table.old[b][t], limit))


@checked
@given(token_tables, modes, clips)
def test_clipped_policy_loss_without_the_clamp(table, mode, edges):
    low, high = edges
    leaf = table.leaf()
    old, advantages, mask = table.tensors("old", "advantages", "mask")
    settings_ = {"clip_low": low, "clip_high": high}
    loss, reported = losses.clipped_policy_loss(
        leaf, old, advantages, mask, log_ratio_clamp=None, **settings_, **options_of(mode, None)
    )

    def value(x, b, t):
        return ref.clipped_token(x[b][t], table.old[b][t], table.advantages[b][t], limit=None, **settings_)

    compare_loss(table, (loss, reported, leaf), value, metrics={}, mode=mode)


@checked
@given(token_tables, modes, denominators, st.tuples(st.floats(0.0, 1.0), st.floats(0.05, 3.0)))
def test_cispo(table, mode, denominator, edges):
    low, high = edges
    old, advantages, mask, drop = table.tensors("old", "advantages", "mask", "drop")
    leaf = table.leaf()
    loss, reported = losses.cispo_loss(
        leaf, old, advantages, mask, clip_low=low, clip_high=high, drop=drop, **options_of(mode, denominator)
    )

    def value(x, b, t):
        return (
            0.0
            if table.drop[b][t]
            else ref.cispo_token(x[b][t], table.old[b][t], table.advantages[b][t], clip_low=low, clip_high=high)
        )

    def bounded(b, t):
        ratio = math.exp(ref.frozen(ref.log_ratio(table.logprobs[b][t], table.old[b][t])))
        return not 1 - low <= ratio <= 1 + high

    metrics = {
        "clip_fraction": bounded,
        "approx_kl": minus_log_ratio(table),
        "dropped_fraction": lambda b, t: table.drop[b][t],
    }
    compare_loss(table, (loss, reported, leaf), value, metrics=metrics, mode=mode, denominator=denominator)


@checked
@given(shapes, seeds, modes, denominators, st.sampled_from([0.001, 0.3]))
def test_gspo(shape, seed, mode, denominator, spread):
    table = Tokens(shape, seed, spread)
    if spread < 0.01:
        table.logprobs = table.near
    old, advantages, mask, drop = table.tensors("old", "advantages", "mask", "drop")
    leaf = table.leaf()
    edges = {"clip_low": 3e-4, "clip_high": 4e-4} if spread < 0.01 else {"clip_low": 0.2, "clip_high": 0.28}
    loss, reported = losses.gspo_loss(leaf, old, advantages, mask, drop=drop, **edges, **options_of(mode, denominator))
    rows = zip(table.logprobs.tolist(), table.old.tolist(), table.mask.tolist(), strict=True)
    log_ratios = [ref.gspo_log_ratio(*row) if any(row[2]) else 0.0 for row in rows]

    def value(x, b, t):
        return 0.0 if table.drop[b][t] else ref.gspo_token(x[b][t], log_ratios[b], table.advantages[b][t], **edges)

    def away(b, t):
        a = table.advantages[b][t]
        ratio = math.exp(ref.clip(log_ratios[b], -ref.LIMIT, ref.LIMIT))
        return -a * ref.clip(ratio, 1 - edges["clip_low"], 1 + edges["clip_high"]) > -a * ratio

    metrics = {
        "clip_fraction": away,
        "approx_kl": minus_log_ratio(table, None),
        "dropped_fraction": lambda b, t: table.drop[b][t],
    }
    compare_loss(table, (loss, reported, leaf), value, metrics=metrics, mode=mode, denominator=denominator)


@checked
@given(token_tables, modes, denominators, st.floats(0, 1), st.floats(0, 1))
def test_kl_cov(table, mode, denominator, ratio, kl_coef):
    assume(table.mask.sum() != 2)  # two tokens have the same covariance but for rounding
    old, advantages, mask = table.tensors("old", "advantages", "mask")
    leaf = table.leaf()
    loss, reported = losses.kl_cov_loss(
        leaf, old, advantages, mask, ratio=ratio, kl_coef=kl_coef, **options_of(mode, denominator)
    )
    keys = table.rng.permutation(mask.numel()).reshape(table.shape)
    penalised = ref.highest(
        table.logprobs.tolist(), table.advantages.tolist(), table.mask.tolist(), ratio=ratio, keys=keys.tolist()
    )

    def value(x, b, t):
        return ref.kl_cov_token(x[b][t], table.old[b][t], table.advantages[b][t], (b, t) in penalised, kl_coef=kl_coef)

    distance = minus_log_ratio(table, None)
    metrics = {
        "penalised_fraction": lambda b, t: (b, t) in penalised,
        "approx_kl": distance,
        "abs_log_ratio": lambda b, t: abs(distance(b, t)),
        "dropped_fraction": lambda b, t: 0.0,
    }
    compare_loss(table, (loss, reported, leaf), value, metrics=metrics, mode=mode, denominator=denominator)
    assert torch.equal(
        losses.kl_cov_selection(leaf, advantages, mask, ratio=ratio), truth(table, lambda b, t: (b, t) in penalised)
    )
    assert torch.equal(
        losses.kl_cov_selection(leaf, advantages, mask, ratio=ratio, keys=torch.tensor(keys)),
        truth(table, lambda b, t: (b, t) in penalised),
    )
    flat = np.where(table.mask, 0.0, np.nan)
    tied = ref.highest(table.logprobs.tolist(), flat.tolist(), table.mask.tolist(), ratio=ratio, keys=keys.tolist())
    drawn = losses.kl_cov_selection(leaf, torch.tensor(flat), mask, ratio=ratio, keys=torch.tensor(keys))
    assert torch.equal(drawn, truth(table, lambda b, t: (b, t) in tied))


@checked
@given(token_tables, modes, st.sampled_from(["k1", "k2", "k3", "abs"]))
def test_kl_divergence(table, mode, estimator):
    leaf = table.leaf()
    reference, mask = table.tensors("old", "mask")
    distance = losses.kl_divergence(leaf, reference, estimator)
    loss = losses.aggregate(distance, mask, mode, horizon=HORIZON)
    compare_loss(
        table,
        (loss, {}, leaf),
        lambda x, b, t: ref.kl_token(x[b][t], table.old[b][t], estimator),
        metrics={},
        mode=mode,
    )


@checked
@given(token_tables, modes, denominators, st.floats(0.05, 1.0))
def test_value_loss(table, mode, denominator, bound):
    targets = table.table(np.nan_to_num(table.old) + table.rng.normal(0, 1, table.shape))
    old, mask, drop = table.tensors("old", "mask", "drop")
    leaf = table.leaf("near")
    loss, reported = losses.value_loss(
        leaf, old, torch.tensor(targets), mask, clip=bound, drop=drop, **options_of(mode, denominator)
    )

    def both(x, b, t):
        return ref.value_token(x[b][t], table.old[b][t], targets[b][t], bound=bound)

    metrics = {
        "clip_fraction": lambda b, t: both(table.near, b, t)[1] > both(table.near, b, t)[0],
        "error": lambda b, t: abs(table.near[b][t] - targets[b][t]),
        "dropped_fraction": lambda b, t: table.drop[b][t],
    }

    def value(x, b, t):
        return 0.0 if table.drop[b][t] else ref.larger(*both(x, b, t))

    compare_loss(table, (loss, reported, leaf), value, metrics=metrics, at="near", mode=mode, denominator=denominator)


bounds = st.sampled_from(
    [
        (0.1, 3.0),
        (-1.0, 1.0),
        ("quantile:0.3137", 40.0),
        (-5.0, "quantile:0.7717"),
        ("quantile:0.2113", "quantile:0.9371"),
        (1e8, 1e9),
    ]
)


@checked
@given(token_tables, bounds, st.floats(0, 1), st.booleans())
def test_covariance_selection(table, edges, ratio, keyed):
    logprobs, advantages, mask, drop = table.tensors("logprobs", "advantages", "mask", "drop")
    settings_ = {"lower": edges[0], "upper": edges[1]}
    candidates = ref.eligible(
        table.logprobs.tolist(),
        table.advantages.tolist(),
        table.mask.tolist(),
        exclude=table.drop.tolist(),
        **settings_,
    )
    count = ref.quota(ratio, table.mask.tolist(), len(candidates))
    keys = table.rng.permutation(mask.numel()).reshape(table.shape)
    if keyed:
        drawn = set(sorted(candidates, key=lambda at: keys[at])[:count])
        draw = {"keys": torch.tensor(keys)}
    else:
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(7)).tolist()
        drawn = {candidates[place] for place in order[:count]}
        draw = {"generator": torch.Generator().manual_seed(7)}
    got = losses.covariance_selection(logprobs, advantages, mask, ratio=ratio, exclude=drop, **settings_, **draw)
    assert torch.equal(got, truth(table, lambda b, t: (b, t) in drawn))


@checked
@given(token_tables, modes, denominators, bounds, st.floats(0, 0.6), clips)
def test_clip_cov(table, mode, denominator, edges, ratio, clip_edges):
    low, high = clip_edges
    old, advantages, mask, drop = table.tensors("old", "advantages", "mask", "drop")
    keys = table.rng.permutation(mask.numel()).reshape(table.shape)
    leaf = table.leaf()
    settings_ = {"clip_low": low, "clip_high": high, "ratio": ratio, "lower": edges[0], "upper": edges[1]}
    loss, reported = losses.clip_cov_loss(
        leaf, old, advantages, mask, keys=torch.tensor(keys), drop=drop, **settings_, **options_of(mode, denominator)
    )

    def away(b, t):
        return ref.clipped_away(
            table.logprobs[b][t], table.old[b][t], table.advantages[b][t], clip_low=low, clip_high=high
        )

    rows, acted = table.logprobs.tolist(), table.mask.tolist()
    barred = truth(table, away).tolist()
    candidates = ref.eligible(rows, table.advantages.tolist(), acted, lower=edges[0], upper=edges[1], exclude=barred)
    drawn = sorted(candidates, key=lambda at: keys[at])[: ref.quota(ratio, acted, len(candidates))]

    def gone(b, t):
        return bool(table.drop[b][t]) or (b, t) in drawn

    def value(x, b, t):
        token = ref.clipped_token(x[b][t], table.old[b][t], table.advantages[b][t], clip_low=low, clip_high=high)
        return 0.0 if gone(b, t) else token

    metrics = {"clip_fraction": away, "dropped_fraction": gone, "approx_kl": minus_log_ratio(table)}
    compare_loss(table, (loss, reported, leaf), value, metrics=metrics, mode=mode, denominator=denominator)


@checked
@given(
    token_tables,
    st.sampled_from(["tis", "mis"]),
    st.sampled_from(["token", "sequence"]),
    st.floats(1.1, 4),
    st.floats(0.2, 0.9),
)
def test_importance_weights(table, mode, level, cap, floor):
    """Some tokens beyond the clamp, some that the engine gave no finite number for."""
    lost = table.rng.random(table.shape) < 0.1
    source = table.near if level == "sequence" else table.logprobs
    rollout = np.where(lost, table.rng.choice([np.nan, -np.inf], table.shape), source)
    old, mask = torch.tensor(table.old, requires_grad=True), torch.tensor(table.mask)
    got = losses.importance_weights(old, torch.tensor(rollout), mask, mode=mode, level=level, cap=cap, floor=floor)
    assert not got.requires_grad
    compare(
        got,
        ref.importance(
            table.old.tolist(), rollout.tolist(), table.mask.tolist(), mode=mode, level=level, cap=cap, floor=floor
        ),
        floor=0.0,
    )


# The reference itself: worked by hand (spear.md, section 10), and its derivative against finite differences


def test_the_reference_aggregates_as_worked_by_hand():
    toy, mask = [[1, 2, 3, 4], [5, 6, 7, 8]], [[True] * 4, [True, True, False, False]]
    expected = {
        "token-mean": 3.5,
        "seq-mean-token-sum": 10.5,
        "seq-mean-token-mean": 4.0,
        "seq-mean-token-sum-norm": 5.25,
    }
    for mode, value in expected.items():
        compare(ref.aggregate(lambda b, t: toy[b][t], mask, mode, horizon=4), value, floor=1e-8)


def test_the_reference_loss_of_the_worked_clip_cov_case():
    """Item 6 of section 10: eligible tokens, then the loss with both dropped."""
    old = [[-1.0] * 4, [-2.0] * 4]
    now = [[-0.5, -1, -1.5, -1], [-2, -1.7, -2.6, 0.8]]
    a = [[1.0] * 4, [-1.0] * 4]
    mask = [[True] * 4] * 2
    barred = [
        [ref.clipped_away(now[b][t], old[b][t], a[b][t], clip_low=0.2, clip_high=0.28) for t in range(4)]
        for b in range(2)
    ]
    assert [at for at in ref.tokens(mask) if barred[at[0]][at[1]]] == [(0, 0), (1, 2)]
    drawn = ref.eligible(now, a, mask, lower=0.2, upper=60, exclude=barred)
    assert drawn == [(1, 0), (1, 1)]
    for gone, expected in ((drawn, 3.339529), ([], 3.926994)):

        def value(b, t, gone=gone):
            return (
                0.0
                if (b, t) in gone
                else ref.clipped_token(now[b][t], old[b][t], a[b][t], clip_low=0.2, clip_high=0.28)
            )

        compare(complex(ref.aggregate(value, mask, "seq-mean-token-sum-norm", horizon=4)).real, expected, floor=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, old, a: ref.clipped_token(x, old, a, clip_low=0.2, clip_high=0.28, dual_clip=1.5),
        lambda x, old, a: ref.kl_cov_token(x, old, a, True, kl_coef=0.3),
        lambda x, old, a: ref.kl_token(x, old, "k3"),
        lambda x, old, a: ref.larger(*ref.value_token(x, old, a, bound=0.5)),
    ],
)
def test_the_reference_derivative_agrees_with_finite_differences(function):
    rng = np.random.default_rng(0)
    for old, shift, a in zip(rng.normal(-2, 1, 12), rng.uniform(-0.7, 0.7, 12), rng.normal(size=12), strict=True):
        at = old + shift
        slope = ref.gradient(lambda x, old=old, a=a: function(x[0][0], old, a), [[at]], [[True]])[0][0]
        up, down = (complex(function(at + move, old, a)).real for move in (1e-6, -1e-6))
        assert slope == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-8)
