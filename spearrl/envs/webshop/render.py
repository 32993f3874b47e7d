"""Pages as the original's observation strings: `text` (strings joined by [SEP]) and `text_rich` (lines with marked buttons)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spearrl.envs.webshop.catalogue import Product
from spearrl.envs.webshop.pages import Session, item_targets

SEP = " [SEP] "


@dataclass(slots=True, frozen=True)
class Page:
    """What one state looks like to the policy."""

    text: str  # Observation.text
    chat: str  # what later turns of a chat show: no instruction
    body: str  # the whole page without the instruction: windowed prompts, and what GiGPO compares states by
    admissible: tuple[str, ...]
    labels: dict[str, str] | None = None  # shown label -> the simulator's name, where they differ


@dataclass(slots=True, frozen=True)
class Move:
    """What the last action did."""

    changed: bool = True  # False: it was impossible
    option: str | None = None  # name of the option it chose
    score: float | None = None  # of the purchase it made


@dataclass(slots=True, frozen=True)
class Fragment:
    """The parts of a product's pages that never change, made once."""

    listing: str  # text mode, on a results page
    item: str  # text mode, from the options to Buy Now
    item_quoted: str
    admissible: tuple[str, ...]


class OriginalRenderer:
    """`text` or `text_rich`, equal to the original's strings. Shared by all slots; only its cache of fragments changes."""

    def __init__(self, rich: bool, show_attrs: bool):
        self._rich, self._show_attrs = rich, show_attrs
        self._fragments: dict[str, Fragment] = {}

    def show(self, session: Session, goal: dict[str, Any], move: Move) -> Page:
        """The whole page of `session`, whatever the move was."""
        head = "" if session.page == "done" else f"Instruction:{SEP}{goal['instruction_text']}{SEP}"
        head = f"WebShop{SEP}{head}" if session.page == "index" else head
        plain, quoted = self._strings(session, move.score)
        if not self._rich:
            return Page(head + plain, plain, quoted, self._admissible(session))
        body = "".join(f"{line}\n" for line in _rich_body(session, move.score))
        above = "" if session.page == "done" else _rich_head(session, goal["instruction_text"])
        return Page(above + body, body, body, self._admissible(session))

    def fragment(self, product: Product) -> Fragment:
        found = self._fragments.get(product["asin"])
        if found is None:
            parts = [*_option_strings(product), *_item_strings(product), "Description", "Features", "Reviews"]
            parts += ["Attributes", "Buy Now"] if self._show_attrs else ["Buy Now"]
            names = item_targets(product, self._show_attrs)
            found = Fragment(
                SEP.join(_listing_strings(product)),
                SEP.join(parts),
                _quoted(parts),
                tuple(f"click[{name}]" for name in names),
            )
            self._fragments[product["asin"]] = found
        return found

    def _strings(self, session: Session, score: float | None) -> tuple[str, str]:
        """Everything after the instruction, plain and quoted."""
        if session.page == "item" and session.product is not None:
            fragment, top = self.fragment(session.product), ["Back to Search", "< Prev"]
            return SEP.join([*top, fragment.item]), SEP.join([_quoted(top), fragment.item_quoted])
        if session.page == "results":
            buttons = _results_buttons(session)
            plain = SEP.join([*buttons, *(self.fragment(p).listing for p in session.visible())])
            return plain, _quoted(plain.split(SEP))
        if session.page == "index":
            return "Search", "'Search'"
        strings = (
            _done_strings(session, score)
            if session.page == "done"
            else ["Back to Search", "< Prev", *_sub_page_strings(session)]
        )
        parts = [text.strip() for text in strings]
        return SEP.join(parts), _quoted(parts)

    def _admissible(self, session: Session) -> tuple[str, ...]:
        if session.page == "item" and session.product is not None:
            return self.fragment(session.product).admissible
        search = ("search[<your query>]",) if session.page == "index" else ()
        return (*search, *(f"click[{name}]" for name in session.targets()))


def _quoted(parts: list[str]) -> str:
    return SEP.join(f"'{part}'" for part in parts)


def _results_buttons(session: Session) -> list[str]:
    counted = f"Page {session.number} (Total results: {len(session.found)})"
    return (
        ["Back to Search", counted, "< Prev", "Next >"] if session.number > 1 else ["Back to Search", counted, "Next >"]
    )


