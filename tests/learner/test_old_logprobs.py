"""Old log-probabilities are those of the update's own first passes; another pass is made only where none would do."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from spearrl.learner import LocalLearner
from spearrl.learner.protocol import UpdateResult
from spearrl.losses import ClipCov, Correction, Objective
from tests.batching.test_rows import make_rows
from tests.learner.test_learner import RUNS, batch_of, settings, tiny

QUIET = torch.tensor([0, 3])  # rows without an advantage
LOSSES = {
    "clip": {},
    "clip_cov": {"clip_cov": ClipCov(0.2, -60.0, 60.0)},
    "clip_cov as released": {"clip_cov": ClipCov(0.2, -60.0, 60.0, "micro_batch"), "denominator": "micro_batch"},
    "kl_cov": {"surrogate": "kl_cov"},
    "gspo, corrected": {"surrogate": "gspo", "correction": Correction("tis", "sequence")},
}


class Updated(NamedTuple):
    gradients: list[torch.Tensor]  # of each optimiser step
    result: UpdateResult
    before: list[int]  # rows that had a pass of their own before the update


def updated(kind: str, *, given: bool, joint: bool = False, **changes) -> Updated:
    """An update of seven rows and three replayed ones, with old_logprobs `given` or left to it.

    In float64, but for Qwen's norms.
    """
    learner = LocalLearner(tiny().double(), settings(**changes), joint=joint)
    batch, replay = (batch_of(rows, learner) for rows in (make_rows(RUNS), make_rows([[2]] * 3, first_trajectory=100)))
    batch.advantages[QUIET] = 0.0
    batch.rollout_logprobs, replay.rollout_logprobs = batch.old_logprobs - 0.1, replay.old_logprobs + 0.1
    if not given:
        batch.old_logprobs = None
    gradients, before, logprobs = [], [], learner.logprobs

    @torch.no_grad()
    def spy_step():  # plain descent: AdamW turns the rounding of a gradient near 0 into a step
        gradients.append(torch.cat([p.grad.flatten() for p in learner.model.parameters()]))
        for parameter in learner.model.parameters():
            parameter -= 0.1 * parameter.grad

    learner.optimizer.step = spy_step
    learner.logprobs = lambda rows: (before.append(len(rows)) if not gradients else None) or logprobs(rows)
    objectives = [Objective(name, **LOSSES[kind]) for name in ("policy", "sil")]
    return Updated(gradients, learner.update(batch, replay, gamma=0.5, objectives=objectives, seed=3), before)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "kl_cov"])  # whose |log ratio| has a kink at 0
@pytest.mark.parametrize("tokens", [1000, 20, 1])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_update_is_the_same(parts, tokens, kind, joint):
    given, own = (
        updated(kind, given=given, joint=joint, mini_batches=parts, micro_batch_tokens=tokens)
        for given in (True, False)
    )
    assert len(own.gradients) == len(given.gradients) >= parts
    for one, other in zip(own.gradients, given.gradients, strict=True):
        assert float((one - other).norm()) <= 1e-6 * float(other.norm()) and float(other.norm()) > 0
    found = ~own.result.old_logprobs.isnan()
    torch.testing.assert_close(own.result.old_logprobs[found], given.result.old_logprobs[found], rtol=0, atol=1e-6)
    rows_without = (~found).any(1).nonzero().flatten().tolist()
    assert set(rows_without) <= set(QUIET.tolist()), "only rows without an advantage have no pass"
    for name, value in given.result.metrics.items():
        if not name.endswith("seconds"):
            assert own.result.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("kind", "changes", "rows"),
    [
        ("clip", {"mini_batches": 1}, []),
        ("clip", {"mini_batches": 1, "micro_batch_tokens": 1}, []),
        ("clip_cov", {"mini_batches": 1}, [2]),
        ("clip_cov", {"mini_batches": 1, "micro_batch_tokens": 1}, [7]),
        ("clip_cov as released", {"mini_batches": 1, "micro_batch_tokens": 1}, []),
        ("kl_cov", {"mini_batches": 1, "micro_batch_tokens": 1}, [7]),
    ],
)
def test_a_pass_before_is_made_only_where_none_would_do(kind, changes, rows):
    """Rows that no step computes but a rule looks at; all rows where a rule looks over several passes."""
    assert updated(kind, given=False, **changes).before == rows
    assert updated(kind, given=True, **changes).before == []


def test_rows_of_later_steps_have_theirs_before_the_first():
    (rows,) = updated("clip", given=False, mini_batches=2).before
    assert 2 <= rows <= 4, "the second mini-batch's, less the rows without an advantage"


def test_a_stored_trajectory_has_the_log_probabilities_of_all_its_rows():
    """A row of nothing but zeros beside a good one of its trajectory."""
    learner = LocalLearner(tiny().double(), settings())
    batch = batch_of(make_rows(RUNS), learner)
    batch.rows.trajectory[3], batch.old_logprobs = batch.rows.trajectory[1], None
    batch.advantages[QUIET], batch.advantages[1] = 0.0, 1.0
    old = learner.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=3).old_logprobs
    assert old.isnan().any(1).nonzero().flatten().tolist() == [0]
