"""Health alarms: each begins at its threshold, is given once, clears, comes again; its settings exist."""

from __future__ import annotations

import itertools
import json
import math
import re
import tomllib
from pathlib import Path

import pytest

from spearrl.config import RunConfig
from spearrl.config.fields import leaves
from spearrl.run.health import FLAGS, Alarm, Health

# flag: metrics just inside what is well, and just outside
SIMPLE = {
    "entropy_collapse": ({"policy/entropy": 0.6}, {"policy/entropy": 0.179}),  # starts at 0.6: 30 % is 0.18
    "equal_groups": ({"rollout/mixed_groups": 0.4}, {"rollout/mixed_groups": 0.39}),
    "sampler_gap": ({"policy/sampler_gap": 0.05}, {"policy/sampler_gap": 0.051}),
    "clipping": ({"policy/clip_fraction": 0.2}, {"policy/clip_fraction": 0.21}),
    "invalid_actions": ({"rollout/invalid": 0.3}, {"rollout/invalid": 0.31}),
    "outage": ({"rollout/faults": 0.1}, {"rollout/faults": 0.11}),
    "truncation": (
        {"status/success": 40.0, "status/failure": 50.0, "status/context_limit": 6.0, "status/overlong": 4.0},
        {"status/success": 40.0, "status/failure": 49.0, "status/context_limit": 6.0, "status/overlong": 5.0},
    ),
    "grad_norm": ({"policy/grad_norm": 2.0}, {"policy/grad_norm": 20.1}),
    "skipped_updates": ({"policy/skipped": 0.0}, {"policy/skipped": 1.0}),
    "nonfinite_rollout": ({"guard/nonfinite_rollout_logprobs": 0.0}, {"guard/nonfinite_rollout_logprobs": 3.0}),
}
GROWTH = (
    {"rollout/reply_tokens": 100.0, "rollout/reward": 0.5},
    {"rollout/reply_tokens": 150.0, "rollout/reward": 0.5},
)
FARM = ({"rollout/tool_calls": 2.0, "rollout/success": 0.5}, {"rollout/tool_calls": 4.0, "rollout/success": 0.1})
QUIET = ({"policy/updates": 2.0}, {"policy/updates": 0.0, "rollout/mixed_groups": 0.0, "rollout/success": 0.0})
WINDOWED = {"length_growth": GROWTH, "tool_bonus_farmed": FARM, "no_signal": QUIET}


def play(*parts: tuple[dict[str, float], int], health: Health | None = None, first: int = 1) -> list[tuple[int, Alarm]]:
    """Each part's metrics for so many steps; the alarms with their steps."""
    health = health or Health()
    steps = [metrics for metrics, count in parts for _ in range(count)]
    return [(step, alarm) for step, metrics in enumerate(steps, first) for alarm in health.observe(step, metrics)]


def steps_of(alarms: list[tuple[int, Alarm]]) -> list[tuple[int, str]]:
    return [(step, alarm.flag) for step, alarm in alarms]


@pytest.mark.parametrize("flag", SIMPLE)
def test_begins_once_clears_and_comes_again(flag):
    well, ill = SIMPLE[flag]
    assert steps_of(play((well, 10), (ill, 3), (well, 3), (ill, 2))) == [(11, flag), (17, flag)]


@pytest.mark.parametrize("flag", SIMPLE)
def test_a_metric_that_flaps_around_its_limit_is_told_once(flag):
    well, ill = SIMPLE[flag]
    assert steps_of(play((well, 10), *[(ill, 1), (well, 2)] * 4)) == [(11, flag)]


@pytest.mark.parametrize("flag", SIMPLE)
def test_a_step_without_the_metric_or_without_a_number_changes_nothing(flag):
    well, ill = SIMPLE[flag]
    blind = dict.fromkeys(ill, math.nan)
    assert play((blind, 3), ({}, 3)) == []
    assert steps_of(play((well, 10), (ill, 1), (blind, 1), ({}, 1), (ill, 1))) == [(11, flag)]


def test_every_flag_has_a_case():
    assert set(SIMPLE) | set(WINDOWED) == set(FLAGS) and len(FLAGS) == len(set(FLAGS))


def test_entropy_counts_against_the_first_one_and_only_up_to_step_50():
    start, low = {"policy/entropy": 0.5}, {"policy/entropy": 0.14}
    assert steps_of(play((start, 49), (low, 1))) == [(50, "entropy_collapse")]
    assert play((start, 50), (low, 5)) == []
    assert play(({"policy/entropy": 0.0}, 2), (low, 3)) == []  # a start of 0 is no start
    text = play((start, 1), (low, 1))[0][1].text
    assert "0.14" in text and "28%" in text and "0.5" in text


