"""Short pages for tiny models: few words, the same in instruction, page and action, and only what changed."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from spearrl.config.tables import table
from spearrl.envs.webshop.catalogue import Product
from spearrl.envs.webshop.goals import NO_LIMIT, Goal
from spearrl.envs.webshop.pages import ShopSession

WORD = re.compile(r"[^\W_]+(?:[.'][^\W_]+)*")
FILLER = frozenset(table(__file__, "words.toml")["filler"].split())
DETAIL_WORDS = 60  # of a description or feature list
BACK = {"back": "back to search", "prev": "< prev"}
ITEM_BUTTONS = {**BACK, "buy": "buy now", "description": "description", "features": "features"}


def plain_words(text: str) -> str:
    """Lower-case words joined by one space; punctuation is dropped (all of it only where nothing else is there)."""
    return " ".join(WORD.findall(text.lower())) or text.strip().lower()


def wish_words(goal: Goal) -> list[str]:
    """The words of the instruction that name attributes and category, without options and price."""
    words = plain_words(goal["wish"]).split()
    return [word for word in words if word not in FILLER] or words


def short_instruction(goal: Goal) -> str:
    """Example: `find soft vegan lamp color: red size: large under $60`. Human goals name their options in the wish."""
    options = goal["goal_options"].items() if isinstance(goal["goal_options"], dict) else ()
    named = (f"{plain_words(name)}: {plain_words(value)}" for name, value in options)
    limit = [f"under ${goal['price_upper']:.0f}"] if goal["price_upper"] < NO_LIMIT else []
    return " ".join(["find", *wish_words(goal), *named, *limit])


@dataclass(slots=True, frozen=True)
class ShortProduct:
    """A product's parts of pages, made once."""

    title: str  # with the price
    options: str  # one line a group
    labels: dict[str, str]  # of its item page: shown label -> the simulator's name
    value_labels: dict[str, str]  # option value -> its label


class CompactRenderer:
    """Labels are positions (or ASINs) on a results page and words elsewhere; an option click shows only `chosen …`."""

    def __init__(self, title_words: int, ids: str):
        self._title_words, self._ids = title_words, ids
        self._short_products: dict[str, ShortProduct] = {}

    def show(self, session: ShopSession, goal: Goal, *, changed: bool) -> tuple[str, str, str, dict[str, str]]:
        """The page, or what changed: one word after an impossible action, the choice after a click on an option.

        Returns:
            As `render.show`, and the labels: what can be clicked -> the simulator's name for it.
        """
        body, labels = self._page(session)
        shown = self._short(session.product).value_labels if session.options else {}
        choices = {name: f"chosen {plain_words(name)}: {shown[value]}" for name, value in session.options.items()}
        picked = session.option_picked
        text = "invalid" if not changed else body if picked is None else choices[picked]
        instruction = f"{short_instruction(goal)}\n" if session.page == "index" and changed else ""
        return instruction + text, text, "\n ".join([body, *choices.values()]), labels

    def _page(self, session: ShopSession) -> tuple[str, dict[str, str]]:
        """The whole page, and what its labels stand for."""
        if session.page in ("index", "done"):
            return "search" if session.page == "index" else "done", {}
        if session.page == "item":
            short = self._short(session.product)
            return f"item {short.title}{short.options}\n buy", short.labels
        if session.page == "results":
            return self._results(session)
        return f"{session.page} {_detail(session)}\n prev", BACK

    def _results(self, session: ShopSession) -> tuple[str, dict[str, str]]:
        labels = (BACK if session.number > 1 else {"back": "back to search"}) | {"next": "next >"}
        lines = [f"page {session.number}"]
        for position, product in enumerate(session.visible(), 1):
            asin = product["asin"].lower()
            label = str(position) if self._ids == "position" else asin
            labels[label] = asin
            lines.append(f"{label} {self._short(product).title}")
        return "\n ".join([*lines, "prev next" if session.number > 1 else "next"]), labels

    def _short(self, product: Product) -> ShortProduct:
        if product["asin"] not in self._short_products:
            self._short_products[product["asin"]] = self._shorten(product)
        return self._short_products[product["asin"]]

    def _shorten(self, product: Product) -> ShortProduct:
        price = f"${math.ceil(max(product['pricing']))}"
        title = " ".join([*plain_words(product["Title"]).split()[: self._title_words], price])
        labels, value_labels, lines = dict(ITEM_BUTTONS), dict[str, str](), []
        for name, values in product["options"].items():
            for value in filter(None, values):
                if value not in value_labels:
                    value_labels[value] = _free_label(plain_words(value), labels)
                    labels[value_labels[value]] = value
            shown = [value_labels[value] for value in values if value]
            separator = ", " if any(" " in label for label in shown) else " "
            lines.append(f"\n {plain_words(name)}: {separator.join(shown)}")
        return ShortProduct(title, "".join(lines), labels, value_labels)


def _free_label(label: str, taken: Collection[str]) -> str:
    """`label`, numbered where another option of the product already has it."""
    numbered = (f"{label} {number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([label], numbered) if free not in taken)


def _detail(session: ShopSession) -> str:
    """The beginning of a sub-page."""
    texts = {"description": session.product["Description"], "features": " ".join(session.product["BulletPoints"])}
    return " ".join(plain_words(texts.get(session.page, "")).split()[:DETAIL_WORDS])
