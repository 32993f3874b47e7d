"""The state of a running game: the 14 actions of ALFWorld's PDDL domain, their texts, and what is possible now."""

from __future__ import annotations

from collections.abc import Iterable

from spearrl.envs.alfworld.game import KNIVES, Act, Game
from spearrl.envs.alfworld.prompts import HELP

NOTHING = "Nothing happens."
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
        text = self._treat(verb, first, second) if verb in TREATMENTS else getattr(self, f"_{verb}")(first, second)
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

    # one method an action: (first, second) of its Act -> text

    def _look(self, _: int, __: int) -> str:
        game, here = self.game, self.game.at_place[self.place]
        if not here:
            return "You are in the middle of a room. Looking quickly around you, you see nothing."
        # the engine forgets where a thing stands now: it lists what was taken from one of these and put into another
        beside = [game.objects[o] for o in sorted(self.lying[self.place]) if any((o, r) in self.moved for r in here)]
        facing = _joined([game.receptacles[r] for r in here])
        return f"You are facing the {facing}. Next to it, you see {_listed(beside)}."

    def _inventory(self, _: int, __: int) -> str:
        if self.held < 0:
            return "You are not carrying anything."
        return f"You are carrying: a {self.game.objects[self.held]}."

    def _help(self, _: int, __: int) -> str:
        return HELP

    def _go(self, r: int, _: int) -> str:
        self.place, self.facing = self.game.place_of[r], r
        arrived = self.game.places[self.place] if self.old else self.game.receptacles[r]
        return f"You arrive at {arrived}. {self._examine(r, -1)}"

    def _examine(self, r: int, _: int) -> str:
        name = self.game.receptacles[r]
        if not self.reach(r):
            return f"The {name} is closed."
        things = _listed([self.game.objects[o] for o in sorted(self.contents[r])])
        where = f"The {name} is open. In it" if r in self.game.openable else f"On the {name}"
        return f"{where}, you see {things}."

    def _inspect(self, o: int, _: int) -> str:
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

    def _open(self, r: int, _: int) -> str:
        self.open.add(r)
        return f"You open the {self.game.receptacles[r]}. {self._examine(r, -1)}"

    def _close(self, r: int, _: int) -> str:
        self.open.discard(r)
        return f"You close the {self.game.receptacles[r]}."

    def _take(self, o: int, r: int) -> str:
        self.contents[r].discard(o)
        self.lying[self.place].discard(o)
        self.moved.add((o, r))
        self.held = o
        return f"You pick up the {self.game.objects[o]} from the {self.game.receptacles[r]}."

    def _put(self, o: int, r: int) -> str:
        self.contents[r].add(o)
        self.lying[self.place].add(o)
        self.moved.discard((o, r))
        self.held = -1
        thing, name = self.game.objects[o], self.game.receptacles[r]
        return f"You put the {thing} in/on the {name}." if self.old else f"You move the {thing} to the {name}."

    def _treat(self, verb: str, o: int, r: int) -> str:
        state = TREATMENTS[verb]
        if state != "clean":
            self.is_in["hot"].discard(o)
            self.is_in["cool"].discard(o)
        self.is_in[state].add(o)
        return f"You {verb} the {self.game.objects[o]} using the {self.game.receptacles[r]}."

    def _use(self, o: int, _: int) -> str:
        self.on.add(o)
        return f"You turn on the {self.game.objects[o]}."

    def _slice(self, o: int, knife: int) -> str:
        self.sliced.add(o)
        return f"You sliced the {self.game.objects[o]} with the {self.game.objects[knife]}."


def _joined(names: Iterable[str]) -> str:
    """Example: "desk 1, drawer 2, and drawer 1"."""
    *first, last = names
    return f"{', '.join(first)}, and {last}" if first else last


def _listed(names: Iterable[str]) -> str:
    """Example: "a desk 1, and a drawer 1"; "nothing" for none."""
    articles = [f"a {name}" for name in names]
    return _joined(articles) if articles else "nothing"
