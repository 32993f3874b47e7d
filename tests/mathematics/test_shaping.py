"""Intrinsic bonus, quality flags, group filter, penalty."""

from __future__ import annotations

import random
import statistics
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spearrl.errors import ContractError
from spearrl.schedules import cosine_decay
from spearrl.shaping import (
    filter_groups_by_std,
    overlong,
    penalise_invalid,
    repetitive,
    tool_bonus,
    unreadable,
    void_turn,
)
from tests.support.shared_data import golden

MU = {"none": lambda step, total: 0.0, "constant": lambda step, total: 1.0, "cosine": cosine_decay}


def test_tool_bonus_by_hand():
    assert [tool_bonus(n) for n in (0, 3, 10, 12)] == pytest.approx([0.0, 0.3, 1.0, 1.0])
    right, wrong = 1 + tool_bonus(3), -1 + tool_bonus(3)
    assert (right, wrong) == pytest.approx((1.3, -0.7))
    assert (1 + cosine_decay(100, 200) * tool_bonus(3), -1 + cosine_decay(100, 200) * tool_bonus(3)) == pytest.approx(
        (1.15, -0.85)
    )
    assert tool_bonus(7, per_call=0.5, cap=2.0) == 2.0


def test_golden_episode_rewards():
    for case in golden("episode_reward_agent")["cases"]:
        if "flags" in case:
            assert [int(void_turn(case["text"]))] == case["flags"]["is_incomplete"]
            assert [int(overlong(case["valid_len"], case["max_response_len"]))] == case["flags"]["is_overlong"]
            continue
        mu = MU[case["mode"]](case["global_steps"], case["max_toolcall_steps"])
        reward = case["episode_reward"] + mu * tool_bonus(case["episode_length"])
        assert reward == pytest.approx(case["reward"], rel=1e-5, abs=1e-6)


def test_golden_toolcall_rewards():
    for case in golden("toolcall_reward_math")["cases"]:
        mu = MU[case["mode"]](case["global_steps"], case["max_toolcall_steps"])
        right, calls = case["result"]["acc"], case["n_tool_call_turns"]
        once = case["fn"].endswith("qwen3") and right  # this variant pays correct answers for any call at all
        bonus = tool_bonus(calls, per_call=1.0) if once else tool_bonus(calls)
        assert (1.0 if right else -1.0) + mu * bonus == pytest.approx(case["result"]["score"], rel=1e-9, abs=1e-9)


def test_golden_invalid_penalty():
    for case in golden("invalid_penalty_agent")["cases"]:
        invalid = ~torch.tensor(case["is_action_valid"])
        rewards = penalise_invalid(
            torch.tensor(case["before"], dtype=torch.float32).sum(-1), invalid, coefficient=case["coef"]
        )
        torch.testing.assert_close(rewards, torch.tensor(case["after"]).sum(-1))
        steps = penalise_invalid(torch.tensor(case["step_rewards_before"]), invalid, coefficient=case["coef"])
        torch.testing.assert_close(steps, torch.tensor(case["step_rewards_after"]))


def test_golden_filters():
    for case in golden("filters_agent")["cases"]:
        if case["fn"] == "is_think_action_valid":
            assert void_turn(case["text"]) != case["valid"], case["text"]
        else:
            assert repetitive(case["tokens"], ngram=case["n"], times=case["threshold"]) == case["repetitive"], case[
                "name"
            ]


def test_void_turn():
    assert void_turn(None) and void_turn("<action>go") and void_turn("go</action><action>")
    assert not void_turn("<action>\ngo\n</action>") and not void_turn("<think>x</think> <action></action>")


@pytest.mark.parametrize(
    ("period", "length", "expected"),
    [(1, 28, False), (1, 29, True), (20, 180, False), (20, 200, True), (7, 82, False), (7, 83, True)],
)
def test_repetitive_by_hand(period, length, expected):
    assert repetitive([i % period for i in range(length)]) is expected


