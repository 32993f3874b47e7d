"""Clip-Cov and KL-Cov: selection by hand, golden files, independence of row order, the counter hash."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spearrl.batching.token_hashes import counter_keys
from spearrl.errors import ContractError
from spearrl.losses import (
    clip_cov_loss,
    clipped_policy_loss,
    clipped_tokens,
    covariance_selection,
    kl_cov_loss,
)
from tests.support.shared_data import golden

DTYPES = {"f32": (torch.float32, {"rtol": 1e-5, "abs": 1e-6}), "f64": (torch.float64, {"rtol": 1e-9, "abs": 1e-9})}
FULL = torch.ones(2, 4, dtype=torch.bool)


def hand():
    """spear.md section 10 item 6."""
    old = torch.tensor([[-1.0] * 4, [-2.0] * 4], dtype=torch.float64)
    new = torch.tensor([[-0.5, -1, -1.5, -1], [-2, -1.7, -2.6, 0.8]], dtype=torch.float64)
    return new, old, torch.tensor([[1.0] * 4, [-1.0] * 4], dtype=torch.float64)


def test_selection_by_hand():
    new, old, advantages = hand()
    clipped = clipped_tokens(new, old, advantages, FULL, clip_low=0.2, clip_high=0.28)
    assert clipped.nonzero().tolist() == [[0, 0], [1, 2]]
    drawn = covariance_selection(new, advantages, FULL, ratio=0.3, lower=0.2, upper=60.0, exclude=clipped)
    assert drawn.nonzero().tolist() == [[1, 0], [1, 1]]
    assert not covariance_selection(new, advantages, FULL, ratio=2e-4, lower=1.0, upper=5.0, exclude=clipped).any()
    assert covariance_selection(new, advantages, FULL, ratio=2e-4, lower=1.0, upper=5.0).nonzero().tolist() == [[1, 2]]


def test_losses_by_hand():
    new, old, advantages = hand()
    norm = {"aggregation": "seq-mean-token-sum-norm", "horizon": 4}
    new.requires_grad_()
    loss, metrics = clip_cov_loss(new, old, advantages, FULL, clip_high=0.28, ratio=0.3, lower=0.2, upper=60.0, **norm)
    loss.backward()
    assert loss.item() == pytest.approx(3.339529, abs=1e-6) and metrics["dropped_fraction"] == pytest.approx(0.25)
    assert not new.grad[1, :2].any()
    new.requires_grad_(False)
    assert float(clip_cov_loss(new, old, advantages, FULL, clip_high=0.28, **norm)[0]) == pytest.approx(
        3.926994, abs=1e-6
    )
    dual = {"clip_high": 0.28, "dual_clip": 10.0}
    assert float(clipped_policy_loss(new, old, advantages, FULL, **dual)[0]) == pytest.approx(1.157916, abs=1e-6)
    assert float(clipped_policy_loss(new, old, advantages, FULL, **dual, **norm)[0]) == pytest.approx(
        2.315832, abs=1e-6
    )


def test_quota_is_a_share_of_all_action_tokens_and_at_least_one():
    generator = torch.Generator().manual_seed(0)
    new, advantages = torch.randn(2, 20, 50, generator=generator)
    mask = torch.rand(20, 50, generator=generator) < 0.5
    tokens = int(mask.sum())
    for ratio in (1e-6, 0.01, 0.1):
        drawn = covariance_selection(new, advantages, mask, ratio=ratio, lower=-100, upper=100)
        assert int(drawn.sum()) == max(int(ratio * tokens), 1) and not (drawn & ~mask).any()


def test_keys_ignore_row_order_and_padding():
    generator = torch.Generator().manual_seed(0)
    new, advantages = torch.randn(2, 12, 20, generator=generator)
    mask, uids = torch.rand(12, 20, generator=generator) < 0.8, torch.arange(12) * 4096
    rule = {"ratio": 0.05, "lower": 0.2, "upper": 3.0}
    drawn = covariance_selection(new, advantages, mask, keys=counter_keys(7, uids, 20), **rule)
    order = torch.randperm(12, generator=generator)
    shuffled = covariance_selection(
        new[order], advantages[order], mask[order], keys=counter_keys(7, uids[order], 20), **rule
    )
    assert torch.equal(shuffled, drawn[order]) and drawn.any()
    wide = [torch.nn.functional.pad(x, (0, 5)) for x in (new, advantages, mask)]
    assert torch.equal(covariance_selection(*wide, keys=counter_keys(7, uids, 25), **rule)[:, :20], drawn)
    other = covariance_selection(new, advantages, mask, keys=counter_keys(8, uids, 20), **rule)
    assert not torch.equal(other, drawn)


def test_the_k_smallest_keys_win():
    new, _, advantages = hand()
    keys = torch.arange(8).flip(0).view(2, 4)
    everything = covariance_selection(new, advantages, FULL, ratio=1.0, lower=0.0, upper=9.0)
    drawn = covariance_selection(new, advantages, FULL, ratio=0.25, lower=0.0, upper=9.0, keys=keys)
    assert drawn.flatten().nonzero()[:, 0].tolist() == everything.flatten().nonzero()[:, 0].tolist()[-2:]


def test_generator_and_keys_exclude_each_other():
    with pytest.raises(ContractError, match="keys"):
        covariance_selection(
            *hand()[:2], FULL, ratio=0.1, lower=0, upper=1, generator=torch.Generator(), keys=torch.zeros(2, 4)
        )


def splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**62), st.integers(0, 50))
def test_counter_keys_are_splitmix64(seed, uid, position):
    expected = splitmix((splitmix((splitmix(seed) + uid) % 2**64) + position) % 2**64)
    assert int(counter_keys(seed, torch.tensor([uid]), position + 1)[0, position]) % 2**64 == expected


def test_splitmix_reference_value():
    assert splitmix(0) == 0xE220A8397B1DCDAF  # first output of the published generator seeded with 0


def test_counter_keys_do_not_repeat_and_are_even():
    keys = counter_keys(3, torch.arange(500), 400)
    assert len(keys.unique()) == keys.numel()
    assert abs(float((keys > 0).double().mean()) - 0.5) < 0.01


# --- golden files ---


def tensors(case, dtype):
    old, new, advantages = (torch.tensor(case["inputs"][name], dtype=dtype) for name in ("old", "new", "A"))
    return new.requires_grad_(), old, advantages, torch.tensor(case["inputs"]["M"]).bool()


def compare(loss, new, expected, tolerance):
    loss.backward()
    assert loss.item() == pytest.approx(expected["pg_loss"], rel=tolerance["rtol"], abs=tolerance["abs"])
    gradient = torch.tensor(expected["grad_log_prob"], dtype=new.dtype)
    torch.testing.assert_close(new.grad, gradient, rtol=tolerance["rtol"], atol=tolerance["abs"])


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("tree", ["agent", "math"])
def test_golden_clip_cov(tree, precision):
    dtype, tolerance = DTYPES[precision]
    for case in golden(f"clip_cov_{tree}")["cases"]:
        new, old, advantages, mask = tensors(case, dtype)
        ratio, lower, upper = case["effective_ratio_lb_ub"]
        expected, diagnostic = case["out"][precision], case["diagnostic"]
        clip = {"clip_low": case["clip_low"], "clip_high": case["clip_high"]}
        generator = torch.Generator().manual_seed(case["torch_manual_seed"])
        rule = {
            "ratio": ratio,
            "lower": lower,
            "upper": upper,
            "aggregation": case["loss_agg_mode"],
            "horizon": mask.shape[1],
        }
        loss, metrics = clip_cov_loss(new, old, advantages, mask, generator=generator, **rule, **clip)
        clamped = bool(((new - old).abs() > 20)[mask].any())  # the reference has no clamp: e^-29 there, e^-20 here
        compare(loss, new, expected, tolerance | ({"abs": 1e-8} if clamped else {}))
        assert metrics["dropped_fraction"] == pytest.approx(expected["pg_clipfrac"], rel=tolerance["rtol"], abs=1e-7)
        clipped = clipped_tokens(new, old, advantages, mask, **clip)
        assert clipped.int().tolist() == diagnostic["ppo_clipped"]
        eligible = covariance_selection(new, advantages, mask, ratio=1.0, lower=lower, upper=upper, exclude=clipped)
        assert eligible.int().tolist() == diagnostic["eligible"] and int(eligible.sum()) == diagnostic["n_eligible"]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("tree", ["agent", "math"])
def test_golden_kl_cov(tree, precision):
    dtype, tolerance = DTYPES[precision]
    for case in golden(f"kl_cov_{tree}")["cases"]:
        new, old, advantages, mask = tensors(case, dtype)
        expected = case["out"][precision]
        loss, metrics = kl_cov_loss(
            new,
            old,
            advantages,
            mask,
            ratio=case["kl_cov_ratio"],
            kl_coef=case["ppo_kl_coef"],
            aggregation=case["loss_agg_mode"],
            horizon=mask.shape[1],
        )
        compare(loss, new, expected, tolerance)
        assert metrics["abs_log_ratio"] == pytest.approx(expected["ppo_kl"], rel=tolerance["rtol"], abs=1e-7)
