"""A game compiled from the facts of its PDDL problem: everything about it that no action changes, and how it starts."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from spearrl.errors import ConfigError

Facts = Mapping[str, Iterable[Any]]  # predicate -> the arguments it holds for
Act = tuple[str, int, int]  # verb, receptacle or object, the other one (-1: none)

FACT = re.compile(r"\((\w+) ([^()]*)\)")
GOAL_TYPE = re.compile(r"\((objectType|receptacleType) \?\w+ (\w+)\)")
STATES = {"isClean": "clean", "isHot": "hot", "isCool": "cool"}
LAMPS = ("DeskLampType", "FloorLampType")
KNIVES = ("KnifeType", "ButterKnifeType")
FLAGS = {"cleanable": "clean", "heatable": "hot", "coolable": "cool", "pickupable": "take", "sliceable": "slice"}
FLAGS |= {"toggleable": "use", "isReceptacleObject": "box"}
THINGS = (*FLAGS, "isCool", "inReceptacle", "inReceptacleObject", "objectAtLocation")  # facts that begin with an object


@dataclass(slots=True, frozen=True)
class Goal:
    """What wins. `kind`: place | two | light; `state`: clean, hot, cool or empty; types as the PDDL spells them."""

    kind: str
    object: str
    receptacle: str = ""
    state: str = ""
    lamp: str = ""


class Source(NamedTuple):
    """What a game is compiled from. `record`: what the original engine needs; empty for a generated game."""

    facts: Facts
    goal: Goal
    task: str  # the text after "Your task is to: "
    where: str  # what errors call it
    old: bool = False  # the grammar of the 2.1.1 files
    record: Mapping[str, Any] = {}


@dataclass(slots=True, frozen=True)
class Game:
    """Receptacles r and objects o are numbered in the order in which lists name them; l are places to stand at.

    `able[o]` holds what can be done with an object: clean, hot, cool, take, slice, use; `box` that it can hold others.
    """

    receptacles: tuple[str, ...]  # names, "cabinet 1"
    objects: tuple[str, ...]
    places: tuple[str, ...]  # "loc 7", as the old grammar says
    receptacle_types: tuple[str, ...]
    object_types: tuple[str, ...]
    place_of: tuple[int, ...]  # of receptacle r
    at_place: tuple[tuple[int, ...], ...]  # receptacles at place l
    openable: frozenset[int]
    accepts: tuple[frozenset[str], ...]  # object types that receptacle r takes
    able: tuple[frozenset[str], ...]
    inner: tuple[tuple[int, ...], ...]  # objects inside object o
    start: int
    contents: tuple[frozenset[int], ...]  # at the start: of receptacle r
    lying: tuple[frozenset[int], ...]  # at the start: objects at place l
    open: frozenset[int]
    cool: frozenset[int]
    goal: Goal
    routes: dict[str, Act]  # "go to …" for every receptacle
    task: str  # the text after "Your task is to: "
    old: bool  # the grammar of the 2.1.1 game files


def parse_problem(text: str, where: str) -> tuple[dict[str, list[tuple[str, ...]]], Goal]:
    """Facts and goal of a PDDL problem. Raises ConfigError for a problem that is not one of ALFWorld's six kinds."""
    start, end = text.find("(:init"), text.find("(:goal")
    if start < 0 or end < start:
        reason = "no (:init … (:goal … in this PDDL problem"
        raise ConfigError(reason, where=where, hint="give a game.tw-pddl file of ALFWorld")
    facts: dict[str, list[tuple[str, ...]]] = {}
    for predicate, arguments in FACT.findall(text, start, end):
        facts.setdefault(predicate, []).append(tuple(arguments.split()))
    return facts, _parse_goal(text[end:], where)


def _parse_goal(text: str, where: str) -> Goal:
    """The goal of a PDDL problem, recognised by the predicates in it."""
    types: dict[str, list[str]] = {"objectType": [], "receptacleType": []}
    for predicate, name in GOAL_TYPE.findall(text):
        types[predicate].append(name)
    objects, receptacles = types["objectType"], types["receptacleType"]
    if "isToggled" in text:
        lamps, others = [t for t in objects if t in LAMPS], [t for t in objects if t not in LAMPS]
        if len(lamps) == 1 and len(others) == 1:
            return Goal("light", others[0], lamp=lamps[0])
    elif objects and receptacles and "isSliced" not in text and "inReceptacleObject" not in text:
        state = next((name for predicate, name in STATES.items() if predicate in text), "")
        return Goal("two" if "?o2" in text else "place", objects[0], receptacles[0], state)
    hint = "leave out games with sliced or stacked objects, as ALFWorld does"
    raise ConfigError("the goal is none of ALFWorld's six kinds", where=where, hint=hint)


