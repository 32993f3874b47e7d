"""Advantages and schedules against tests/support/reference.py on random inputs, in float64 at 1e-9."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from spearrl import advantages as adv
from spearrl import schedules
from tests.support import reference as ref
from tests.support.random_inputs import checked, compare, token_tables, turn_tables

statistics_kinds = st.sampled_from(["trajectory", "turn", "balanced"])
singleton_kinds = st.sampled_from(["zero", "raw"])


@checked
@given(turn_tables, st.booleans(), statistics_kinds, singleton_kinds)
def test_grpo(turns, normalize_std, statistics, singleton):
    options = {"normalize_std": normalize_std, "statistics": statistics, "singleton": singleton}
    got = adv.grpo_advantages(turns.t_rewards, turns.t_groups, trajectory_ids=turns.t_trajectories, **options)
    compare(got, ref.grpo(turns.rewards, turns.groups, turns.trajectories, **options))
    alone = adv.grpo_advantages(turns.t_rewards, turns.t_groups, **options)
    compare(alone, ref.grpo(turns.rewards, turns.groups, range(len(turns.rewards)), **options))


@checked
@given(turn_tables, st.booleans(), statistics_kinds, singleton_kinds, st.floats(0, 2), st.booleans())
def test_gigpo(turns, normalize_std, statistics, singleton, weight, discount):
    returns = ref.discounted(turns.rewards, turns.trajectories, 0.95) if discount else turns.rewards
    t_returns = torch.tensor(returns, dtype=torch.float64)
    options = {"normalize_std": normalize_std, "statistics": statistics, "singleton": singleton, "step_weight": weight}
    got = adv.gigpo_advantages(
        turns.t_rewards, t_returns, turns.t_groups, turns.t_anchors, trajectory_ids=turns.t_trajectories, **options
    )
    compare(got, ref.gigpo(turns.rewards, returns, turns.groups, turns.anchors, turns.trajectories, **options))
    step = adv.state_advantages(t_returns, turns.t_groups, turns.t_anchors, normalize_std=normalize_std)
    compare(step, ref.state(returns, turns.groups, turns.anchors, normalize_std=normalize_std))


@checked
@given(turn_tables, st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_discounted_returns(turns, gamma):
    compare(
        adv.discounted_returns(turns.t_rewards, turns.t_trajectories, gamma),
        ref.discounted(turns.rewards, turns.trajectories, gamma),
    )


@checked
@given(turn_tables, statistics_kinds, singleton_kinds)
def test_rloo(turns, statistics, singleton):
    options = {"statistics": statistics, "singleton": singleton}
    got = adv.rloo_advantages(turns.t_rewards, turns.t_groups, trajectory_ids=turns.t_trajectories, **options)
    compare(got, ref.rloo(turns.rewards, turns.groups, turns.trajectories, **options))


@checked
@given(turn_tables, statistics_kinds, singleton_kinds)
def test_reinforce_plus_plus_baseline(turns, statistics, singleton):
    options = {"statistics": statistics, "singleton": singleton}
    assume(sum(turns.counts) != 1)
    got = adv.reinforce_plus_plus_baseline(
        turns.t_rewards, turns.t_groups, turns.t_counts, trajectory_ids=turns.t_trajectories, **options
    )
    compare(
        got,
        ref.reinforce_plus_plus_baseline(turns.rewards, turns.groups, turns.counts, turns.trajectories, **options),
        floor=1e-10,
    )


@checked
@given(turn_tables, st.booleans(), st.booleans())
def test_recalibrated_advantages(turns, per_turn, with_std):
    count = len(turns.rewards)
    baselines = turns.rng.normal(size=count).tolist() if per_turn else [2.5] * count
    spreads = (turns.rng.random(count) + 0.1).tolist() if per_turn else [1.25] * count
    as_given = [torch.tensor(column, dtype=torch.float64) if per_turn else column[0] for column in (baselines, spreads)]
    got = adv.recalibrated_advantages(turns.t_rewards, as_given[0], as_given[1] if with_std else None)
    compare(got, ref.recalibrated(turns.rewards, baselines, spreads if with_std else None))


@checked
@given(token_tables, st.floats(0, 1), st.floats(0, 1))
def test_gae(table, gamma, lam):
    rewards, values = table.table(table.rng.normal(size=table.shape)), table.near
    got = adv.gae(torch.tensor(rewards), torch.tensor(values), torch.tensor(table.mask), gamma=gamma, lam=lam)
    expected = ref.gae(rewards.tolist(), values.tolist(), table.mask.tolist(), gamma=gamma, lam=lam)
    for actual, value in zip(got, expected, strict=True):
        compare(actual, value)


@checked
@given(token_tables, st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from(["skip", "reset"]))
def test_reinforce_plus_plus(table, gamma, gaps):
    rewards = table.table(table.rng.normal(size=table.shape))
    assume(table.mask.sum() != 1)
    got = adv.reinforce_plus_plus(torch.tensor(rewards), torch.tensor(table.mask), gamma=gamma, gaps=gaps)
    compare(got, ref.reinforce_plus_plus(rewards.tolist(), table.mask.tolist(), gamma=gamma, gaps=gaps), floor=1e-10)


@checked
@given(st.floats(-3, 400), st.floats(0.5, 300), st.sampled_from(["cosine", "linear", "constant"]), st.booleans())
def test_schedules(step, total, kind, rising):
    compare(schedules.cosine_warmup(step, total), ref.schedule("cosine", step, total, rising=True))
    compare(schedules.cosine_decay(step, total), ref.schedule("cosine", step, total, rising=False))
    compare(schedules.schedule_value(kind, step, total, rising=rising), ref.schedule(kind, step, total, rising=rising))


@checked
@given(st.sampled_from(["entropy", "curiosity", "success"]), st.floats(-1, 2), st.floats(0, 0.4), st.floats(0.5, 1))
def test_adaptive_progress(kind, value, low, high):
    compare(schedules.adaptive_progress(kind, value, low=low, high=high), ref.adaptive(kind, value, low, high))


def test_the_reference_gives_the_hand_worked_values():
    options = {"statistics": "turn", "singleton": "raw"}
    compare(ref.grpo([1, 0, 0, 1], [0] * 4, range(4), normalize_std=False, **options), [0.5, -0.5, -0.5, 0.5])
    compare(ref.grpo([5.0], [0], [0], normalize_std=True, **options), [5 / 1.000001])
    three = [10, 10, 10, 0, 0, 0], [0] * 6, [0, 0, 0, 1, 2, 2]
    compare(ref.grpo(*three, normalize_std=False, **options), [5, 5, 5, -5, -5, -5])
    compare(
        ref.grpo(*three, normalize_std=False, statistics="trajectory", singleton="raw"), [20 / 3] * 3 + [-10 / 3] * 3
    )
    compare(
        [ref.schedule("cosine", step, 200, rising=True) for step in (1, 50, 100)],
        [6.168375e-5, 0.1464466094, 0.5],
        floor=1e-10,
    )
