"""The simulator's states and transitions, without HTML: what can be clicked where, and what a click or search does."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from spearrl.envs.webshop.catalogue import Catalogue, Product

SUB_PAGES = ("description", "features", "reviews", "attributes")
MOST_RESULTS = 50  # products a search returns at most
Target = tuple[str, str] | None  # (option name, value) behind a name; None: a button or a product


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

    def targets(self) -> dict[str, Target]:
        """What can be clicked, in lower case and the page's order; of equal names the last one counts."""
        if self.page == "index":
            return {"search": None}
        if self.page == "results":
            names = ["back to search", "< prev", "next >"] if self.number > 1 else ["back to search", "next >"]
            return dict.fromkeys([*names, *(product["asin"].lower() for product in self.visible())])
        if self.page == "item":
            return item_targets(self.product, self.show_attrs)
        return {} if self.page == "done" else {"back to search": None, "< prev": None}

    def play(self, kind: str, argument: str) -> bool:
        """Play "search" (on any page) or "click"; False, and nothing changed, where that is impossible here."""
        self.option_picked = None
        if self.page == "done" or not argument:
            return False
        if kind == "search":
            self.keywords = argument.split(" ")
            products = self.catalogue.products
            self.results = (
                self.draw.sample(products, min(MOST_RESULTS, len(products)))
                if self.keywords[0] == "<r>"
                else self.catalogue.search(self.keywords, MOST_RESULTS)
            )
            self._show_results(1)
            return True
        targets = self.targets()
        if kind != "click" or argument == "search" or argument not in targets:
            return False
        self._click(argument, targets[argument])
        return True

    def _show_results(self, number: int) -> None:
        self.page, self.number, self.product, self.options = "results", number, {}, {}

    def _click(self, name: str, option: Target) -> None:
        if name == "buy now":
            self.page = "done"
        elif name == "back to search":
            self.page, self.product, self.options, self.opened = "index", {}, {}, set()
        elif name == "next >" and self.page == "results":
            self._show_results(self.number + 1)
        elif name == "< prev" and self.page in ("results", "item"):
            self._show_results(self.number - (self.page == "results"))
        elif name == "< prev":
            self.page = "item"
        elif name in SUB_PAGES:
            self.page = name
        elif option is not None:
            self.option_picked, value = option
            self.options[self.option_picked] = value
        else:
            self._open(name)

    def _open(self, name: str) -> None:
        self.product = next((p for p in self.visible() if p["asin"].lower() == name), self.product)
        if self.product:
            self.page = "item"
            self.opened.add(self.product["asin"])


def item_targets(product: Product, show_attrs: bool) -> dict[str, Target]:
    """What an item page offers: buttons first, then option values."""
    names = ["back to search", "< prev", "description", "features", "reviews"]
    targets: dict[str, Target] = dict.fromkeys([*names, "attributes", "buy now"] if show_attrs else [*names, "buy now"])
    for option, values in product["options"].items():
        targets |= {value: (option, value) for value in values}
    return targets