@pytest.mark.parametrize(
    ("success", "said"),
    [(0.5, "too easy (50% succeed)"), (0.49, "too hard (49% succeed)"), (None, "too easy or too hard")],
)
def test_equal_groups_says_which(success, said):
    metrics = {"rollout/mixed_groups": 0.25} | ({} if success is None else {"rollout/success": success})
    ((_, alarm),) = play((metrics, 1))
    assert said in alarm.text and "75%" in alarm.text


def test_length_growth_compares_ten_steps_with_the_ten_before():
    short, long = GROWTH
    assert steps_of(play((short, 10), (long, 10))) == [(20, "length_growth")]  # mean 100, then 150
    assert play((short, 10), ({**long, "rollout/reply_tokens": 125.0}, 10)) == []  # up by exactly 25 %
    assert play((long, 40)) == []
    # After 10 + 13 steps the older ten average 115 tokens and 150 > 1.25 · 115; after 14 it is 120: cleared.
    health = Health()
    play((short, 10), (long, 13), health=health)
    assert "length_growth" in health.state_dict()["active"]
    play((long, 3), health=health, first=24)
    assert health.state_dict()["active"] == {}
    # It comes again: 7 steps of 200 among ten of 150 average 185, ratio 1.23; 8 average 190, ratio 1.27.
    assert steps_of(play((long, 10), ({**long, "rollout/reply_tokens": 200.0}, 10), health=health, first=25)) == [
        (42, "length_growth")
    ]


@pytest.mark.parametrize(
    ("before", "after", "flat"),
    [
        (0.5, 0.509, True),
        (0.5, 0.511, False),
        (0.0, 0.0, True),
        (0.0, 0.001, False),
        (-1.0, -0.99, True),
        (-1.0, -0.97, False),
    ],
)
def test_reward_is_flat_below_two_percent_of_its_size(before, after, flat):
    parts = (
        ({"rollout/reply_tokens": 100.0, "rollout/reward": before}, 10),
        ({"rollout/reply_tokens": 200.0, "rollout/reward": after}, 10),
    )
    assert bool(play(*parts)) == flat


def test_a_farmed_bonus_needs_both_more_calls_and_half_the_success():
    well, ill = FARM
    # k ill steps among ten: calls 2 + 0.2 k > 3 from k = 6, success 0.5 − 0.04 k < 0.25 from k = 7.
    assert steps_of(play((well, 10), (ill, 10), (well, 10), (ill, 10))) == [
        (17, "tool_bonus_farmed"),
        (37, "tool_bonus_farmed"),
    ]
    assert play((well, 10), ({**ill, "rollout/success": 0.25}, 10)) == []
    assert play((well, 10), ({**ill, "rollout/tool_calls": 3.0}, 10)) == []
    assert play((ill, 10), (well, 10)) == []
    # Equal bests: the first one is the measure, so a rise before the fall counts.
    assert steps_of(play((well, 10), ({**well, "rollout/tool_calls": 4.0}, 10), (ill, 10))) == [
        (27, "tool_bonus_farmed")
    ]
    assert (
        play(({**well, "rollout/success": 0.0}, 10), ({**ill, "rollout/success": 0.0}, 10)) == []
    )  # success never was above 0


def test_a_farmed_bonus_that_is_no_longer_paid():
    paid, unpaid = [play((FARM[0], 10), ({**FARM[1], "mu": mu}, 10))[0][1].text for mu in (0.5, 0.0)]
    assert paid.endswith('algo.intrinsic.condition = "correct_only"') and unpaid.endswith("lower learner.lr")


def test_grad_norm_needs_ten_steps_that_learnt_and_ignores_the_others():
    assert play(({"policy/grad_norm": 1.0}, 9), ({"policy/grad_norm": 50.0}, 1)) == []
    assert play(({"policy/grad_norm": 1.0}, 10), ({"policy/grad_norm": 10.0}, 1)) == []
    assert play(({"policy/grad_norm": 0.0}, 20), ({"policy/grad_norm": 50.0}, 1)) == []
    norms = [{"policy/grad_norm": value} for value in (1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0)]  # median 2
    assert play(*((norm, 1) for norm in norms), ({"policy/grad_norm": 19.9}, 1)) == []
    assert steps_of(play(*((norm, 1) for norm in norms), ({"policy/grad_norm": 20.1}, 1))) == [(11, "grad_norm")]
    assert steps_of(
        play(({"policy/grad_norm": 5.0}, 60), ({"policy/grad_norm": 1.0}, 55), ({"policy/grad_norm": 11.0}, 1))
    ) == [(116, "grad_norm")]


def test_staleness_is_not_blamed_on_the_engine():
    stale = {"policy/sampler_gap": 0.3, "policy/staleness": 1.5}
    ((_, alarm),) = play((stale, 1))
    assert alarm.flag == "sampler_gap" and "1.5 versions old" in alarm.text and "engine" not in alarm.text
    assert play(({**stale, "policy/token_weight": 0.9}, 1)) == [], "a correction is at work"
    assert play(({"policy/sampler_gap": 0.3, "policy/staleness": 0.0, "policy/token_weight": 1.0}, 1))


