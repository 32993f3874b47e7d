"""The simulator's states and transitions, without HTML: what can be clicked where, and what a click or search does."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from spearrl.envs.webshop.catalogue import Catalogue, Product

SUB_PAGES = ("description", "features", "reviews", "attributes")
FOUND = 50  # products a search returns at most
Target = tuple[str, str] | None  # (option name, value) behind a name; None: a button or a product


def parse_action(text: str) -> tuple[str, str] | None:
    """(name, argument) of the longest `name[argument]` at the start of the first line; None where there is none."""
    line = text.split("\n", 1)[0]
    close = line.rfind("]")
    start = line.rfind("[", 0, max(close - 1, 0))
    return (line[:start], line[start + 1 : close].lower()) if start > 0 else None


@dataclass(slots=True)
class Session:
    """One shopper: the page shown, and what the visit has gathered. `play` is the only thing that changes it."""

    catalogue: Catalogue
    draw: random.Random  # for the query <r>
    per_page: int = 10
    show_attrs: bool = False
    page: str = "index"  # index, results, item, one of SUB_PAGES, done
    keywords: list[str] = field(default_factory=list)
    found: list[Product] = field(default_factory=list)
    number: int = 1  # of the results page
    product: Product | None = None
    options: dict[str, str] = field(default_factory=dict)
    opened: set[str] = field(default_factory=set)  # asins
    chose: str | None = None  # the option that the last click picked

    def visible(self) -> list[Product]:
        """The products on the results page shown."""
        return self.found[(self.number - 1) * self.per_page : self.number * self.per_page]

    def targets(self) -> dict[str, Target]:
        """What can be clicked, lower case, in the page's order; a name that occurs twice keeps its first place and its last meaning."""
        if self.page == "index":
            return {"search": None}
        if self.page == "results":
            names = ["back to search", "< prev", "next >"] if self.number > 1 else ["back to search", "next >"]
            return dict.fromkeys([*names, *(p["asin"].lower() for p in self.visible())])
        if self.page == "item" and self.product is not None:
            return item_targets(self.product, self.show_attrs)
        return {} if self.page == "done" else {"back to search": None, "< prev": None}

    def play(self, kind: str, argument: str) -> bool:
        """Play "search" (on any page) or "click"; False, and nothing changed, where that is impossible here."""
        self.chose = None
        if self.page == "done" or not argument:
            return False
        if kind == "search":
            self._search(argument)
            return True
        targets = self.targets()
        if kind != "click" or argument == "search" or argument not in targets:
            return False
        self._click(argument, targets[argument])
        return True

    def _search(self, words: str) -> None:
        self.keywords = words.split(" ")
        everything = self.catalogue.products
        if self.keywords[0] == "<r>":
            self.found = self.draw.sample(everything, min(FOUND, len(everything)))
        else:
            self.found = self.catalogue.search(self.keywords, FOUND)
        self._show_results(1)

    def _show_results(self, number: int) -> None:
        self.page, self.number, self.product, self.options = "results", number, None, {}

    def _click(self, name: str, option: Target) -> None:
        if name == "buy now":
            self.page = "done"
        elif name == "back to search":
            self.page, self.product, self.options, self.opened = "index", None, {}, set()
        elif name == "next >" and self.page == "results":
            self._show_results(self.number + 1)
        elif name == "< prev" and self.page != "results":
            self._leave()
        elif name == "< prev":
            self._show_results(self.number - 1)
        elif name in SUB_PAGES:
            self.page = name
        elif option is not None:
            self.chose = option[0]
            self.options[option[0]] = option[1]
        else:
            self._open(name.upper())

    def _leave(self) -> None:
        if self.page == "item":
            self._show_results(self.number)
        else:
            self.page = "item"

    def _open(self, asin: str) -> None:
        self.product = next((p for p in self.visible() if p["asin"].upper() == asin), self.product)
        if self.product is not None:
            self.page = "item"
            self.opened.add(self.product["asin"])


def item_targets(product: Product, show_attrs: bool) -> dict[str, Target]:
    """What an item page offers: buttons first, then option values."""
    names = ["back to search", "< prev", "description", "features", "reviews"]
    targets: dict[str, Target] = dict.fromkeys([*names, "attributes", "buy now"] if show_attrs else [*names, "buy now"])
    for option, values in product["options"].items():
        targets |= {value: (option, value) for value in values}
    return targets
