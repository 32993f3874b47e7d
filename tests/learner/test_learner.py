"""The local learner: gradients that do not depend on batching, exact resume, skips, schedules."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from spearrl.batching import Batch, Rows
from spearrl.config.sections import LearnerSection
from spearrl.errors import CheckpointError, ConfigError, ContractError
from spearrl.learner import LocalLearner, ValueHead
from spearrl.learner import minibatches as partition
from spearrl.learner.loss_inputs import Share
from spearrl.learner.optimizer import learning_rate
from spearrl.losses import ClipCov, Correction, KlCov, Objective
from tests.batching.test_rows import make_rows

RUNS = [[1, 2], [3], [2, 2, 4], [5], [1, 1], [7, 2], [3, 3]]
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def tiny(*, tied: bool = True, seed: int = 0) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
    }
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=50, max_position_embeddings=128, tie_word_embeddings=tied, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)  # far from uniform predictions
    return model


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**changes) -> LearnerSection:
    fixed = {"lr": 1e-3, "precision": "fp32", "packing": "padded", "mini_batches": 1, "lm_head_chunk": 8}
    return LearnerSection(**{**fixed, **changes})


def batch_of(rows: Rows, learner: LocalLearner, *, shift: float = 0.0, seed: int = 0) -> Batch:
    """Random turn advantages; old_logprobs are the learner's, moved by `shift` x noise of the token's own."""
    draw = torch.Generator().manual_seed(seed)
    advantages = rows.scatter(torch.randn(len(rows.turns), generator=draw, dtype=torch.float64))
    noise = rows.pad(torch.randn(len(rows.token_ids), generator=draw, dtype=torch.float64))
    return Batch(rows, advantages, learner.logprobs(rows) + torch.where(rows.padded_mask, shift * noise, 0.0))


def gradient(
    learner: LocalLearner, batch: Batch, replay: Batch | None, objectives: list[Objective], **options
) -> torch.Tensor:
    """Sum over optimiser steps of the gradients before clipping, with the weights held still."""
    total: list[torch.Tensor] = []
    learner.optimizer.step = lambda: total.append(
        torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained(learner)])
    )
    learner.update(batch, replay, gamma=options.pop("gamma", 1.0), objectives=objectives, seed=options.pop("seed", 3))
    return torch.stack(total).sum(0)


def trained(learner: LocalLearner) -> list[torch.nn.Parameter]:
    return [*learner.model.parameters(), *(learner.critic.parameters() if learner.critic is not None else ())]


def double(**changes) -> LocalLearner:
    # A bound that never binds: what is compared is the gradient itself.
    return LocalLearner(tiny().double(), settings(**{"grad_clip": 1e9, **changes}), temperature=0.7)


def test_logprobs_are_those_of_the_model():
    for tied in (True, False):
        learner = LocalLearner(tiny(tied=tied), settings(), temperature=0.5)
        rows = make_rows(RUNS)
        computed = learner.logprobs(rows)
        for b in range(len(rows)):
            ids = rows.token_ids[rows.offsets[b] : rows.offsets[b + 1]]
            with torch.no_grad():
                exact = (learner.model(input_ids=ids[None]).logits[0].double() / 0.5).log_softmax(-1)
            for t in range(1, len(ids)):
                expected = float(exact[t - 1, ids[t]]) if rows.padded_mask[b, t] else 0.0
                assert float(computed[b, t]) == pytest.approx(expected, abs=2e-5)
        assert computed.shape == (len(rows), rows.width) and not computed.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_gradient_does_not_depend_on_batching_or_order(mode):
    shape = {"aggregation": mode, "horizon": 20}
    objective = [
        Objective("policy", clip_cov=ClipCov(0.1, 0.01, 60.0), **shape),
        Objective("entropy", weight=0.01, **shape),
    ]
    rows = make_rows(RUNS)
    results = []
    for budget in (10**6, 30, 1):
        learner = double(micro_batch_tokens=budget)
        results.append(gradient(learner, batch_of(rows, learner, shift=0.3), None, objective))
    learner = double(micro_batch_tokens=40, lm_head_chunk=3)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    results.append(gradient(learner, batch_of(rows, learner, shift=0.3).select(order), None, objective))
    for other in results[1:]:
        assert float((other - results[0]).norm()) <= 1e-9 * float(results[0].norm())
    assert float(results[0].norm()) > 1e-3


def test_mini_batch_gradients_do_not_depend_on_order_either():
    objectives = [Objective("policy", aggregation="token-mean"), Objective("sil", clip_cov=ClipCov(0.2, 0.0, 60.0))]
    rows, old = make_rows(RUNS), make_rows(RUNS, first_trajectory=100, seed=5)
    results = []
    for budget, order in ((10**6, None), (25, torch.tensor([6, 2, 0, 1, 5, 4, 3]))):
        learner = double(micro_batch_tokens=budget, mini_batches=3)
        on_policy, replay = batch_of(rows, learner, shift=0.2), batch_of(old, learner, shift=0.2, seed=4)
        if order is not None:
            on_policy, replay = on_policy.select(order), replay.select(order.flip(0))
        results.append(gradient(learner, on_policy, replay, objectives, gamma=0.3))
    assert float((results[1] - results[0]).norm()) <= 1e-9 * float(results[0].norm())


def full_batch(rows: Rows, learner: LocalLearner, *, seed: int = 0) -> Batch:
    """A batch with everything an objective may ask for."""
    draw = torch.Generator().manual_seed(seed + 50)
    batch = batch_of(rows, learner, shift=0.2, seed=seed)

    def near(tensor: torch.Tensor) -> torch.Tensor:
        return torch.where(
            rows.padded_mask, tensor + 0.3 * torch.randn(tensor.shape, generator=draw, dtype=torch.float64), 0.0
        )

    values = learner.values(rows)
    return Batch(
        rows,
        batch.advantages,
        batch.old_logprobs,
        near(batch.old_logprobs),
        values,
        near(values),
        near(batch.old_logprobs),
    )


EVERYTHING = {
    "clip_cov quantiles, corrected": {
        "clip_cov": ClipCov(0.2, "quantile:0.5", "quantile:0.95"),
        "correction": Correction("tis"),
    },
    "kl_cov": {"surrogate": "kl_cov", "kl_cov": KlCov(0.2, 0.5)},
    "gspo, corrected by sequence": {
        "surrogate": "gspo",
        "clip_low": 0.05,
        "clip_high": 0.05,
        "correction": Correction("mis", "sequence", cap=9.0, floor=0.1),
    },
    "cispo with clip_cov": {"surrogate": "cispo", "clip_low": 1.0, "clip_cov": ClipCov(0.2, -60.0, 60.0)},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(EVERYTHING))
@pytest.mark.parametrize("joint", [False, True])
def test_no_objective_depends_on_batching_or_order(kind, mode, joint):
    """Policy, SIL with token weights, entropy, KL and value together, two mini-batches, micro-batches from all rows
    down to one, shuffled rows.
    """
    shape = {"aggregation": mode, "horizon": 20}
    objectives = [
        Objective("policy", **EVERYTHING[kind], **shape),
        Objective("sil", **EVERYTHING[kind], token_weight="unsure", token_power=2.0, **shape),
        Objective("entropy", weight=0.01, **shape),
        Objective("entropy", weight=0.01, replay=True, **shape),
        Objective("kl", weight=0.1, **shape),
        Objective("value", weight=0.5, **shape),
    ]
    results = []
    for budget, order in ((10**6, None), (25, [6, 2, 0, 1, 5, 4, 3]), (1, [3, 4, 5, 6, 0, 1, 2])):
        learner = LocalLearner(
            tiny().double(),
            settings(grad_clip=1e9, micro_batch_tokens=budget, mini_batches=2),
            temperature=0.7,
            joint=joint,
            critic=ValueHead(16, 3).double(),
        )
        torch.nn.init.normal_(learner.critic.outer.weight, generator=torch.Generator().manual_seed(1))
        on_policy, replay = (
            full_batch(make_rows(RUNS), learner),
            full_batch(make_rows(RUNS, first_trajectory=100, seed=5), learner, seed=4),
        )
        if order is not None:
            on_policy, replay = on_policy.select(order), replay.select(order[::-1])
        results.append(gradient(learner, on_policy, replay, objectives, gamma=0.3))
    for other in results[1:]:
        assert float((other - results[0]).norm()) <= 1e-9 * float(results[0].norm())
    assert float(results[0].norm()) > 1e-3


def test_passes_that_are_held_select_what_a_pass_of_their_own_selects(monkeypatch):
    """Rows of very different lengths go in several passes even where all fit: their graphs are kept until the selection
    is made.
    """
    monkeypatch.setattr(partition, "WORTHWHILE_TOKENS", 1)
    runs = [[1, 2], [3], [9, 9, 9], [5], [1, 1], [7, 2, 8, 8], [3, 3]]
    rule = [
        Objective("policy", clip_cov=ClipCov(0.2, -60.0, 60.0)),
        Objective("sil", surrogate="kl_cov", kl_cov=KlCov(0.3, 0.5)),
    ]
    results, passes = [], []
    for budget in (10**6, 20):
        learner = double(micro_batch_tokens=budget, mini_batches=2)
        assert len(partition.micro_batches(make_rows(runs).lengths, budget)) > 2
        on_policy, replay = (
            batch_of(make_rows(runs), learner, shift=0.2),
            batch_of(make_rows(runs, first_trajectory=100), learner, shift=0.2, seed=4),
        )
        forward = learner.passes.forward
        learner.passes.forward = lambda rows, policy=None, forward=forward: (
            passes.append(len(rows)) or forward(rows, policy)
        )
        results.append(gradient(learner, on_policy, replay, rule))
        passes.append(0)
    assert float((results[1] - results[0]).norm()) <= 1e-9 * float(results[0].norm())
    first = passes[: passes.index(0)]
    assert sum(first) == 14 and sum(passes) > 28, "every row goes through the model once where its mini-batch fits"


def test_released_denominator_depends_on_micro_batches_as_the_release_does():
    """Token sums over L, averaged over micro-batches by rows: m / N of the per-row mean, so twice the micro-batch is
    twice the gradient (spear.md 1.3).
    """
    objective = [Objective("policy", aggregation="seq-mean-token-sum-norm", horizon=20, denominator="micro_batch")]
    rows = make_rows([[3], [3], [3], [3]])
    norms = []
    for rows_at_a_time in (1, 2, 4):
        learner = double(micro_batch_tokens=rows_at_a_time * int(rows.lengths[0]))
        norms.append(gradient(learner, batch_of(rows, learner), None, objective))
    assert torch.allclose(norms[1], 2 * norms[0]) and torch.allclose(norms[2], 4 * norms[0])


def test_reference_and_critic_are_there_when_built_with_and_refused_otherwise():
    learner, rows = double(), make_rows(RUNS)
    with pytest.raises(ContractError, match="reference"):
        learner.logprobs(rows, reference=True)
    with pytest.raises(ContractError, match="critic"):
        learner.values(rows)
    other = LocalLearner(
        tiny().double(), settings(critic_lr=0.03), reference=tiny(seed=7).double(), critic=ValueHead(16, 3).double()
    )
    expected = LocalLearner(tiny(seed=7).double(), settings()).logprobs(rows)
    assert torch.equal(other.logprobs(rows, reference=True), expected) and not torch.equal(
        other.logprobs(rows), expected
    )
    assert not other.values(rows).any()  # 0 everywhere at the start
    before = [p.clone() for p in other.passes.reference.parameters()]
    batch = full_batch(rows, other)
    batch.returns = torch.where(rows.padded_mask, 3.0, 0.0).double()
    for _ in range(100):
        batch.values = other.values(rows)
        metrics = other.update(batch, None, gamma=0.0, objectives=[Objective("value")], seed=0).metrics
    assert metrics["value/error"] < 0.3  # the head has learnt the constant
    other.update(batch, None, gamma=0.0, objectives=[Objective("kl")], seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, other.passes.reference.parameters(), strict=True))


def test_values_are_those_of_the_state_before_each_token():
    learner = LocalLearner(tiny().double(), settings(), critic=ValueHead(16, 3).double())
    torch.nn.init.normal_(learner.critic.outer.weight, generator=torch.Generator().manual_seed(1))
    rows = make_rows(RUNS)
    computed = learner.values(rows)
    for b in range(len(rows)):
        ids = rows.token_ids[rows.offsets[b] : rows.offsets[b + 1]]
        states = learner.model.base_model(input_ids=ids[None]).last_hidden_state[0]
        expected = learner.critic(states).detach()
        for t in range(1, len(ids)):
            assert float(computed[b, t]) == pytest.approx(
                float(expected[t - 1]) if rows.padded_mask[b, t] else 0.0, abs=1e-9
            )


def test_the_critic_does_not_touch_the_policy():
    """Neither its gradient nor its size: with a huge value error the policy's step stays what it was."""
    weights = []
    for kind in ([Objective("policy")], [Objective("policy"), Objective("value", weight=1e6)]):
        learner = LocalLearner(tiny().double(), settings(grad_clip=0.01), critic=ValueHead(16, 3).double())
        batch = full_batch(make_rows(RUNS), learner)
        learner.update(batch, None, gamma=0.0, objectives=kind, seed=0)
        weights.append(torch.cat([p.detach().flatten() for p in learner.model.parameters()]))
    assert torch.equal(*weights)


