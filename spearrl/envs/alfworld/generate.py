"""Households without data: own rooms and placements, ALFWorld's six kinds of task and its text. Everything comes from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from spearrl.envs.alfworld.game import Goal
from spearrl.seeds import derive

FOOD, CROCKERY, CUTLERY = "Apple Bread Egg Lettuce Potato Tomato", "Bowl Cup Mug Plate", "ButterKnife Fork Knife Spatula Spoon"
COOKWARE, SHAKERS, BATH = "Kettle Pan Pot", "PepperShaker SaltShaker", "Candle Cloth SoapBar SoapBottle SprayBottle ToiletPaper"
POCKET, DECOR = "CellPhone CreditCard KeyChain", "Box Statue Vase"
HOLDS = {  # what may stand where; a part of what ALFRED allows
    "ArmChair": f"{POCKET} Book Box Laptop Newspaper Pillow RemoteControl",
    "BathtubBasin": "Cloth SoapBar",
    "Bed": "Book CellPhone Laptop Pillow",
    "Cabinet": f"{CROCKERY} {COOKWARE} {SHAKERS} {BATH}",
    "Cart": BATH,
    "CoffeeMachine": "Mug",
    "CoffeeTable": f"{POCKET} {DECOR} Book Laptop Newspaper RemoteControl",
    "CounterTop": f"{FOOD} {CROCKERY} {CUTLERY} {COOKWARE} {SHAKERS} {BATH}",
    "Desk": f"{POCKET} {DECOR} AlarmClock Book Bowl CD Laptop Mug Pen Pencil",
    "DiningTable": f"{FOOD} {CROCKERY} {CUTLERY} {COOKWARE} {SHAKERS} {POCKET} {DECOR} Book Laptop Newspaper RemoteControl",
    "Drawer": f"{CUTLERY} {SHAKERS} {POCKET} {BATH} Book CD Newspaper Pen Pencil RemoteControl",
    "Dresser": f"{POCKET} {DECOR} AlarmClock Book CD Laptop Pen Pencil RemoteControl",
    "Fridge": f"{FOOD} {CROCKERY} Pan Pot",
    "GarbageCan": f"{FOOD} CD Newspaper Pen Pencil SoapBar SoapBottle SprayBottle ToiletPaper",
    "Microwave": "Apple Bowl Bread Cup Egg Mug Plate Potato Tomato",
    "Ottoman": f"{POCKET} Book Box Laptop Newspaper Pillow RemoteControl",
    "Safe": f"{POCKET} CD Statue Vase",
    "Shelf": f"{CROCKERY} {SHAKERS} {POCKET} {DECOR} {BATH} AlarmClock Book CD Newspaper Pen Pencil RemoteControl",
    "SideTable": f"{FOOD} {CROCKERY} {CUTLERY} {SHAKERS} {POCKET} {DECOR} {BATH} AlarmClock Book CD Laptop Newspaper Pen Pencil RemoteControl",
    "SinkBasin": f"Apple Egg Lettuce Potato Tomato {CROCKERY} {CUTLERY} {COOKWARE} Cloth SoapBar",
    "Sofa": f"{POCKET} Book Box Laptop Newspaper Pillow RemoteControl",
    "StoveBurner": COOKWARE,
    "Toilet": BATH,
    "ToiletPaperHanger": "ToiletPaper",
}
OPENABLE = {"Fridge": 1.0, "Microwave": 1.0, "Safe": 1.0, "Cabinet": 0.8, "Drawer": 0.8}  # how often
ABLE = {
    "cleanable": f"Apple Egg Lettuce Potato Tomato {CROCKERY} {CUTLERY} {COOKWARE} Cloth SoapBar",
    "heatable": "Apple Bread Cup Egg Mug Plate Potato Tomato",
    "coolable": f"{FOOD} {CROCKERY} Pan Pot",
    "sliceable": FOOD,
    "isReceptacleObject": f"{CROCKERY} Box Pan Pot",
}
LAMP_ON = ("Desk", "Dresser", "Shelf", "SideTable", "CoffeeTable")


# room -> what every one has; what it may have, and how often at most; what lies about in it
ROOMS: dict[str, tuple[str, dict[str, int], str]] = {
    "kitchen": (
        "CounterTop Fridge Microwave SinkBasin",
        {"Cabinet": 6, "Drawer": 5, "CounterTop": 2, "StoveBurner": 4, "CoffeeMachine": 1, "DiningTable": 1, "GarbageCan": 1, "Shelf": 3, "SideTable": 1},
        f"{FOOD} {CROCKERY} {CUTLERY} {COOKWARE} {SHAKERS} SoapBottle",
    ),
    "bedroom": (
        "Bed Desk SideTable",
        {"Drawer": 10, "Shelf": 7, "Dresser": 1, "Safe": 1, "GarbageCan": 1, "ArmChair": 1, "SideTable": 2},
        f"{POCKET} AlarmClock Book Bowl Box CD Laptop Mug Pen Pencil Pillow",
    ),
    "livingroom": (
        "Sofa CoffeeTable SideTable",
        {"ArmChair": 2, "Drawer": 8, "Shelf": 6, "Cabinet": 4, "DiningTable": 1, "Dresser": 1, "GarbageCan": 1, "Ottoman": 1, "Safe": 1},
        f"{POCKET} {DECOR} Book Laptop Newspaper Pillow RemoteControl",
    ),
    "bathroom": (
        "CounterTop SinkBasin Toilet",
        {"Cabinet": 8, "Drawer": 8, "Shelf": 5, "BathtubBasin": 1, "Cart": 1, "GarbageCan": 1, "ToiletPaperHanger": 1, "SideTable": 1},
        BATH,
    ),
}
# task type -> (kind of goal, state, rooms), with ALFWorld's two ways to say it; {o} object, {r} receptacle
KINDS = {
    "pick_and_place_simple": ("place", "", tuple(ROOMS), ("put a {o} in {r}", "put some {o} on {r}")),
    "look_at_obj_in_light": ("light", "", ("bedroom", "livingroom"), ("look at {o} under the {r}", "examine the {o} with the {r}")),
    "pick_clean_then_place_in_recep": ("place", "clean", ("kitchen", "bathroom"), ("put a clean {o} in {r}", "clean some {o} and put it in {r}")),
    "pick_heat_then_place_in_recep": ("place", "hot", ("kitchen",), ("put a hot {o} in {r}", "heat some {o} and put it in {r}")),
    "pick_cool_then_place_in_recep": ("place", "cool", ("kitchen",), ("put a cool {o} in {r}", "cool some {o} and put it in {r}")),
    "pick_two_obj_and_place": ("two", "", tuple(ROOMS), ("put two {o} in {r}", "find two {o} and put them in {r}")),
}
TREATS = {"clean": ("cleanable", "SinkBasin"), "hot": ("heatable", "Microwave"), "cool": ("coolable", "Fridge")}
SIZES = {"small": ((6, 10), (6, 10)), "large": ((12, 22), (20, 36))}  # receptacles, objects


def household(task_type: str, layout: int, size: str, draw: random.Random, layout_seed: int) -> tuple[dict[str, list[Any]], Goal, str]:
    """Facts, goal and task text of one game. `layout` and `layout_seed` fix room and furniture; `draw` fixes everything else."""
    kind, state, rooms, texts = KINDS[task_type]
    name = rooms[layout % len(rooms)]
    fixed, more, pool = ROOMS[name]
    furniture = _furnish(fixed, more, size, random.Random(derive(layout_seed, "room", name, layout)))
    types = sorted({holder for holder, _ in furniture})
    things = pool.split()
    tool_type, tool = TREATS.get(state, ("", ""))
    wished = [o for o in things if not state or o in ABLE[tool_type].split()]
    fits = {o: [r for r in types if o in HOLDS[r].split()] for o in wished}
    ways = [(o, r) for o in wished for r in fits[o] if r != tool and len(fits[o]) > 1]
    thing, target = draw.choice(ways)
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


def _furnish(fixed: str, more: dict[str, int], size: str, draw: random.Random) -> list[tuple[str, bool]]:
    """Receptacle types of a room, and whether each can be opened."""
    chosen, extra = fixed.split(), [holder for holder, most in more.items() for _ in range(most)]
    draw.shuffle(extra)
    chosen += extra[: max(0, draw.randint(*SIZES[size][0]) - len(chosen))]
    return [(holder, draw.random() < OPENABLE.get(holder, 0.0)) for holder in sorted(chosen)]


def _spots(thing: str, types: Iterable[str], furniture: list[tuple[str, bool]]) -> list[int]:
    """Receptacles of these types that may hold a thing."""
    return [i for i, (holder, _) in enumerate(furniture) if holder in types and thing in HOLDS[holder].split()]


def _facts(furniture: list[tuple[str, bool]], placed: list[tuple[str, int]]) -> dict[str, list[Any]]:
    """The facts a PDDL problem would state."""
    holders = [f"{holder.removesuffix('Basin')}_bar_{i:02d}{'_bar_Basin' * holder.endswith('Basin')}" for i, (holder, _) in enumerate(furniture)]
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
        facts[predicate] = [(name,) for name, thing, _ in things if thing in able.split()]
    facts["canContain"] = [(f"{holder}Type", f"{thing}Type") for holder in {holder for holder, _ in furniture} for thing in HOLDS[holder].split()]
    return facts
