"""The --algo grammar: every sensible name means one thing, in any order and over any preset; the others say why not."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest

from spearrl.config import AlgoSection, RunConfig, check, diff, load_config, resolve, to_toml
from spearrl.config.dump import flat
from spearrl.config.fields import leaves
from spearrl.config.grammar import BASES, DESCRIPTIONS, MODULES, GrammarError, algo_settings, words_of
from spearrl.config.presets import PRESETS
from spearrl.errors import ConfigError
from spearrl.losses.objective import SURROGATES

OFF = {
    "sil.enabled": False,
    "intrinsic.enabled": False,
    "clip_cov.enabled": False,
    "dynamic.enabled": False,
    "correction.mode": "none",
}
TOKEN_SUMS = "seq-mean-token-sum-norm"
# What makes an algorithm what it is, by hand from the papers; keys below algo.
BASE_FIELDS = {
    "grpo": {"advantage": "grpo", "loss": "clip"},
    "gigpo": {"advantage": "gigpo", "loss": "clip"},
    "rloo": {"advantage": "rloo", "loss": "clip"},
    "reinforce++": {"advantage": "reinforce++", "loss": "clip"},
    "reinforce++_baseline": {"advantage": "reinforce++_baseline", "loss": "clip"},
    "ppo": {"advantage": "gae", "loss": "clip"},
    "dapo": {
        "advantage": "grpo",
        "loss": "clip",
        "policy.clip_low": 0.2,
        "policy.clip_high": 0.28,
        "policy.aggregation": "token-mean",
        "dynamic.enabled": True,
    },
    "dr_grpo": {"advantage": "grpo", "loss": "clip", "groups.normalize_std": False, "policy.aggregation": TOKEN_SUMS},
    "gspo": {
        "advantage": "grpo",
        "loss": "gspo",
        "policy.clip_low": 3e-4,
        "policy.clip_high": 4e-4,
        "policy.dual_clip": None,
        "policy.aggregation": "seq-mean-token-mean",
    },
    "cispo": {
        "advantage": "grpo",
        "loss": "cispo",
        "policy.clip_low": 1.0,
        "policy.clip_high": 0.28,
        "policy.dual_clip": None,
    },
}
MODULE_FIELDS = {
    "sil": {"sil.enabled": True},
    "intrinsic": {"intrinsic.enabled": True},
    "clip_cov": {"clip_cov.enabled": True},
    "kl_cov": {"loss": "kl_cov"},
    "tis": {"correction.mode": "tis"},
    "mis": {"correction.mode": "mis"},
    "drbot": {
        "groups.normalize_std": False,
        "policy.clip_high": 0.28,
        "policy.aggregation": TOKEN_SUMS,
        "filters.overlong": True,
        "filters.void_turn": True,
        "filters.repetitive": True,
        "filters.unreadable": True,
        "filters.group_keep": 0.75,
        "kl.loss_coef": 0.0,
        "kl.reward_coef": 0.0,
    },
    "spear": {"sil.enabled": True, "intrinsic.enabled": True, "clip_cov.enabled": True},
}
# Words that are refused together, what the reason must say, and what the fix must offer for that pair alone.
REFUSED = {
    ("gspo", "kl_cov"): ("loss of its own", "use gspo"),
    ("cispo", "kl_cov"): ("loss of its own", "use cispo"),
    ("clip_cov", "kl_cov"): ("highest covariance", "grpo+kl_cov"),
    ("kl_cov", "spear"): ("highest covariance", "grpo+sil+intrinsic+kl_cov"),
    ("mis", "tis"): ("same ratio", "grpo+tis"),
    ("drbot", "gspo"): ("4e-4", "algo.filters."),
    ("sil", "spear"): ("holds sil already", "grpo+spear"),
    ("intrinsic", "spear"): ("holds intrinsic already", "grpo+spear"),
    ("clip_cov", "spear"): ("holds clip_cov already", "grpo+spear"),
}


def refused(base: str, words: tuple[str, ...]) -> bool:
    return any(set(pair) <= {base, *words} for pair in REFUSED)


def all_names() -> list[tuple[str, tuple[str, ...]]]:
    return [
        (base, words) for base in BASES for size in range(len(MODULES) + 1) for words in combinations(MODULES, size)
    ]


def below_algo(config: RunConfig) -> dict[str, object]:
    return {key.removeprefix("algo."): value for key, value in flat(config).items() if key.startswith("algo.")}


def expected(base: str, words: tuple[str, ...]) -> dict[str, object]:
    fields = {**OFF, **BASE_FIELDS[base]}
    for word in words:
        fields |= MODULE_FIELDS[word]
    if base == "cispo":
        fields |= {"policy.clip_low": 1.0, "policy.clip_high": 0.28}
    return fields


def test_every_name_is_either_refused_or_sets_exactly_its_parts():
    assert (
        set(BASE_FIELDS) == set(BASES)
        and set(MODULE_FIELDS) == set(MODULES)
        and set(DESCRIPTIONS) == {*BASES, *MODULES}
    )
    sensible = 0
    for base, words in all_names():
        name = "+".join((base, *words))
        if refused(base, words):
            with pytest.raises(GrammarError):
                algo_settings(name)
            continue
        sensible += 1
        settings = algo_settings(name)
        assert words_of(name) == (base, words)
        assert {key: settings[f"algo.{key}"] for key in expected(base, words)} == expected(base, words), name
        assert all(tuple(key.split(".")) in leaves() for key in settings), name
        section = AlgoSection.model_validate({"name": name})
        fields = below_algo(RunConfig(algo=section))
        assert {key: fields[key] for key in expected(base, words)} == expected(base, words), name
        check(RunConfig(algo=section))
    assert sensible > 500


def test_the_names_of_losses_are_those_there_are():
    assert leaves()[("algo", "loss")].examples == list(SURROGATES)
    assert {fields["advantage"] for fields in BASE_FIELDS.values()} == set(leaves()[("algo", "advantage")].examples)


@pytest.mark.parametrize("base", BASES)
def test_the_order_of_modules_does_not_matter(base):
    for words in (w for size in (2, 3) for w in combinations(MODULES, size) if not refused(base, w)):
        results = [algo_settings("+".join((base, *order))) for order in permutations(words)]
        assert all(result == results[0] for result in results), (base, words)


@pytest.mark.parametrize("pair", REFUSED, ids="+".join)
def test_senseless_names_say_why_and_what_instead(pair):
    reason, offer = REFUSED[pair]
    base = next((word for word in pair if word in BASES), "grpo")
    words = [word for word in pair if word != base]
    for order in permutations(words):
        with pytest.raises(ConfigError) as caught:
            load_config(algo="+".join((base, *order)))
        message = str(caught.value)
        assert all(word in message for word in pair) and reason in message and offer in message.partition("fix: ")[2], (
            message
        )
    with pytest.raises(ConfigError, match="algo.name"):
        check(RunConfig(algo=AlgoSection.model_validate({"name": "+".join((base, *words))})))


def test_the_name_a_refusal_offers_is_accepted():
    for base, words in all_names():
        if len(words) > 3 or not refused(base, words):
            continue
        with pytest.raises(GrammarError) as caught:
            algo_settings("+".join((base, *words)))
        for _ in words:  # each step removes one conflict
            offered = next(
                word.strip(",") for word in caught.value.fix.split() if words_look_like_a_name(word.strip(","))
            )
            try:
                algo_settings(offered)
                break
            except GrammarError as error:
                caught.value.fix = error.fix
        else:
            pytest.fail(f"{base}+{'+'.join(words)} leads nowhere: {caught.value.fix}")


def words_look_like_a_name(text: str) -> bool:
    return any(text == base or text.startswith(f"{base}+") for base in BASES)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reinforce+++sil", ("reinforce++", ("sil",))),
        ("reinforce++", ("reinforce++", ())),
        ("reinforce++_baseline+spear", ("reinforce++_baseline", ("spear",))),
        ("reinforce++_baseline", ("reinforce++_baseline", ())),
        ("gigpo+drbot+spear", ("gigpo", ("drbot", "spear"))),
        ("grpo+tis+kl_cov", ("grpo", ("tis", "kl_cov"))),
    ],
)
def test_parsing(name, words):
    assert words_of(name) == words


@pytest.mark.parametrize(
    ("name", "says", "fix"),
    [
        ("", "does not exist", "use one of: grpo"),
        ("grop", "base 'grop'", "did you mean 'grpo'"),
        ("GRPO+spear", "base 'GRPO'", "did you mean 'grpo'"),
        ("dr-grpo", "base 'dr-grpo'", "did you mean 'dr_grpo'"),
        ("reinforce_plus_plus", "does not exist", "did you mean 'reinforce++'"),
        ("reinforce+sil", "base 'reinforce'", "did you mean 'reinforce++'"),
        ("gae+sil", "base 'gae'", "did you mean 'ppo'"),
        ("grpo+clip-cov", "module 'clip-cov'", "did you mean 'clip_cov'"),
        ("grpo+spaer", "module 'spaer'", "did you mean 'spear'"),
        ("spear", "does not begin with a base", "use grpo+spear"),
        ("clip-cov+sil", "does not begin with a base", "use grpo+clip_cov+sil"),
        ("grpo+", "empty module name", "grpo+spear"),
        ("reinforce+++", "empty module name", "grpo+spear"),
        ("grpo++sil", "empty module name", "grpo+spear"),
        ("grpo+sil+sil", "named twice", "use 'sil' once"),
        ("grpo+gigpo", "a second base, 'gigpo'", "use one base"),
        ("gigpo+gspo", "a second base, 'gspo'", 'use gigpo with algo.loss="gspo"'),
        ("cispo+rloo", "a second base, 'rloo'", 'use rloo with algo.loss="cispo"'),
        ("x" * 5000, "does not exist", "use one of"),
    ],
)
def test_wrong_words_are_named_and_fixed(name, says, fix):
    with pytest.raises(GrammarError) as caught:
        algo_settings(name)
    assert says in str(caught.value) and fix in caught.value.fix and len(str(caught.value)) < 300


@pytest.mark.parametrize("preset", PRESETS)
def test_a_name_on_the_command_line_gives_that_algorithm_over_any_preset(preset):
    for base in BASES:
        for words in ((), ("spear",), ("drbot", "tis"), ("kl_cov", "sil")):
            if refused(base, words):
                continue
            fields = below_algo(load_config(preset=preset, algo="+".join((base, *words))))
            assert {key: fields[key] for key in expected(base, words)} == expected(base, words), (base, words)


def test_hyper_parameters_of_a_preset_outlive_another_name_but_its_modules_do_not():
    """The name says which parts are on; what a preset sets beside it are hyper-parameters."""
    tiny = load_config(preset="tiny", algo="grpo").algo
    assert (
        not tiny.groups.normalize_std
        and tiny.policy.clip_high == 0.28
        and tiny.sil.capacity == 16
        and not tiny.sil.enabled
    )
    paper = resolve(preset="webshop-1.5b", algo="grpo+spear")
    assert (
        paper.config.algo.sil.capacity == 2048
        and paper.config.algo.filters.group_keep == 1.0
        and not paper.config.algo.filters.void_turn
    )
    assert (
        paper.config.algo.groups.normalize_std
        and paper.config.algo.policy.clip_high == 0.2
        and paper.config.algo.policy.aggregation == "token-mean"
    )
    assert (
        paper.sources["algo.filters.group_keep"] == "default" and paper.sources["algo.sil.enabled"] == "algo grpo+spear"
    )
    assert resolve(preset="webshop-1.5b").sources["algo.filters.group_keep"] == "algo grpo+drbot+spear"


@pytest.mark.parametrize(
    "name", ["dapo+sil", "grpo+drbot+spear", "gspo", "cispo+clip_cov", "dr_grpo+tis", "ppo+kl_cov"]
)
def test_a_saved_config_takes_another_name_as_if_it_had_never_had_its_own(tmp_path, name):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(load_config(preset="alfworld-1.5b-base", algo=name)))
    assert load_config(path) == load_config(preset="alfworld-1.5b-base", algo=name)
    for other in ("grpo", "gigpo+sil", "dr_grpo+drbot", name):
        assert diff(load_config(path, algo=other), load_config(preset="alfworld-1.5b-base", algo=other)) == {}
    assert (
        load_config(path, algo="grpo").algo.policy.clip_high == 0.2
        and load_config(path, algo="grpo").algo.filters.group_keep == 1.0
    )


def test_settings_beside_a_name_win_over_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[algo]\nname = "dapo+drbot"\npolicy.clip_high = 0.25\nfilters.void_turn = false\nloss = "my_pkg.mod:fn"\n'
    )
    algo = load_config(path).algo
    assert (algo.policy.clip_high, algo.filters.void_turn, algo.filters.overlong, algo.loss) == (
        0.25,
        False,
        True,
        "my_pkg.mod:fn",
    )
    # Another name keeps what the file says beyond its own name, and brings its own loss.
    algo = load_config(path, algo="dr_grpo").algo
    assert (algo.policy.clip_high, algo.filters.void_turn, algo.filters.overlong, algo.loss) == (
        0.25,
        False,
        False,
        "clip",
    )
    made = AlgoSection.model_validate(
        {"name": "dapo+drbot", "policy": {"clip_high": 0.25}, "dynamic": {"rounds": 3}, "loss": "my_pkg.mod:fn"}
    )
    assert (
        made.policy.clip_high == 0.25
        and made.dynamic.enabled
        and made.dynamic.rounds == 3
        and made.loss == "my_pkg.mod:fn"
    )
