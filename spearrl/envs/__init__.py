"""Environments: the interface, tools as environments, and the built-in ones by name."""

from spearrl.envs.base import Environment, import_path, load, make, option_errors, tasks_of
from spearrl.envs.tool import Done, ToolEnvironment, call, tool

__all__ = ["Done", "Environment", "ToolEnvironment", "call", "import_path", "load", "make", "option_errors"]
__all__ += ["tasks_of", "tool"]
