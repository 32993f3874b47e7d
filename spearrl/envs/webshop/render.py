"""Pages as the original's observations: `text` (strings joined by [SEP]) and `text_rich` (lines, marked buttons)."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from spearrl.config.tables import table
from spearrl.envs.webshop.catalogue import Product
from spearrl.envs.webshop.pages import ShopSession, item_targets

SEP = " [SEP] "
TEXT, BUTTON, CLICKED = (
    "{}",
    "[button] {} [button_]",
    "[clicked button] {} [clicked button_]",
)  # how rich lines show a node
Node = tuple[str, str]  # the text of an HTML node, and how a rich line shows it
# The page after a purchase: a fixed form, in which the original fills in the product, its options and the reward.
THANKS, NOT_FILLED_IN = (table(__file__, "words.toml")[name].split("|") for name in ("thanks", "not_filled_in"))


@dataclass(slots=True, frozen=True)
class Page:
    """What one state looks like to the policy."""

    text: str  # Observation.text
    chat: str  # what later turns of a chat show: no instruction
    body: str  # the whole page without the instruction: windowed prompts, and what GiGPO compares states by
    admissible: tuple[str, ...]
    labels: dict[str, str] | None = None  # shown label -> the simulator's name, where they differ


@dataclass(slots=True, frozen=True)
class Fragment:
    """The parts of a product's pages that never change, made once."""

    listing: str  # text mode, on a results page
    item: str  # text mode, from the options to Buy Now
    admissible: tuple[str, ...]


class OriginalRenderer:
    """`text` or `text_rich`, equal to the original's. Shared by all slots; only its cache of fragments changes."""

    def __init__(self, rich: bool):
        self._rich = rich
        self._fragments: dict[str, Fragment] = {}

    def show(
        self, session: ShopSession, goal: dict[str, Any], *, changed: bool = True, score: float | None = None
    ) -> Page:
        """The whole page of `session`, whatever the last action was. `score`: of the purchase, where it was one."""
        instruction, admissible = goal["instruction_text"], self._admissible(session)
        if self._rich:
            body = "".join(f"{mark.format(text)}\n" for text, mark in _nodes(session, score))
            return Page(_rich_head(session, instruction) + body, body, body, admissible)
        head = "" if session.page == "done" else f"Instruction:{SEP}{instruction}{SEP}"
        body = self._text(session, score)
        quoted = "'" + body.replace(SEP, f"'{SEP}'") + "'"
        return Page(f"WebShop{SEP}{head}{body}" if session.page == "index" else head + body, body, quoted, admissible)

    def _text(self, session: ShopSession, score: float | None) -> str:
        """Everything after the instruction."""
        if session.page == "item":
            return SEP.join(["Back to Search", "< Prev", self._fragment(session, session.product).item])
        if session.page == "results":
            listings = (self._fragment(session, product).listing for product in session.visible())
            return SEP.join([*(text for text, _ in _results_head(session)), *listings])
        return _joined(_nodes(session, score))

    def _fragment(self, session: ShopSession, product: Product) -> Fragment:
        fragment = self._fragments.get(product["asin"])
        if fragment is None:
            fragment = self._fragments[product["asin"]] = Fragment(
                _joined(_listing(product, BUTTON)),
                _joined(_item(product, (), session.show_attrs)),
                tuple(f"click[{name}]" for name in item_targets(product, session.show_attrs)),
            )
        return fragment

    def _admissible(self, session: ShopSession) -> tuple[str, ...]:
        if session.page == "item":
            return self._fragment(session, session.product).admissible
        search = ("search[<your query>]",) if session.page == "index" else ()
        return (*search, *(f"click[{name}]" for name in session.targets()))


def _joined(nodes: Iterable[Node]) -> str:
    return SEP.join(text.strip() for text, _ in nodes if text)


def _nodes(session: ShopSession, score: float | None) -> Iterator[Node]:
    """Everything after the instruction."""
    if session.page == "index":
        yield "Search", BUTTON
    elif session.page == "done":
        yield from ((text, TEXT) for text in _done_texts(session, score))
    elif session.page == "results":
        yield from _results_head(session)
        for product in session.visible():
            yield from _listing(product, CLICKED if product["asin"] in session.opened else BUTTON)
    else:
        yield from (("Back to Search", BUTTON), ("< Prev", BUTTON))
        if session.page == "item":
            yield from _item(session.product, set(_clicked_values(session)), session.show_attrs)
        else:
            yield from ((text, TEXT) for text in _sub_page_texts(session))


def _results_head(session: ShopSession) -> Iterator[Node]:
    yield "Back to Search", BUTTON
    yield f"Page {session.number} (Total results: {len(session.results)})", TEXT
    if session.number > 1:
        yield "< Prev", BUTTON
    yield "Next >", BUTTON


def _listing(product: Product, mark: str) -> Iterator[Node]:
    yield product["asin"], f"\n{mark}"
    yield from ((text, TEXT) for text in (product["Title"], product["Price"]) if text)


def _item(product: Product, clicked: Collection[str], show_attrs: bool) -> Iterator[Node]:
    for name, values in product["options"].items():
        yield name, TEXT
        yield from ((value, f"  {CLICKED if value in clicked else BUTTON}") for value in values)
    if product["Title"]:
        yield product["Title"], TEXT
    yield f"Price: {product['Price']}", TEXT
    yield "Rating: N.A.", TEXT
    buttons = ["Description", "Features", "Reviews", *(["Attributes"] if show_attrs else []), "Buy Now"]
    yield from ((name, BUTTON) for name in buttons)


def _sub_page_texts(session: ShopSession) -> list[str]:
    product = session.product
    if session.page == "description":
        return [product["Description"]] if product["Description"] else []
    if session.page == "features":
        return [f" {bullet}" for bullet in product["BulletPoints"]]
    if session.page == "attributes":
        kinds = (product["category"], product["query"], product["product_category"])
        return [*(f" {attribute}" for attribute in product["Attributes"]), *kinds]
    return []


def _done_texts(session: ShopSession, score: float | None) -> list[str]:
    options = json.dumps(session.options, sort_keys=True)
    for character in "<>&'":
        options = options.replace(character, f"\\u{ord(character):04x}")
    filled_in = ["asin", session.product.get("asin", "None"), "options", options]
    return [*THANKS, *filled_in, *NOT_FILLED_IN, str(score), "Reward Details", "None"]


def _rich_head(session: ShopSession, instruction: str) -> str:
    if session.page == "index":
        return f"WebShop\nInstruction: \n{instruction}\n"
    if session.page == "done":
        return ""
    clicked = "".join(f"You have clicked {value}.\n" for value in reversed(list(_clicked_values(session))))
    return f"{clicked}Instruction:\n{instruction}\n"


def _clicked_values(session: ShopSession) -> Iterator[str]:
    """Option values on an item page that the original marks as clicked: those quoted in the page's address."""
    if session.page == "item" and (session.options or any('"' in word for word in session.keywords)):
        address = "+".join(session.keywords) + json.dumps(session.options)
        for values in session.product["options"].values():
            yield from (value for value in values if value and f'"{value}"' in address)
