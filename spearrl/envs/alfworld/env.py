"""The ALFWorld environment: splits, replies, prompts and rewards around a playing state."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from spearrl.envs.alfworld import compact, prompts
from spearrl.envs.alfworld.data import SPLITS, Games, generated_games, open_games
from spearrl.envs.alfworld.expert import Expert
from spearrl.envs.alfworld.world import CHANGING, NOTHING, World
from spearrl.envs.base import Environment
from spearrl.envs.text.tagged import projection
from spearrl.errors import ConfigError, ContractError
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task

VERBS = frozenset((*CHANGING, "move", "look", "inventory", "examine", "help"))
LONGEST_PLAIN = 80  # characters of a plain reply that can be a command
THOUGHT = "The next step follows from what I see."
REWARD = 10.0  # for a finished task


class ALFWorld(Environment):
    """ALFWorld (arXiv 2010.03768) without TextWorld: the original's text, commands and success, on its games or generated households.

    Splits are train, valid_seen and valid_unseen; task ids are the games' names; the stratum of a task is its type (six of them).
    A finished task pays 10. `observation="compact"` shows short texts and takes short commands that a tiny model can handle.
    """

    max_turns = 50

    class Options(Environment.Options):
        data: str | None = Field(
            None,
            description="Folder of ALFWorld's games (packed or json_2.1.1), or one game.tw-pddl; none: generated households.",
        )
        grammar: Literal["auto", "0.4.2", "2.1.1"] = Field(
            "auto", description='"move … to …" (0.4.2) or "put … in/on …" (2.1.1); auto: as a game file says.'
        )
        backend: Literal["native", "textworld"] = Field(
            "native", description="textworld: the original engine (extra `alfworld`), for comparison."
        )
        observation: Literal["text", "compact"] = Field(
            "text", description="How texts are written; compact: short, for tiny models."
        )
        reply: Literal["tagged", "plain"] = Field(
            "tagged", description="<think>…</think><action>…</action>, or the action alone."
        )
        anchor: Literal["text", "state"] = Field(
            "text", description="What GiGPO compares: the observation's text, as SPEAR has it, or the whole state."
        )
        history_length: int = Field(2, ge=0, description="Earlier turns a windowed prompt shows.")
        seed: int = Field(0, ge=0, description="Fixes the generated households.")
        size: Literal["auto", "small", "large"] = Field(
            "auto", description="Generated rooms of 6-10 or 12-22 receptacles; auto: small in compact."
        )
        train_tasks: int = Field(3000, ge=1, description="Generated tasks of the split train.")
        valid_tasks: int = Field(200, ge=1, description="Generated tasks of each validation split.")

        @model_validator(mode="after")
        def _fit(self) -> ALFWorld.Options:
            if self.backend == "textworld" and (self.data is None or self.observation == "compact"):
                raise ValueError('backend="textworld" needs data and observation="text"')
            return self

    options: Options

    def __init__(self, data: str | Path | None = None, **options: Any):
        super().__init__(data=None if data is None else str(data), **options)
        chosen = self.options
        self.execution = (
            "process" if chosen.backend == "textworld" else "inline"
        )  # a step of the original takes a tenth of a second
        self._tagged, self._compact = chosen.reply == "tagged", chosen.observation == "compact"
        size = ("small" if self._compact else "large") if chosen.size == "auto" else chosen.size
        self._games: Games = (
            open_games(chosen.data)
            if chosen.data
            else generated_games(chosen.seed, size, chosen.train_tasks, chosen.valid_tasks)
        )
        self._world: World | None = None
        self._engine: Any = None

    def spawn(self) -> ALFWorld:
        """A slot that shares the games."""
        slot = copy.copy(self)
        slot._world = slot._engine = None
        return slot

    def close(self) -> None:
        """Free the original engine, where one runs."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def tasks(self, split: str) -> Sequence[Task]:
        """The games of a split, in the order of the files. Raises ConfigError for an unknown or empty split."""
        if split not in SPLITS:
            raise ConfigError(
                f"split {split!r} is not one of {', '.join(SPLITS)}",
                where="env alfworld",
                hint='use "train", "valid_seen" or "valid_unseen"',
            )
        found = self._games.tasks(split)
        if not found:
            raise ConfigError(
                f"no games of the split {split} in {self._games.name}",
                where="env alfworld",
                hint="check env.options.data",
            )
        return found

    def reset(self, task: Task, seed: int) -> Observation:
        """Start a game. `seed` only drives the expert's slips: the games themselves are deterministic."""
        entry = self._games.entry(task)
        self._world = World(
            entry.game, old=entry.old if self.options.grammar == "auto" else self.options.grammar == "2.1.1"
        )
        self._expert = Expert(self._world, random.Random(derive(seed, "expert")))
        self._done = False
        if self._compact:
            return self._show(compact.opening(entry.game))
        text = f"{self._world.intro()}\n\nYour task is to: {entry.task}."
        if self.options.backend == "textworld":
            from spearrl.envs.alfworld.original import Engine

            self.close()
            self._engine = Engine(self._games.source(task))
            text = self._engine.text
        return self._show(text)

    def step(self, action: Action) -> Outcome:
        """Play a command; one that is not possible changes nothing. Raises ContractError before the first reset."""
        world = self._playing()
        if self._done:
            return Outcome(
                self._show(compact.INVALID if self._compact else NOTHING), 0.0, True, info={"success": False}
            )
        command = self._labels.get(action.text.strip(), "") if self._compact else action.text
        text, won = world.act(command), world.won()
        if self._engine is not None:
            text, won = self._engine.act(command)
        self._done = won
        observation = self._show(compact.change(world) if self._compact else text)
        return Outcome(observation, REWARD if won else 0.0, won, info={"success": won})

    def messages(self, observation: Observation, turn: int) -> list[Message]:
        """Turn 0: the rules (not in compact) and the first text, which holds the task; later turns only the engine's answer."""
        if turn > 0 or self._compact:
            return [Message("user", observation.text)]
        return [Message("user", f"{prompts.rules(tagged=self._tagged, old=self._playing().old)}\n\n{observation.text}")]

    def window(
        self, history: Sequence[tuple[Observation, Action]], observation: Observation, task: Task
    ) -> list[Message]:
        """SPEAR's prompt: task, the last `history_length` steps, observation, admissible actions."""
        entry = self._games.entry(task)
        past = [
            (seen.info.get("seen", seen.text), action.text)
            for seen, action in history[max(0, len(history) - self.options.history_length) :]
        ]
        if self._compact:
            lines = [f"{seen}\n> {done}" for seen, done in past]
            return [
                Message(
                    "user",
                    "\n".join([compact.opening(entry.game), *lines, observation.info.get("page", observation.text)]),
                )
            ]
        text = prompts.windowed(
            entry.task, observation.text, observation.admissible or (), past, len(history), tagged=self._tagged
        )
        return [Message("user", text)]

    def parse(self, reply: Reply) -> Action:
        """Tagged: verl-agent's projection (what stands in <action>, lower-cased; valid with <think> and without Chinese). Plain: the reply itself."""
        if not self._tagged:
            text = reply.text.lower().strip()
            valid = text.partition(" ")[0] in VERBS and "\n" not in text and len(text) <= LONGEST_PLAIN
            return Action(text, valid, tool_calls=int(valid))
        text, valid = projection(reply.text, 30)
        return Action(text, valid, tool_calls=int(valid and text.partition(" ")[0] in VERBS))

    def format(self, text: str) -> str:
        """A reply that `parse` turns into `text`."""
        return f"<think>{THOUGHT}</think><action>{text}</action>" if self._tagged else text

    def expert(self) -> str | None:
        """The scripted player's next command, from the true state; None after the end."""
        self._playing()
        if self._done:
            return None
        command = self._expert.act(self.expert_noise)
        if self._compact:
            return next((label for label, full in self._labels.items() if full == command), command)
        return command

    def _show(self, text: str) -> Observation:
        world = self._playing()
        state = world.key() if self.options.anchor == "state" else None
        if not self._compact:
            commands = world.commands() if self._engine is None else self._engine.commands
            return Observation(text, text if state is None else state, commands)
        self._labels = compact.labels(world)
        page = compact.whole(world)
        seen = text if world.facing >= 0 else compact.START
        return Observation(
            text, page if state is None else state, tuple(self._labels), info={"page": page, "seen": seen}
        )

    def _playing(self) -> World:
        if self._world is None:
            raise ContractError(
                "step() or expert() before reset()", where="env alfworld", hint="call reset(task, seed) first"
            )
        return self._world
