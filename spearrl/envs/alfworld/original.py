"""ALFWorld's own engine (packages alfworld and textworld), for comparison with the native one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spearrl.errors import ConfigError


class OriginalEngine:
    """One game in the original engine. `text` and `commands` are what it shows now.

    Args:
        record: what a game.tw-pddl holds, or `pddl_problem` and `task_desc`: domain and grammar are the package's then.
    Raises:
        ConfigError: a package is missing.
    """

    def __init__(self, record: Mapping[str, Any]):
        try:
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
            from textworld.envs import PddlEnv
        except ImportError as error:
            reason = f"the original engine is not installed: {error}"
            hint = 'pip install "spearrl[alfworld]", or leave env.options.backend at native'
            raise ConfigError(reason, where="env.options.backend", hint=hint) from error
        game = dict(record)
        if "grammar" not in game:
            grammar = Path(ALFRED_TWL2_PATH).read_text(encoding="utf-8")
            game["grammar"] = grammar.replace("UNKNOWN GOAL", game["task_desc"])
            game["pddl_domain"] = Path(ALFRED_PDDL_PATH).read_text(encoding="utf-8")
        self._env = AlfredDemangler(PddlEnv())
        self._env.load(game)
        self._show(self._env.reset())

    def act(self, command: str) -> tuple[str, bool]:
        """Play a command: the text, and whether the goal is reached."""
        state, _, done = self._env.step(command)
        self._show(state)
        return self.text, bool(done)

    def close(self) -> None:
        """Free the planner's library."""
        self._env.close()

    def _show(self, state: Any) -> None:
        self.text: str = state.feedback
        self.commands: tuple[str, ...] = tuple(state["admissible_commands"])
