"""Short pages for tiny models: few words, no punctuation, the same words in instruction, page and action, and only what changed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from spearrl.config.tables import table
from spearrl.envs.webshop.catalogue import Product
from spearrl.envs.webshop.goals import NO_LIMIT
from spearrl.envs.webshop.pages import Session
from spearrl.envs.webshop.render import Move, Page

WORD = re.compile(r"[^\W_]+(?:[.'][^\W_]+)*")
FILLER = frozenset(table(__file__, "words.toml")["filler"].split())
DETAIL_WORDS = 60  # of a description or feature list
BUTTONS = {
    "back": "back to search",
    "prev": "< prev",
    "buy": "buy now",
    "description": "description",
    "features": "features",
}


def words(text: str) -> str:
    """Lower-case words joined by one space; punctuation is dropped (all of it only where nothing else is there)."""
    return " ".join(WORD.findall(text.lower())) or text.strip().lower()


def wish_words(goal: dict[str, Any]) -> list[str]:
    """The words of the instruction that name attributes and category, without options and price."""
    found = words(goal["wish"]).split()
    return [word for word in found if word not in FILLER] or found


def option_words(goal: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the options wanted, as the compact pages spell them. Human goals name them in the wish."""
    options = goal["goal_options"]
    return [(words(name), words(value)) for name, value in options.items()] if isinstance(options, dict) else []


def short_instruction(goal: dict[str, Any]) -> str:
    """Example: `find soft vegan lamp color: red size: large under $60`."""
    parts = ["find", *wish_words(goal), *(f"{name}: {value}" for name, value in option_words(goal))]
    return " ".join(parts + ([f"under ${goal['price_upper']:.0f}"] if goal["price_upper"] < NO_LIMIT else []))


@dataclass(slots=True, frozen=True)
class Short:
    """A product's parts of pages, made once."""

    title: str  # with the price
    options: str  # one line a group
    labels: dict[str, str]  # of its item page: shown label -> the simulator's name
    admissible: tuple[str, ...]
    values: dict[str, str]  # option value -> its label


class CompactRenderer:
    """Labels are positions (or ASINs) on a results page and words elsewhere; an option click shows only `chosen …`."""

    def __init__(self, title_words: int, ids: str):
        self._title_words, self._ids = title_words, ids
        self._shorts: dict[str, Short] = {}

    def show(self, session: Session, goal: dict[str, Any], move: Move) -> Page:
        """The page of `session`, or only what changed: one word after an impossible action, the choice after an option click."""
        body, labels, admissible = self._page(session)
        option = move.option
        full = body + "".join(
            f"\n chosen {words(name)}: {self._label(session, value)}" for name, value in session.options.items()
        )
        if not move.changed:
            text = "invalid"
        elif option is not None:
            text = f"chosen {words(option)}: {self._label(session, session.options[option])}"
        else:
            text = body
        instruction = f"{short_instruction(goal)}\n" if session.page == "index" and move.changed else ""
        return Page(instruction + text, text, full, admissible, labels)

    def _label(self, session: Session, value: str) -> str:
        return self.short(session.product).values.get(value, value) if session.product else value

    def short(self, product: Product) -> Short:
        found = self._shorts.get(product["asin"])
        if found is None:
            found = self._shorts[product["asin"]] = self._shorten(product)
        return found

    def _shorten(self, product: Product) -> Short:
        title = " ".join(
            [*words(product["Title"]).split()[: self._title_words], f"${math.ceil(max(product['pricing']))}"]
        )
        labels, spelled = dict(BUTTONS), {}
        for value in (value for values in product["options"].values() for value in values if value):
            if value not in spelled:
                spelled[value] = _free(words(value), labels)
                labels[spelled[value]] = value
        lines = []
        for name, values in product["options"].items():
            shown = [spelled[value] for value in values if value]
            lines.append(f"\n {words(name)}: " + (", " if any(" " in label for label in shown) else " ").join(shown))
        return Short(title, "".join(lines), labels, _clicks(labels), spelled)

    def _page(self, session: Session) -> tuple[str, dict[str, str], tuple[str, ...]]:
        if session.page == "item" and session.product is not None:
            short = self.short(session.product)
            return f"item {short.title}{short.options}\n buy", short.labels, short.admissible
        if session.page == "results":
            return self._results(session)
        if session.page in ("index", "done"):
            return ("search", {}, ("search[<your query>]",)) if session.page == "index" else ("done", {}, ())
        labels = {label: BUTTONS[label] for label in ("back", "prev")}
        return f"{session.page} {_detail(session)}\n prev", labels, _clicks(labels)

    def _results(self, session: Session) -> tuple[str, dict[str, str], tuple[str, ...]]:
        labels = (
            {"back": "back to search", "prev": "< prev", "next": "next >"}
            if session.number > 1
            else {"back": "back to search", "next": "next >"}
        )
        lines = [f"page {session.number}"]
        for place, product in enumerate(session.visible(), 1):
            label = str(place) if self._ids == "position" else product["asin"].lower()
            labels[label] = product["asin"].lower()
            lines.append(f"\n {label} {self.short(product).title}")
        return "".join([*lines, "\n prev next" if session.number > 1 else "\n next"]), labels, _clicks(labels)


def _free(label: str, taken: dict[str, str]) -> str:
    """`label`, numbered where another option of the product already has it."""
    number, wanted = 1, label
    while label in taken:
        number += 1
        label = f"{wanted} {number}"
    return label


def _clicks(labels: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"click[{label}]" for label in labels)


def _detail(session: Session) -> str:
    product = session.product or {}
    text = (
        product.get("Description", "") if session.page == "description" else " ".join(product.get("BulletPoints", ()))
    )
    return " ".join(words(text).split()[:DETAIL_WORDS]) if session.page in ("description", "features") else ""
