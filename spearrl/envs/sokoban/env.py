"""The Sokoban environment: levels, replies, prompts and rewards around the rules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pydantic import Field, model_validator

from spearrl.config.tables import table
from spearrl.envs.sokoban import picture
from spearrl.envs.sokoban.expert import solve
from spearrl.envs.sokoban.level import MOVES, Level, State, reverse_play
from spearrl.envs.text.environment import TextEnvironment
from spearrl.envs.text.tagged_replies import PLAIN, REASON, TAGGED, compact_window, past_steps
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Action, Image, Message, Observation, Outcome, Task, Text

ATTEMPTS = 1000  # draws for one level
STEP, ON_TARGET, SOLVED = -0.1, 1.0, 10.0  # gym-sokoban's rewards, which verl-agent pays
STILL = "still"  # what a reply without a move does
_TEXT = table(__file__, "prompts.toml")


class Sokoban(TextEnvironment[Level]):
    """Sokoban as verl-agent plays it (6x6 rooms, one move a turn, 15 turns), on levels that can be solved in time.

    A move pays -0.1, a box that gets onto a target +1, one that leaves it -1, the solved level 10 more. `vision` shows
    pictures instead of symbols. No level of "val" is one of "train", turned or mirrored. `observation="compact"` leaves
    out rules and rim, for tiny models.
    """

    max_turns = 15
    thought = "The next push follows from where I stand."
    tail = 1

    class Options(TextEnvironment.Options):
        vision: bool = Field(False, description="Show the room as a picture; else as symbols.")
        rows: int = Field(6, ge=4, le=20, description="Rows of a room, its rim included.")
        columns: int = Field(6, ge=4, le=20, description="Columns of a room, its rim included.")
        boxes: int = Field(1, ge=1, le=6, description="Boxes, and targets.")
        walls: int = Field(3, ge=0, description="Inner walls.")
        pulls: int = Field(10, ge=1, description="Pulls by which a level is made from a solved one, at most.")
        longest_solution: int = Field(15, ge=1, description="Moves that the shortest solution of a level may take.")
        cell: int = Field(28, ge=8, le=112, description="Pixels of a cell's side; 28: one merged patch of Qwen2.5-VL.")
        train_tasks: int = Field(3000, ge=1, description="Levels of the split train.")
        val_tasks: int = Field(200, ge=1, description="Levels of the split val.")

        @model_validator(mode="after")
        def _fit(self) -> Sokoban.Options:
            if self.walls + 2 * self.boxes >= (self.rows - 2) * (self.columns - 2):
                filling = f"{self.walls} walls, {self.boxes} boxes and as many targets"
                raise ValueError(f"{filling} do not fit into {self.rows}x{self.columns}")
            return self

    options: Options

    def __init__(self, vision: bool = False, **options: Any):
        super().__init__(vision=vision, **options)
        self.shows_images = vision
        self._levels = lru_cache(maxsize=4096)(self._make)
        counts = {"train": self.options.train_tasks, "val": self.options.val_tasks}
        self._tasks = {split: tuple(Task(f"{split}/{i}", split) for i in range(n)) for split, n in counts.items()}

    def tasks(self, split: str) -> Sequence[Task]:
        """The levels of a split; each is made at its first reset.

        Raises:
            ConfigError: an unknown split, or levels that cannot be won within `max_turns`.
        """
        self._check_split(split)
        longest = self.options.longest_solution
        if longest > self.max_turns:
            reason = f"longest_solution={longest} cannot be played in max_turns={self.max_turns}"
            hint = "raise env.max_turns, or lower env.options.longest_solution"
            raise ConfigError(reason, where=self._where(), hint=hint)
        return self._tasks[split]

    def reset(self, task: Task, seed: int) -> Observation:
        """Start a level. `seed` only drives the expert's slips: the game itself is deterministic."""
        level = self._episode = self._levels(task.split, task.id)
        self._state = level.start
        self._plan, self._draw = dict[State, str](), random.Random(derive(seed, "expert"))
        return self._show()

    def step(self, action: Action) -> Outcome:
        """Play a move; one into a wall costs a step, what is no move changes and pays nothing.

        Raises:
            ContractError: before the first reset.
        """
        level, reward = self._running(), 0.0
        if not level.solved(self._state) and action.text in MOVES:
            before, self._state = self._state, level.move(self._state, action.text)
            gained = len(self._state[1] & level.targets) - len(before[1] & level.targets)
            reward = STEP + ON_TARGET * gained + SOLVED * level.solved(self._state)
        won = level.solved(self._state)
        return Outcome(self._show(), reward, won, info={"success": won})

    def messages(self, observation: Observation, turn: int) -> list[Message]:
        """Turn 0: the rules (not in compact) and the room; later turns the room."""
        if turn or self._compact:
            return [_message([], observation)]
        answer = TAGGED if self._tagged else PLAIN
        return [_message([*self._head(), _TEXT["choices"], answer, _TEXT["now"]], observation)]

    def window(
        self, history: Sequence[tuple[Observation, Action]], observation: Observation, task: Task
    ) -> list[Message]:
        """SPEAR's prompt: rules, the last `history_length` steps (not with pictures), the room, the moves."""
        recent = () if self.options.vision else self._recent(history)
        steps = [(earlier.text, action.text) for earlier, action in recent]
        if self._compact:
            return [_message([compact_window("", steps, "")], observation)]
        past = [past_steps(steps, len(history)), _TEXT["step"].format(step=len(history) + 1)] if steps else []
        answer = REASON if self._tagged else PLAIN
        return [_message([*self._head(), *past, _TEXT["now"]], observation, [_TEXT["choices"], answer])]

    def expert(self) -> str | None:
        """The next move of a shortest solution, or of chance where there is none any more; None after the end."""
        level = self._running()
        if level.solved(self._state):
            return None
        if self._state not in self._plan:
            self._plan = solve(level, self._state)
        wrong = self._draw.random() < self.expert_noise
        return self._draw.choice(list(MOVES)) if wrong or not self._plan else self._plan[self._state]

    def _action(self, text: str, valid: bool) -> Action:
        """The first move named in a tagged text, or the one that a plain text is. Else no move, and invalid."""
        move = next((name for name in MOVES if (name in text if self._tagged else name == text)), "")
        sound = valid and bool(move)
        return Action(move or STILL, sound, tool_calls=int(sound))

    def _make(self, split: str, name: str) -> Level:
        """The level of a task. A level's digest says which split it belongs to, so none is in both."""
        settings, draw = self.options, random.Random(derive(self.options.seed, "sokoban", name))
        size, boxes, walls, pulls = (settings.rows, settings.columns), settings.boxes, settings.walls, settings.pulls
        for _ in range(ATTEMPTS):
            level = reverse_play(draw, size, boxes=boxes, walls=walls, pulls=pulls)
            if level is None or self.splits[level.digest % 5 == 0] != split:
                continue
            if 0 < len(solve(level, level.start)) <= settings.longest_solution:
                return level
        reason = f"no level in {ATTEMPTS} draws: {size[0]}x{size[1]}, {boxes} boxes, {walls} walls, {pulls} pulls"
        hint = "use fewer boxes, walls or pulls, a larger room, or a longer longest_solution"
        raise ConfigError(reason, where="env.options", hint=hint)

    def _head(self) -> list[str]:
        return [_TEXT["role"], _TEXT["rules"], _TEXT["picture" if self.options.vision else "text"]]

    def _show(self) -> Observation:
        rows = self._running().grid(self._state)
        grid = [row[1:-1] for row in rows[1:-1]] if self._compact else rows
        text = "\n".join("".join(f" {symbol}" for symbol in row) for row in grid)
        images = (Image(picture.png(picture.draw(grid, self.options.cell))),) if self.options.vision else ()
        return Observation("" if images else text, text, tuple(MOVES), images)


def _message(above: Sequence[str], observation: Observation, below: Sequence[str] = ()) -> Message:
    """The room, as text or as a picture, between lines of text."""
    before, after = ("\n".join(filter(None, lines)) for lines in (above, below))
    if not observation.images:
        return Message("user", "\n".join(filter(None, (before, observation.text, after))))
    parts: tuple[Text | Image, ...] = (Text(before), *observation.images, Text(after))
    return Message("user", tuple(part for part in parts if part != Text("")))
