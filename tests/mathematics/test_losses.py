"""The four tests every loss has, plus micro-batch additivity, drop, objectives."""

from __future__ import annotations

import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spearrl.batching.token_hashes import counter_keys
from spearrl.errors import ContractError
from spearrl.losses import (
    AGGREGATIONS,
    ClipCov,
    Correction,
    KlCov,
    Objective,
    aggregate,
    cispo_loss,
    clip_cov_loss,
    clipped_policy_loss,
    clipped_tokens,
    gspo_loss,
    kl_cov_loss,
    kl_divergence,
    value_loss,
)

ROWS, WIDTH, HORIZON = 4, 9, 16


def sft(
    logprobs,
    old_logprobs,
    advantages,
    action_mask,
    *,
    aggregation="token-mean",
    horizon=HORIZON,
    denominator=None,
    drop=None,
):
    batch = SimpleNamespace(action_mask=action_mask, advantages=advantages, old_logprobs=old_logprobs)
    return Objective("sft", aggregation=aggregation, horizon=horizon).loss(batch, logprobs, denominator=denominator)


def sil(
    logprobs,
    old_logprobs,
    advantages,
    action_mask,
    *,
    aggregation="token-mean",
    horizon=HORIZON,
    denominator=None,
    drop=None,
):
    objective = Objective("sil", aggregation=aggregation, horizon=horizon)
    return objective.loss(
        batch_of(old_logprobs, advantages, action_mask), logprobs, denominator=denominator, covariance_tokens=drop
    )


def entropy_bonus(
    logprobs,
    old_logprobs,
    advantages,
    action_mask,
    *,
    aggregation="token-mean",
    horizon=HORIZON,
    denominator=None,
    drop=None,
):
    """Only the bonus of an objective: logprobs stand in for the entropy."""
    batch = SimpleNamespace(action_mask=action_mask, advantages=torch.zeros_like(advantages), old_logprobs=old_logprobs)
    objective = Objective("entropy", aggregation=aggregation, horizon=horizon)
    return objective.loss(batch, old_logprobs.detach(), denominator=denominator, entropy=logprobs)


def clip_cov_off(
    logprobs,
    old_logprobs,
    advantages,
    action_mask,
    *,
    aggregation="token-mean",
    horizon=None,
    denominator=None,
    drop=None,
):
    """Thresholds no covariance reaches: the draw itself is tested in test_covariance.py."""
    settings = {"aggregation": aggregation, "horizon": horizon, "denominator": denominator, "drop": drop}
    return clip_cov_loss(logprobs, old_logprobs, advantages, action_mask, lower=1e9, upper=2e9, **settings)


def kl_cov_all(
    logprobs,
    old_logprobs,
    advantages,
    action_mask,
    *,
    aggregation="token-mean",
    horizon=None,
    denominator=None,
    drop=None,
):
    settings = {"aggregation": aggregation, "horizon": horizon, "denominator": denominator, "drop": drop}
    return kl_cov_loss(logprobs, old_logprobs, advantages, action_mask, ratio=1.0, **settings)


def surrogate(new, old, a, low=0.2, high=0.2):
    r = math.exp(new - old)
    return max(-a * r, -a * min(max(r, 1 - low), 1 + high))


# name: (loss, token value(new, old, advantage), on-policy gradient per token before the denominator)
TOKEN_LOSSES = {
    "clipped": (clipped_policy_loss, surrogate, lambda a, new: -a),
    "sil": (sil, lambda new, old, a: surrogate(new, old, max(a, 0)), lambda a, new: -max(a, 0)),
    "clip_cov": (clip_cov_off, surrogate, lambda a, new: -a),
    "kl_cov": (kl_cov_all, lambda new, old, a: -a * math.exp(new - old) + 0.1 * abs(new - old), lambda a, new: -a),
    "cispo": (cispo_loss, lambda new, old, a: -min(math.exp(new - old), 1.2) * a * new, lambda a, new: -a),
    # value: `new` is the prediction, `old` the old one, the advantage stands for the return
    "value": (
        value_loss,
        lambda v, old, ret: max((v - ret) ** 2, (min(max(v, old - 0.5), old + 0.5) - ret) ** 2) / 2,
        lambda ret, v: v - ret,
    ),
    "sft": (sft, lambda new, old, a: -a * new, lambda a, new: -a),
    "entropy": (entropy_bonus, lambda new, old, a: -new, lambda a, new: -1.0),
}
LOSSES = {name: entry[0] for name, entry in TOKEN_LOSSES.items()} | {"gspo": gspo_loss}