def test_critic_is_saved_and_restored(tmp_path):
    learner = LocalLearner(tiny(), settings(), critic=ValueHead(16, 3))
    rows = make_rows(RUNS)
    batch = full_batch(rows, learner)
    learner.update(batch, None, gamma=0.0, objectives=[Objective("policy"), Objective("value")], seed=0)
    learner.save(tmp_path)
    other = LocalLearner(tiny(seed=3), settings(), critic=ValueHead(16, 9))
    other.load(tmp_path)
    assert torch.equal(other.values(rows), learner.values(rows))
    for each in (learner, other):
        each.update(batch, None, gamma=0.0, objectives=[Objective("policy"), Objective("value")], seed=1)
    assert torch.equal(other.values(rows), learner.values(rows)) and torch.equal(
        other.logprobs(rows), learner.logprobs(rows)
    )


def test_gradient_equals_plain_autograd():
    learner = double(micro_batch_tokens=30)
    rows = make_rows(RUNS)
    batch = batch_of(rows, learner, shift=0.3)
    computed = gradient(learner, batch, None, [Objective("policy", clip_high=0.28, weight=2.0)])
    learner.model.zero_grad()
    logits = learner.model(input_ids=rows.pad(rows.token_ids)).logits / 0.7
    logprobs = _own_logprobs(logits, rows)
    ratio = (logprobs - batch.old_logprobs).exp()
    surrogate = torch.minimum(ratio * batch.advantages, ratio.clamp(0.8, 1.28) * batch.advantages)
    (-2.0 * surrogate[rows.padded_mask].mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in learner.model.parameters()])
    assert float((computed - expected).norm()) <= 1e-7 * float(expected.norm())


