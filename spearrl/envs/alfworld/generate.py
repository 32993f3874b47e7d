"""Households without data: rooms and placements from a seed, ALFWorld's six kinds of task and its text."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from spearrl.config.tables import table
from spearrl.envs.alfworld.game import Goal
from spearrl.seeds import derive

_TABLE = table(__file__, "generate.toml")


def _things(text: str) -> tuple[str, ...]:
    """The kinds of thing that a text of the table names, one by one or as groups."""
    return tuple(text.format(**_TABLE["groups"]).split())


HOLDS = {holder: _things(text) for holder, text in _TABLE["holds"].items()}
ABLE = {predicate: _things(text) for predicate, text in _TABLE["able"].items()}
# room -> what every one has; what it may have, and how often at most; what lies about in it
ROOMS: dict[str, tuple[tuple[str, ...], dict[str, int], tuple[str, ...]]] = {
    name: (_things(room["has"]), room["may_have"], _things(room["lying"])) for name, room in _TABLE["rooms"].items()
}
# task type -> kind of goal, state, rooms, texts
KINDS: dict[str, tuple[str, str, list[str], list[str]]] = _TABLE["kinds"]
LAMP_ON = ("Desk", "Dresser", "Shelf", "SideTable", "CoffeeTable")
TREATS = {"clean": ("cleanable", "SinkBasin"), "hot": ("heatable", "Microwave"), "cool": ("coolable", "Fridge")}
SIZES = {"small": ((6, 10), (6, 10)), "large": ((12, 22), (20, 36))}  # receptacles, objects


def household(
    task_type: str, layout: int, size: str, draw: random.Random, layout_seed: int
) -> tuple[dict[str, list[Any]], Goal, str]:
    """Facts, goal and task text of one game. `layout` and `layout_seed` fix room and furniture, `draw` all else."""
    kind, state, rooms, texts = KINDS[task_type]
    name = rooms[layout % len(rooms)]
    furniture = _furnish(name, size, random.Random(derive(layout_seed, "room", name, layout)))
    types, things = sorted({holder for holder, _ in furniture}), ROOMS[name][2]
    predicate, appliance = TREATS.get(state, ("", ""))
    treatable = [o for o in things if not state or o in ABLE[predicate]]
    fits = {o: [r for r in types if o in HOLDS[r]] for o in treatable}
    thing, target = draw.choice([(o, r) for o in treatable for r in fits[o] if r != appliance and len(fits[o]) > 1])
    lamp = "DeskLamp" if kind == "light" else ""
    goal = Goal(kind, f"{thing}Type", "" if lamp else f"{target}Type", state, f"{lamp}Type" if lamp else "")
    elsewhere = [r for r in types if r != target] if not lamp else types
    copies = draw.choice((2, 3)) if kind == "two" else draw.choice((1, 1, 2))
    placed = [(thing, draw.choice(_spots(thing, elsewhere, furniture))) for _ in range(copies)]
    if name in KINDS["look_at_obj_in_light"][2]:
        placed.append(("DeskLamp", draw.choice([i for i, (holder, _) in enumerate(furniture) if holder in LAMP_ON])))
    others = [o for o in things if o != thing]
    for _ in range(max(0, draw.randint(*SIZES[size][1]) - len(placed))):
        other = draw.choice(others)
        placed.append((other, draw.choice(_spots(other, types, furniture))))
    text = draw.choice(texts).format(o=thing.lower(), r=(lamp or target).lower())
    return _facts(furniture, placed), goal, text


def _furnish(room: str, size: str, draw: random.Random) -> list[tuple[str, bool]]:
    """Receptacle types of a room, and whether each can be opened."""
    fixed, may_have, _ = ROOMS[room]
    extra = [holder for holder, most in may_have.items() for _ in range(most)]
    draw.shuffle(extra)
    holders = [*fixed, *extra[: max(0, draw.randint(*SIZES[size][0]) - len(fixed))]]
    return [(holder, draw.random() < _TABLE["openable"].get(holder, 0.0)) for holder in sorted(holders)]


def _spots(thing: str, types: Iterable[str], furniture: list[tuple[str, bool]]) -> list[int]:
    """Receptacles of these types that may hold a thing."""
    return [i for i, (holder, _) in enumerate(furniture) if holder in types and thing in HOLDS[holder]]


def _facts(furniture: list[tuple[str, bool]], placed: list[tuple[str, int]]) -> dict[str, list[Any]]:
    """The facts a PDDL problem would state."""
    holders = [
        f"{holder.removesuffix('Basin')}_bar_{i:02d}{'_bar_Basin' * holder.endswith('Basin')}"
        for i, (holder, _) in enumerate(furniture)
    ]
    things = [(f"{thing}_bar_{i:02d}", thing, spot) for i, (thing, spot) in enumerate(placed)]
    facts: dict[str, list[Any]] = {"atLocation": [("agent1", "loc_bar_start")]}
    facts["receptacleType"] = [(holders[i], f"{holder}Type") for i, (holder, _) in enumerate(furniture)]
    facts["receptacleAtLocation"] = [(holder, f"loc_bar_{i:02d}") for i, holder in enumerate(holders)]
    facts["openable"] = [(holders[i],) for i, (_, openable) in enumerate(furniture) if openable]
    facts["objectType"] = [(name, f"{thing}Type") for name, thing, _ in things]
    facts["inReceptacle"] = [(name, holders[spot]) for name, _, spot in things]
    facts["objectAtLocation"] = [(name, f"loc_bar_{spot:02d}") for name, _, spot in things]
    facts["pickupable"] = [(name,) for name, thing, _ in things if thing != "DeskLamp"]
    facts["toggleable"] = [(name,) for name, thing, _ in things if thing == "DeskLamp"]
    for predicate, able in ABLE.items():
        facts[predicate] = [(name,) for name, thing, _ in things if thing in able]
    facts["canContain"] = [(f"{holder}Type", f"{thing}Type") for holder, _ in furniture for thing in HOLDS[holder]]
    return facts
