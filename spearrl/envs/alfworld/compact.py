"""Short texts and commands for tiny models: few words, each spelled one way, and only what changed."""

from __future__ import annotations

from spearrl.envs.alfworld.game import Game
from spearrl.envs.alfworld.world import CHANGING, World

START, INVALID = "at start", "invalid"


def short_task(game: Game) -> str:
    """Example: `put clean mug cabinet`, `put two pen drawer`, `use desklamp book`."""
    goal = game.goal
    thing, target, lamp = (name.removesuffix("Type").lower() for name in (goal.object, goal.receptacle, goal.lamp))
    if goal.kind == "light":
        return f"use {lamp} {thing}"
    return " ".join(word for word in ("put", "two" if goal.kind == "two" else "", goal.state, thing, target) if word)


def opening(game: Game) -> str:
    """Task and receptacles: what an episode starts with, and what a windowed prompt repeats."""
    return " ".join([short_task(game), "in", *sorted(game.receptacles)])


def labels(world: World) -> dict[str, str]:
    """Short command -> the engine's; the receptacle is named only where two would do. No look, inventory, examine, help."""
    found: dict[str, str] = {}
    game = world.game
    for command, act in sorted(world.options.items()):
        verb, first, second = act
        if verb in CHANGING:
            name = game.receptacles[first] if verb in ("go", "open", "close") else game.objects[first]
            label = f"{verb} {name}"
            if label in found and second >= 0:
                label = f"{label} {game.receptacles[second] if verb != 'slice' else game.objects[second]}"
            found[label] = command
    return found


def change(world: World) -> str:
    """What the last act did: `at cabinet 1 closed`, `hold hot mug 1`, `use desklamp 1`, or `invalid`."""
    verb, first, _ = world.last
    if verb in ("go", "open", "close", "put"):
        return _place(world)
    if verb in ("take", "clean", "heat", "cool"):
        return _holding(world)
    return f"{verb} {world.game.objects[first]}" if verb in ("use", "slice") else INVALID


def whole(world: World) -> str:
    """Where the agent stands, what is there, and what it holds."""
    on = "".join(f"\n use {world.game.objects[o]}" for o in sorted(world.on))
    return f"{_place(world)}\n {_holding(world)}{on}"


def _place(world: World) -> str:
    if world.facing < 0:
        return START
    name = world.game.receptacles[world.facing]
    if not world.reach(world.facing):
        return f"at {name} closed"
    things = [world.game.objects[o] for o in sorted(world.contents[world.facing])]
    return " ".join([f"at {name}", *things]) if things else f"at {name} empty"


def _holding(world: World) -> str:
    if world.held < 0:
        return "hold nothing"
    states = [state for state, things in world.is_in.items() if world.held in things]
    return " ".join(["hold", *states, world.game.objects[world.held]])
