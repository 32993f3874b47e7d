"""Advantages: hand values, golden files, brute force, properties."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spearrl.advantages import (
    discounted_returns,
    gae,
    gigpo_advantages,
    grpo_advantages,
    masked_moments,
    recalibrated_advantages,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo_advantages,
    whiten,
)
from spearrl.errors import ContractError
from tests.support.shared_data import golden

DTYPES = {"f32": (torch.float32, {"rtol": 1e-5, "atol": 1e-6}), "f64": (torch.float64, {"rtol": 1e-9, "atol": 1e-9})}
PRECISIONS = list(DTYPES)
TREES = ["agent", "math"]


def ids(labels) -> torch.Tensor:
    """Integers in order of first appearance."""
    seen: dict = {}
    return torch.tensor([seen.setdefault(label, len(seen)) for label in labels], dtype=torch.int64)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), **(tolerance or {"rtol": 1e-5, "atol": 1e-6})
    )


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- worked values ---


def test_grpo_by_hand():
    rewards, group = f64([1, 0, 0, 1]), torch.zeros(4, dtype=torch.int64)
    close(grpo_advantages(rewards, group), [0.8660239, -0.8660239, -0.8660239, 0.8660239])
    close(grpo_advantages(rewards, group, normalize_std=False), [0.5, -0.5, -0.5, 0.5])


def test_singleton_modes():
    one, group = f64([5.0]), torch.tensor([3])
    close(grpo_advantages(one, group), [0.0])
    close(grpo_advantages(one, group, singleton="raw"), [4.999995])
    close(grpo_advantages(one, group, singleton="raw", normalize_std=False), [5.0])
    close(rloo_advantages(one, group), [0.0])
    close(rloo_advantages(one, group, singleton="raw"), [5.0])


def test_a_trajectory_of_many_turns_is_still_a_singleton():
    rewards, zeros = f64([5.0, 5.0, 5.0]), torch.zeros(3, dtype=torch.int64)
    close(grpo_advantages(rewards, zeros, trajectory_ids=zeros), [0.0, 0.0, 0.0])


def test_statistics_over_turns_or_trajectories():
    rewards, group, trajectory = (
        f64([10, 10, 10, 0, 0, 0]),
        torch.zeros(6, dtype=torch.int64),
        torch.tensor([0, 0, 0, 1, 2, 2]),
    )
    close(
        grpo_advantages(rewards, group, trajectory_ids=trajectory, statistics="turn", normalize_std=False),
        [5.0] * 3 + [-5.0] * 3,
    )
    close(
        grpo_advantages(rewards, group, trajectory_ids=trajectory, statistics="turn"),
        [0.9128707] * 3 + [-0.9128707] * 3,
    )
    per_trajectory = grpo_advantages(rewards, group, trajectory_ids=trajectory, normalize_std=False)
    close(per_trajectory, [10 - 10 / 3] * 3 + [-10 / 3] * 3)
    close(
        grpo_advantages(rewards, group, trajectory_ids=trajectory), [1.15470] * 3 + [-0.57735] * 3, rtol=1e-5, atol=1e-5
    )


HAND = {
    False: [5.721428, 2.671429, 2.871428, 6.196429, 2.971428, -13.303572, -7.128572],
    True: [1.122044, -0.117474, 0.58963, 1.21078, 1.2762, -2.617372, -1.463809],
}


@pytest.mark.parametrize("normalize_std", [False, True])
def test_gigpo_by_hand(normalize_std):
    group, trajectory, anchor = (
        torch.zeros(7, dtype=torch.int64),
        torch.tensor([0, 0, 0, 1, 1, 2, 2]),
        torch.tensor([0, 1, 2, 0, 1, 0, 3]),
    )
    returns = discounted_returns(f64([0, 0, 10, 0, 10, 0, 0]), trajectory, 0.95)
    close(returns, [9.025, 9.5, 10, 9.5, 10, 0, 0])
    penalty = f64([0, 0, 0, 0, 0.1, 0, 0])
    episode = f64([10] * 5 + [0] * 2) - penalty
    advantages = gigpo_advantages(
        episode,
        returns - penalty,
        group,
        anchor,
        trajectory_ids=trajectory,
        normalize_std=normalize_std,
        statistics="turn",
        singleton="raw",
    )
    close(advantages, HAND[normalize_std], rtol=1e-5, atol=1e-6)


def test_recalibrated_by_hand():
    close(recalibrated_advantages(f64([10, 0, 2.5]), 2.5), [7.5, -2.5, 0.0])
    close(recalibrated_advantages(f64([10.0]), 2.0, 2.0, eps=0.0), [4.0])


# --- golden files ---


def inputs(case, dtype):
    rewards = torch.tensor(case["token_level_rewards"], dtype=dtype).sum(-1)
    trajectory = ids(list(zip(case["index"], case["traj_index"], strict=True)))
    return rewards, ids(case["index"]), trajectory, torch.tensor(case["response_mask"], dtype=dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tree", TREES)
def test_golden_grpo(tree, precision):
    dtype, tolerance = DTYPES[precision]
    for case in golden(f"grpo_{tree}")["cases"]:
        rewards, group, trajectory, mask = inputs(case, dtype)
        if "custom_mean" in case:
            advantages = recalibrated_advantages(
                rewards, case["custom_mean"], case["custom_std"] if case["norm_adv_by_std"] else None
            )
        else:
            statistics = "turn" if case.get("cross_all_data", True) else "trajectory"
            advantages = grpo_advantages(
                rewards,
                group,
                trajectory_ids=trajectory,
                normalize_std=case["norm_adv_by_std"],
                statistics=statistics,
                singleton="raw",
                eps=case["epsilon"],
            )
        close(advantages[:, None] * mask, case["advantages"][precision], **tolerance)


def test_golden_gigpo():
    for case in golden("gigpo_agent")["cases"]:
        group, trajectory = ids(case["group"]), ids(case["traj"])
        anchor = ids([str(a) for a in case["anchor_obs"]])
        mask = torch.tensor(case["response_mask"])
        returns = discounted_returns(torch.tensor(case["env_rewards"], dtype=torch.float32), trajectory, case["gamma"])
        close(returns, case["step_returns"])
        penalty = case["invalid_penalty"] * torch.tensor(case["action_invalid"], dtype=torch.float32)
        close(returns - penalty, case["step_rewards_after_penalty"])
        episode = torch.tensor(case["token_level_rewards"]).sum(-1)
        common = {
            "trajectory_ids": trajectory,
            "normalize_std": case["mode"] == "mean_std_norm",
            "statistics": "turn",
            "singleton": "raw",
        }
        steps = torch.tensor(case["step_rewards_after_penalty"])
        total = gigpo_advantages(episode, steps, group, anchor, step_weight=case["omega"], **common)
        only_episode = gigpo_advantages(episode, steps, group, anchor, step_weight=0.0, **common)
        tolerance = {"rtol": 1e-5, "atol": 2e-6}
        close(only_episode[:, None] * mask, case["episode_adv"], **tolerance)
        close(total[:, None] * mask, case["advantages"], **tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tree", TREES)
def test_golden_rloo_and_reinforce_plus_plus(tree, precision):
    dtype, tolerance = DTYPES[precision]
    for case in golden(f"estimators_{tree}")["cases"]:
        rewards, group, _, mask = inputs(case, dtype)
        close(rloo_advantages(rewards, group, singleton="raw")[:, None] * mask, case["rloo"][precision], **tolerance)
        baseline = reinforce_plus_plus_baseline(rewards, group, mask.sum(-1), singleton="raw")
        close(baseline[:, None] * mask, case["reinforce_plus_plus_baseline"][precision], **tolerance)
        for gamma in (1.0, 0.95):
            advantages = reinforce_plus_plus(
                torch.tensor(case["token_level_rewards"], dtype=dtype), mask.bool(), gamma=gamma, gaps="reset"
            )
            close(advantages, case[f"reinforce_plus_plus_gamma{gamma}"][precision], **tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_golden_gae(precision):
    dtype, tolerance = DTYPES[precision]
    for case in golden("estimators_math")["cases"]:
        mask = torch.tensor(case["response_mask"]).bool()
        rewards, values = (torch.tensor(case[name], dtype=dtype) for name in ("token_level_rewards", "values"))
        for gamma, lam in ((1.0, 1.0), (0.99, 0.95)):
            advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
            name = f"g{gamma}_l{lam}"
            close(whiten(advantages, mask)[mask], f64(case[f"gae_{name}"][precision])[mask], **tolerance)
            close(returns[mask], f64(case[f"gae_returns_{name}"][precision])[mask], **tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tree", TREES)
def test_golden_masked_statistics(tree, precision):
    dtype, tolerance = DTYPES[precision]
    for case in golden(f"masked_stats_{tree}")["cases"]:
        values, mask = torch.tensor(case["values"], dtype=dtype), torch.tensor(case["mask"]).bool()
        mean, variance = masked_moments(values, mask)
        if mask.sum() < 2:  # the reference raises; one value has no spread, none has no mean either
            close(torch.stack([mean, variance]), [float(values[mask].sum()), 0.0], rtol=1e-7, atol=1e-7)
            assert whiten(values, mask).abs().max() < 1e-3
            continue
        close(mean, case["masked_mean"][precision], **tolerance)
        close(variance, case["masked_var"][precision], **tolerance)
        close(whiten(values, mask)[mask], f64(case["masked_whiten"][precision])[mask], **tolerance)
        close((whiten(values, mask) + mean)[mask], f64(case["masked_whiten_noshift"][precision])[mask], **tolerance)


# --- brute force and properties ---


def test_discounted_returns_of_interleaved_trajectories():
    generator = torch.Generator().manual_seed(0)
    trajectory = torch.randint(0, 5, (200,), generator=generator)
    rewards = torch.randn(200, generator=generator, dtype=torch.float64)
    expected, running = [0.0] * 200, {}
    for t in reversed(range(200)):
        key = int(trajectory[t])
        running[key] = expected[t] = float(rewards[t]) + 0.9 * running.get(key, 0.0)
    close(discounted_returns(rewards, trajectory, 0.9), expected, rtol=1e-12, atol=1e-12)
    close(discounted_returns(rewards, trajectory, 0.0), rewards)


@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_gae_skips_tokens_that_are_not_actions(lam):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(4, 30, generator=generator) < 0.6
    mask[2] = False
    rewards, values = torch.randn(2, 4, 30, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(values)
    for row in range(4):
        following, running = 0.0, 0.0
        for t in reversed(range(30)):
            if mask[row, t]:
                running = float(rewards[row, t] + 0.97 * following - values[row, t]) + 0.97 * lam * running
                following, expected[row, t] = float(values[row, t]), running
    garbage = torch.where(mask, 0.0, torch.nan)
    advantages, returns = gae(rewards + garbage, values + garbage, mask, gamma=0.97, lam=lam)
    close(advantages, expected, rtol=1e-12, atol=1e-12)
    close(returns, torch.where(mask, expected + values, 0.0), rtol=1e-12, atol=1e-12)


def test_reinforce_plus_plus_credits_turns_before_a_tool_output():
    rewards, mask = (
        f64([[0, 0, 0, 1.0], [0, 0, 0, 0]]),
        torch.tensor([[True, False, True, True], [True, False, True, True]]),
    )
    skipping = reinforce_plus_plus(rewards, mask)
    assert skipping[0, 0] == skipping[0, 3] > 0 > skipping[1, 0]
    assert reinforce_plus_plus(rewards, mask, gaps="reset")[0, 0] < 0


@pytest.mark.parametrize("reward", [0.1, 9.9, 1 / 3])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_rewards_give_exactly_zero(reward, size):
    for dtype in (torch.float32, torch.float64):
        rewards, group = torch.full((size,), reward, dtype=dtype), torch.zeros(size, dtype=torch.int64)
        assert not grpo_advantages(rewards, group).any()
        assert not rloo_advantages(rewards, group).any()


def test_types_follow_the_input_and_empty_input_is_fine():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert grpo_advantages(torch.zeros(0), nothing, trajectory_ids=nothing).shape == (0,)
    assert discounted_returns(torch.zeros(0), nothing, 0.9).shape == (0,)
    assert gigpo_advantages(torch.zeros(0), torch.zeros(0), nothing, nothing).shape == (0,)
    zeros = torch.zeros(2, dtype=torch.int64)
    assert grpo_advantages(torch.tensor([1.0, 0.0]), zeros).dtype == torch.float32
    close(grpo_advantages(torch.tensor([1, 0]), zeros, normalize_std=False), [0.5, -0.5])


def test_bad_options_say_what_to_do():
    rewards, group = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    for wrong in ({"statistics": "row"}, {"singleton": "nan"}):
        with pytest.raises(ContractError, match="must be"):
            grpo_advantages(rewards, group, **wrong)
    with pytest.raises(ContractError, match=r"\[N\]"):
        grpo_advantages(rewards, group[:2])
    with pytest.raises(ContractError, match="skip"):
        reinforce_plus_plus(torch.ones(1, 2), torch.ones(1, 2).bool(), gaps="jump")


turns = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(-10, 10)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(turns, st.booleans(), st.randoms())
def test_grpo_properties(rows, normalize_std, random):
    group, trajectory = torch.tensor([g for g, _, _ in rows]), torch.tensor([g * 4 + t for g, t, _ in rows])
    scores = {int(key): rows[i][2] for i, key in reversed(list(enumerate(trajectory)))}
    rewards = f64([scores[int(key)] for key in trajectory])
    advantages = grpo_advantages(rewards, group, trajectory_ids=trajectory, normalize_std=normalize_std)
    for g in set(group.tolist()):
        members = {int(t): float(a) for t, a in zip(trajectory[group == g], advantages[group == g], strict=True)}
        assert math.isclose(sum(members.values()), 0.0, abs_tol=1e-6)
    shifted = grpo_advantages(rewards + 3.0, group, trajectory_ids=trajectory, normalize_std=False)
    close(
        shifted, grpo_advantages(rewards, group, trajectory_ids=trajectory, normalize_std=False), rtol=1e-6, atol=1e-8
    )
    order = list(range(len(rows)))
    random.shuffle(order)
    permuted = grpo_advantages(
        rewards[order], group[order], trajectory_ids=trajectory[order], normalize_std=normalize_std
    )
    close(permuted, advantages[order], rtol=1e-6, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=10))
def test_rloo_is_reward_minus_mean_of_the_others(rewards):
    total = sum(rewards)
    expected = [r - (total - r) / (len(rewards) - 1) for r in rewards]
    close(rloo_advantages(f64(rewards), torch.zeros(len(rewards), dtype=torch.int64)), expected, rtol=1e-9, atol=1e-9)


def test_a_hundred_thousand_turns_take_milliseconds():
    count = 100_000
    trajectory = torch.arange(count) // 20
    rewards, group, anchor = torch.rand(count), trajectory // 8, torch.randint(0, 2**62, (count,)) % 997
    spent = []
    for _ in range(3):
        start = time.thread_time()  # processor time: other processes do not count
        gigpo_advantages(
            rewards, discounted_returns(rewards, trajectory, 0.95), group, anchor, trajectory_ids=trajectory
        )
        spent.append(time.thread_time() - start)
    assert min(spent) < 0.5  # about 0.03 s; a loop over groups takes many seconds


def test_a_penalty_in_an_equal_group_stays_small():
    """Two failing siblings, one invalid turn each: by first turns the deviation would be 0, the penalty -0.1 / 1e-6."""
    rewards = torch.tensor([0.0, -0.1, 0.0, -0.1], dtype=torch.float64)
    advantages = balanced(rewards, torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 1, 1]))
    assert advantages.tolist() == pytest.approx(
        [0.70710, -0.70710, 0.70710, -0.70710], abs=1e-4
    )  # mean -0.05, variance 2 * 0.0025 / 1


def test_without_penalties_it_is_grpo():
    generator = torch.Generator().manual_seed(3)
    trajectory = torch.arange(12).repeat_interleave(torch.randint(1, 5, (12,), generator=generator))
    rewards = torch.randn(12, generator=generator, dtype=torch.float64)[trajectory]
    for normalize_std in (True, False):
        expected = grpo_advantages(rewards, trajectory // 4, trajectory_ids=trajectory, normalize_std=normalize_std)
        advantages = balanced(rewards, trajectory // 4, trajectory, normalize_std=normalize_std)
        assert torch.allclose(advantages, expected, rtol=0, atol=1e-9)


def test_penalised_singletons_and_equal_groups():
    ids = torch.tensor([0, 0, 1, 1])
    assert balanced(torch.tensor([5.0, 4.9, 2.0, 2.0]), ids, torch.tensor([0, 0, 1, 2])).tolist() == [
        0.0,
        0.0,
        0.0,
        0.0,
    ]


def balanced(rewards, group_ids, trajectory_ids, **options):
    return grpo_advantages(rewards, group_ids, trajectory_ids=trajectory_ids, statistics="balanced", **options)


@pytest.mark.parametrize("statistics", ["trajectory", "balanced"])
@pytest.mark.parametrize("rewards", [[0.0, 5.0, 10.0], [0.0, 0.1, 0.2], [-1.0, -0.3, 0.4]])
def test_a_reward_at_the_mean_is_worth_exactly_nothing(rewards, statistics):
    """Whatever the weights of turns round to: else the trajectory would count as a good one and be replayed."""
    turns = [3, 7, 5]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(turns))
    values = torch.tensor(rewards, dtype=torch.float64)[ids]
    options = {"trajectory_ids": ids, "statistics": statistics, "normalize_std": False}
    advantages = grpo_advantages(values, torch.zeros_like(ids), **options)
    assert (advantages[ids == 1] == 0).all() and (advantages[ids == 0] < 0).all() and (advantages[ids == 2] > 0).all()
