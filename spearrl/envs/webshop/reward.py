"""WebShop's reward for a purchase (arXiv:2207.01206, section 3.3), as the original code computes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from rapidfuzz import fuzz
from rapidfuzz.utils import default_process

from spearrl.config.tables import table
from spearrl.envs.webshop.nouns import NounTagger

Option = str | tuple[str, str]  # a value, or (name, value)

MATCH = 85  # a token_set_ratio above this is a match
NO_GOAL_NOUNS = 0.2  # the title score where the goal's title has no nouns
# in the order searched: a value that holds several is known by the first
COLORS = tuple(table(__file__, "words.toml")["colors"].split())
_LATIN_1 = dict.fromkeys(range(128, 256))  # thefuzz deletes these letters and keeps the rest of Unicode


def purchase_reward(
    product: Mapping[str, Any],
    goal: Mapping[str, Any],
    price: float,
    options: Mapping[str, str],
    tagger: NounTagger,
) -> dict[str, Any]:
    """Reward of buying `product` at `price` with the picked `options` (name: value) for `goal`, and its parts.

    Args:
        product: Title, BulletPoints, Description, Attributes, name, query, product_category, as the original has them.
        goal: attributes, goal_options (a dict, or a list of values), price_upper, name, query, product_category.
        tagger: finds the nouns of titles.

    Returns:
        task_score: the original's reward, r_type · score_before_type.
        score_before_type: (attributes matched + options matched + r_price) / (attributes + options + 1).
        r_type: 1, 0.5, 0.1 or 0: is it the kind of product the goal names.
        r_attributes, r_options: share of the goal's attributes and options matched; no r_options where it has none.
        r_price: 1 if the price is within the limit.
        tagger: what found the nouns.
    """
    wanted = goal["goal_options"]
    goal_options: list[Option] = list(wanted.items() if isinstance(wanted, Mapping) else wanted)
    attributes = matched_attributes(product, goal["attributes"])
    matched = matched_options(options.values(), goal_options)
    r_price = float(price <= goal["price_upper"])
    before_type = (attributes + matched + r_price) / (len(goal["attributes"]) + len(goal_options) + 1)
    categories = (one["product_category"] for one in (product, goal))
    same_kind = product["query"] == goal["query"] or same_category(*categories)
    r_type = type_score(title_similarity(product["name"], goal["name"], tagger), same_kind=same_kind)
    parts: dict[str, Any] = {"task_score": before_type * r_type, "score_before_type": before_type, "r_type": r_type}
    parts |= {"r_attributes": attributes / max(len(goal["attributes"]), 1), "r_price": r_price, "tagger": tagger.name}
    return parts | ({"r_options": matched / len(goal_options)} if goal_options else {})


@lru_cache(maxsize=1 << 16)
def token_set_ratio(first: Option, second: Option) -> int:
    """How alike two texts are as sets of words, 0 to 100: thefuzz 0.22's, which is rapidfuzz's on processed texts.

    A tuple stands for its Python text, so every word of an option pair counts, the option's name as well: "large" is
    within ("size", "x-large").
    """
    ours, theirs = (default_process(str(text).translate(_LATIN_1)) for text in (first, second))
    return round(fuzz.token_set_ratio(ours, theirs))


def normalize_color(option: Option) -> Option:
    """The first known colour that `option` contains, else `option` itself.

    A pair contains only its two elements whole: ("color", "red") becomes "red", ("color", "dark red") stays a pair.
    That is what the original does to the options of synthetic goals.
    """
    return next((color for color in COLORS if color in option), option)


def matched_attributes(product: Mapping[str, Any], attributes: Sequence[str]) -> int:
    """How many attributes are like one of the product's or stand in its title, bullets or description."""
    texts = [text.lower() for text in (product["Title"], " ".join(product["BulletPoints"]), product["Description"])]
    return sum(
        any(token_set_ratio(own, attribute) > MATCH for own in product["Attributes"])
        or any(attribute in text for text in texts)
        for attribute in attributes
    )


def matched_options(values: Iterable[str], goal_options: Iterable[Option]) -> int:
    """How many of the goal's options are like one of the picked values."""
    picked = [normalize_color(value) for value in values]
    return sum(
        any(token_set_ratio(value, option) > MATCH for value in picked) for option in map(normalize_color, goal_options)
    )


def same_category(first: str, second: str) -> bool:
    """Whether two category paths ("a › b › c") share at least two different parts."""
    ours, theirs = ({part.strip() for part in path.split("›")} for path in (first, second))
    return len(ours & theirs) >= 2


def title_similarity(bought: str, goal: str, tagger: NounTagger) -> float:
    """Distinct nouns in both titles over the nouns of the goal's, repeats counted."""
    nouns = tagger.nouns(goal)
    return len(set(nouns) & set(tagger.nouns(bought))) / len(nouns) if nouns else NO_GOAL_NOUNS


def type_score(title_score: float, *, same_kind: bool) -> float:
    """1 for the goal's kind, by query, category or title; a title with (almost) nothing in common overrides these."""
    if title_score == 0:
        return 0.0
    if title_score < 0.1:
        return 0.1
    return 1.0 if same_kind or title_score > 0.2 else 0.5