def sample(seed=0, dtype=torch.float64, spread=0.5):
    """logprobs (leaf), old_logprobs, advantages, mask with a hole and a fully masked row."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(ROWS, WIDTH, generator=generator, dtype=dtype) * 3 - 0.1
    new = (old + spread * torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype)).requires_grad_()
    advantages = torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype)
    mask = torch.rand(ROWS, WIDTH, generator=generator) < 0.7
    mask[1] = False
    return new, old, advantages, mask


def by_loops(tokens, mask, mode):
    """The aggregation of a nested list of token values, one at a time."""
    rows = [[tokens[b][t] for t in range(WIDTH) if mask[b, t]] for b in range(ROWS)]
    if mode == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if mode == "seq-mean-token-sum":
        return sum(map(sum, rows)) / ROWS
    if mode == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows if row) / ROWS
    return sum(map(sum, rows)) / HORIZON


# --- 1. equals the equation, token by token ---


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_equals_the_equation(name, mode):
    loss, token, _ = TOKEN_LOSSES[name]
    new, old, advantages, mask = sample()
    value, metrics = loss(new, old, advantages, mask, aggregation=mode, horizon=HORIZON)
    tokens = [
        [token(float(new.detach()[b, t]), float(old[b, t]), float(advantages[b, t])) for t in range(WIDTH)]
        for b in range(ROWS)
    ]
    assert value.item() == pytest.approx(by_loops(tokens, mask, mode), rel=1e-7)
    assert all(isinstance(number, float) and math.isfinite(number) for number in metrics.values())


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_gspo_equals_the_equation(mode):
    new, old, advantages, mask = sample(spread=0.003)
    advantages = advantages[:, :1].expand(ROWS, WIDTH)
    tokens = [[0.0] * WIDTH for _ in range(ROWS)]
    for b in range(ROWS):
        live = [t for t in range(WIDTH) if mask[b, t]]
        mean = sum(float(new.detach()[b, t] - old[b, t]) for t in live) / max(len(live), 1)
        tokens[b] = [surrogate(mean, 0.0, float(advantages[b, 0]), 3e-4, 4e-4)] * WIDTH
    value, _ = gspo_loss(new, old, advantages, mask, aggregation=mode, horizon=HORIZON)
    assert value.item() == pytest.approx(by_loops(tokens, mask, mode), rel=1e-7)


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    old, mask = torch.zeros(1, 3), torch.ones(1, 3).bool()
    new = torch.tensor([[5.0, 0.1, 5.0]], requires_grad=True)
    loss, metrics = clipped_policy_loss(new, old, torch.tensor([[-2.0, -2.0, 2.0]]), mask, dual_clip=3.0)
    loss.backward()
    assert loss.item() == pytest.approx((6.0 + 2 * math.exp(0.1) - 2 * 1.2) / 3, rel=1e-6)
    assert new.grad[0, 0] == 0 and new.grad[0, 2] == 0 and new.grad[0, 1] > 0
    assert metrics["dual_clip_fraction"] == pytest.approx(1 / 3) and metrics["clip_fraction"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("loss", [clipped_policy_loss, sil, clip_cov_loss, gspo_loss, cispo_loss, kl_cov_loss])
@pytest.mark.parametrize("distance", [-300.0, 300.0])
def test_stale_tokens_stay_finite(loss, distance):
    new = torch.full((2, 3), -1.0, requires_grad=True)
    value, _ = loss(new, new.detach() - distance, torch.tensor([[1.0, 0.0, -1.0]] * 2), torch.ones(2, 3).bool())
    value.backward()
    assert value.isfinite() and new.grad.isfinite().all()


# --- 2. garbage outside the mask ---


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_garbage_outside_the_mask_changes_nothing(name, mode, garbage):
    new, old, advantages, mask = sample()
    clean, metrics = LOSSES[name](new, old, advantages, mask, aggregation=mode, horizon=HORIZON)
    clean.backward()
    dirty_new = torch.where(mask, new.detach(), garbage).requires_grad_()
    dirty_old, dirty_advantages = torch.where(mask, old, garbage), torch.where(mask, advantages, garbage)
    dirty, dirty_metrics = LOSSES[name](dirty_new, dirty_old, dirty_advantages, mask, aggregation=mode, horizon=HORIZON)
    dirty.backward()
    assert torch.equal(dirty, clean) and torch.equal(dirty_new.grad, new.grad) and dirty_metrics == metrics
    assert not new.grad[~mask].any()


# --- 3. the on-policy gradient ---


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_on_policy_gradient(name):
    loss, _, gradient = TOKEN_LOSSES[name]
    _, old, advantages, mask = sample()
    new = old.clone().requires_grad_()
    loss(new, old, advantages, mask)[0].backward()
    expected = torch.tensor(
        [[gradient(float(advantages[b, t]), float(old[b, t])) for t in range(WIDTH)] for b in range(ROWS)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(new.grad, torch.where(mask, expected, 0.0) / mask.sum(), rtol=1e-7, atol=1e-12)


def test_on_policy_gradient_of_gspo():
    _, old, advantages, mask = sample()
    advantages = advantages[:, :1].expand(ROWS, WIDTH)
    new = old.clone().requires_grad_()
    gspo_loss(new, old, advantages, mask)[0].backward()
    expected = torch.where(mask, -advantages / mask.sum(-1, keepdim=True).clamp(min=1), 0.0) / ROWS
    torch.testing.assert_close(new.grad, expected, rtol=1e-9, atol=1e-12)


# --- 4. an empty mask ---


@pytest.mark.parametrize("denominator", [None, 0.0, 7.0])
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_mask_gives_zero_and_back_propagates(name, mode, denominator):
    new, old, advantages, mask = sample()
    loss, metrics = LOSSES[name](
        new, old, advantages, torch.zeros_like(mask), aggregation=mode, horizon=HORIZON, denominator=denominator
    )
    loss.backward()
    assert loss.item() == 0 and not new.grad.any() and not any(metrics.values())


# --- common arguments ---


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_mini_batch(name, mode):
    new, old, advantages, mask = sample()
    of_whole = {"token-mean": int(mask.sum()), "seq-mean-token-sum-norm": ROWS * HORIZON}.get(mode, ROWS)
    whole, _ = LOSSES[name](new, old, advantages, mask, aggregation=mode, horizon=HORIZON, denominator=of_whole)
    whole.backward()
    gradient, new.grad = new.grad, None
    parts = 0.0
    for rows in ([0], [1], [2, 3]):
        part, _ = LOSSES[name](
            new[rows], old[rows], advantages[rows], mask[rows], aggregation=mode, horizon=HORIZON, denominator=of_whole
        )
        part.backward()
        parts += part.item()
    assert parts == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(new.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if name not in ("kl_cov", "entropy", "sft")]
)  # kl_cov ranks, the others drop nothing
def test_dropped_tokens_have_no_loss_but_count_in_the_divisor(name):
    new, old, advantages, mask = sample()
    drop = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(3)) < 0.3
    full, _ = LOSSES[name](new, old, advantages, mask, denominator=1.0, aggregation="token-mean")
    full.backward()
    gradient, new.grad = new.grad, None
    loss, _ = LOSSES[name](new, old, advantages, mask, drop=drop, aggregation="token-mean")
    loss.backward()
    torch.testing.assert_close(new.grad, torch.where(drop, 0.0, gradient) / mask.sum(), rtol=1e-7, atol=1e-12)


def test_dropped_fraction_is_of_action_tokens():
    new, old, advantages, mask = sample()
    assert clipped_policy_loss(new, old, advantages, mask, drop=~mask)[1]["dropped_fraction"] == 0
    assert clipped_policy_loss(new, old, advantages, mask, drop=torch.ones_like(mask))[1][
        "dropped_fraction"
    ] == pytest.approx(1.0)


def test_metrics_on_policy_are_zero_and_approx_kl_has_its_sign():
    _, old, advantages, mask = sample()
    assert not any(clipped_policy_loss(old, old, advantages, mask)[1].values())
    assert clipped_policy_loss(old - 0.1, old, advantages, mask)[1]["approx_kl"] == pytest.approx(0.1, rel=1e-6)


def test_aggregation_by_hand():
    values = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    by_mode = [float(aggregate(values, mask, mode, horizon=4)) for mode in AGGREGATIONS]
    assert by_mode == pytest.approx([3.5, 10.5, 4.0, 5.25])
    assert [float(aggregate(values, mask > -1, mode, horizon=4)) for mode in AGGREGATIONS] == pytest.approx(
        [4.5, 18.0, 4.5, 9.0]
    )
    assert [float(aggregate(values, mask, mode, denominator=2.0)) for mode in AGGREGATIONS] == pytest.approx(
        [10.5, 10.5, 4.0, 10.5]
    )


def test_aggregation_errors_say_what_to_do():
    ones = torch.ones(1, 1)
    with pytest.raises(ContractError, match="token-mean"):
        aggregate(ones, ones, "mean")
    with pytest.raises(ContractError, match="horizon="):
        aggregate(ones, ones, "seq-mean-token-sum-norm")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-100, 100), max_size=6), min_size=1, max_size=5),
    st.integers(0, 4),
    st.sampled_from(AGGREGATIONS),
)
def test_padding_does_not_matter(rows, extra, mode):
    width = max(len(row) for row in rows)
    values, mask = (
        torch.full((len(rows), width + extra), math.nan, dtype=torch.float64),
        torch.zeros(len(rows), width + extra, dtype=torch.bool),
    )
    for b, row in enumerate(rows):
        values[b, extra : extra + len(row)], mask[b, extra : extra + len(row)] = (
            torch.tensor(row, dtype=torch.float64),
            True,
        )
    result = float(aggregate(values, mask, mode, horizon=10))
    assert result == pytest.approx(float(aggregate(values[:, extra:], mask[:, extra:], mode, horizon=10)), abs=1e-9)
    assert abs(result) <= 100 * (1 if mode.endswith("mean") else 6 * len(rows)) + 1e-6


# --- KL ---


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        ("k1", lambda d: d),
        ("abs", abs),
        ("k2", lambda d: d * d / 2),
        ("k3", lambda d: min(math.exp(-d) + d - 1, 10.0)),
    ],
)
def test_kl_equals_the_equation_and_keeps_garbage_out(estimator, formula):
    new, old, _, mask = sample()
    kl = kl_divergence(new.detach(), old, estimator)
    for b, t in mask.nonzero().tolist():
        assert float(kl[b, t]) == pytest.approx(formula(float(new.detach()[b, t] - old[b, t])), rel=1e-9)
    for garbage in (math.nan, math.inf, -math.inf):
        dirty = torch.where(mask, new.detach(), garbage).requires_grad_()
        aggregate(kl_divergence(dirty, old, estimator), mask, "token-mean").backward()
        assert dirty.grad.isfinite().all() and not dirty.grad[~mask].any() and dirty.grad[mask].any()


def test_kl_shows_garbage_inside_the_mask():
    assert kl_divergence(torch.tensor([[math.nan]]), torch.zeros(1, 1)).isnan().all()


@pytest.mark.parametrize("distance", [-500.0, 500.0])
def test_k3_far_from_the_reference_has_no_gradient(distance):
    new = torch.full((1, 1), distance, requires_grad=True)
    kl = kl_divergence(new, torch.zeros(1, 1)).sum()
    kl.backward()
    assert kl.item() == 10.0 and float(new.grad) == 0.0


def test_kl_on_policy_gradient():
    for estimator, slope in (("k1", 1.0), ("k2", 0.0), ("k3", 0.0), ("abs", 0.0)):
        new = torch.full((2, 2), -1.0, requires_grad=True)
        aggregate(kl_divergence(new, torch.full((2, 2), -1.0), estimator), torch.ones(2, 2), "token-mean").backward()
        torch.testing.assert_close(new.grad, torch.full((2, 2), slope / 4))


# --- objectives ---


EVERYTHING = Objective(
    "policy", surrogate="kl_cov", kl_cov=KlCov(0.1, 0.2), correction=Correction("mis"), denominator="micro_batch"
)


def batch_of(old, advantages, mask):
    absent = dict.fromkeys(("ref_logprobs", "rollout_logprobs", "values", "returns"))
    return SimpleNamespace(action_mask=mask, advantages=advantages, old_logprobs=old, **absent)


def test_policy_objective_is_the_loss_with_its_settings():
    new, old, advantages, mask = sample()
    objective = Objective(
        "policy", weight=5.0, aggregation="seq-mean-token-sum-norm", horizon=HORIZON, clip_high=0.28, dual_clip=10.0
    )
    loss, metrics = objective.loss(batch_of(old, advantages, mask), new, denominator=ROWS * HORIZON)
    expected, same = clipped_policy_loss(
        new,
        old,
        advantages,
        mask,
        clip_high=0.28,
        dual_clip=10.0,
        aggregation="seq-mean-token-sum-norm",
        denominator=ROWS * HORIZON,
    )
    assert torch.equal(loss, expected) and metrics == same


def test_sil_objective_imitates_only_what_beat_the_baseline():
    new, old, advantages, mask = sample()
    loss, _ = Objective("sil").loss(batch_of(old, advantages, mask), new, denominator=None)
    loss.backward()
    assert not new.grad[advantages <= 0].any() and new.grad[mask & (advantages > 0)].any()
    good = advantages.abs()
    same, _ = Objective("policy").loss(batch_of(old, good, mask), new, denominator=None)
    assert torch.equal(Objective("sil").loss(batch_of(old, good, mask), new, denominator=None)[0], same)


def test_entropy_bonus_is_asked_for_and_maximised():
    new, old, advantages, mask = sample()
    objective, entropy = Objective("entropy"), torch.where(mask, 2.0, math.nan)
    with pytest.raises(ContractError, match="entropy"):
        objective.loss(batch_of(old, advantages, mask), new, denominator=None)
    loss, metrics = objective.loss(batch_of(old, advantages, mask), new, denominator=None, entropy=entropy)
    assert loss.item() == pytest.approx(-2.0, rel=1e-6) and metrics["entropy"] == pytest.approx(2.0)


def test_selection_of_an_objective_is_that_of_clip_cov_loss():
    new, old, advantages, mask = sample(spread=1.0)
    keys = counter_keys(1, torch.arange(ROWS), WIDTH)
    objective = Objective("policy", clip_cov=ClipCov(0.2, 0.1, 5.0))
    batch = batch_of(old, advantages, mask)
    drop = objective.covariance_tokens(batch, new, keys=keys)
    clipped = clipped_tokens(new, old, advantages, mask, clip_low=0.2, clip_high=0.2)
    assert drop.any() and not (drop & (~mask | clipped)).any()
    loss, metrics = objective.loss(batch, new, denominator=None, covariance_tokens=drop)
    expected, same = clip_cov_loss(new, old, advantages, mask, ratio=0.2, lower=0.1, upper=5.0, keys=keys)
    assert torch.equal(loss, expected) and metrics == same
    assert Objective("policy").covariance_tokens(batch, new) is None


def test_objectives_travel_as_dictionaries_and_refuse_nonsense():
    for objective in (
        Objective("sft"),
        Objective(
            "sil", weight=0.5, clip_cov=ClipCov(0.02, "quantile:0.8", 60.0, "micro_batch"), token_weight="unsure"
        ),
        EVERYTHING,
    ):
        assert Objective.from_dict(asdict(objective)) == objective
    with pytest.raises(ContractError, match="policy, sil, entropy, kl, value, sft"):
        Objective("magic")
    with pytest.raises(ContractError, match="clip, gspo, cispo, kl_cov"):
        Objective("policy", surrogate="magic")
    with pytest.raises(ContractError, match="token-mean"):
        Objective("policy", aggregation="sum")