def _own_logprobs(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    ids = rows.pad(rows.token_ids)
    predicted = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    return torch.nn.functional.pad(predicted, (1, 0))


def test_joint_is_the_weighted_sum_of_both_gradients():
    rows, old = make_rows(RUNS), make_rows([[2], [4, 1]], first_trajectory=100)
    objectives = [Objective("policy"), Objective("sil")]
    learner = double()
    on_policy, replay = batch_of(rows, learner), batch_of(old, learner, seed=9)
    learner.joint = True
    joint = gradient(learner, on_policy, replay, objectives, gamma=0.25)
    policy = gradient(learner, on_policy, None, objectives)
    imitation = gradient(learner, on_policy.select([]), replay, objectives, gamma=1.0)
    torch.testing.assert_close(joint, policy + 0.25 * imitation, rtol=1e-9, atol=1e-12)


def test_number_of_optimiser_steps():
    rows, old = make_rows(RUNS), make_rows([[2]] * 4, first_trajectory=100)
    objectives = [Objective("policy"), Objective("sil")]
    for changes, joint, gamma, steps in (
        ({"mini_batches": 3}, False, 0.5, 3 + 2),  # parts of 3, 2, 2 rows: four replayed rows take two more
        ({"mini_batch_rows": 2}, False, 0.5, 4 + 2),
        ({"mini_batches": 3}, True, 0.5, 3),
        ({"mini_batches": 3}, False, 0.0, 3),
        ({"mini_batches": 50}, True, 0.5, 7),
    ):
        learner = LocalLearner(tiny(), settings(**changes), joint=joint)
        replay = batch_of(old, learner)
        replay.advantages.abs_()  # a mini-batch with nothing above 0 would be left out
        result = learner.update(batch_of(rows, learner), replay, gamma=gamma, objectives=objectives, seed=0)
        assert learner.steps == steps == result.metrics["policy/updates"] and result.skipped == 0
        assert ("sil/loss" in result.metrics) == (gamma > 0)


def test_first_step_is_on_policy():
    learner = LocalLearner(tiny(), settings())
    batch = batch_of(make_rows(RUNS), learner)
    metrics = learner.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=0).metrics
    assert abs(metrics["policy/approx_kl"]) < 1e-5 and metrics["policy/clip_fraction"] == 0.0
    assert metrics["policy/loss"] == pytest.approx(-float(batch.advantages[batch.action_mask].mean()), abs=1e-5)
    assert 0 < metrics["policy/entropy"] < math.log(50)
    assert metrics["update/tokens"] == len(batch.rows.token_ids) >= metrics["update/unique_tokens"] > 0
    again = learner.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=0).metrics
    assert again["policy/loss"] < metrics["policy/loss"]


