"""What all slots share: the catalogue with effective prices drawn, and the goals in their fixed order."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from spearrl.envs.webshop.catalogue import Catalogue, load
from spearrl.envs.webshop.goals import Goal, draw_prices, make_goals
from spearrl.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Shop:
    """Read-only. Goal i is `goals[i]` in the original's shuffled order."""

    catalogue: Catalogue
    prices: dict[str, float]
    goals: tuple[Goal, ...]


@lru_cache(maxsize=8)
def open_shop(data: str | None, num_products: int | None, seed: int, human_goals: bool) -> Shop:
    """The shop of these options, made once per process. `seed=0` gives the golden episodes' prices and goals. Raises ConfigError."""
    catalogue = load(data, num_products, seed if data is None else 0)
    draw = random.Random(seed)
    prices = draw_prices(catalogue.products, draw)
    goals = make_goals(catalogue.products, prices, draw, human=human_goals)
    if not goals:
        kind, file = ("human", "items_human_ins.json") if human_goals else ("synthetic", "items_ins_v2*.json")
        hint = f"put {file} beside the products, or change env.options.human_goals"
        raise ConfigError(f"these products have no {kind} goals", where="env.options.data", hint=hint)
    return Shop(catalogue, prices, tuple(goals))
