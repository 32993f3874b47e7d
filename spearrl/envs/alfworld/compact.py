"""Short texts and commands for tiny models: few words, each spelled one way, and only what changed."""

from __future__ import annotations

from spearrl.envs.alfworld.game import Game
from spearrl.envs.alfworld.world import CHANGING, World

START, INVALID = "at start", "invalid"


def opening(game: Game) -> str:
    """Task and receptacles: what an episode starts with, and what a windowed prompt repeats.

    Tasks read `put clean mug cabinet`, `put two pen drawer`, `use desklamp book`.
    """
    goal = game.goal
    thing, target, lamp = (name.removesuffix("Type").lower() for name in (goal.object, goal.receptacle, goal.lamp))
    task = ["put", "two" if goal.kind == "two" else "", goal.state, thing, target]
    task = ["use", lamp, thing] if goal.kind == "light" else task
    return " ".join([*filter(None, task), "in", *sorted(game.receptacles)])


def short_commands(world: World) -> dict[str, str]:
    """Short command -> the engine's, without look, inventory, examine, help.

    The receptacle is named only where two would do.
    """
    commands: dict[str, str] = {}
    game = world.game
    for command, (verb, first, second) in sorted(world.possible.items()):
        if verb in CHANGING:
            short = f"{verb} {(game.receptacles if verb in ('go', 'open', 'close') else game.objects)[first]}"
            if short in commands and second >= 0:
                short = f"{short} {(game.objects if verb == 'slice' else game.receptacles)[second]}"
            commands[short] = command
    return commands


def effect(world: World) -> str:
    """What the last act did: `at cabinet 1 closed`, `hold hot mug 1`, `use desklamp 1`, or `invalid`."""
    verb, first, _ = world.last
    if verb in ("go", "open", "close", "put"):
        return _place(world)
    if verb in ("take", "clean", "heat", "cool"):
        return _holding(world)
    return f"{verb} {world.game.objects[first]}" if verb in ("use", "slice") else INVALID


def surroundings(world: World) -> str:
    """Where the agent stands, what is there, what it holds, and which lamps are on."""
    lamps = (f"use {world.game.objects[o]}" for o in sorted(world.on))
    return "\n ".join([_place(world), _holding(world), *lamps])


def _place(world: World) -> str:
    if world.facing < 0:
        return START
    things = [world.game.objects[o] for o in sorted(world.contents[world.facing])] or ["empty"]
    shown = things if world.reach(world.facing) else ["closed"]
    return " ".join([f"at {world.game.receptacles[world.facing]}", *shown])


def _holding(world: World) -> str:
    if world.held < 0:
        return "hold nothing"
    states = [state for state, things in world.is_in.items() if world.held in things]
    return " ".join(["hold", *states, world.game.objects[world.held]])
