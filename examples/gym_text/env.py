"""Gymnasium's FrozenLake as text: a new map for every task, the player drawn into it."""

from __future__ import annotations

from collections import deque

from pydantic import Field

from spearrl import ConfigError, Environment, Observation, Outcome, Task

MOVES = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}  # in the order of Gymnasium's action numbers


class FrozenLake(Environment):
    """Walk from S to G over F(rozen) squares; H is a hole. One word a turn. Needs the package gymnasium."""

    class Options(Environment.Options):
        size: int = Field(4, ge=2, le=8, description="Side of the map.")
        slippery: bool = Field(False, description="Whether a step may go sideways, as in the original.")

    def __init__(self, **options):
        super().__init__(**options)
        try:
            import gymnasium
            from gymnasium.envs.toy_text.frozen_lake import generate_random_map
        except ImportError as error:
            raise ConfigError(
                "the package gymnasium is not installed", where="examples.gym_text", hint="pip install gymnasium"
            ) from error
        self._gymnasium, self._draw_map = gymnasium, generate_random_map
        self.max_turns = 3 * self.options.size

    def tasks(self, split):
        if split not in ("train", "val"):
            raise ConfigError(f"split {split!r} is not one of train, val", hint="use train or val")
        first = 0 if split == "train" else 1_000_000
        return [Task(f"{split}-{i}", split, {"map": first + i}) for i in range(300)]

    def reset(self, task, seed):
        self.map = self._draw_map(size=self.options.size, seed=task.data["map"])
        self.lake = self._gymnasium.make(
            "FrozenLake-v1", desc=self.map, is_slippery=self.options.slippery, disable_env_checker=True
        )
        self.square, _ = self.lake.reset(seed=seed % 2**31)
        self.over = False
        return self.show()

    def step(self, action):
        if self.over or action.text not in MOVES:
            text = "the episode is over" if self.over else f"say {', '.join(MOVES)}"
            return Outcome(Observation(text, self.anchor()), 0.0, self.over, info={"success": False})
        self.square, reward, self.over, _, _ = self.lake.step(list(MOVES).index(action.text))
        return Outcome(self.show(), 10.0 * float(reward), bool(self.over), info={"success": bool(reward)})

    def close(self):
        if hasattr(self, "lake"):
            self.lake.close()

    def expert(self):
        """The first step of a shortest way round the holes."""
        size, start = len(self.map), divmod(int(self.square), len(self.map))
        ways, seen = deque([(start, "")]), {start}
        while ways:
            (row, column), first = ways.popleft()
            if self.map[row][column] == "G":
                return first or "up"
            for word, (down, right) in MOVES.items():
                there = (row + down, column + right)
                if (
                    there not in seen
                    and 0 <= there[0] < size
                    and 0 <= there[1] < size
                    and self.map[there[0]][there[1]] != "H"
                ):
                    seen.add(there)
                    ways.append((there, first or word))
        return "up"

    def anchor(self):
        return (*self.map, int(self.square))

    def show(self):
        row, column = divmod(int(self.square), len(self.map))
        lines = [
            " ".join("A" if (y, x) == (row, column) else square for x, square in enumerate(line))
            for y, line in enumerate(self.map)
        ]
        return Observation("\n".join(lines), anchor=self.anchor(), admissible=tuple(MOVES))
