"""WebShop's reward against the original's test facts and done pages; its matcher against thefuzz; the noun finders."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from spearrl.envs.webshop import nouns
from spearrl.envs.webshop.nouns import LEXICON, default_tagger
from spearrl.envs.webshop.reward import (
    matched_attributes,
    matched_options,
    normalize_color,
    purchase_reward,
    same_category,
    title_similarity,
    token_set_ratio,
    type_score,
)
from tests.support.shared_data import golden, golden_lines, read_lines, shared

EMPTY = {"Title": "", "BulletPoints": [], "Description": ""}
PRODUCT = {
    "name": "Tea Tree Shampoo",
    "Title": "Tea Tree Shampoo",
    "Attributes": ["tea tree", "essential oil", "natural ingredients"],
    "BulletPoints": [],
    "Description": "",
    "query": "shampoo",
    "product_category": "Beauty › Hair Care › Shampoo",
}
GOAL = {
    "attributes": ["tea tree", "essential oils", "natural ingredients"],
    "goal_options": {"color": "grey", "size": "XL"},
    "price_upper": 40.0,
    "name": "Tea Tree Shampoo",
    "query": "shampoo",
    "product_category": "Beauty › Hair Care › Shampoo",
}
CHOSEN = {"color": "grey", "size": "XL"}


@pytest.fixture(scope="module")
def cases():
    return golden("webshop_reward_cases")


def test_colors_are_folded_as_the_original_folds_them(cases):
    for option, expected in cases["normalize_color"]:
        assert normalize_color(option) == expected


def test_a_pair_is_folded_only_where_one_of_its_parts_is_a_color():
    assert normalize_color(("color", "red")) == "red"
    assert normalize_color(("color", "dark red")) == ("color", "dark red")


def test_categories(cases):
    for case in cases["category_match"]:
        assert same_category(case["goal"], case["bought"]) is case["expected"], case


def test_attributes(cases):
    for case in cases["attribute"]:
        matched = matched_attributes(EMPTY | case, case["goal"])
        assert (matched, matched / len(case["goal"])) == (case["n"], case["r"]), case


def test_options(cases):
    for case in cases["option"]:
        assert matched_options(case["bought"], case["goal"]) == case["n"], case


def test_title_scores_of_the_fallback_are_within_the_originals_tolerance(cases):
    for case in cases["title_score"]:
        similarity = title_similarity(case["bought"], case["goal"], LEXICON)
        assert (
            similarity < case["expected_lt"]
            if "expected_lt" in case
            else similarity == pytest.approx(case["expected"], abs=case["tol"])
        ), case


def test_total(cases):
    # a bare string, as in the original's test: its characters are joined
    bullets = "This shampoo has essential oils and smells like lemons"
    described = PRODUCT | {
        "Title": "",
        "Attributes": [],
        "BulletPoints": bullets,
        "Description": "made with natural ingredients",
    }
    amount = GOAL | {"goal_options": CHOSEN | {"amount": "pack of 12"}}
    other = {"query": "soap", "product_category": "Beauty › Bath › Soap", "name": "Tea Soap"}
    seven_nouns = {"name": "Lemon Tea Shampoo Bottle Pump Gift Box"}
    goals = [(PRODUCT, GOAL), (described, GOAL), (described, amount), (described | other, amount | seven_nouns)]
    for (product, goal), case in zip(goals, cases["total"], strict=True):
        assert purchase_reward(product, goal, 35.0, CHOSEN, LEXICON)["task_score"] == pytest.approx(
            case["expected"], abs=1e-4
        ), case


def test_done_pages_of_the_golden_episodes():
    lines = read_lines(shared("data/webshop/products_1000_text.jsonl.xz"))
    products = {product["asin"]: product for product in map(json.loads, lines)}
    episodes = [json.loads(line) for line in golden_lines("webshop_episodes.jsonl")]
    for episode in episodes:
        done = episode["steps"][-1]
        parts = done["info_no_title"]
        score = purchase_reward(products[done["bought"]], episode["goal"], done["price"], done["options"], LEXICON)
        assert score["score_before_type"] == pytest.approx(done["reward_before_r_type"]), episode["goal_index"]
        assert score["r_attributes"] == pytest.approx(parts["r_att"]), episode["goal_index"]
        assert score.get("r_options") == (pytest.approx(parts["r_option"]) if "r_option" in parts else None), episode[
            "goal_index"
        ]
        product, goal = products[done["bought"]], episode["goal"]
        assert score["r_price"] == parts["r_price"]
        assert (product["query"] == goal["query"]) is parts["query_match"]
        assert same_category(product["product_category"], goal["product_category"]) is parts["category_match"]
        if done["reward"] is not None:
            assert score["task_score"] == pytest.approx(done["reward"]), episode["goal_index"]


def test_a_result_names_its_parts():
    score = purchase_reward(PRODUCT, GOAL, 45.0, {"size": "XL"}, LEXICON)
    assert (score["task_score"], score["score_before_type"], score["r_type"]) == (
        pytest.approx(4 / 6),
        pytest.approx(4 / 6),
        1.0,
    )
    assert (score["r_attributes"], score.get("r_options"), score["r_price"]) == (1.0, 0.5, 0.0)
    assert score["tagger"] == "lexicon"


def test_a_goal_without_options_has_no_option_share():
    assert purchase_reward(PRODUCT, GOAL | {"goal_options": []}, 35.0, {}, LEXICON).get("r_options") is None


@pytest.mark.parametrize(
    ("title", "same_kind", "expected"),
    [
        (1.0, False, 1.0),
        (0.21, False, 1.0),
        (0.2, False, 0.5),
        (0.2, True, 1.0),
        (0.1, False, 0.5),
        (0.09, True, 0.1),
        (0.0, True, 0.0),
        (0.0, False, 0.0),
    ],
)
def test_type_score(title, same_kind, expected):
    assert type_score(title, same_kind=same_kind) == expected


def test_a_goal_title_without_nouns_scores_a_fifth():
    assert title_similarity("Red Shoe", "12 of the 5", LEXICON) == 0.2


def test_repeated_nouns_of_the_goal_count():
    assert title_similarity("Shoe Box", "Shoe Box Shoe Shoe", LEXICON) == 0.5


# what thefuzz 0.22.1 returns
RATIOS = [
    ("large", ("size", "x-large"), 100),
    ("essential oil", "essential oils", 96),
    ("machine wash", "machine washable", 86),
    ("navy", ("color", "navy | red"), 100),
    ("fuzzy was a bear but not a dog", "fuzzy was a bear but not a cat", 92),
    ("café noir", "caf noir", 100),
    ("a_b", "a b", 100),
    ("---", "---", 0),
    ("锅 pot", "锅", 100),
    ("x-small", ("size", "xx-small"), 83),
    ("long sleeve", "short sleeve", 71),
    ("tan", ("item shape", "rectangular"), 24),
    ("men's", ("fit type", 'men\'s "big"'), 100),
    ("İ x", "i x", 100),
]


@pytest.mark.parametrize(("first", "second", "expected"), RATIOS)
def test_token_set_ratio(first, second, expected):
    assert token_set_ratio(first, second) == token_set_ratio(second, first) == expected


def test_the_fallback_finds_names_and_things():
    title = "Women's Non-Slip Breathable 921ORB Running Shoes (2pcs), Highly Rated for a Jet-Black Table"
    assert list(LEXICON.nouns(title)) == [
        "women",
        "slip",
        "921orb",
        "running",
        "shoes",
        "jet",
        "black",
        "table",
    ]


def test_spacy_is_used_where_a_model_is_installed(monkeypatch):
    loaded = []

    def pipeline(title: str):
        tags = {"Shoe": "NOUN", "Nike": "PROPN", "red": "ADJ"}
        return [SimpleNamespace(text=word, pos_=tags[word]) for word in title.split()]

    spacy = ModuleType("spacy")
    spacy.load = lambda model: loaded.append(model) or pipeline
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    monkeypatch.setattr(nouns.importlib.util, "find_spec", lambda name: name in ("spacy", "en_core_web_sm") or None)
    default_tagger.cache_clear()
    try:
        tagger = default_tagger()
    finally:
        default_tagger.cache_clear()
    assert tagger.name == "spacy:en_core_web_sm" and loaded == []
    assert tagger.nouns("red Nike Shoe") == tagger.nouns("red Nike Shoe") == ("nike", "shoe")
    assert loaded == ["en_core_web_sm"]


def test_without_a_model_the_fallback_is_used(monkeypatch):
    monkeypatch.setattr(nouns.importlib.util, "find_spec", lambda name: None)
    default_tagger.cache_clear()
    try:
        assert default_tagger().name == "lexicon"
    finally:
        default_tagger.cache_clear()
