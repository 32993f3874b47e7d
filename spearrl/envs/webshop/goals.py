"""What the shopper wants: synthetic goals (every option combination of a product's instruction) and human ones.

A `Shop` is what all slots share.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from spearrl.envs.webshop.catalogue import Catalogue, Product, load
from spearrl.errors import ConfigError

PRICES = [10.0 * i for i in range(1, 100)]
NO_LIMIT = 1_000_000
SHUFFLE_SEED = 233  # the original's

Goal = dict[str, Any]
Wish = tuple[str, list[str], list[Any]]  # what is said, its attributes, the options of each goal that says so


@dataclass(frozen=True, eq=False)
class Shop:
    """Read-only. Goal i is `goals[i]` in the original's shuffled order."""

    catalogue: Catalogue
    prices: dict[str, float]
    goals: tuple[Goal, ...]


@lru_cache(maxsize=8)
def open_shop(data: str | None, num_products: int | None, seed: int, human_goals: bool) -> Shop:
    """The shop of these options, once per process. Seed 0 gives the original's prices and goals. Raises ConfigError."""
    catalogue = load(data, num_products, seed if data is None else 0)
    draw = random.Random(seed)
    prices = draw_prices(catalogue.products, draw)
    goals = make_goals(catalogue.products, prices, draw, human=human_goals)
    if not goals:
        kind, file = ("human", "items_human_ins.json") if human_goals else ("synthetic", "items_ins_v2*.json")
        hint = f"put {file} beside the products, or change env.options.human_goals"
        raise ConfigError(f"these products have no {kind} goals", where="env.options.data", hint=hint)
    return Shop(catalogue, prices, tuple(goals))


def draw_prices(products: Iterable[Product], draw: random.Random) -> dict[str, float]:
    """Effective price by asin: where a product shows a range, a uniform draw from it."""
    return {p["asin"]: p["pricing"][0] if len(p["pricing"]) == 1 else draw.uniform(*p["pricing"]) for p in products}


def make_goals(
    products: Iterable[Product], prices: dict[str, float], draw: random.Random, *, human: bool
) -> list[Goal]:
    """All goals in the original's shuffled order; `draw` continues from the price draws, as there.

    `wish` is the instruction without options and price.
    """
    goals: list[Goal] = []
    for product in products:
        for wish, attributes, choices in _human_wishes(product) if human else _synthetic_wishes(product):
            limit, limit_text = _price_limit(prices[product["asin"]], draw)
            for options in choices:
                named = [] if human else [f"{name}: {value}" for name, value in options.items()]
                text = wish + (f" with {', and '.join(named)}" if named else "") + limit_text
                goal = {name: product[name] for name in ("asin", "category", "query", "name", "product_category")}
                goal |= {"instruction_text": text, "price_upper": limit, "wish": wish}
                goals.append(goal | {"attributes": attributes, "goal_options": options})
    random.Random(SHUFFLE_SEED).shuffle(goals)
    return goals


def _synthetic_wishes(product: Product) -> Iterator[Wish]:
    if product["instruction_text"]:
        names = sorted(product["options"])
        values = itertools.product(*(product["options"][name] for name in names))
        choices = [dict(zip(names, chosen, strict=True)) for chosen in values]
        yield product["instruction_text"], product["instruction_attributes"], choices


def _human_wishes(product: Product) -> Iterator[Wish]:
    for said in product["instructions"]:
        if said["instruction_attributes"]:
            yield said["instruction"].strip("."), said["instruction_attributes"], [said["instruction_options"]]


def _price_limit(price: float, draw: random.Random) -> tuple[float, str]:
    """The highest price accepted, and how the instruction says so."""
    above = [p for p in PRICES if p > price][:4]
    if len(above) < 2:
        return NO_LIMIT, ""
    limit = max(draw.sample(above, 2))
    return limit, f", and price lower than {limit:.2f} dollars"
