"""Plans: A* over moves, so that solutions are shortest ones."""

from __future__ import annotations

import heapq
from itertools import count

from spearrl.envs.sokoban.level import MOVES, Level, State

MOST_STATES = 20_000  # looked at in one search; a 6x6 room with two boxes has fewer


def solve(level: Level, start: State, most: int = MOST_STATES) -> dict[State, str]:
    """A shortest solution, as the move to make in each of its states in order; empty where there is none.

    The search gives up after `most` states.

    A push brings one box one cell on, so the boxes' distances to their nearest targets never say too much.
    """
    distances, order = _distances(level), count()
    ends: list[tuple[int, int, State]] = [(0, next(order), start)] if distances.keys() >= start[1] else []
    reached: dict[State, tuple[int, State, str]] = {start: (0, start, "")}
    while ends and len(reached) <= most:
        here = heapq.heappop(ends)[2]
        if level.solved(here):
            plan = {}
            while here != start:
                _, here, name = reached[here]
                plan[here] = name
            return dict(reversed(plan.items()))
        steps = reached[here][0] + 1
        for name in MOVES:
            there = level.move(here, name)
            if distances.keys() >= there[1] and (there not in reached or steps < reached[there][0]):
                reached[there] = steps, here, name
                heapq.heappush(ends, (steps + sum(distances[box] for box in there[1]), next(order), there))
    return {}


def _distances(level: Level) -> dict[int, int]:
    """Cell -> pushes to the nearest target of a box alone in the room; cells from which it gets to none are missing."""
    pushes, ends = dict.fromkeys(level.targets, 0), sorted(level.targets)
    for cell in ends:  # grows while it is read
        for delta in level.deltas.values():
            there = cell + delta
            if there not in pushes and there not in level.walls and there + delta not in level.walls:
                pushes[there] = pushes[cell] + 1
                ends.append(there)
    return pushes
