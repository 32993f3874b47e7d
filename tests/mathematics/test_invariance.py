"""A mini-batch's gradient is the sum over any cut: ranks, micro-batches, order of rows, padding. float64, 1e-9.

The cut is all that changes: covariance rules choose tokens once over the whole mini-batch, denominators are
`spearrl.batching.denominator` of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spearrl import losses
from spearrl.batching import denominator
from spearrl.batching.token_hashes import counter_keys
from tests.support.random_inputs import Tokens, checked, seeds

HORIZON = 12.5
COLUMNS = ("mask", "old", "advantages", "returns", "logprobs")
EXACT = {"rtol": 1e-9, "atol": 1e-30}


@dataclass
class Part:
    """Rows of a mini-batch, `padding` more columns of garbage on the right; with the covariance tokens of the whole."""

    table: Tokens
    rows: list[int]
    padding: int = 0
    covariance_tokens: torch.Tensor | None = None

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in COLUMNS:
            raise AttributeError(name)
        values = getattr(self.table, name)[self.rows]
        garbage = np.full((len(self.rows), self.padding), False if name == "mask" else np.nan)
        return torch.tensor(np.concatenate([values, garbage], axis=1).astype(values.dtype))

    @property
    def drop(self) -> torch.Tensor:
        return torch.nn.functional.pad(self.covariance_tokens[self.rows], (0, self.padding))

    @property
    def keys(self) -> torch.Tensor:
        return counter_keys(5, torch.tensor(self.table.uids)[self.rows], self.mask.shape[1])


def kl(x, part, estimator, **options):
    return losses.aggregate(
        losses.kl_divergence(x, part.old, estimator), part.mask, options.pop("aggregation"), **options
    ), {}


def ratio_loss(function, **fixed) -> Callable:
    return lambda x, part, **options: function(x, part.old, part.advantages, part.mask, **fixed, **options)


def clip_cov(x, part, **options):
    return losses.clipped_policy_loss(
        x, part.old, part.advantages, part.mask, clip_high=0.28, drop=part.drop, **options
    )


def kl_cov(x, part, **options):
    return losses.kl_cov_loss(x, part.old, part.advantages, part.mask, kl_coef=0.5, penalised=part.drop, **options)


LOSSES: dict[str, Callable] = {
    "clipped": ratio_loss(losses.clipped_policy_loss, clip_high=0.28),
    "dual clip": ratio_loss(losses.clipped_policy_loss, dual_clip=1.5),
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "gspo": ratio_loss(losses.gspo_loss, clip_low=0.1, clip_high=0.1),
    "cispo": ratio_loss(losses.cispo_loss),
    "value": lambda x, part, **options: losses.value_loss(x, part.old, part.returns, part.mask, **options),
    **{
        estimator: lambda x, part, estimator=estimator, **options: kl(x, part, estimator, **options)
        for estimator in ("k1", "k2", "k3", "abs")
    },
}
LOWER, UPPER, RATIO = "quantile:0.2113", 40.0, 0.4


def select(part: Part, rule: str) -> torch.Tensor:
    if rule == "kl_cov":
        return losses.kl_cov_selection(part.logprobs, part.advantages, part.mask, ratio=RATIO, keys=part.keys)
    exclude = losses.clipped_tokens(part.logprobs, part.old, part.advantages, part.mask, clip_low=0.2, clip_high=0.28)
    return losses.covariance_selection(
        part.logprobs,
        part.advantages,
        part.mask,
        ratio=RATIO,
        lower=LOWER,
        upper=UPPER,
        exclude=exclude,
        keys=part.keys,
    )


def make(rows: int, width: int, seed: int) -> Tokens:
    table = Tokens((rows, width), seed)
    table.returns = table.table(np.nan_to_num(table.old) + table.rng.normal(0, 1, table.shape))
    table.uids = table.rng.choice(10_000, rows, replace=False)
    return table


@st.composite
def cuts(draw) -> tuple[Tokens, list[list[tuple[list[int], int]]]]:
    """A mini-batch and, for each rank, its micro-batches as (rows in any order, padding); a rank may have none."""
    table = make(draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(seeds))
    order = draw(st.permutations(range(table.shape[0])))
    ranks = draw(st.integers(1, 4))
    owners = [draw(st.integers(0, ranks - 1)) for _ in order]
    plan = []
    for rank in range(ranks):
        mine, micro = [row for row, owner in zip(order, owners, strict=True) if owner == rank], []
        while mine:
            size = draw(st.integers(1, len(mine)))
            micro.append((mine[:size], draw(st.integers(0, 3))))
            mine = mine[size:]
        plan.append(micro)
    return table, plan


def gradient_of(name: str, part: Part, mode: str, of_whole: float) -> tuple[float, torch.Tensor]:
    leaf = part.logprobs.requires_grad_()
    loss, _ = LOSSES[name](leaf, part, aggregation=mode, horizon=HORIZON, denominator=of_whole)
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", LOSSES)
@checked
@given(cuts(), st.sampled_from(losses.AGGREGATIONS))
def test_any_cut_of_a_mini_batch_has_the_same_gradient(name, cut, mode):
    table, plan = cut
    whole = Part(table, list(range(table.shape[0])))
    whole.covariance_tokens = select(whole, name) if name in ("clip_cov", "kl_cov") else None
    of_whole = denominator(whole.mask, mode, HORIZON)
    total, slope = gradient_of(name, whole, mode, of_whole)
    summed, pieces = torch.zeros_like(slope), []
    for micro in plan:
        own = torch.zeros_like(slope)
        for rows, padding in micro:
            loss, part_slope = gradient_of(name, Part(table, rows, padding, whole.covariance_tokens), mode, of_whole)
            assert not part_slope[:, table.shape[1] :].any()
            own[rows] += part_slope[:, : table.shape[1]]
            pieces.append(loss)
        summed += own
    np.testing.assert_allclose(summed.numpy(), slope.numpy(), **EXACT)
    np.testing.assert_allclose(sum(pieces), total, rtol=1e-9, atol=1e-13 * sum(abs(piece) for piece in pieces))


@pytest.mark.parametrize("rule", ["clip_cov", "kl_cov"])
@checked
@given(cuts(), st.integers(0, 3))
def test_the_selection_follows_its_rows(rule, cut, padding):
    """In another order and a wider table the same tokens are found."""
    table, plan = cut
    rows = [row for micro in plan for part, _ in micro for row in part]
    tokens = select(Part(table, list(range(table.shape[0]))), rule)
    moved = select(Part(table, rows, padding), rule)
    assert torch.equal(moved[:, : table.shape[1]], tokens[rows])
    assert not moved[:, table.shape[1] :].any()


def test_the_cut_matters_where_the_divisor_is_the_micro_batchs_own():
    """The property can fail: a mean of unequal parts is not the mean of the whole."""
    table = make(6, 8, 3)
    halves = [Part(table, [0]), Part(table, [1, 2, 3, 4, 5])]
    whole = gradient_of("clipped", Part(table, list(range(6))), "token-mean", None)[1]
    apart = torch.cat([gradient_of("clipped", half, "token-mean", None)[1] for half in halves]) / 2
    assert whole.any() and not torch.allclose(apart, whole, rtol=1e-3)


@checked
@given(st.integers(1, 8), st.integers(1, 8), seeds)
def test_the_divisor_counts_tokens_or_rows(rows, width, seed):
    mask = torch.tensor(make(rows, width, seed).mask)
    tokens = sum(map(sum, mask.tolist()))
    expected = dict(zip(losses.AGGREGATIONS, [max(tokens, 1), rows, rows, rows * HORIZON], strict=True))
    assert {mode: denominator(mask, mode, HORIZON) for mode in losses.AGGREGATIONS} == expected