def test_metrics_do_not_depend_on_micro_batches():
    results = []
    for budget in (10**6, 20):
        learner = double(micro_batch_tokens=budget, mini_batches=2)
        batch = batch_of(make_rows(RUNS), learner, shift=0.3)
        results.append(
            learner.update(
                batch, None, gamma=0.0, objectives=[Objective("policy", clip_cov=ClipCov(0.1, 0.01, 60.0))], seed=0
            ).metrics
        )
    for name, value in results[0].items():
        if name != "update/seconds":
            assert results[1][name] == pytest.approx(value, rel=1e-6), name
    assert results[0]["policy/dropped_fraction"] > 0


def test_covariance_selection_sees_current_logprobs():
    """The first mini-batch is selected on old_logprobs without a forward pass; later ones and replay need one, unless
    they fit into memory anyway. Rows without signal need one in any case.
    """
    assert selection_forwards(micro_batch_tokens=1) == [4, 3]
    assert selection_forwards(micro_batch_tokens=1000) == []
    assert selection_forwards(quiet=2, micro_batch_tokens=1000) == [2]
    assert selection_forwards(quiet=1, micro_batch_tokens=1) == [4, 1, 2]


def selection_forwards(quiet: int = 0, **changes) -> list[int]:
    """Rows of each pass without gradient, `quiet` ones of the replayed without signal."""
    learner = LocalLearner(tiny(), settings(mini_batches=2, **changes))
    forwards = []
    real = learner.logprobs
    rows, old = make_rows(RUNS), make_rows([[2]] * 3, first_trajectory=100)
    on_policy, replay = batch_of(rows, learner), batch_of(old, learner)
    learner.logprobs = lambda rows: forwards.append(len(rows)) or real(rows)
    replay.advantages.abs_()[:quiet] *= -1
    rule = ClipCov(0.1, 0.0, 60.0)
    learner.update(
        on_policy,
        replay,
        gamma=0.5,
        objectives=[Objective("policy", clip_cov=rule), Objective("sil", clip_cov=rule)],
        seed=0,
    )
    return forwards


