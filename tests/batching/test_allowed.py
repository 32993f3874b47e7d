"""Replies restricted to allowed ids: engine, rows and learner renormalise over the same tokens."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spearrl.batching import AllowedIds, Rows, forward_inputs, rows_from_groups
from spearrl.batching.nested_tensors import pack, unpack
from spearrl.buffers import BaselineBuffer, ReplayBuffer
from spearrl.config.sections import LearnerSection
from spearrl.envs import Done, ToolEnvironment, tool
from spearrl.errors import ContractError
from spearrl.learner import LocalLearner
from spearrl.learner.logprobs import token_logprobs
from spearrl.losses import ClipCov, Objective
from spearrl.rollout import LocalEngine
from spearrl.types import Observation, Outcome, Reply, Task
from tests.learner.test_learner import RUNS, batch_of, double, gradient, make_rows, settings, tiny
from tests.learner.test_logprobs import plain, problem
from tests.learner.test_packing import learner_of, model_of
from tests.rollout.test_collector import Script, collector_of, parts, play
from tests.support.random_inputs import checked, seeds

VOCABULARY = 50  # of make_rows and tiny()
EVERYTHING = [
    Objective("policy", clip_cov=ClipCov(0.2, -60.0, 60.0)),
    Objective("sil", token_weight="unsure"),
    Objective("entropy", weight=0.05),
]


def allowed_of(sets: list[set[int] | None]) -> AllowedIds | None:
    """The table in which every restricted turn has a set of its own."""
    numbered = [(number, ids) for number, ids in enumerate(ids for ids in sets if ids is not None)]
    if not numbered:
        return None
    places = iter(range(len(numbered)))
    index = torch.tensor([-1 if ids is None else next(places) for ids in sets])
    owner, ids = zip(*[(number, token) for number, members in numbered for token in sorted(members)], strict=True)
    return AllowedIds(index, torch.tensor(owner), torch.tensor(ids))


def sets_of(rows: Rows) -> list[set[int] | None]:
    """The inverse, whatever sets turns share."""
    if rows.allowed is None:
        return [None] * len(rows.turns)
    allowed = rows.allowed
    return [None if i < 0 else set(allowed.ids[allowed.owner == i].tolist()) for i in allowed.index.tolist()]


def restricted(rows: Rows, seed: int = 0, share: float = 0.7) -> Rows:
    """The rows, a share of whose turns were drawn from a random set around their own tokens."""
    draws = random.Random(seed)
    own = [set(rows.token_ids[rows.turn_index == turn].tolist()) for turn in range(len(rows.turns))]
    sets = [
        ids | set(draws.sample(range(VOCABULARY), draws.randrange(VOCABULARY))) if draws.random() < share else None
        for ids in own
    ]
    return replace(rows, allowed=allowed_of(sets))


def left_of(sets: list[set[int] | None], vocabulary: int) -> torch.Tensor:
    """bool [n, V], True where a token is allowed."""
    return torch.tensor([[ids is None or token in ids for token in range(vocabulary)] for ids in sets])


def masked(hidden, weight, bias, targets, temperature, left):
    """Plain autograd over the allowed tokens, one position at a time."""
    logp, entropy = [], []
    for n in range(len(targets)):
        columns = left[n].nonzero().flatten()
        values = plain(
            hidden[n : n + 1],
            weight[columns],
            None if bias is None else bias[columns],
            (columns == targets[n]).nonzero().flatten(),
            temperature,
        )
        logp.append(values[0])
        entropy.append(values[1])
    return torch.cat(logp), torch.cat(entropy)


def drawn_sets(draws: random.Random, targets: torch.Tensor, vocabulary: int) -> list[set[int] | None]:
    def one(target: int) -> set[int] | None:
        kind = draws.randrange(4)
        more = draws.sample(range(vocabulary), draws.randrange(vocabulary + 1)) if kind > 1 else []
        return None if kind == 0 else {target, *more}

    return [one(target) for target in targets.tolist()]


@checked
@given(st.integers(1, 12), st.integers(1, 13), st.sampled_from([1.0, 0.4]), st.booleans(), seeds)
def test_values_and_gradients_are_plain_autograds(n, chunk, temperature, bias, seed):
    hidden, weight, shift, targets = problem(n=n, bias=bias, seed=seed)
    sets = drawn_sets(random.Random(seed), targets, len(weight))
    table = allowed_of(sets)
    given_sets = () if table is None else tuple(table.tensors().values())
    packed = token_logprobs(
        hidden, weight, targets, bias=shift, temperature=temperature, chunk=chunk, allowed=given_sets
    )
    expected = masked(hidden, weight, shift, targets, temperature, left_of(sets, len(weight)))
    leaves, scale = [x for x in (hidden, weight, shift) if x is not None], torch.linspace(-1, 1, n, dtype=torch.float64)
    gradients = []
    for values in (packed, expected):
        gradients.append(torch.autograd.grad((scale * values[0]).sum() + (scale.cos() * values[1]).sum(), leaves))
    for one, two in zip((*packed, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-11)


def test_gradients_are_finite_differences():
    hidden, weight, shift, targets = problem(n=4, d=3, vocabulary=6)
    table = allowed_of([{*targets[:1].tolist(), 0, 5}, None, {int(targets[2])}, {int(targets[3]), 1, 2}])
    allowed = tuple(table.tensors().values())
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(h, w, targets, bias=b, temperature=0.7, chunk=3, allowed=allowed),
        (hidden, weight, shift),
    )


@checked
@given(st.integers(1, 12), st.integers(1, 13), seeds)
def test_the_whole_vocabulary_changes_nothing(n, chunk, seed):
    hidden, weight, shift, targets = problem(n=n, seed=seed)
    results = []
    for allowed in (
        (),
        tuple(allowed_of([set(range(len(weight)))] * n).tensors().values()),
        (torch.full((n,), -1), *[torch.zeros(0, dtype=torch.int64)] * 2),
    ):
        values = token_logprobs(hidden, weight, targets, bias=shift, chunk=chunk, allowed=allowed)
        results.append((*values, *torch.autograd.grad((values[0] - 0.3 * values[1]).sum(), (hidden, weight, shift))))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_forbidden_tokens_get_no_gradient_and_extreme_logits_do_no_harm():
    weight = torch.tensor([[300.0], [1.0], [-200.0], [0.5]], requires_grad=True)
    hidden, allowed = (
        torch.tensor([[1.0], [-1.0]], requires_grad=True),
        tuple(allowed_of([{1, 3}, {3}]).tensors().values()),
    )
    logp, entropy = token_logprobs(hidden, weight, torch.tensor([1, 3]), allowed=allowed)
    assert logp.tolist() == pytest.approx([-0.474077, 0.0], abs=1e-6) and float(entropy[1].detach()) == 0.0
    (logp + entropy).sum().backward()
    assert (
        weight.grad[[0, 2]].abs().sum() == 0
        and bool(weight.grad[[1, 3]].all())
        and bool(torch.isfinite(hidden.grad).all())
    )


@checked
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=5), seeds)
def test_rows_carry_the_sets_of_their_turns(lengths, seed):
    draws = random.Random(seed)
    rows = restricted(make_rows(lengths), seed, share=draws.choice([0.0, 0.3, 1.0]))
    chosen = draws.sample(range(len(rows)), draws.randrange(len(rows) + 1))
    part = rows.select(torch.tensor(chosen, dtype=torch.int64))
    assert sets_of(part) == [
        ids
        for ids, keep in zip(
            sets_of(rows), rows.turns_of(torch.tensor(chosen, dtype=torch.int64)).tolist(), strict=True
        )
        if keep
    ]
    assert part.allowed is None or set(part.allowed.owner.tolist()) == set(part.allowed.index.tolist()) - {
        -1
    }  # nobody else's sets
    other = restricted(make_rows(lengths[::-1], first_trajectory=100), seed + 1)
    joined = Rows.concat([part, make_rows([[1]], first_trajectory=300), other, rows])
    assert sets_of(joined) == [*sets_of(part), None, *sets_of(other), *sets_of(rows)]
    again = Rows.from_state(unpack(pack(joined.state_dict())))
    assert sets_of(again) == sets_of(joined) and ("allowed" in rows.state_dict()) == any(
        ids is not None for ids in sets_of(rows)
    )


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_saved_rows_keep_their_sets(tmp_path, share):
    rows = restricted(make_rows(RUNS), share=share)
    rows.save(tmp_path / "rows.safetensors")
    assert sets_of(Rows.load(tmp_path / "rows.safetensors")) == sets_of(rows)


def test_tables_that_do_not_fit_are_refused():
    rows = make_rows([[1, 2]])
    with pytest.raises(ContractError, match="allowed ids of 1 turns; expected 2"):
        replace(rows, allowed=allowed_of([{1}]))
    with pytest.raises(ContractError, match="outside -1 .. 0"):
        AllowedIds(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([7]))
    with pytest.raises(ContractError, match="allowed.ids"):
        AllowedIds(torch.tensor([0]), torch.tensor([0]), torch.tensor([7.0]))


def test_replayed_rows_keep_their_sets():
    rows = restricted(make_rows(RUNS), share=0.6)
    rewards = torch.arange(len(rows.turns)).double()
    first, second = (ReplayBuffer(100, max_age=9, fill_factor=0.01) for _ in range(2))
    first.add(1, rows, rewards, rewards, torch.zeros(len(rows), rows.width))
    second.load_state_dict(unpack(pack(first.state_dict())))
    baseline = BaselineBuffer(9)
    baseline.add(1, [-1.0])
    batch = second.drain(2, baseline, torch.Generator().manual_seed(0))
    wanted = dict(zip(rows.turns.anchor_ids.tolist(), sets_of(rows), strict=True))
    assert len(batch.rows) == len(rows) and sets_of(batch.rows) == [
        wanted[anchor] for anchor in batch.rows.turns.anchor_ids.tolist()
    ]
    assert sum(ids is not None for ids in sets_of(batch.rows)) > 3


def test_the_learner_renormalises_over_the_set():
    rows = restricted(make_rows(RUNS))
    learner = double(micro_batch_tokens=30)
    logprobs, sets = learner.logprobs(rows), sets_of(rows)
    assert sum(ids is not None for ids in sets) > 3 and None in sets
    for b in range(len(rows)):
        ids, turns = (tensor[rows.offsets[b] : rows.offsets[b + 1]] for tensor in (rows.token_ids, rows.turn_index))
        with torch.no_grad():
            logits = learner.model(input_ids=ids[None]).logits[0] / 0.7
        for t in rows.padded_mask[b].nonzero().flatten().tolist():
            allowed = left_of([sets[turns[t]]], VOCABULARY)[0]
            exact = logits[t - 1].masked_fill(~allowed, -torch.inf).log_softmax(-1)[ids[t]]
            assert float(logprobs[b, t]) == pytest.approx(float(exact), abs=1e-9)


def test_the_gradient_does_not_depend_on_passes_packing_or_order():
    results = []
    for packing, budget, chunk, order in (
        ("padded", 10**6, 100, None),
        ("tree", 10**6, 5, None),
        ("tree", 25, 100, None),
        ("padded", 20, 3, torch.tensor([6, 2, 0, 1, 5, 4, 3])),
    ):
        learner = learner_of(model_of("Starcoder2"), packing=packing, micro_batch_tokens=budget, lm_head_chunk=chunk)
        on_policy, replay = (
            batch_of(restricted(make_rows(RUNS, first_trajectory=at, seed=at), at), learner, shift=0.2)
            for at in (0, 100)
        )
        given_batch = on_policy if order is None else on_policy.select(order)
        results.append(gradient(learner, given_batch, replay, EVERYTHING, gamma=0.3))
    for other in results[1:]:
        assert float((other - results[0]).norm()) <= 1e-9 * float(results[0].norm())
    free = learner_of(model_of("Starcoder2"), packing="padded")
    plain_batches = [batch_of(make_rows(RUNS, first_trajectory=at, seed=at), free, shift=0.2) for at in (0, 100)]
    assert float((gradient(free, *plain_batches, EVERYTHING, gamma=0.3) - results[0]).norm()) > 0.1 * float(
        results[0].norm()
    )


def test_observed_tokens_that_are_trained_have_no_set():
    """Cold start also imitates a little of what was observed; such tokens belong to no turn."""
    rows = restricted(make_rows(RUNS), share=1.0)
    observed = torch.ones_like(rows.action_mask)
    observed[rows.offsets[:-1]] = False
    inputs = forward_inputs(rows.with_action_mask(observed))
    assert ((inputs.allowed[0] < 0) == (rows.turn_index[observed] < 0)).all() and (inputs.allowed[0] >= 0).any()
    assert forward_inputs(make_rows(RUNS)).allowed == ()


CHOICES = ((9, 40, 77), (12, 13))


def choosy(script: Script) -> Script:
    """Its observations restrict the replies of the last two turns of four, to a set each."""
    script.outcome = lambda turn, action: Outcome(
        Observation(f"turn {turn}", allowed_ids=(None, *CHOICES, None)[turn]), 1.0, terminated=turn == 3
    )
    return script


@pytest.mark.parametrize("style", ["chat", "windowed"])
def test_what_an_observation_allows_reaches_engine_rows_and_learner(style):
    model, encoder = parts()
    engine = LocalEngine(model, slots=8, context_tokens=256, cache_mib=16)
    groups = play(
        collector_of(engine, choosy(Script()), style=style, temperature=0.6, context_tokens=256), count=3, size=4
    )
    allowed = [tuple(sorted({*choice, *encoder.stop_ids})) for choice in CHOICES]
    turns = [turn for group in groups for trajectory in group.valid for turn in trajectory.turns]
    assert [turn.allowed_ids for turn in turns] == [None, None, *allowed] * 12
    assert all(set(turn.token_ids) <= set(turn.allowed_ids) for turn in turns if turn.allowed_ids)
    rows = rows_from_groups(groups)
    assert rows.allowed.sets == 2 and len(rows) == (12 if style == "chat" else 48)  # siblings share sets
    assert sets_of(rows) == [None if turn.allowed_ids is None else set(turn.allowed_ids) for turn in turns]
    for packing in ("padded", "tree"):
        logprobs = LocalLearner(model, LearnerSection(precision="fp32", packing=packing), temperature=0.6).logprobs(
            rows
        )
        torch.testing.assert_close(
            logprobs[rows.padded_mask], rows.rollout_logprobs[rows.action_mask], rtol=0, atol=1e-4
        )
    free = LocalLearner(model, LearnerSection(precision="fp32"), temperature=0.6).logprobs(replace(rows, allowed=None))
    assert float((free[rows.padded_mask] - rows.rollout_logprobs[rows.action_mask]).abs().max()) > 0.5


def test_a_token_that_was_not_allowed_is_an_error():
    engine = LocalEngine(parts()[0], slots=4, context_tokens=256, cache_mib=16)
    groups = play(collector_of(engine, choosy(Script())))
    turn = next(turn for turn in groups[0].trajectories[0].turns if turn.allowed_ids)
    turn.token_ids = (*turn.token_ids[:-1], 99)
    with pytest.raises(
        ContractError, match=r"trajectory 0, turn \d: sampled tokens \[99\] are not among the \d allowed ids"
    ):
        rows_from_groups(groups)


def test_a_step_on_restricted_rows_moves_only_what_was_possible():
    """The policy of a set of two: its gradient is that of a choice between two."""
    rows = make_rows([[1], [1]])
    turns = [{int(rows.token_ids[rows.turn_index == turn]), 3} for turn in range(2)]
    rows = replace(rows, allowed=allowed_of(turns))
    learner = LocalLearner(tiny(tied=False).double(), settings(grad_clip=1e9))
    flat = gradient(learner, batch_of(rows, learner), None, [Objective("policy"), Objective("entropy", weight=0.1)])
    names, sizes = zip(
        *[(name, parameter.numel()) for name, parameter in learner.model.named_parameters()], strict=True
    )
    head = dict(zip(names, flat.split(sizes), strict=True))["lm_head.weight"].view(VOCABULARY, -1)
    assert set(head.abs().sum(1).nonzero().flatten().tolist()) == set().union(*turns)


class Quiz(ToolEnvironment):
    def begin(self, task, draw):
        return "what?"

    @tool
    def look(self) -> Observation:
        return Observation("a or b?", anchor="door", allowed_ids=(5, 6))

    @tool
    def answer(self) -> Done:
        return Done(1.0)


def test_a_tools_observation_keeps_what_it_allows():
    env = Quiz()
    env.reset(Task("t", "train"), 0)
    shown = env.step(
        env.parse(Reply('<tool_call>{"name": "look", "arguments": {}}</tool_call>', (1,), "stop"))
    ).observation
    assert (shown.text, shown.anchor, shown.allowed_ids) == ("a or b?", "door", (5, 6))
