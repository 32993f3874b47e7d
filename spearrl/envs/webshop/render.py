"""Pages as the original's observations: `text` (strings joined by [SEP]) and `text_rich` (lines, marked buttons)."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from spearrl.config.tables import table
from spearrl.envs.webshop.catalogue import Product
from spearrl.envs.webshop.goals import Goal
from spearrl.envs.webshop.pages import ShopSession

SEP = " [SEP] "
# how rich lines show a node
TEXT, BUTTON, CLICKED = "{}", "[button] {} [button_]", "[clicked button] {} [clicked button_]"
Node = tuple[str, str]  # the text of an HTML node, and how a rich line shows it
# The page after a purchase: a fixed form, in which the original fills in the product, its options and the reward.
THANKS, NOT_FILLED_IN = (table(__file__, "words.toml")[name].split("|") for name in ("thanks", "not_filled_in"))


def show(session: ShopSession, goal: Goal, score: float | None, *, rich: bool) -> tuple[str, str, str]:
    """The page of `session` as `text` (rich: `text_rich`), equal to the original's.

    Args:
        score: of the purchase, where the last action was one.

    Returns:
        The whole text; what later turns of a chat show, which have no instruction; what windowed prompts show.
    """
    instruction, nodes = goal["instruction_text"], _nodes(session, score)
    if rich:
        body = "".join(f"{mark.format(text)}\n" for text, mark in nodes)
        return _rich_head(session, instruction) + body, body, body
    body = SEP.join(text.strip() for text, _ in nodes if text)
    head = "" if session.page == "done" else f"Instruction:{SEP}{instruction}{SEP}"
    title = f"WebShop{SEP}" if session.page == "index" else ""
    return title + head + body, body, "'" + body.replace(SEP, f"'{SEP}'") + "'"


def _nodes(session: ShopSession, score: float | None) -> Iterator[Node]:
    """Everything after the instruction."""
    if session.page == "index":
        yield "Search", BUTTON
    elif session.page == "done":
        yield from ((text, TEXT) for text in _done_texts(session, score))
    elif session.page == "results":
        yield "Back to Search", BUTTON
        yield f"Page {session.number} (Total results: {len(session.results)})", TEXT
        if session.number > 1:
            yield "< Prev", BUTTON
        yield "Next >", BUTTON
        for product in session.visible():
            yield product["asin"], f"\n{CLICKED if product['asin'] in session.opened else BUTTON}"
            yield from ((text, TEXT) for text in (product["Title"], product["Price"]) if text)
    else:
        yield from (("Back to Search", BUTTON), ("< Prev", BUTTON))
        if session.page == "item":
            yield from _item(session.product, set(_clicked_values(session)), session.show_attrs)
        else:
            yield from ((text, TEXT) for text in _sub_page_texts(session))


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
    kinds = [product[name] for name in ("category", "query", "product_category")]
    texts = {
        "description": [product["Description"]] if product["Description"] else [],
        "features": [f" {bullet}" for bullet in product["BulletPoints"]],
        "attributes": [*(f" {attribute}" for attribute in product["Attributes"]), *kinds],
    }
    return texts.get(session.page, [])


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