def test_micro_batch_scope_selects_in_every_micro_batch():
    dropped = []
    for scope in ("mini_batch", "micro_batch"):
        learner = double(micro_batch_tokens=1)
        rule = ClipCov(1e-9, -60.0, 60.0, scope)  # quota 1 per selection
        batch = batch_of(make_rows(RUNS), learner)
        metrics = learner.update(
            batch, None, gamma=0.0, objectives=[Objective("policy", clip_cov=rule)], seed=0
        ).metrics
        dropped.append(round(metrics["policy/dropped_fraction"] * int(batch.action_mask.sum())))
    assert dropped == [1, len(RUNS)]


def test_non_finite_numbers_skip_the_step():
    learner = LocalLearner(tiny(), settings(mini_batches=2, weight_decay=0.1))
    batch = batch_of(make_rows(RUNS), learner)
    batch.advantages[batch.action_mask] = math.nan
    before = copy.deepcopy(learner.model.state_dict())
    result = learner.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=0)
    assert result.skipped == 2 and learner.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    assert math.isnan(result.metrics["policy/loss"])


def no_advantages(rows: Rows, learner: LocalLearner) -> Batch:
    return Batch(rows, torch.zeros(len(rows), rows.width), learner.logprobs(rows) - 0.5)


@pytest.mark.parametrize("surrogate", ["clip", "gspo", "cispo"])
def test_equal_groups_cost_no_pass_and_change_no_weight(monkeypatch, surrogate):
    learner = LocalLearner(tiny(), settings(mini_batches=2, weight_decay=0.1))
    rows, objective = make_rows(RUNS), Objective("policy", surrogate=surrogate)
    learner.update(batch_of(rows, learner), None, gamma=0.0, objectives=[objective], seed=0)  # moments that would go on
    batch, before = no_advantages(rows, learner), copy.deepcopy(learner.model.state_dict())
    monkeypatch.setattr(learner.passes, "forward", None)
    result = learner.update(batch, None, gamma=0.0, objectives=[objective], seed=1)
    assert (result.metrics["policy/without_signal"], result.metrics["policy/updates"], result.skipped) == (2, 0, 0)
    assert learner.steps == 2
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())