def test_twenty_steps_without_an_optimiser_step_and_the_likely_cause():
    equal = {"policy/updates": 0.0, "rollout/mixed_groups": 0.0, "rollout/success": 0.9}
    ((step, alarm),) = [(s, a) for s, a in play((QUIET[0], 5), (equal, 25)) if a.flag == "no_signal"]
    assert step == 25 and "all siblings earn the same (90% succeed)" in alarm.text
    lost = {"rollout/groups_lost": 4.0}
    ((_, alarm),) = play((lost, 20))
    assert alarm.flag == "no_signal" and "filtered out" in alarm.text
    assert play((equal, 19), ({"policy/updates": 1.0}, 1), (equal, 19))[1:] == []


@pytest.mark.parametrize(
    ("context", "overlong", "key"), [(12.0, 8.0, "rollout.context_tokens"), (8.0, 12.0, "rollout.max_response_tokens")]
)
def test_truncation_says_which_limit(context, overlong, key):
    ((_, alarm),) = play(({"status/success": 80.0, "status/context_limit": context, "status/overlong": overlong}, 1))
    assert alarm.text.endswith(key) and "20%" in alarm.text


def every_text() -> list[Alarm]:
    played = [play((well, 10), (ill, 21)) for well, ill in [*SIMPLE.values(), *WINDOWED.values()]]
    played += [play(({"rollout/mixed_groups": 0.1, "rollout/success": success}, 1)) for success in (0.1, 0.9)]
    stale = {"policy/sampler_gap": 0.1, "policy/staleness": 1.0}
    played += [play((stale, 1)), play(({"rollout/groups_lost": 4.0}, 20))]
    played += [play((FARM[0], 10), ({**FARM[1], "mu": 0.0}, 10)), play(({"status/overlong": 1.0}, 1))]
    return [alarm for alarms in played for _, alarm in alarms]


SECTIONS = "|".join(RunConfig.model_fields)
SETTING = re.compile(rf'\b((?:{SECTIONS})(?:\.[a-z_]+)+)(?: = (true|false|[0-9.]*[0-9]|"[^"]*"))?')


def settings_in(text: str) -> list[re.Match[str]]:
    matches = list(SETTING.finditer(text))
    for match in matches:
        assert tuple(match[1].split(".")) in leaves(), f"{match[1]} is not a setting"
        if match[2]:
            RunConfig.model_validate(tomllib.loads(f"{match[1]} = {match[2]}"))
    return matches


def test_every_text_ends_with_a_setting_that_exists():
    alarms = every_text()
    assert {alarm.flag for alarm in alarms} == set(FLAGS)
    for alarm in alarms:
        settings = settings_in(alarm.text)
        assert settings and settings[-1].end() == len(alarm.text) and "{" not in alarm.text, alarm


def test_the_page_lists_every_flag_and_names_settings_that_exist():
    page = (Path(__file__).parents[2] / "docs" / "health.md").read_text()
    entries = re.findall(r"^- (`.*(?:\n  .*)*)", page, re.MULTILINE)
    assert sorted(entry.split("`")[1] for entry in entries) == sorted(FLAGS)
    named = {
        flag: {match[1] for alarm in every_text() if alarm.flag == flag for match in settings_in(alarm.text)}
        for flag in FLAGS
    }
    for entry in entries:
        assert all(settings_in(code) for code in re.findall(r"`([a-z_.]+\.[a-z_.]+[^`]*)`", entry)), entry
        assert {match[1] for match in SETTING.finditer(entry)} >= named[entry.split("`")[1]], entry


def test_a_reloaded_watch_goes_on_exactly():
    parts = [*SIMPLE.values(), *WINDOWED.values()]
    well, ill = ({name: value for pair in parts for name, value in pair[i].items()} for i in (0, 1))
    series = [
        *itertools.repeat(well, 12),
        *itertools.repeat(ill, 9),
        *itertools.repeat(well, 12),
        *itertools.repeat(ill, 21),
    ]
    whole = Health()
    expected = [whole.observe(step, metrics) for step, metrics in enumerate(series, 1)]
    raised = {alarm.flag for alarms in expected for alarm in alarms}
    assert raised == set(FLAGS) - {"no_signal"}, "a skipped step is no step without a signal"
    for cut in range(len(series)):
        before, after = Health(), Health()
        for step, metrics in enumerate(series[:cut], 1):
            before.observe(step, metrics)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert [after.observe(step, metrics) for step, metrics in enumerate(series[cut:], cut + 1)] == expected[cut:]
        assert after.state_dict() == whole.state_dict()
