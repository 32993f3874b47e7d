"""Policy, value and KL losses and the aggregation against the golden files."""

from __future__ import annotations

import math

import pytest
import torch

from spearrl.losses import AGGREGATIONS, aggregate, clipped_policy_loss, kl_divergence, value_loss
from tests.support.shared_data import golden

DTYPES = {"f32": (torch.float32, 1e-5, 1e-6), "f64": (torch.float64, 1e-9, 1e-9)}
ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2", "low_var_kl": "k3"}
pytestmark = [pytest.mark.parametrize("precision", DTYPES), pytest.mark.parametrize("tree", ["agent", "math"])]


def test_golden_aggregation(tree, precision):
    dtype, rel, tiny = DTYPES[precision]
    for case in golden(f"agg_loss_{tree}")["cases"]:
        values, mask = torch.tensor(case["loss_mat"], dtype=dtype), torch.tensor(case["loss_mask"]).bool()
        for mode in AGGREGATIONS:
            expected = case[mode][precision]
            if math.isnan(expected):  # a fully masked row: it adds 0 here
                rows = torch.where(mask, values, 0).sum(-1) / mask.sum(-1).clamp(min=1)
                expected = float(rows.sum() / len(rows))
            assert float(aggregate(values, mask, mode, horizon=values.shape[1])) == pytest.approx(
                expected, rel=rel, abs=tiny
            )


def test_golden_policy_loss(tree, precision):
    dtype, rel, tiny = DTYPES[precision]
    checked = 0
    for case in golden(f"policy_loss_vanilla_gpg_{tree}")["cases"]:
        old, new, advantages = (torch.tensor(case["inputs"][name], dtype=dtype) for name in ("old", "new", "A"))
        mask, expected = torch.tensor(case["inputs"]["M"]).bool(), case["out"][precision]
        new.requires_grad_()
        loss, metrics = clipped_policy_loss(
            new,
            old,
            advantages,
            mask,
            clip_low=case["clip_low"],
            clip_high=case["clip_high"],
            dual_clip=case["clip_c"],
            aggregation=case["loss_agg_mode"],
            horizon=mask.shape[1],
        )
        loss.backward()
        for ours, theirs in (
            ("clip_fraction", "pg_clipfrac"),
            ("dual_clip_fraction", "pg_clipfrac_lower"),
            ("approx_kl", "ppo_kl"),
        ):
            assert metrics[ours] == pytest.approx(expected[theirs], rel=rel, abs=1e-7)
        assert loss.isfinite() and new.grad.isfinite().all()
        if math.isnan(expected["pg_loss"]):  # a fully masked row: NaN there, the mean over rows with a 0 here
            live = mask.any(-1)
            clips = {"clip_low": case["clip_low"], "clip_high": case["clip_high"], "dual_clip": case["clip_c"]}
            scale = {"aggregation": "seq-mean-token-mean", "denominator": len(mask)}
            rows = (new[live], old[live], advantages[live], mask[live])
            alone, _ = clipped_policy_loss(*rows, **clips, **scale)
            assert loss.item() == pytest.approx(alone.item(), rel=rel)
            continue
        assert loss.item() == pytest.approx(expected["pg_loss"], rel=rel, abs=tiny)
        torch.testing.assert_close(new.grad, torch.tensor(expected["grad_log_prob"], dtype=dtype), rtol=rel, atol=tiny)
        checked += 1
    assert checked >= 40


def test_golden_kl(tree, precision):
    dtype, rel, tiny = DTYPES[precision]
    for case in golden(f"kl_{tree}")["cases"]:
        if "adaptive_init" in case:  # the adaptive controller of KL in the reward, which spearrl does not have
            continue
        logprobs, reference = (torch.tensor(case[name], dtype=dtype) for name in ("logprob", "ref_logprob"))
        for theirs, ours in ESTIMATORS.items():
            if theirs in case:
                torch.testing.assert_close(
                    kl_divergence(logprobs, reference, ours),
                    torch.tensor(case[theirs][precision], dtype=dtype),
                    rtol=rel,
                    atol=tiny,
                )


def test_golden_value_loss(tree, precision):
    dtype, rel, tiny = DTYPES[precision]
    for case in golden(f"value_loss_{tree}")["cases"]:
        values, old_values, returns = (
            torch.tensor(case[name], dtype=dtype) for name in ("vpreds", "values", "returns")
        )
        mask = torch.tensor(case["mask"]).bool()
        loss, _ = value_loss(
            values, old_values, returns, mask, clip=case["cliprange"], aggregation=case["mode"], horizon=values.shape[1]
        )
        halved = 0.5 if tree == "agent" else 1.0  # the agent tree does not halve
        assert loss.item() == pytest.approx(halved * case["out"][precision], rel=rel, abs=tiny)