def test_repetitive_is_quick_on_long_replies():
    generator = random.Random(0)
    tokens = [generator.randrange(50) for _ in range(16_384)]
    start = time.thread_time()
    assert not repetitive(tokens) and repetitive(tokens + [1] * 29)
    assert time.thread_time() - start < 1.0


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 4), st.integers(1, 5))
def test_repetitive_equals_counting(tokens, ngram, times):
    grams = [tuple(tokens[i : i + ngram]) for i in range(len(tokens) - ngram + 1)]
    assert repetitive(tokens, ngram=ngram, times=times) == any(grams.count(gram) >= times for gram in grams)


def test_repetitive_refuses_nonsense():
    with pytest.raises(ContractError, match=">= 1"):
        repetitive([1, 2], ngram=0)


def test_unreadable():
    mangled = "\ufffd".encode()
    assert unreadable("a\ufffdb") and unreadable(mangled.decode("latin-1")) and unreadable((mangled * 2).decode("gbk"))
    assert unreadable("\uff1f".encode().decode("cp1252")) and unreadable("\uff1f".encode().decode("latin-1"))
    assert not unreadable("") and not unreadable("Is it so? 是吗\uff1f café naïve ½")


def test_overlong():
    assert overlong(512, 512) and not overlong(511, 512)


# --- group filter ---


def groups_left(rewards, groups, trajectories, keep):
    ids = {name: i for i, name in enumerate(dict.fromkeys(trajectories))}
    tensors = (
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(groups),
        torch.tensor([ids[t] for t in trajectories]),
    )
    return filter_groups_by_std(*tensors, keep=keep).tolist()


@pytest.mark.parametrize("tree", ["agent", "math"])
def test_golden_group_filter(tree):
    checked = 0
    for case in golden(f"rollout_filter_{tree}")["cases"]:
        if case["type"] != "std" and case["ratio"] < 1:  # std_rev keeps the flattest groups: not offered
            continue
        names = list(dict.fromkeys(case["uid"]))
        result = groups_left(case["reward"], [names.index(u) for u in case["uid"]], case["traj_uid"], case["ratio"])
        if tree == "agent":
            assert [names[i] for i in result] == case["kept_groups"]
        else:  # torch.topk there leaves open which of equal deviations it takes; ours are the earliest
            spread = {
                u: statistics.pstdev(r for r, v in zip(case["reward"], case["uid"], strict=True) if v == u)
                for u in names
            }
            assert sorted(spread[names[i]] for i in result) == sorted(spread[u] for u in case["kept_groups"])
        checked += 1
    assert checked == 12


def test_a_trajectory_counts_once_however_long():
    rewards, groups, trajectories = [10, 10, 10, 10, 0, 10, 0], [0] * 5 + [1] * 2, [0, 0, 0, 0, 1, 2, 3]
    assert groups_left(rewards, groups, trajectories, 0.5) == [
        0
    ]  # both groups have deviation 5; the first wins the tie


def test_ties_go_to_the_group_that_appears_first_and_one_group_always_stays():
    rewards, groups = [0.0, 10, 10, 0, 0.1, 0.1, 0, 10], [9, 9, 3, 3, 5, 5, 1, 1]
    assert groups_left(rewards, groups, list(range(8)), 0.5) == [9, 3]
    assert groups_left(rewards, groups, list(range(8)), 0.1) == [9]
    assert groups_left(rewards, groups, list(range(8)), 1.0) == [9, 3, 5, 1]
    assert groups_left([], [], [], 0.5) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=40),
    st.floats(0.05, 0.99),
)
def test_group_filter_equals_a_plain_loop(turns, keep):
    groups, trajectories = [g for g, _, _ in turns], [g * 10 + t for g, t, _ in turns]
    rewards = [float(r) for _, _, r in turns]
    spread = {}
    for group in dict.fromkeys(groups):
        means = [
            statistics.fmean(r for r, t in zip(rewards, trajectories, strict=True) if t == one)
            for one in set(trajectories)
            if one // 10 == group
        ]
        spread[group] = statistics.pstdev(means)
    result, count = groups_left(rewards, groups, trajectories, keep), max(1, int(keep * len(spread)))
    assert len(result) == count and result == [g for g in spread if g in result]
    worst = min(spread[g] for g in result)
    assert all(spread[g] <= worst + 1e-9 for g in spread if g not in result)
