"""Products: the original's files, packed ones, or generated ones, cleaned into the records the simulator shows."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from spearrl.envs.text.bm25 import LuceneIndex
from spearrl.envs.text.records import read_records
from spearrl.envs.webshop.generate import generate
from spearrl.errors import ConfigError

Product = dict[str, Any]
WHERE = "env.options.data"
LAYOUT = (
    "a folder with items_shuffle*.json, items_ins_v2*.json (and items_human_ins.json for human goals), "
    "or with products_*.jsonl.xz"
)


class Catalogue:
    """Read-only products, and the search index over them (built when first used)."""

    def __init__(self, products: Iterable[Product]):
        self.products = tuple(products)

    @cached_property
    def index(self) -> LuceneIndex:
        """Equal scores keep the products' order (the original's Pyserini goes by asin)."""
        return LuceneIndex.from_texts(map(indexed_text, self.products))

    def search(self, keywords: list[str], limit: int = 50) -> list[Product]:
        """The best products for a query. `<a> x`, `<c> x`, `<q> x` list all of an attribute, category or query."""
        rest = " ".join(keywords[1:]).strip()
        if keywords[0] == "<a>":
            return [p for p in self.products if rest in p["Attributes"]]
        if keywords[0] == "<c>":
            return [p for p in self.products if p["category"] == (keywords[1].strip() if len(keywords) > 1 else "")]
        if keywords[0] == "<q>":
            return [p for p in self.products if p["query"] == rest]
        return [self.products[number] for number, _ in self.index.search(" ".join(keywords), limit)]


def indexed_text(product: Mapping[str, Any]) -> str:
    """Title, description, first bullet, and the options as "size: s, m, and color: red", in lower case."""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product["options"].items())
    bullet = product["BulletPoints"][0] if product["BulletPoints"] else ""
    return " ".join((product["Title"], product["Description"], bullet, options)).lower()


@lru_cache(maxsize=8)
def load(data: str | None, num_products: int | None, seed: int) -> Catalogue:
    """The catalogue behind `env.options.data`, loaded once per process; None: generated. Raises ConfigError."""
    if data is None:
        raw, attributes = generate(num_products or 480, seed)
        return Catalogue(_cleaned(raw, attributes, {}))
    path = Path(data).expanduser()
    if not path.exists():
        raise _not_webshop(f"{data!r} does not exist")
    folder = path if path.is_dir() else path.parent
    source = path if path.is_file() else _product_file(folder)
    attributes = _json(_attribute_file(folder, source.name))
    human = folder / "items_human_ins.json"
    instructions = _json(human) if human.exists() else {}
    records = read_records(source, layout=LAYOUT, where=f"{WHERE}={source}")
    try:
        first = (record for _, record in itertools.islice(records, num_products))
        products = list(_cleaned(first, attributes, instructions))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _not_webshop(f"{source.name} is not in WebShop's format: {error!r}") from error
    if not products:
        raise _not_webshop(f"{source.name} holds no products")
    return Catalogue(products)


def _not_webshop(reason: str) -> ConfigError:
    return ConfigError(reason, where=WHERE, hint=f"point it at {LAYOUT}")


def _product_file(folder: Path) -> Path:
    """verl-agent's small set where both are there; the full set by its file name."""
    files = sorted(folder.glob("items_shuffle*.json"), key=lambda p: (p.stem == "items_shuffle", p.name))
    files += sorted(p for p in folder.glob("products_*.jsonl.xz") if not p.name.endswith("_text.jsonl.xz"))
    if not files:
        raise _not_webshop(f"no product file in {folder}")
    return files[0]


def _attribute_file(folder: Path, source: str) -> Path:
    """Attributes and synthetic instructions by asin: where there are several files, that of the product file's size."""
    size = re.search(r"_\d+", source)
    same_size = folder / f"items_ins_v2{size.group() if size else ''}.json"
    files = [same_size] if same_size.exists() else sorted(folder.glob("items_ins_v2*.json"))
    if not files:
        raise _not_webshop(f"no items_ins_v2*.json in {folder}")
    return files[0]


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path.name} is not JSON: {error}", where=WHERE, hint="download the file again") from error


def _cleaned(records: Iterable[Product], attributes: dict[str, Any], human: dict[str, Any]) -> Iterator[Product]:
    asins: set[str] = set()
    for raw in records:
        asin = raw["asin"]
        if asin == "nan" or len(asin) > 10 or asin in asins:
            continue
        asins.add(asin)
        known = attributes.get(asin, {})
        bullets = raw["small_description"]
        pricing, price = _price(raw.get("pricing"))
        yield {
            **{name: raw[name] for name in ("asin", "name", "category", "product_category")},
            "query": raw["query"].lower().strip(),
            "Title": raw["name"],
            "Description": raw["full_description"],
            "BulletPoints": bullets if isinstance(bullets, list) else [bullets],
            "pricing": pricing,
            "Price": price,
            "options": _options(raw.get("customization_options")),
            "Attributes": known.get("attributes", ["DUMMY_ATTR"]),
            "instruction_text": known.get("instruction"),
            "instruction_attributes": known.get("instruction_attributes"),
            "instructions": human.get(asin, raw.get("instructions", [])),
        }


def _price(raw: Any) -> tuple[list[float], str]:
    """Numbers and shown text of "$a" or "$a$b" (or of numbers already parsed); no price means $100."""
    if not raw:
        return [100.0], "$100.0"
    parts = [re.sub(r"[^\d.]", "", part) for part in raw.split("$")[1:]] if isinstance(raw, str) else raw
    numbers = [float(part) for part in parts if part != ""] or [100.0]
    if len(numbers) == 1:
        return numbers, f"${numbers[0]}"
    return numbers[:2], f"${numbers[0]} to ${numbers[1]}"


def _options(raw: Any) -> dict[str, list[str]]:
    groups = raw.items() if raw else ()
    return {
        name.lower(): [v["value"].strip().replace("/", " | ").lower() for v in values]
        for name, values in groups
        if values is not None
    }