def compile_game(source: Source) -> Game:
    """Number everything and index the facts. Raises ConfigError where a fact names something that does not exist."""
    try:
        return _compile(source, source.facts)
    except (KeyError, ValueError, IndexError) as error:
        reason = f"the facts do not fit together: {error!r}"
        raise ConfigError(reason, where=source.where, hint="give an unchanged ALFWorld game") from error


def _compile(source: Source, facts: Facts) -> Game:
    kind_of, location_of = dict(facts["receptacleType"]), dict(facts["receptacleAtLocation"])
    # some things have no type, but a number
    type_of = {row[0]: "" for predicate in THINGS for row in facts.get(predicate, ())} | dict(facts["objectType"])
    ((_, start),) = facts["atLocation"]
    lying = facts.get("objectAtLocation", ())
    names = _numbered_names([*kind_of, *type_of])
    receptacles, objects = sorted(kind_of, key=str.lower), sorted(type_of, key=str.lower)
    places = sorted({start, *location_of.values()})  # where the agent can ever be
    place_names = _numbered_names({*places, *(place for _, place in lying)})
    number_r, number_o, number_p = (
        {identifier: number for number, identifier in enumerate(ids)} for ids in (receptacles, objects, places)
    )
    place_of = tuple(number_p[location_of[identifier]] for identifier in receptacles)
    accepts, able = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for kind, thing_type in facts.get("canContain", ()):
        accepts[kind].add(thing_type)
    shared = {kind: frozenset(accepts[kind]) for kind in kind_of.values()}
    for predicate, flag in FLAGS.items():
        for (thing,) in facts.get(predicate, ()):
            able[thing].add(flag)
    return Game(
        receptacles=tuple(names[identifier] for identifier in receptacles),
        objects=tuple(names[identifier] for identifier in objects),
        places=tuple(place_names[identifier] for identifier in places),
        receptacle_types=tuple(kind_of[identifier] for identifier in receptacles),
        object_types=tuple(type_of[identifier] for identifier in objects),
        place_of=place_of,
        at_place=tuple(tuple(r for r, place in enumerate(place_of) if place == p) for p in range(len(places))),
        openable=frozenset(number_r[identifier] for (identifier,) in facts.get("openable", ())),
        accepts=tuple(shared[kind_of[identifier]] for identifier in receptacles),
        able=tuple(frozenset(able[identifier]) for identifier in objects),
        inner=tuple(map(tuple, map(sorted, _grouped(facts.get("inReceptacleObject", ()), number_o, number_o)))),
        start=number_p[start],
        contents=_grouped(facts.get("inReceptacle", ()), number_o, number_r),
        lying=_grouped((pair for pair in lying if pair[1] in number_p), number_o, number_p),
        open=frozenset(number_r[identifier] for (identifier,) in facts.get("opened", ())),
        cool=frozenset(number_o[identifier] for (identifier,) in facts.get("isCool", ())),
        goal=source.goal,
        routes={f"go to {names[identifier]}": ("go", r, -1) for r, identifier in enumerate(receptacles)},
        task=source.task,
        old=source.old,
    )


def _numbered_names(ids: Iterable[str]) -> dict[str, str]:
    """PDDL ids -> names, as ALFWorld numbers them: sorted within their kind, the first gets the highest number."""
    names, counts = {}, Counter[str]()
    for identifier in reversed(sorted(ids, key=str.lower)):
        kind = identifier.partition("_bar_")[0].lower() + ("basin" if "basin" in identifier.lower() else "")
        counts[kind] += 1
        names[identifier] = f"{kind} {counts[kind]}"
    return names


def _grouped(
    pairs: Iterable[tuple[str, str]], members: Mapping[str, int], holders: Mapping[str, int]
) -> tuple[frozenset[int], ...]:
    """For every holder, the numbers of what it holds."""
    groups: list[set[int]] = [set() for _ in holders]
    for member, holder in pairs:
        groups[holders[holder]].add(members[member])
    return tuple(map(frozenset, groups))
