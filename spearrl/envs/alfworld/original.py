"""ALFWorld's own engine (packages alfworld and textworld), for comparison with the native one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spearrl.errors import ConfigError


class OriginalEngine:
    """One game in the original engine. `text` and `commands` are what it shows now.

    Args:
        source: the `file` of a game, or `pddl_problem` and `task_desc`; domain and grammar then are the package's.
    Raises:
        ConfigError: a package is missing.
    """

    def __init__(self, source: dict[str, Any]):
        try:
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
            from textworld.envs import PddlEnv
        except ImportError as error:
            reason = f"the original engine is not installed: {error}"
            hint = 'pip install "spearrl[alfworld]", or leave env.options.backend at native'
            raise ConfigError(reason, where="env.options.backend", hint=hint) from error
        if "file" in source:
            game = json.loads(Path(source["file"]).read_text(encoding="utf-8"))
        else:
            grammar = Path(ALFRED_TWL2_PATH).read_text(encoding="utf-8").replace("UNKNOWN GOAL", source["task_desc"])
            domain = Path(ALFRED_PDDL_PATH).read_text(encoding="utf-8")
            game = {"pddl_domain": domain, "grammar": grammar, "pddl_problem": source["pddl_problem"]}
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
