"""The ALFWorld environment: splits, replies, prompts and rewards around a playing state."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from spearrl.config.tables import table
from spearrl.envs.alfworld import compact
from spearrl.envs.alfworld.data import SPLITS, Games, generated_games, open_games
from spearrl.envs.alfworld.expert import Expert
from spearrl.envs.alfworld.world import CHANGING, NOTHING, World
from spearrl.envs.text.environment import TextEnvironment
from spearrl.envs.text.tagged_replies import PLAIN, REASON, compact_window, past_steps
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Task

VERBS = frozenset((*CHANGING, "move", "look", "inventory", "examine", "help"))
LONGEST_PLAIN = 80  # characters of a plain reply that can be a command
REWARD = 10.0  # for a finished task
_TEXT = table(__file__, "prompts.toml")


class ALFWorld(TextEnvironment[World]):
    """ALFWorld (arXiv 2010.03768) without TextWorld: the original's text, commands and success.

    Games are the original's or generated. Splits are train, valid_seen and valid_unseen; task ids are the games' names;
    the stratum of a task is its type, one of six. A finished task pays 10. `observation="compact"` has short texts and
    commands for tiny models.
    """

    max_turns = 50
    splits = SPLITS
    tail = 30

    class Options(TextEnvironment.Options):
        data: str | None = Field(
            None, description="Folder of ALFWorld's games (packed or json_2.1.1), or a game.tw-pddl; none: generated."
        )
        grammar: Literal["auto", "0.4.2", "2.1.1"] = Field(
            "auto", description='"move … to …" (0.4.2) or "put … in/on …" (2.1.1); auto: as a game file says.'
        )
        backend: Literal["native", "textworld"] = Field(
            "native", description="textworld: the original engine (extra `alfworld`), for comparison."
        )
        anchor: Literal["text", "state"] = Field(
            "text", description="What GiGPO compares: the observation's text, as SPEAR has it, or the whole state."
        )
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
        super().__init__(data=data, **options)
        settings = self.options
        # a step of the original takes a tenth of a second
        self.execution = "process" if settings.backend == "textworld" else "inline"
        size = ("small" if self._compact else "large") if settings.size == "auto" else settings.size
        self._games: Games = (
            open_games(settings.data)
            if settings.data
            else generated_games(settings.seed, size, settings.train_tasks, settings.valid_tasks)
        )
        self._engine: Any = None

    def spawn(self) -> Self:
        """A slot that shares the games."""
        slot = super().spawn()
        slot._engine = None
        return slot

    def close(self) -> None:
        """Free the original engine, where one runs."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def tasks(self, split: str) -> Sequence[Task]:
        """The games of a split, in the order of the files. Raises ConfigError for an unknown or empty split."""
        self._check_split(split)
        tasks = self._games.tasks(split)
        if not tasks:
            reason = f"no games of the split {split} in {self._games.name}"
            raise ConfigError(reason, where=self._where(), hint="check env.options.data")
        return tasks

    def reset(self, task: Task, seed: int) -> Observation:
        """Start a game. `seed` only drives the expert's slips: the games themselves are deterministic."""
        game, grammar = self._games.game(task), self.options.grammar
        world = self._episode = World(game, old=None if grammar == "auto" else grammar == "2.1.1")
        self._expert = Expert(world, random.Random(derive(seed, "expert")))
        self._done = False
        if self._compact:
            return self._show(compact.opening(game))
        if self.options.backend == "textworld":
            from spearrl.envs.alfworld.original import OriginalEngine

            self.close()
            self._engine = OriginalEngine(self._games.source(task).record)
            return self._show(self._engine.text)
        return self._show(f"{world.intro()}\n\nYour task is to: {game.task}.")

    def step(self, action: Action) -> Outcome:
        """Play a command; one that is not possible changes nothing. Raises ContractError before the first reset."""
        world = self._running()
        if self._done:
            text = compact.INVALID if self._compact else NOTHING
            return Outcome(self._show(text), 0.0, True, info={"success": False})
        command = self._commands.get(action.text.strip(), "") if self._compact else action.text
        text, won = world.act(command), world.won()
        if self._engine is not None:
            text, won = self._engine.act(command)
        self._done = won
        observation = self._show(compact.effect(world) if self._compact else text)
        return Outcome(observation, REWARD if won else 0.0, won, info={"success": won})

    def window(
        self, history: Sequence[tuple[Observation, Action]], observation: Observation, task: Task
    ) -> list[Message]:
        """SPEAR's prompt: task, the last `history_length` steps, observation, admissible actions."""
        game = self._games.game(task)
        steps = [(earlier.info.get("short", earlier.text), action.text) for earlier, action in self._recent(history)]
        if self._compact:
            page = observation.info.get("page", observation.text)
            return [Message("user", compact_window(compact.opening(game), steps, page))]
        actions = "\n ".join(f"'{action}'" for action in observation.admissible or () if action != "help")
        lines = [_TEXT["role"], _TEXT["first"].format(text=observation.text)]  # which holds the task itself
        if history:
            past = [past_steps(steps, len(history))] if steps else []
            now = _TEXT["now"].format(step=len(history) + 1, text=observation.text)
            lines = [f"{_TEXT['role']} Your task is to: {game.task}", *past, now]
        lines += [_TEXT["choices"].format(actions=actions), "", REASON if self._tagged else PLAIN]
        return [Message("user", "\n".join(lines))]

    def expert(self) -> str | None:
        """The scripted player's next command, from the true state; None after the end."""
        self._running()
        if self._done:
            return None
        command = self._expert.act(self.expert_noise)
        if self._compact:
            return next((short for short, full in self._commands.items() if full == command), command)
        return command

    def _rules(self) -> str:
        return str(_TEXT["rules"].format(**_TEXT["old_grammar" if self._running().old else "grammar"]))

    def _action(self, text: str, valid: bool) -> Action:
        known = text.partition(" ")[0] in VERBS
        if not self._tagged:
            valid = known and "\n" not in text and len(text) <= LONGEST_PLAIN
        return Action(text, valid, tool_calls=int(valid and known))

    def _show(self, text: str) -> Observation:
        world = self._running()
        state = world.key() if self.options.anchor == "state" else None
        if not self._compact:
            commands = world.commands() if self._engine is None else self._engine.commands
            return Observation(text, text if state is None else state, commands)
        self._commands = compact.short_commands(world)
        page = compact.surroundings(world)
        info = {"page": page, "short": text if world.facing >= 0 else compact.START}
        return Observation(text, page if state is None else state, tuple(self._commands), info=info)
