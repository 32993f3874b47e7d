"""The state of a running game: the 14 actions of ALFWorld's PDDL domain, their texts, and what is possible now."""

from __future__ import annotations

from collections.abc import Iterable

from spearrl.config.tables import table
from spearrl.envs.alfworld.game import KNIVES, Act, Game

NOTHING = "Nothing happens."
HELP: str = table(__file__, "prompts.toml")["help"]  # the engine's own
TREATMENTS = {"clean": "clean", "heat": "hot", "cool": "cool"}  # verb -> what the object is then
APPLIANCES = {"SinkBasinType": "clean", "MicrowaveType": "heat", "FridgeType": "cool"}
CHANGING = ("go", "open", "close", "take", "put", "clean", "heat", "cool", "use", "slice")  # acts; the others only look


class World:
    """`act` plays a command and returns the engine's text; `possible` maps every possible command to its act.

    `old`: the grammar of the 2.1.1 files ("put … in/on …", "You arrive at loc 5.", no help); default: as the game says.
    """

    def __init__(self, game: Game, *, old: bool | None = None):
        self.game, self.old = game, game.old if old is None else old
        self.place, self.held, self.facing = game.start, -1, -1  # facing: the receptacle gone to last
        self.last: Act = ("", -1, -1)
        self.contents = [set(things) for things in game.contents]
        self.lying = [set(things) for things in game.lying]
        self.open = set(game.open)
        self.is_in: dict[str, set[int]] = {"clean": set(), "hot": set(), "cool": set(game.cool)}
        self.sliced: set[int] = set()
        self.on: set[int] = set()
        # (object, receptacle) it was taken from and has not been put back into
        self.moved: set[tuple[int, int]] = set()
        self.possible = self._possible()

    def intro(self) -> str:
        """What the engine shows before the first action, without the task."""
        room = "You are in the middle of a room. Looking quickly around you, you see"
        return f"-= Welcome to TextWorld, ALFRED! =-\n\n{room} {_listed(self.game.receptacles)}."

    def act(self, command: str) -> str:
        """Play one command; one that is not possible changes nothing."""
        verb, first, second = self.last = self.possible.get(command.strip(), ("", -1, -1))
        if not verb:
            return NOTHING
        text = self._change(verb, first, second) if verb in CHANGING else self._look(verb, first)
        if verb in CHANGING:
            self.possible = self._possible()
        return text

    def commands(self) -> tuple[str, ...]:
        """All possible commands, sorted as the engine sorts them."""
        return tuple(sorted(self.possible))

    def won(self) -> bool:
        """Whether the goal of the PDDL problem holds now."""
        game, goal, types = self.game, self.game.goal, self.game.object_types
        if goal.kind == "light":
            here = game.at_place[self.place]
            lit = any(types[o] == goal.lamp and any(o in self.contents[r] for r in here) for o in self.on)
            return lit and self.held >= 0 and types[self.held] == goal.object
        for r, kind in enumerate(game.receptacle_types):
            if kind == goal.receptacle:
                fitting = [o for o in self.contents[r] if types[o] == goal.object]
                fitting = [o for o in fitting if not goal.state or o in self.is_in[goal.state]]
                if len(fitting) >= (2 if goal.kind == "two" else 1) and (
                    not goal.state or any(goal.state in game.able[o] for o in fitting)
                ):
                    return True
        return False

    def reach(self, r: int) -> bool:
        """Whether things can be taken out of and put into receptacle r, standing there."""
        return r in self.open or r not in self.game.openable

    def key(self) -> tuple[object, ...]:
        """The whole state; equal for two episodes of one game exactly where the same commands lead to the same ends."""
        sets = (*self.contents, self.open, *self.is_in.values(), self.sliced, self.on)
        return (self.place, self.held, *(tuple(sorted(things)) for things in sets))

    def _possible(self) -> dict[str, Act]:
        game, held, here = self.game, self.held, self.game.at_place[self.place]
        acts: dict[str, Act] = dict(game.routes) | {"look": ("look", -1, -1), "inventory": ("inventory", -1, -1)}
        if not self.old:
            acts["help"] = ("help", -1, -1)
        for r in here:
            name, reach = game.receptacles[r], self.reach(r)
            del acts[f"go to {name}"]
            acts[f"examine {name}"] = ("examine", r, -1)
            if r in game.openable:
                verb = "close" if r in self.open else "open"
                acts[f"{verb} {name}"] = (verb, r, -1)
            for o in self.contents[r]:
                if reach and held < 0 and "take" in game.able[o]:
                    acts[f"take {game.objects[o]} from {name}"] = ("take", o, r)
                if "use" in game.able[o]:
                    acts[f"use {game.objects[o]}"] = ("use", o, r)
            if held >= 0:
                thing, treatment = game.objects[held], APPLIANCES.get(game.receptacle_types[r], "")
                if reach and game.object_types[held] in game.accepts[r]:
                    acts[f"put {thing} in/on {name}" if self.old else f"move {thing} to {name}"] = ("put", held, r)
                if TREATMENTS.get(treatment) in game.able[held]:
                    acts[f"{treatment} {thing} with {name}"] = (treatment, held, r)
        if held >= 0:
            acts[f"examine {game.objects[held]}"] = ("inspect", held, -1)
            if game.object_types[held] in KNIVES:
                for o in self.lying[self.place]:
                    if "slice" in game.able[o]:
                        acts[f"slice {game.objects[o]} with {game.objects[held]}"] = ("slice", o, held)
        return acts

    def _look(self, verb: str, number: int) -> str:
        """The text of an act that changes nothing; `number`: the receptacle or object it is about."""
        game, held = self.game, self.held
        if verb == "help":
            return HELP
        if verb == "inventory":
            return f"You are carrying: a {game.objects[held]}." if held >= 0 else "You are not carrying anything."
        if verb == "examine":
            return self._receptacle(number)
        if verb == "inspect":
            return self._object(number)
        here = game.at_place[self.place]
        if not here:
            return "You are in the middle of a room. Looking quickly around you, you see nothing."
        # the engine forgets where a thing stands now: it lists what was taken from one of these and put into another
        beside = [game.objects[o] for o in sorted(self.lying[self.place]) if any((o, r) in self.moved for r in here)]
        facing = _joined([game.receptacles[r] for r in here])
        return f"You are facing the {facing}. Next to it, you see {_listed(beside)}."

    def _receptacle(self, r: int) -> str:
        name = self.game.receptacles[r]
        if not self.reach(r):
            return f"The {name} is closed."
        things = _listed([self.game.objects[o] for o in sorted(self.contents[r])])
        where = f"The {name} is open. In it" if r in self.game.openable else f"On the {name}"
        return f"{where}, you see {things}."

    def _object(self, o: int) -> str:
        game, name = self.game, self.game.objects[o]
        if "box" in game.able[o]:
            return f"This is a normal {name}. In it, you see {_listed([game.objects[i] for i in game.inner[o]])}."
        marks = " and ".join(state for state in ("hot", "cool", "clean") if o in self.is_in[state])
        words = f"{marks} sliced".strip() if o in self.sliced else "cold" if marks == "cool" else marks
        if words:
            return f"This is a {words} {name}."
        if "use" in game.able[o]:
            return f"This {name} is {'on' if o in self.on else 'off'}."
        return f"There's nothing special about {name}."

    def _change(self, verb: str, first: int, second: int) -> str:
        """Carry out an act, and its text."""
        receptacles, objects = self.game.receptacles, self.game.objects
        match verb:
            case "go":
                self.place, self.facing = self.game.place_of[first], first
                arrived = self.game.places[self.place] if self.old else receptacles[first]
                return f"You arrive at {arrived}. {self._receptacle(first)}"
            case "open":
                self.open.add(first)
                return f"You open the {receptacles[first]}. {self._receptacle(first)}"
            case "close":
                self.open.discard(first)
                return f"You close the {receptacles[first]}."
            case "take":
                self.contents[second].discard(first)
                self.lying[self.place].discard(first)
                self.moved.add((first, second))
                self.held = first
                return f"You pick up the {objects[first]} from the {receptacles[second]}."
            case "put":
                self.contents[second].add(first)
                self.lying[self.place].add(first)
                self.moved.discard((first, second))
                self.held = -1
                way = "put the {} in/on the {}" if self.old else "move the {} to the {}"
                return f"You {way.format(objects[first], receptacles[second])}."
            case "use":
                self.on.add(first)
                return f"You turn on the {objects[first]}."
            case "slice":
                self.sliced.add(first)
                return f"You sliced the {objects[first]} with the {objects[second]}."
        if verb != "clean":  # heat and cold take turns
            self.is_in["hot"].discard(first)
            self.is_in["cool"].discard(first)
        self.is_in[TREATMENTS[verb]].add(first)
        return f"You {verb} the {objects[first]} using the {receptacles[second]}."


def _joined(names: Iterable[str]) -> str:
    """Example: "desk 1, drawer 2, and drawer 1"."""
    *first, last = names
    return f"{', '.join(first)}, and {last}" if first else last


def _listed(names: Iterable[str]) -> str:
    """Example: "a desk 1, and a drawer 1"; "nothing" for none."""
    articles = [f"a {name}" for name in names]
    return _joined(articles) if articles else "nothing"