def _listing_strings(product: Product) -> list[str]:
    return [text.strip() for text in (product["asin"], product["Title"], product["Price"]) if text]


def _option_strings(product: Product) -> Iterator[str]:
    for name, values in product["options"].items():
        yield from (text.strip() for text in (name, *values) if text)


def _item_strings(product: Product) -> Iterator[str]:
    if product["Title"]:
        yield product["Title"].strip()
    yield f"Price: {product['Price']}"
    yield f"Rating: {product['Rating']}"


def _sub_page_strings(session: Session) -> list[str]:
    """The text nodes of a sub-page, unstripped as the rich mode shows them."""
    product = session.product
    if product is None:
        return []
    if session.page == "description":
        return [product["Description"]] if product["Description"] else []
    if session.page == "features":
        return [f" {bullet}" for bullet in product["BulletPoints"]]
    if session.page == "attributes":
        return [
            *(f" {a}" for a in product["Attributes"]),
            product["category"],
            product["query"],
            product["product_category"],
        ]
    return []


def _done_strings(session: Session, score: float | None) -> list[str]:
    """The page after a purchase: a fixed form in which the original fills in the product, its options and the reward."""
    options = json.dumps(session.options, sort_keys=True)
    for character in "<>&'":
        options = options.replace(character, f"\\u{ord(character):04x}")
    bought = ["asin", session.product["asin"] if session.product else "None", "options", options]
    bought += ["attrs", "None", "category", "None", "query", "None", "product category", "None"]
    target = [
        "asin",
        "options",
        "attrs",
        "price upper",
        "instuction text",
        "category",
        "product category",
        "query",
        "Goal",
        "None",
    ]
    thanks = ["Thank you for shopping with us!", "Your code: ", "None", " (Paste it in your MTurk interface.)"]
    return [
        *thanks,
        "Purchased",
        *bought,
        "Target",
        *target,
        "Reward",
        "Your score (min 0.0, max 1.0)",
        str(score),
        "Reward Details",
        "None",
    ]


def _rich_head(session: Session, instruction: str) -> str:
    if session.page == "index":
        return f"WebShop\nInstruction: \n{instruction}\n"
    clicked = "".join(f"You have clicked {value}.\n" for value in reversed(list(_clicked(session))))
    return f"{clicked}Instruction:\n{instruction}\n"


def _clicked(session: Session) -> Iterator[str]:
    """Option values on an item page that the original marks as clicked: those quoted in the page's address."""
    if (
        session.page == "item"
        and session.product is not None
        and (session.options or any('"' in word for word in session.keywords))
    ):
        address = "+".join(session.keywords) + json.dumps(session.options)
        for values in session.product["options"].values():
            yield from (value for value in values if value and f'"{value}"' in address)


def _rich_body(session: Session, score: float | None) -> Iterator[str]:
    if session.page == "index":
        yield "[button] Search [button_]"
    elif session.page == "done":
        yield from _done_strings(session, score)
    elif session.page == "results":
        yield from _rich_results(session)
    else:
        yield from ("[button] Back to Search [button_]", "[button] < Prev [button_]")
        yield from _rich_item(session) if session.page == "item" else _sub_page_strings(session)


def _rich_results(session: Session) -> Iterator[str]:
    back, counted, *buttons = _results_buttons(session)
    yield from (f"[button] {back} [button_]", counted, *(f"[button] {name} [button_]" for name in buttons))
    for product in session.visible():
        mark = "clicked button" if product["asin"] in session.opened else "button"
        yield f"\n[{mark}] {product['asin']} [{mark}_]"
        yield from (text for text in (product["Title"], product["Price"]) if text)


def _rich_item(session: Session) -> Iterator[str]:
    if session.product is None:
        return
    clicked = set(_clicked(session))
    for name, values in session.product["options"].items():
        yield name
        for value in values:
            mark = "clicked button" if value in clicked else "button"
            yield f"  [{mark}] {value} [{mark}_]"
    yield from (
        text
        for text in (
            session.product["Title"],
            f"Price: {session.product['Price']}",
            f"Rating: {session.product['Rating']}",
        )
        if text
    )
    buttons = ["Description", "Features", "Reviews", *(["Attributes"] if session.show_attrs else []), "Buy Now"]
    yield from (f"[button] {name} [button_]" for name in buttons)