@pytest.mark.parametrize(("mode", "tokens"), [*((mode, 1000) for mode in MODES), (MODES[0], 20)])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", ["plain", *EVERYTHING])
def test_rows_without_signal_are_left_out_and_change_no_gradient(monkeypatch, kind, joint, mode, tokens):
    """Denominators, and the tokens that covariance rules choose, stay those of all rows; float64."""
    shape, quiet = {"aggregation": mode, "horizon": 20}, torch.tensor([0, 2, 3, 5])
    rule = EVERYTHING.get(kind, {})
    objectives = [Objective(name, **rule, **shape) for name in ("policy", "sil")]
    found = {}
    for left_out in (True, False):
        if not left_out:
            monkeypatch.setattr(Share, "signal", property(lambda share: torch.ones(len(share.batch)).bool()))
        options = settings(grad_clip=1e9, micro_batch_tokens=tokens)
        learner = LocalLearner(tiny().double(), options, temperature=0.7, joint=joint)
        on_policy = full_batch(make_rows(RUNS), LocalLearner(tiny().double(), settings(), critic=ValueHead(16, 3)))
        replay = on_policy.select(torch.arange(len(on_policy)))
        replay.rows.trajectory += 100
        on_policy.advantages[quiet] = 0.0
        replay.advantages[quiet] = -1.0
        passes, forward = {True: 0, False: 0}, learner.passes.forward

        def spy_forward(rows, policy=None, forward=forward, passes=passes):
            passes[torch.is_grad_enabled()] += len(rows)
            return forward(rows)

        monkeypatch.setattr(learner.passes, "forward", spy_forward)
        found[left_out] = gradient(learner, on_policy, replay, objectives, gamma=0.3), passes
    (kept, fewer), (whole, all_rows) = found[True], found[False]
    assert float((kept - whole).norm()) <= 1e-12 * float(whole.norm()) and float(whole.norm()) > 1e-4
    assert (fewer[True], all_rows[True]) == (14 if kind == "kl_cov" else 5, 14)
    if tokens == 1000:
        rule = kind not in ("plain", "gspo, corrected by sequence", "kl_cov")
        assert fewer[False] == 5 * rule, "a rule needs current log-probabilities of all replayed rows"
        assert all_rows[False] == 0


