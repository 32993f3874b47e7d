"""Rules and levels. A cell is the number row * columns + column; the rim of a room is wall, so no step leaves it."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

State = tuple[int, frozenset[int]]  # the player's cell, and those of the boxes


@dataclass(frozen=True)
class Level:
    """A room, and where the player and the boxes stand at first."""

    rows: int
    columns: int
    walls: frozenset[int]
    targets: frozenset[int]
    start: State

    @cached_property
    def deltas(self) -> dict[str, int]:
        """Move -> what it adds to a cell."""
        return {name: row * self.columns + column for name, (row, column) in MOVES.items()}

    def move(self, state: State, name: str) -> State:
        """The state after a move; the same one where wall or box is in the way, or the name is no move."""
        player, boxes = state
        delta = self.deltas.get(name, 0)
        cell, behind = player + delta, player + 2 * delta
        if cell in self.walls or not delta:
            return state
        if cell not in boxes:
            return cell, boxes
        return state if behind in self.walls or behind in boxes else (cell, boxes - {cell} | {behind})

    def solved(self, state: State) -> bool:
        """Whether every box stands on a target."""
        return state[1] == self.targets

    def grid(self, state: State) -> list[str]:
        """Rows of symbols: # wall, _ floor, O target, X box, P player, √ box on target, S player on target."""
        player, boxes = state
        text = ""
        for cell in range(self.rows * self.columns):
            on = cell in self.targets
            text += (
                "#" if cell in self.walls else "X√"[on] if cell in boxes else "PS"[on] if cell == player else "_O"[on]
            )
        return [text[i : i + self.columns] for i in range(0, len(text), self.columns)]

    def reach(self, cell: int, boxes: Collection[int]) -> set[int]:
        """Where a player at `cell` can walk without a push."""
        reached, ends = {cell}, [cell]
        while ends:
            here = ends.pop()
            fresh = {here + delta for delta in self.deltas.values()} - reached - self.walls - set(boxes)
            reached |= fresh
            ends += sorted(fresh)
        return reached

    @property
    def digest(self) -> int:
        """A number that the level shares with its turned and mirrored copies only."""
        rows, copies = self.grid(self.start), []
        for _ in range(4):
            rows = ["".join(column) for column in zip(*rows[::-1], strict=True)]
            copies += ["\n".join(rows), "\n".join(rows[::-1])]
        return int.from_bytes(hashlib.blake2b(min(copies).encode(), digest_size=8).digest(), "little")


def reverse_play(draw: random.Random, size: tuple[int, int], *, boxes: int, walls: int, pulls: int) -> Level | None:
    """A level that can be solved, since it was made from a solved one by pulls; None where this draw gives none.

    Args:
        size: rows and columns, the rim included.
        walls: inner ones; the floor between them hangs together.
        pulls: at most so many, none of which leads back to boxes that stood so before.
    """
    rows, columns = size
    cells = set(range(rows * columns))
    inner = [cell for cell in sorted(cells) if 0 < cell // columns < rows - 1 and 0 < cell % columns < columns - 1]
    floor = sorted(set(inner) - set(draw.sample(inner, walls)))
    targets = frozenset(draw.sample(floor, boxes))
    room = Level(rows, columns, frozenset(cells - set(floor)), targets, (floor[0], targets))
    if len(room.reach(floor[0], ())) < len(floor) or len(floor) <= boxes:
        return None
    player, standing = draw.choice(sorted(set(floor) - targets)), targets
    passed = {standing}
    for _ in range(pulls):
        near, ways = room.reach(player, standing), []
        for box, delta in itertools.product(sorted(standing), room.deltas.values()):
            pulled = standing - {box} | {box + delta}
            if box + delta in near and box + 2 * delta not in room.walls | standing and pulled not in passed:
                ways.append((box + 2 * delta, pulled))
        if not ways:
            break
        player, standing = draw.choice(ways)
        passed.add(standing)
    if standing & targets:
        return None
    return Level(rows, columns, room.walls, targets, (draw.choice(sorted(room.reach(player, standing))), standing))
