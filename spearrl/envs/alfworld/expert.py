"""A scripted player: what the cold start imitates.

Perfect, it knows where everything is; otherwise it knows what it has seen, searches, and slips.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from spearrl.envs.alfworld.game import Act, Goal
from spearrl.envs.alfworld.world import APPLIANCES, CHANGING, TREATMENTS, World

# state -> where and how it comes about
APPLIANCE = {TREATMENTS[verb]: (kind, verb) for kind, verb in APPLIANCES.items()}
Stop = tuple[int, str]  # a receptacle, and what to do there: take | put | use | clean | heat | cool
Plan = tuple[int, int, list[Stop]]  # cost in actions, object, stops


def plan(world: World, goal: Goal, known: set[int]) -> Act | None:
    """The next act of a shortest way to the goal with the known objects; None where there is none.

    Of two objects, one is brought after the other.
    """
    game, held = world.game, world.held
    cheapest = min(_plans(world, goal, known), default=None)
    if cheapest is None:
        return None
    _, thing, stops = cheapest
    if held >= 0 and held != thing:
        thing = held
        ways: list[list[Stop]] = [
            [(r, "put")] for r in range(len(game.accepts)) if game.object_types[held] in game.accepts[r]
        ]
        stops = min(ways, key=lambda way: _cost(world, way), default=[])
    for r, verb in stops[:1]:
        if game.place_of[r] != world.place:
            return "go", r, -1
        if verb in ("take", "put") and not world.reach(r):
            return "open", r, -1
        lamps = (o for o in world.contents[r] if game.object_types[o] == goal.lamp and "use" in game.able[o])
        return verb, next(lamps) if verb == "use" else thing, r
    return None


def _plans(world: World, goal: Goal, known: set[int]) -> Iterator[Plan]:
    """Ways to bring one more object to a receptacle of the goal, or to one with its lamp.

    Where the goal is two objects, the cheapest way for the other one is counted in.
    """
    game = world.game
    things = [o for o in sorted(known) if game.object_types[o] == goal.object]
    things = [o for o in things if not goal.state or goal.state in game.able[o]]
    targets = [r for r, kind in enumerate(game.receptacle_types) if kind == goal.receptacle]
    if goal.kind == "light":
        lamps = {o for o in known if game.object_types[o] == goal.lamp and "use" in game.able[o]}
        targets = [r for r, contents in enumerate(world.contents) if contents & lamps]
    for target in targets:
        plans = [carried for o in things for carried in _carry_plans(world, goal, o, target)]
        if goal.kind != "two":
            yield from plans
            continue
        cheapest = {thing: cost for cost, thing, _ in sorted(plans, reverse=True)}
        there = [0] if any(o in world.contents[target] for o in things) else []
        for cost, thing, stops in plans:
            others = there or [other for o, other in cheapest.items() if o != thing]
            if others:
                yield cost + min(others), thing, stops


def _carry_plans(world: World, goal: Goal, o: int, target: int) -> Iterator[Plan]:
    """Ways to bring object o to `target`, treated as the goal says; under a lamp it stays in the hand."""
    game, there = world.game, o in world.contents[target]
    ready, lamp = not goal.state or o in world.is_in[goal.state], goal.kind == "light"
    if not lamp and (game.object_types[o] not in game.accepts[target] or (ready and there)):
        return
    appliance, verb = APPLIANCE.get(goal.state, ("", ""))
    treatments: list[list[Stop]] = [[(r, verb)] for r, kind in enumerate(game.receptacle_types) if kind == appliance]
    for grip in _grips(world, o):
        # some objects stand in two receptacles at once: taken from one, they are still in the other
        put: list[Stop] = [] if there and grip != [(target, "take")] else [(target, "put")]
        for treatment in [[]] if ready else treatments:
            stops = [*grip, *treatment, *([(target, "use")] if lamp else put)]
            yield _cost(world, stops), o, stops


def _grips(world: World, o: int) -> Iterator[list[Stop]]:
    """Where to take object o from; nowhere where it is held."""
    if world.held == o:
        yield []
    elif "take" in world.game.able[o]:
        yield from ([(r, "take")] for r, things in enumerate(world.contents) if o in things)


def _cost(world: World, stops: list[Stop]) -> int:
    """Actions that the stops take."""
    place, opened, cost = world.place, set(), 0
    for r, verb in stops:
        cost += 1 + (world.game.place_of[r] != place)
        place = world.game.place_of[r]
        if verb in ("take", "put") and r not in opened and not world.reach(r):
            opened.add(r)
            cost += 1
    return cost


class Expert:
    """One episode's player.

    With noise it knows only what it has seen: it looks where the object may be, and opens what is closed. With noise n
    it plays any command that changes something with n a turn, and with n it forgets to clean, heat or cool until the
    object is in place.
    """

    def __init__(self, world: World, draw: random.Random):
        self._world, self._draw = world, draw
        self._careless: bool | None = None
        self._unseen = set(range(len(world.game.receptacles)))
        self._known: set[int] = set()

    def act(self, noise: float) -> str:
        """The next command; any where nothing helps."""
        world, draw = self._world, self._draw
        self._careless = draw.random() < noise if self._careless is None else self._careless
        visible = [r for r in world.game.at_place[world.place] if world.reach(r)]
        self._unseen -= set(visible)
        self._known |= {o for r in visible for o in world.contents[r]} | {world.held} - {-1}
        known = self._known if noise else set(range(len(world.game.objects)))
        act = None if draw.random() < noise else self._next(known) or self._search()
        commands = [command for command, possible in world.possible.items() if possible == act]
        if commands:
            return commands[0]
        changing = sorted(command for command, possible in world.possible.items() if possible[0] in CHANGING)
        return draw.choice(changing or ["look"])

    def _next(self, known: set[int]) -> Act | None:
        goal = self._world.game.goal
        act = plan(self._world, replace(goal, state=""), known) if self._careless else None
        self._careless = self._careless and (act is not None or not known)
        return act or plan(self._world, goal, known)

    def _search(self) -> Act | None:
        """Open what is closed here, else go where nobody has looked yet, to likely places first."""
        game = self._world.game
        for r in self._unseen.intersection(game.at_place[self._world.place]):
            return "open", r, -1
        likely = sorted(r for r in self._unseen if game.goal.object in game.accepts[r]) or sorted(self._unseen)
        return ("go", self._draw.choice(likely), -1) if likely else None
