"""A scripted shopper that plays from the true state: what the cold start imitates."""

from __future__ import annotations

import random

from spearrl.envs.webshop.catalogue import Product
from spearrl.envs.webshop.compact import plain_words, wish_words
from spearrl.envs.webshop.goals import Goal
from spearrl.envs.webshop.pages import ShopSession

PAGES = 3  # results pages looked through before taking the best on the page
TRIES = 3  # clicks on one option before giving it up

Click = tuple[str, str]


class Expert:
    """One episode's shopper.

    With noise n it leaves out each query word with 1.3n, opens a random product with 1.3n, picks an option wrongly with
    n/3 and forgets it otherwise up to n, and strays with n/6.
    """

    def __init__(self, goal: Goal, prices: dict[str, float], draw: random.Random):
        self._goal, self._prices, self._draw = goal, prices, draw
        self._chosen: set[str] = set()  # asins opened on purpose
        self._plans: dict[tuple[str, str], str] = {}  # (asin, option name) -> right | wrong | skip
        self._tries: dict[tuple[str, str], int] = {}

    def act(self, session: ShopSession, noise: float) -> Click:
        """The next ("search" | "click", argument)."""
        certainty = max(0.0, 1 - 1.3 * noise)
        if session.page == "index":
            return "search", self._query(certainty)
        if session.page == "results":
            return "click", self._browse(session, noise, certainty)
        return "click", self._shop(session, noise) if session.page == "item" else "< prev"

    def _query(self, certainty: float) -> str:
        options = self._goal["goal_options"]
        values = options.values() if isinstance(options, dict) else ()
        words = [*wish_words(self._goal), *(word for value in values for word in plain_words(value).split())]
        remembered = [word for word in words if self._draw.random() < certainty]
        return " ".join(remembered) or plain_words(self._goal["query"])

    def _browse(self, session: ShopSession, noise: float, certainty: float) -> str:
        visible = session.visible()
        if self._draw.random() < noise / 6:
            return self._draw.choice(("next >", "back to search"))
        if not visible:
            return "< prev" if session.number > 1 else "back to search"
        if self._draw.random() < certainty:
            product = max(visible, key=self._fit)
            more = len(session.results) > session.number * session.per_page and session.number < PAGES
            if self._fit(product) < 1 and more:
                return "next >"
        else:
            product = self._draw.choice(visible)
        self._chosen.add(product["asin"])
        return product["asin"].lower()

    def _shop(self, session: ShopSession, noise: float) -> str:
        product = session.product
        if product["asin"] not in self._chosen and self._fit(product) < 1:
            return "< prev"
        if self._draw.random() < noise / 6:
            return "< prev"
        picks = (self._pick(session, option, noise) for option in offered_options(self._goal, product))
        return next((value for value in picks if value is not None), "buy now")

    def _pick(self, session: ShopSession, option: tuple[str, str], noise: float) -> str | None:
        """The value to click for one option, or None where it is done with."""
        (name, value), product = option, session.product
        key = (product["asin"], name)
        roll = self._draw.random()
        plan = "right" if roll < 1 - noise else "wrong" if roll < 1 - noise * 2 / 3 else "skip"
        plan = self._plans.setdefault(key, plan)
        tries = self._tries.get(key, 0)
        if plan == "skip" or session.options.get(name) == value or tries >= (TRIES if plan == "right" else 1):
            return None
        self._tries[key] = tries + 1
        others = [other for other in product["options"][name] if other != value]
        return value if plan == "right" or not others else self._draw.choice(others)

    def _fit(self, product: Product) -> float:
        """How well a product fits the goal; 1 for the goal itself and its equals."""
        goal = self._goal
        if product["asin"] == goal["asin"]:
            return 1.0
        title, offered = product["Title"].lower(), len(offered_options(goal, product))
        parts = [float(a in product["Attributes"] or a in title) for a in goal["attributes"]]
        parts += [1.0] * offered + [0.0] * (len(goal["goal_options"]) - offered)
        parts.append(float(self._prices[product["asin"]] <= goal["price_upper"]))
        parts.append(3.0 * (product["query"] == goal["query"]))
        return sum(parts) / (len(parts) + 2)


def offered_options(goal: Goal, product: Product) -> list[tuple[str, str]]:
    """The (name, value) pairs that the goal names and `product` offers. Human goals name values only, of any group."""
    options = product["options"]
    if isinstance(goal["goal_options"], dict):
        return [(name, value) for name, value in goal["goal_options"].items() if value in options.get(name, ())]
    offers: dict[str, tuple[str, str]] = {}
    for name, values in options.items():
        for value in values:
            offers.setdefault(plain_words(value), (name, value))
    return [offers[plain_words(text)] for text in goal["goal_options"] if plain_words(text) in offers]