@pytest.mark.parametrize("joint", [False, True])
def test_rows_without_advantages_train_where_another_term_has_a_gradient(joint):
    rows, replayed = make_rows(RUNS), make_rows([[2]] * 4, first_trajectory=100)
    policy, sil = Objective("policy"), Objective("sil")
    for others, updates in (
        ([Objective("entropy", weight=0.01)], 1),
        ([Objective("policy", surrogate="kl_cov", kl_cov=KlCov(ratio=0.5))], 1),
        ([], 0),
    ):
        learner = LocalLearner(tiny(), settings())
        batch = no_advantages(rows, learner)
        result = learner.update(batch, None, gamma=0.0, objectives=[policy, *others], seed=0)
        assert result.metrics["policy/updates"] == updates
    for sign, updates in ((1, 1), (-1, 0)):  # self-imitation learns from what is above 0 alone
        learner = LocalLearner(tiny(), settings(), joint=joint)
        replay = no_advantages(replayed, learner)
        replay.advantages[:] = float(sign)
        result = learner.update(no_advantages(rows, learner), replay, gamma=0.5, objectives=[policy, sil], seed=0)
        assert result.metrics["policy/updates"] == updates == len({"sil/loss"} & set(result.metrics))


def test_nothing_to_train_on():
    learner = LocalLearner(tiny(), settings())
    rows = make_rows(RUNS)
    masked = rows.mask_turns(torch.zeros(len(rows.turns), dtype=torch.bool))
    for empty in (rows.select([]), masked):
        batch = Batch(empty, torch.zeros(len(empty), empty.width), learner.logprobs(empty))
        result = learner.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=0)
        assert result.skipped == 0 and learner.steps == 0


def test_sft_weights_are_a_weighted_likelihood():
    learner = double()
    rows = make_rows(RUNS)
    everything = torch.ones(len(rows.token_ids), dtype=torch.bool)
    everything[rows.offsets[:-1]] = False
    rows = rows.with_action_mask(everything)
    weights = rows.pad(torch.where(rows.turn_index >= 0, 1.0, 0.05))
    logprobs = learner.logprobs(rows)
    metrics = learner.update(
        Batch(rows, weights, torch.zeros_like(weights)), None, gamma=0.0, objectives=[Objective("sft")], seed=0
    ).metrics
    expected = -(weights * logprobs)[rows.padded_mask].mean()
    assert metrics["sft/loss"] == pytest.approx(float(expected), rel=1e-9)


def test_save_and_resume_are_bit_exact(tmp_path):
    options = settings(mini_batches=2, warmup_steps=5)
    rows = make_rows(RUNS)
    learner = LocalLearner(tiny(), options)
    batch = batch_of(rows, learner)
    for seed in range(2):
        learner.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=seed)
    learner.save(tmp_path)
    other = LocalLearner(tiny(seed=1), options)
    other.load(tmp_path)
    assert other.steps == learner.steps == 4
    results = [x.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=9) for x in (learner, other)]
    assert results[0].metrics["policy/loss"] == results[1].metrics["policy/loss"]
    for one, two in zip(learner.full_parameters(), other.full_parameters(), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1])
    written = {p.name for p in tmp_path.iterdir()}
    assert written >= {"config.json", "model.safetensors", "training"}
    assert all(name.endswith((".safetensors", ".json")) for name in written - {"training"})


def test_loading_something_else_is_refused(tmp_path):
    learner = LocalLearner(tiny(), settings())
    with pytest.raises(CheckpointError, match="no model"):
        learner.load(tmp_path)
    LocalLearner(tiny(tied=False), settings()).save(tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        _bigger().load(tmp_path)
    (tmp_path / "training" / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match="optimiser state"):
        LocalLearner(tiny(tied=False), settings()).load(tmp_path)


def _bigger() -> LocalLearner:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
    }
    return LocalLearner(Qwen3ForCausalLM(Qwen3Config(vocab_size=50, tie_word_embeddings=False, **shape)), settings())


def test_norms_and_biases_are_not_decayed():
    learner = LocalLearner(tiny(), settings(weight_decay=0.5))
    decayed, undecayed = learner.optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and all(p.ndim >= 2 for p in decayed["params"])
    assert undecayed["weight_decay"] == 0.0 and all(p.ndim == 1 for p in undecayed["params"])
    assert len(decayed["params"]) + len(undecayed["params"]) == len(list(learner.full_parameters()))


