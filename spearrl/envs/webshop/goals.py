"""What the shopper wants: synthetic goals (every option combination of a product's instruction) and human ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

PRICES = [10.0 * i for i in range(1, 100)]
NO_LIMIT = 1_000_000
SHUFFLE_SEED = 233  # the original's

Goal = dict[str, Any]


def draw_prices(products: Iterable[dict[str, Any]], draw: random.Random) -> dict[str, float]:
    """Effective price by asin: where a product shows a range, a uniform draw from it."""
    return {p["asin"]: p["pricing"][0] if len(p["pricing"]) == 1 else draw.uniform(*p["pricing"]) for p in products}


def make_goals(products: Iterable[dict[str, Any]], prices: dict[str, float], draw: random.Random, *, human: bool) -> list[Goal]:
    """All goals in the original's shuffled order; `draw` continues from the price draws, as there."""
    goals = list((_human if human else _synthetic)(products, prices, draw))
    random.Random(SHUFFLE_SEED).shuffle(goals)
    return goals


def _synthetic(products: Iterable[dict[str, Any]], prices: dict[str, float], draw: random.Random) -> Iterator[Goal]:
    for product in products:
        if not product["instruction_text"]:
            continue
        limit, price_text = _price_limit(prices[product["asin"]], draw)
        names = sorted(product["options"])
        for values in itertools.product(*(product["options"][name] for name in names)):
            options = dict(zip(names, values, strict=True))
            listed = ", and ".join(f"{name}: {value}" for name, value in options.items())
            text = product["instruction_text"] + (f" with {listed}" if listed else "") + price_text
            goal = _goal(product, text, limit)
            yield goal | {"wish": product["instruction_text"], "attributes": product["instruction_attributes"], "goal_options": options}


def _human(products: Iterable[dict[str, Any]], prices: dict[str, float], draw: random.Random) -> Iterator[Goal]:
    for product in products:
        for instruction in product["instructions"]:
            if not instruction["instruction_attributes"]:
                continue
            limit, price_text = _price_limit(prices[product["asin"]], draw)
            wish = instruction["instruction"].strip(".")
            goal = _goal(product, wish + price_text, limit)
            yield goal | {"wish": wish, "attributes": instruction["instruction_attributes"], "goal_options": instruction["instruction_options"]}


def _goal(product: dict[str, Any], text: str, limit: float) -> Goal:
    """What both kinds share. Callers add attributes, goal_options and `wish` (the instruction without options and price; not the original's)."""
    return {
        "asin": product["asin"],
        "category": product["category"],
        "query": product["query"],
        "name": product["name"],
        "product_category": product["product_category"],
        "instruction_text": text,
        "price_upper": limit,
    }


def _price_limit(price: float, draw: random.Random) -> tuple[float, str]:
    above = [p for p in PRICES if p > price][:4]
    if len(above) < 2:
        return NO_LIMIT, ""
    limit = max(draw.sample(above, 2))
    return limit, f", and price lower than {limit:.2f} dollars"
