"""Environments: the interface, tools as environments, and the built-in ones by name."""

from spearrl.envs.base import Environment
from spearrl.envs.option_errors import option_errors
from spearrl.envs.registry import import_path, instantiate, load, make, tasks_of
from spearrl.envs.tool import Done, ToolEnvironment, call, tool

__all__ = ["Done", "Environment", "ToolEnvironment", "call", "import_path", "instantiate", "load", "make"]
__all__ += ["option_errors", "tasks_of", "tool"]
