"""A generated catalogue, in the original's file format, with a vocabulary that a tiny model can learn to copy."""

from __future__ import annotations

import random
from typing import Any

from spearrl.config.tables import table
from spearrl.seeds import derive

_WORDS = table(__file__, "generate.toml")
FAMILIES: dict[str, list[list[str]]] = _WORDS["families"]  # category: nouns, attributes
COLORS, SIZES, STYLES = (_WORDS[name] for name in ("colors", "sizes", "styles"))
INSTRUCTED = 5 / 6  # share of products that goals are made of
STYLED = 0.25  # share of products with a third option group


def generate(count: int, seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`count` products as in items_shuffle.json, and their attributes and instructions as in items_ins_v2.json.

    Twelve categories; 3 of 8 attributes, a price of $10-90 in tens, 4 of 8 colours, 3 of 5 sizes and for a quarter
    2 of 4 styles each. 480 products give about 6000 goals.
    """
    draw = random.Random(derive(seed, "webshop-catalogue"))
    kinds = [(family, noun) for family, (nouns, _) in FAMILIES.items() for noun in nouns]
    products, attributes = [], {}
    for number in range(count):
        family, noun = kinds[number % len(kinds)]
        words = draw.sample(FAMILIES[family][1], 3)
        product = _product(f"G{number:09d}", family, noun, words, draw)
        products.append(product)
        attributes[product["asin"]] = {"attributes": words} | (
            _instruction(words, noun, draw) if draw.random() < INSTRUCTED else {}
        )
    draw.shuffle(products)
    return products, attributes


def _instruction(words: list[str], noun: str, draw: random.Random) -> dict[str, Any]:
    attributes = draw.sample(words, 2)
    article = "an" if attributes[0][0] in "aeiou" else "a"
    return {"instruction": f"Find me {article} {' '.join(attributes)} {noun}", "instruction_attributes": attributes}


def _product(asin: str, family: str, noun: str, words: list[str], draw: random.Random) -> dict[str, Any]:
    groups = {"Color": draw.sample(COLORS, 4), "Size": draw.sample(SIZES, 3)}
    if draw.random() < STYLED:
        groups["Style"] = draw.sample(STYLES, 2)
    title = " ".join([*words, noun])
    return {
        "asin": asin,
        "name": title,
        "category": family,
        "query": noun,
        "product_category": f"{family} › {noun}",
        "full_description": f"A {title}.",
        "small_description": [f"{word} {noun}" for word in words],
        "pricing": f"${10 * draw.randint(1, 9)}",
        "customization_options": {name: [{"value": value} for value in values] for name, values in groups.items()},
        "images": [""],
    }
