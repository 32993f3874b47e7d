"""The Sokoban environment: levels, replies, prompts and rewards around the rules."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, model_validator

from spearrl.config.tables import table
from spearrl.envs.base import Environment
from spearrl.envs.sokoban import picture
from spearrl.envs.sokoban.expert import solve
from spearrl.envs.sokoban.level import MOVES, Level, State, reverse_play
from spearrl.envs.text.tagged import PLAIN, TAGGED, numbered, projected
from spearrl.errors import ConfigError, ContractError
from spearrl.seeds import derive
from spearrl.types import Action, Image, Message, Observation, Outcome, Reply, Task, Text

SPLITS = ("train", "val")
ATTEMPTS = 1000  # draws for one level
STEP, ON_TARGET, SOLVED = -0.1, 1.0, 10.0  # gym-sokoban's rewards, which verl-agent pays
STILL = "still"  # what a reply without a move does
THOUGHT = "The next push follows from where I stand."
_WORDS = table(__file__, "prompts.toml")


class Sokoban(Environment):
    """Sokoban as verl-agent plays it (6x6 rooms, one move a turn, 15 turns), on levels of its own: made by reverse play, and solvable in time.

    A move pays -0.1, a box that gets onto a target +1, one that leaves it -1, the solved level 10 more. `vision` shows a picture instead of symbols.
    No level of "val" is one of "train", turned or mirrored. `observation="compact"` leaves out rules and rim, for tiny models.
    """

    max_turns = 15

    class Options(Environment.Options):
        vision: bool = Field(False, description="Show the room as a picture; else as symbols.")
        observation: Literal["text", "compact"] = Field(
            "text", description="text: with rules and rim; compact: the inner cells alone, for tiny models."
        )
        reply: Literal["tagged", "plain"] = Field(
            "tagged", description="<think>…</think><action>…</action>, or the move alone."
        )
        rows: int = Field(6, ge=4, le=20, description="Rows of a room, its rim included.")
        columns: int = Field(6, ge=4, le=20, description="Columns of a room, its rim included.")
        boxes: int = Field(1, ge=1, le=6, description="Boxes, and targets.")
        walls: int = Field(3, ge=0, description="Inner walls.")
        pulls: int = Field(10, ge=1, description="Pulls by which a level is made from a solved one, at most.")
        longest_solution: int = Field(15, ge=1, description="Moves that the shortest solution of a level may take.")
        history_length: int = Field(2, ge=0, description="Earlier turns a windowed prompt shows; none in pictures.")
        cell: int = Field(
            28, ge=8, le=112, description="Pixels of a cell's side; 28 is one merged patch of Qwen2.5-VL."
        )
        seed: int = Field(0, ge=0, description="Fixes the levels.")
        train_tasks: int = Field(3000, ge=1, description="Levels of the split train.")
        val_tasks: int = Field(200, ge=1, description="Levels of the split val.")

        @model_validator(mode="after")
        def _fit(self) -> Sokoban.Options:
            if self.walls + 2 * self.boxes >= (self.rows - 2) * (self.columns - 2):
                raise ValueError(
                    f"{self.walls} walls, {self.boxes} boxes and as many targets do not fit into {self.rows}x{self.columns}"
                )
            return self

    options: Options

    def __init__(self, vision: bool = False, **options: Any):
        super().__init__(vision=vision, **options)
        self._tagged, self._compact = self.options.reply == "tagged", self.options.observation == "compact"
        self._levels = lru_cache(maxsize=4096)(self._make)
        self._tasks = {
            split: tuple(Task(f"{split}/{i}", split) for i in range(getattr(self.options, f"{split}_tasks")))
            for split in SPLITS
        }
        self._level: Level | None = None

    def spawn(self) -> Sokoban:
        """A slot that shares the levels."""
        slot = copy.copy(self)
        slot._level = None
        return slot

    def tasks(self, split: str) -> Sequence[Task]:
        """The levels of a split; each is made at its first reset. Raises ConfigError for an unknown split and for
        levels that cannot be won within `max_turns`."""
        if split not in SPLITS:
            raise ConfigError(
                f"split {split!r} is not one of {', '.join(SPLITS)}", where="env sokoban", hint='use "train" or "val"'
            )
        if self.options.longest_solution > self.max_turns:
            raise ConfigError(
                f"longest_solution={self.options.longest_solution} cannot be played in max_turns={self.max_turns}",
                where="env sokoban",
                hint="raise env.max_turns, or lower env.options.longest_solution",
            )
        return self._tasks[split]

    def reset(self, task: Task, seed: int) -> Observation:
        """Start a level. `seed` only drives the expert's slips: the game itself is deterministic."""
        self._level = self._levels(task.split, task.id)
        self._state = self._level.start
        self._plan, self._draw = dict[State, str](), random.Random(derive(seed, "expert"))
        return self._show()

    def step(self, action: Action) -> Outcome:
        """Play a move; one into a wall costs a step, what is no move changes and pays nothing. Raises ContractError before the first reset."""
        level, reward = self._playing(), 0.0
        if not level.solved(self._state) and action.text in MOVES:
            before, self._state = self._state, level.move(self._state, action.text)
            gained = len(self._state[1] & level.targets) - len(before[1] & level.targets)
            reward = STEP + ON_TARGET * gained + SOLVED * level.solved(self._state)
        won = level.solved(self._state)
        return Outcome(self._show(), reward, won, info={"success": won})

    def messages(self, observation: Observation, turn: int) -> list[Message]:
        """Turn 0: the rules (not in compact) and the room; later turns the room."""
        return [
            _message(
                []
                if turn or self._compact
                else [*self._rules(), _WORDS["choices"], TAGGED if self._tagged else PLAIN, _WORDS["now"]],
                observation,
            )
        ]

    def window(
        self, history: Sequence[tuple[Observation, Action]], observation: Observation, task: Task
    ) -> list[Message]:
        """SPEAR's prompt: rules, the last `history_length` steps (not with pictures), the room, the moves."""
        shown = 0 if self.options.vision else min(self.options.history_length, len(history))
        past = [(seen.text, action.text) for seen, action in history[len(history) - shown :]]
        if self._compact:
            return [_message([f"{seen}\n> {done}" for seen, done in past], observation)]
        told = (
            _WORDS["past"].format(
                count=len(history), shown=shown, history=numbered(past, len(history)), step=len(history) + 1
            )
            if past
            else ""
        )
        return [
            _message(
                [*self._rules(), told, _WORDS["now"]],
                observation,
                [_WORDS["choices"], _WORDS["reason"] if self._tagged else PLAIN],
            )
        ]

    def parse(self, reply: Reply) -> Action:
        """Tagged: verl-agent's projection, the first of the moves that <action> names. Plain: the reply itself. Else no move, and invalid."""
        text, valid = projected(reply.text, 1) if self._tagged else (reply.text.strip().lower(), True)
        found = next((name for name in MOVES if (name in text if self._tagged else name == text)), "")
        return Action(found or STILL, valid and bool(found), tool_calls=int(valid and bool(found)))

    def format(self, text: str) -> str:
        """A reply that `parse` turns into `text`."""
        return f"<think>{THOUGHT}</think><action>{text}</action>" if self._tagged else text

    def expert(self) -> str | None:
        """The next move of a shortest solution, or of chance where there is none any more; None after the end."""
        if self._playing().solved(self._state):
            return None
        if self._state not in self._plan:
            self._plan = solve(self._playing(), self._state)
        wrong = self._draw.random() < self.expert_noise
        return self._draw.choice(list(MOVES)) if wrong or not self._plan else self._plan[self._state]

    def _make(self, split: str, name: str) -> Level:
        """The level of a task. A level's digest says which split it belongs to, so none is in both."""
        chosen, draw = self.options, random.Random(derive(self.options.seed, "sokoban", name))
        for _ in range(ATTEMPTS):
            level = reverse_play(
                draw, (chosen.rows, chosen.columns), boxes=chosen.boxes, walls=chosen.walls, pulls=chosen.pulls
            )
            if level is None or SPLITS[level.digest % 5 == 0] != split:
                continue
            if 0 < len(solve(level, level.start)) <= chosen.longest_solution:
                return level
        seen = f"no level in {ATTEMPTS} draws: {chosen.rows}x{chosen.columns}, {chosen.boxes} boxes, {chosen.walls} walls, {chosen.pulls} pulls"
        raise ConfigError(
            seen,
            where="env.options",
            hint="use fewer boxes, walls or pulls, a larger room, or a longer longest_solution",
        )

    def _rules(self) -> list[str]:
        return [_WORDS["role"], _WORDS["rules"], _WORDS["picture" if self.options.vision else "text"]]

    def _show(self) -> Observation:
        rows = self._playing().grid(self._state)
        grid = [row[1:-1] for row in rows[1:-1]] if self._compact else rows
        text = "\n".join("".join(f" {symbol}" for symbol in row) for row in grid)
        images = (Image(picture.png(picture.draw(grid, self.options.cell))),) if self.options.vision else ()
        return Observation("" if images else text, text, tuple(MOVES), images)

    def _playing(self) -> Level:
        if self._level is None:
            raise ContractError(
                "step() or expert() before reset()", where="env sokoban", hint="call reset(task, seed) first"
            )
        return self._level


def _message(above: Sequence[str], observation: Observation, below: Sequence[str] = ()) -> Message:
    """The room, as text or as a picture, between lines of text."""
    before, after = ("\n".join(filter(None, lines)) for lines in (above, below))
    if not observation.images:
        return Message("user", "\n".join(filter(None, (before, observation.text, after))))
    parts: tuple[Text | Image, ...] = (Text(before), *observation.images, Text(after))
    return Message("user", tuple(part for part in parts if part != Text("")))
