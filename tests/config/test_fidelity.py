"""algo.fidelity: every switch of the table, column by column; what wins over a column; where a value came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from spearrl.config import AlgoSection, RunConfig, advice, diff, load_config, resolve, to_toml
from spearrl.config.dump import flat
from spearrl.config.fidelity import AS_SET, COLUMNS, FIELDS, column
from spearrl.config.fields import leaves
from spearrl.errors import ConfigError

# By hand from the paper (arXiv 2509.22601) and from what its two releases do: values of default, paper, release_agent,
# release_math; keys below algo.
SWITCHES = {
    "groups.statistics": ("trajectory", "trajectory", "turn", "trajectory"),
    "groups.singleton": ("zero", "zero", "raw", "raw"),
    "groups.blocks": ("group", "group", "group", "consecutive"),
    "filters.void_rule": ("no_action", "no_action", "no_action", "never"),
    "filters.subsample": ("none", "none", "power_of_two", "none"),
    "policy.mask": ("action", "action", "attention", "action"),
    "policy.denominator": ("mini_batch", "mini_batch", "micro_batch", "micro_batch"),
    "policy.entropy_coef": (0.0, 0.0, 0.001, 0.0),
    "sil.unit": ("trajectory", "trajectory", "row", "trajectory"),
    "sil.keep_zero": (False, False, True, False),
    "sil.keep_step_part": (True, True, False, False),
    "sil.age_reference": ("current", "current", "newest", "newest"),
    "sil.subset": ("all", "all", "power_of_two", "power_of_two"),
    "sil.require_tool_call": (False, False, False, True),
    "sil.update": ("alternating", "joint", "alternating", "alternating"),
    "clip_cov.scope": ("mini_batch", "mini_batch", "micro_batch", "micro_batch"),
    "clip_cov.log_ratio_clamp": (20.0, 20.0, None, None),
    "intrinsic.count": ("tool_calls", "tool_calls", "turns", "tool_calls"),
    "intrinsic.in_evaluation": (False, False, True, True),
}
# The columns that say nothing leave these to preset and file (here: 77, "linear", 0.5, 1.5, 55.0, 0.3).
LEFT = {
    "sil.gamma.steps": (77, 77, 200, 300),
    "sil.gamma.kind": ("linear", "linear", "cosine", "cosine"),
    "clip_cov.replay_ratio": (0.5, 0.5, 0.02, 2e-4),
    "clip_cov.replay_lower": (1.5, 1.5, 2.0, 1.0),
    "clip_cov.replay_upper": (55.0, 55.0, 60.0, 5.0),
    "invalid_penalty": (0.3, 0.3, 0.3, 0.0),
}
FILE = """
[algo]
name = "grpo+spear"
invalid_penalty = 0.3
sil.gamma.steps = 77
sil.gamma.kind = "linear"
clip_cov.replay_ratio = 0.5
clip_cov.replay_lower = 1.5
clip_cov.replay_upper = 55.0
"""
QUALITY = ("overlong", "void_turn", "repetitive", "unreadable")


def below_algo(config: RunConfig) -> dict[str, object]:
    return {key.removeprefix("algo."): value for key, value in flat(config).items() if key.startswith("algo.")}


@pytest.mark.parametrize("number", range(4), ids=COLUMNS)
def test_every_switch_of_every_column(tmp_path, number):
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    resolved = below_algo(load_config(path, [f"algo.fidelity={COLUMNS[number]}"]))
    for key, values in (SWITCHES | LEFT).items():
        assert resolved[key] == values[number] and type(resolved[key]) is type(values[number]), key
    made = AlgoSection.model_validate({"name": "grpo+spear", "fidelity": COLUMNS[number]})
    made_in_code = below_algo(RunConfig(algo=made))
    assert {key: made_in_code[key] for key in SWITCHES} == {key: values[number] for key, values in SWITCHES.items()}


@pytest.mark.parametrize("key", SWITCHES)
def test_each_switch_is_undone_by_the_default_column(key):
    """A column given explicitly sets its values, whatever stood there: "default" is not "nothing"."""
    other = next(value for value in (*SWITCHES[key], 0.5, "turns") if value != SWITCHES[key][0])
    layered = load_config(None, ["algo.fidelity=default"], algo="grpo+spear", preset="tiny")
    assert below_algo(layered)[key] == SWITCHES[key][0]
    written = resolve(
        None, [f"algo.{key}={'none' if other is None else str(other).lower()}"], algo="grpo+spear", preset="tiny"
    )
    assert below_algo(written.config)[key] == other  # without a fidelity nothing but the setting acts


def test_the_default_column_is_what_a_run_without_a_fidelity_does():
    for name in ("grpo", "grpo+spear", "gigpo+drbot+spear", "gspo+sil", "ppo"):
        plain, explicit = (AlgoSection.model_validate({"name": name} | more) for more in ({}, {"fidelity": "default"}))
        assert plain == explicit


@pytest.mark.parametrize("number", range(4), ids=COLUMNS)
@pytest.mark.parametrize(
    ("name", "inert"),
    [
        ("grpo+drbot", True),
        ("gigpo+drbot", True),
        ("grpo+drbot+intrinsic", True),
        ("grpo+drbot+spear", False),
        ("grpo+sil+drbot", False),
    ],
)
def test_quality_filters_are_inert_in_the_agent_release_without_replay(number, name, inert):
    filters = load_config(None, [f"algo.fidelity={COLUMNS[number]}"], algo=name).algo.filters
    applied = not (inert and COLUMNS[number] == "release_agent")
    assert [getattr(filters, flag) for flag in QUALITY] == [applied] * 4 and filters.group_keep == 0.75


def test_quality_filters_of_ones_own_stay_without_drbot():
    assert load_config(
        None, ["algo.fidelity=release_agent", "algo.filters.overlong=true"], algo="grpo"
    ).algo.filters.overlong
    assert load_config(
        None, ["algo.fidelity=release_agent", "algo.filters.overlong=true"], algo="grpo+drbot"
    ).algo.filters.overlong


@pytest.mark.parametrize("number", range(4), ids=COLUMNS)
@pytest.mark.parametrize("name", ["gigpo+drbot", "gigpo+drbot+spear", "grpo+drbot+spear"])
def test_gigpo_keeps_its_deviation_under_drbot_in_the_agent_release(number, name):
    algo = load_config(None, [f"algo.fidelity={COLUMNS[number]}"], algo=name, preset="webshop-1.5b-gigpo").algo
    assert (
        algo.groups.normalize_std is (COLUMNS[number] == "release_agent" and name.startswith("gigpo"))
        and algo.sil.normalize_std is False
    )


@pytest.mark.parametrize("number", range(4), ids=COLUMNS)
@pytest.mark.parametrize(
    ("name", "clip_cov"), [("grpo", False), ("grpo+clip_cov", True), ("grpo+drbot+spear", True), ("gigpo+sil", False)]
)
def test_the_released_covariance_clipping_has_no_dual_clip(number, name, clip_cov):
    algo = load_config(None, [f"algo.fidelity={COLUMNS[number]}"], algo=name, preset="webshop-1.5b").algo
    assert algo.policy.dual_clip == (None if clip_cov and COLUMNS[number].startswith("release") else 10.0)


def test_the_table_holds_settings_and_the_page_shows_them():
    assert {key.removeprefix("algo.") for key in FIELDS} == {*SWITCHES, *LEFT}
    assert all(tuple(key.split(".")) in leaves() and len(values) == len(COLUMNS) for key, values in FIELDS.items())
    page = (Path(__file__).resolve().parents[2] / "docs" / "config.md").read_text()
    for key in FIELDS:
        line = next(line for line in page.splitlines() if line.startswith(f"| `{key}` |"))
        assert line.count(" | ") == len(COLUMNS)


def test_a_column_holds_values_only():
    for name in ("grpo", "grpo+drbot", "gigpo+drbot+spear"):
        for fidelity in COLUMNS:
            assert AS_SET not in column(fidelity, name).values()
    with pytest.raises(ValueError, match="release"):
        column("release", "grpo")


def test_explicit_settings_win_over_a_column_of_their_own_layer_or_a_lower_one(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[algo]\nname = "grpo+spear"\nfidelity = "release_agent"\npolicy.mask = "action"\nsil.gamma.steps = 50\n'
    )
    resolved = resolve(path, ["algo.sil.keep_zero=false"])
    algo = resolved.config.algo
    assert (algo.policy.mask, algo.sil.gamma.steps, algo.sil.keep_zero) == ("action", 50, False)
    assert (algo.sil.unit, algo.groups.statistics) == ("row", "turn")
    assert (
        resolved.sources["algo.policy.mask"] == f"{path}:4" and resolved.sources["algo.sil.keep_zero"] == "command line"
    )
    assert (
        resolved.sources["algo.sil.unit"] == "fidelity release_agent"
        and resolved.sources["algo.fidelity"] == f"{path}:3"
    )
    assert resolved.sources["algo.sil.enabled"] == "algo grpo+spear"
    # Another algorithm on the command line does not undo what the file says in so many words.
    other = resolve(path, algo="gigpo+drbot")
    assert (
        other.config.algo.policy.mask == "action"
        and other.config.algo.sil.gamma.steps == 50
        and other.config.algo.sil.unit == "row"
    )
    # But it is read as the file's fidelity reads it, also where the name itself says otherwise.
    assert other.config.algo.groups.normalize_std and not other.config.algo.filters.void_turn
    assert (
        other.sources["algo.filters.void_turn"] == "fidelity release_agent"
        and other.sources["algo.filters.group_keep"] == "algo gigpo+drbot"
    )
    made = AlgoSection.model_validate(
        {
            "name": "grpo+spear",
            "fidelity": "release_agent",
            "policy": {"mask": "action"},
            "sil": {"gamma": {"steps": 50}},
        }
    )
    assert (made.policy.mask, made.sil.gamma.steps, made.sil.gamma.kind, made.sil.unit) == (
        "action",
        50,
        "cosine",
        "row",
    )


def test_a_column_stands_above_the_layers_below_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "webshop-1.5b"\n[algo]\nsil.unit = "trajectory"\n')
    assert load_config(path).algo.sil.unit == "trajectory"  # the preset has "row"
    assert load_config(path, ["algo.fidelity=release_agent"]).algo.sil.unit == "row"
    assert load_config(path, ["algo.fidelity=release_agent"]).algo.policy.entropy_coef == 0.001  # the preset has 0
    assert load_config(path, ["algo.fidelity=release_agent", "algo.sil.unit=trajectory"]).algo.sil.unit == "trajectory"
    assert (
        load_config(preset="webshop-1.5b").algo.sil.unit == "row"
        and load_config(preset="webshop-1.5b").algo.fidelity == "default"
    )


@pytest.mark.parametrize("fidelity", COLUMNS)
@pytest.mark.parametrize("name", ["grpo+spear", "grpo+drbot", "gigpo+drbot+spear"])
def test_a_saved_config_is_itself_again_and_takes_another_fidelity_as_if_it_had_never_had_one(tmp_path, fidelity, name):
    def fresh(which: str) -> RunConfig:
        (tmp_path / "fresh.toml").write_text(f'[algo]\nname = "{name}"\nfidelity = "{which}"\n')
        return load_config(tmp_path / "fresh.toml")

    path = tmp_path / "config.toml"
    path.write_text(to_toml(fresh(fidelity)))
    assert load_config(path) == fresh(fidelity)
    for other in COLUMNS:
        assert diff(load_config(path, [f"algo.fidelity={other}"]), fresh(other)) == {}
        assert diff(load_config(path, [f"algo.fidelity={other}"], algo=name), fresh(other)) == {}


@pytest.mark.parametrize("fidelity", ["release_agent", "release_math"])
def test_the_releases_cap_the_age(fidelity):
    with pytest.raises(ConfigError, match="algo.sil.max_age=11.*caps it at 10"):
        load_config(None, ["algo.sil.max_age=11", f"algo.fidelity={fidelity}"])
    assert load_config(None, ["algo.sil.max_age=10", f"algo.fidelity={fidelity}"]).algo.sil.max_age == 10
    for free in ("default", "paper"):
        assert load_config(None, ["algo.sil.max_age=11", f"algo.fidelity={free}"]).algo.sil.max_age == 11


def test_a_contradiction_with_a_column_is_placed_where_somebody_wrote_a_setting():
    with pytest.raises(
        ConfigError, match="command line: algo.clip_cov.replay_lower=2 is not below algo.clip_cov.replay_upper=1.5"
    ):
        load_config(None, ["algo.fidelity=release_agent", "algo.clip_cov.replay_upper=1.5"])


def test_a_wrong_fidelity_is_named_and_the_paper_column_runs_as_it_is():
    with pytest.raises(ConfigError, match="did you mean"):
        load_config(None, ["algo.fidelity=release_agents"])
    assert advice(load_config(None, ["algo.fidelity=paper"])) == []