def test_gradient_norm_is_clipped():
    rows = make_rows(RUNS)
    norms = []
    for bound in (1e9, 0.01):
        learner = LocalLearner(tiny(), settings(grad_clip=bound))
        clipped: list[float] = []
        step = learner.optimizer.step
        learner.optimizer.step = lambda step=step, learner=learner, clipped=clipped: (
            clipped.append(_grad_norm(learner)),
            step(),
        )
        metrics = learner.update(
            batch_of(rows, learner), None, gamma=0.0, objectives=[Objective("policy")], seed=0
        ).metrics
        norms.append((clipped[0], metrics["policy/grad_norm"]))
    assert norms[0][0] == pytest.approx(norms[0][1], rel=1e-5) == pytest.approx(norms[1][1], rel=1e-5)
    assert norms[1][0] == pytest.approx(0.01, rel=1e-3)


def _grad_norm(learner: LocalLearner) -> float:
    return float(torch.cat([p.grad.flatten() for p in learner.model.parameters()]).norm())


def test_learning_rate():
    options = settings(lr=1.0, warmup_steps=4)
    assert [learning_rate(s, options, None) for s in (0, 3, 4, 100)] == [0.2, 0.8, 1.0, 1.0]
    assert [learning_rate(s, options, 14) for s in (4, 9, 14, 20)] == [1.0, 0.5, 0.0, 0.0]
    assert learning_rate(0, settings(lr=2.0), None) == 2.0


def test_bf16_is_close_to_fp32():
    rows = make_rows(RUNS)
    computed = [LocalLearner(tiny(), settings(precision=p)).logprobs(rows) for p in ("fp32", "bf16")]
    assert float((computed[0] - computed[1]).abs().max()) < 0.5 and computed[1].dtype == torch.float32
    assert float((computed[0] - computed[1]).abs().mean()) < 0.05


def test_gradient_checkpointing_changes_nothing():
    rows = make_rows(RUNS)
    results = []
    for switch in (False, True):
        learner = double(gradient_checkpointing=switch)
        results.append(gradient(learner, batch_of(rows, learner, shift=0.2), None, [Objective("policy")]))
        assert not learner.model.training
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing_in_bf16():
    rows = make_rows(RUNS)
    results = []
    for switch in (False, True):
        learner = LocalLearner(tiny(), settings(grad_clip=1e9, precision="bf16", gradient_checkpointing=switch))
        results.append(gradient(learner, batch_of(rows, learner, shift=0.2), None, [Objective("policy")]))
    assert float((results[0] - results[1]).norm()) <= 0.05 * float(results[0].norm())


@pytest.mark.parametrize("name", ["deepspeed", "accelerate"])
def test_what_the_deepspeed_learner_lacks_is_named_before_any_process_starts(tmp_path, monkeypatch, name):
    import sys

    from spearrl.learner import DeepSpeedLearner

    monkeypatch.setattr("spearrl.learner.deepspeed.zero.find_spec", lambda wanted: None if wanted == name else sys)
    with pytest.raises(ConfigError, match=f"needs {name}"):
        DeepSpeedLearner(tmp_path, settings())


def test_probe_and_export_are_of_the_model(tmp_path):
    from transformers import AutoModelForCausalLM

    learner, ids = LocalLearner(tiny(), settings(), temperature=0.5), [3, 1, 4, 1, 5]
    learner.export(tmp_path)
    logits = (
        AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    )
    expected = [float(logits[t, ids[t + 1]]) for t in range(4)]
    assert learner.probe(ids) == pytest.approx(expected, abs=1e-5)
    learner.close()


def test_dropout_is_off():
    model = tiny()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    learner = LocalLearner(model, settings(gradient_checkpointing=True))
    batch = batch_of(make_rows(RUNS), learner)
    metrics = learner.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=0).metrics
    assert abs(metrics["policy/approx_kl"]) < 1e-5


def test_a_head_that_is_not_linear_is_refused():
    model = tiny()
    real = model.forward

    def capped(*args, **options):
        output = real(*args, **options)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output

    model.forward = capped
    with pytest.raises(ConfigError, match="after the output layer"):
        LocalLearner(model, settings())
