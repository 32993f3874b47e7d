"""The simulator's states and transitions, without HTML: what can be clicked where, and what a click or search does."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from spearrl.envs.webshop.catalogue import Catalogue, Product

SUB_PAGES = ("description", "features", "reviews", "attributes")
Targets = dict[str, Callable[[], None] | None]  # what can be clicked, and what a click does; None: nothing
MOST_RESULTS = 50  # products a search returns at most


def parse_action(text: str) -> tuple[str, str]:
    """(name, argument) of the longest `name[argument]` at the start of the first line; else two empty texts."""
    line = text.split("\n", 1)[0]
    close = line.rfind("]")
    start = line.rfind("[", 0, max(close - 1, 0))
    return (line[:start], line[start + 1 : close].lower()) if start > 0 else ("", "")


@dataclass(slots=True)
class ShopSession:
    """One shopper: the page shown, and what the visit has gathered. Only `play` changes it."""

    catalogue: Catalogue
    draw: random.Random  # for the query <r>
    per_page: int = 10
    show_attrs: bool = False
    page: str = "index"  # index, results, item, one of SUB_PAGES, done
    keywords: list[str] = field(default_factory=list)
    results: list[Product] = field(default_factory=list)
    number: int = 1  # of the results page
    product: Product = field(default_factory=dict)  # of the item page, its sub-pages and the purchase; else empty
    options: dict[str, str] = field(default_factory=dict)
    opened: set[str] = field(default_factory=set)  # asins
    option_picked: str | None = None  # its name, where the last click picked one

    def visible(self) -> list[Product]:
        """The products on the results page shown."""
        return self.results[(self.number - 1) * self.per_page : self.number * self.per_page]

    def targets(self) -> Targets:
        """What can be clicked, in lower case and the page's order."""
        home: Targets = {"back to search": self._home}
        if self.page in ("index", "done"):
            return {"search": None} if self.page == "index" else {}
        if self.page == "results":
            back: Targets = {"< prev": partial(self._show_results, self.number - 1)} if self.number > 1 else {}
            forth: Targets = {"next >": partial(self._show_results, self.number + 1)}
            return home | back | forth | {p["asin"].lower(): partial(self._open, p) for p in self.visible()}
        if self.page != "item":
            return home | {"< prev": partial(self._turn_to, "item")}
        pages = SUB_PAGES if self.show_attrs else SUB_PAGES[:-1]
        buttons: Targets = home | {"< prev": partial(self._show_results, self.number)}
        buttons |= {page: partial(self._turn_to, page) for page in pages} | {"buy now": partial(self._turn_to, "done")}
        options = self.product["options"].items()
        picks: Targets = {value: partial(self._pick, name, value) for name, values in options for value in values}
        return buttons | picks | buttons  # a value that is called like a button does not take its place

    def play(self, kind: str, argument: str) -> bool:
        """Play "search" (on any page) or "click"; False, and nothing changed, where that is impossible here."""
        self.option_picked = None
        if kind == "search" and argument and self.page != "done":
            self.keywords, products = argument.split(" "), self.catalogue.products
            if self.keywords[0] == "<r>":
                self.results = self.draw.sample(products, min(MOST_RESULTS, len(products)))
            else:
                self.results = self.catalogue.search(self.keywords, MOST_RESULTS)
            self._show_results(1)
            return True
        click = self.targets().get(argument) if kind == "click" and argument else None
        if click is not None:
            click()
        return click is not None

    def _home(self) -> None:
        self.page, self.product, self.options, self.opened = "index", {}, {}, set()

    def _show_results(self, number: int) -> None:
        self.page, self.number, self.product, self.options = "results", number, {}, {}

    def _open(self, product: Product) -> None:
        self.page, self.product = "item", product
        self.opened.add(product["asin"])

    def _turn_to(self, page: str) -> None:
        self.page = page

    def _pick(self, name: str, value: str) -> None:
        self.option_picked = name
        self.options[name] = value
