"""A scripted shopper that plays from the true state: what the cold start imitates. One number says how imperfect it is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from spearrl.envs.webshop.catalogue import Product
from spearrl.envs.webshop.compact import wish_words, words
from spearrl.envs.webshop.goals import Goal
from spearrl.envs.webshop.pages import Session

PAGES = 3  # results pages looked through before taking the best in sight
TRIES = 3  # clicks on one option before giving it up

Click = tuple[str, str]


class Expert:
    """One episode's shopper. With noise n it drops each query word with 1.3n, opens a random product with 1.3n, picks an
    option wrongly with n/3 and forgets it otherwise up to n, and strays with n/6."""

    def __init__(self, goal: Goal, prices: dict[str, float], draw: random.Random):
        self._goal, self._prices, self._draw = goal, prices, draw
        self._taken: set[str] = set()  # asins opened on purpose
        self._plans: dict[tuple[str, str], str] = {}  # (asin, option name) -> right | wrong | skip
        self._tries: dict[tuple[str, str], int] = {}

    def act(self, session: Session, noise: float) -> Click:
        """The next ("search" | "click", argument)."""
        keep = max(0.0, 1 - 1.3 * noise)
        if session.page == "index":
            return "search", self._query(keep)
        if session.page == "results":
            return self._browse(session, noise, keep)
        if session.page == "item" and session.product is not None:
            return self._shop(session, session.product, noise)
        return "click", "< prev"

    def _query(self, keep: float) -> str:
        wanted = self._goal["goal_options"]
        values = wanted.values() if isinstance(wanted, dict) else ()
        pool = [*wish_words(self._goal), *(word for value in values for word in words(value).split())]
        kept = [word for word in pool if self._draw.random() < keep]
        return " ".join(kept) or words(self._goal["query"])

    def _browse(self, session: Session, noise: float, keep: float) -> Click:
        visible = session.visible()
        if self._draw.random() < noise / 6:
            return "click", self._draw.choice(("next >", "back to search"))
        if not visible:
            return "click", "< prev" if session.number > 1 else "back to search"
        best = max(visible, key=self._fit)
        more = len(session.found) > session.number * session.per_page and session.number < PAGES
        if self._draw.random() < keep:
            if self._fit(best) < 1 and more:
                return "click", "next >"
        else:
            best = self._draw.choice(visible)
        self._taken.add(best["asin"])
        return "click", best["asin"].lower()

    def _shop(self, session: Session, product: Product, noise: float) -> Click:
        if product["asin"] not in self._taken and self._fit(product) < 1:
            return "click", "< prev"
        if self._draw.random() < noise / 6:
            return "click", "< prev"
        for name, value in wanted_options(self._goal, product):
            click = self._pick(session, product, (name, value), noise)
            if click is not None:
                return "click", click
        return "click", "buy now"

    def _pick(self, session: Session, product: Product, option: tuple[str, str], noise: float) -> str | None:
        """The value to click for one option, or None where it is done with."""
        name, value = option
        key = (product["asin"], name)
        roll = self._draw.random()
        plan = self._plans.setdefault(
            key, "right" if roll < 1 - noise else "wrong" if roll < 1 - noise * 2 / 3 else "skip"
        )
        if (
            plan == "skip"
            or session.options.get(name) == value
            or self._tries.get(key, 0) >= (TRIES if plan == "right" else 1)
        ):
            return None
        self._tries[key] = self._tries.get(key, 0) + 1
        others = [other for other in product["options"][name] if other != value]
        return value if plan == "right" or not others else self._draw.choice(others)

    def _fit(self, product: Product) -> float:
        """Share of what is wanted that the product has; 1 for the goal itself and its equals."""
        goal = self._goal
        if product["asin"] == goal["asin"]:
            return 1.0
        title = product["Title"].lower()
        wanted = len(goal["goal_options"])
        parts = [float(a in product["Attributes"] or a in title) for a in goal["attributes"]]
        parts += [1.0] * len(wanted_options(goal, product)) + [0.0] * (wanted - len(wanted_options(goal, product)))
        parts += [
            float(self._prices[product["asin"]] <= goal["price_upper"]),
            3.0 * (product["query"] == goal["query"]),
        ]
        return sum(parts) / (len(parts) + 2)


def wanted_options(goal: Goal, product: Product) -> list[tuple[str, str]]:
    """The (name, value) pairs of `product` that the goal asks for; what it does not offer is left out."""
    wanted: Any = goal["goal_options"]
    if isinstance(wanted, dict):
        return [(name, value) for name, value in wanted.items() if value in product["options"].get(name, ())]
    return [pair for text in wanted for pair in _offers(product, text)[:1]]


def _offers(product: Product, text: str) -> Sequence[tuple[str, str]]:
    """Values spelled like `text`, in any group (human goals name no group)."""
    return [
        (name, value) for name, values in product["options"].items() for value in values if words(value) == words(text)
    ]
