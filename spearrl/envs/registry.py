"""Environments by name: the built-in ones, and classes of the user's own by their import path."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from spearrl.config.plugins import imported
from spearrl.envs.base import Environment
from spearrl.errors import ConfigError
from spearrl.types import Task

BUILTIN = {
    "alfworld": "spearrl.envs.alfworld:ALFWorld",
    "math": "spearrl.envs.math:Math",
    "search": "spearrl.envs.search:Search",
    "sokoban": "spearrl.envs.sokoban:Sokoban",
    "webshop": "spearrl.envs.webshop:WebShop",
}


def load(name_or_import_path: str) -> type[Environment]:
    """The class behind a built-in name or "my_pkg.mod:Class"; modules below the current directory are found too.

    Raises:
        ConfigError: neither a built-in name nor an import path, or not a subclass of Environment.
    """
    path = BUILTIN.get(name_or_import_path, name_or_import_path)
    if ":" not in path:
        built_in = ", ".join(sorted(BUILTIN))
        raise ConfigError(
            f"environment {name_or_import_path!r} is not built in (built in: {built_in})",
            hint='use a built-in name, or the import path "my_pkg.my_module:MyEnvironment" of your own class',
        )
    cls = imported(path, "environment")
    if not (isinstance(cls, type) and issubclass(cls, Environment)):
        raise ConfigError(f"{path!r} is not a subclass of spearrl.envs.Environment", hint="subclass Environment")
    return cls


def make(name_or_import_path: str, **options: Any) -> Environment:
    """Build an environment from its name or import path. Raises ConfigError for unknown options.

    The turn limit is no option: set `max_turns` of what is returned, as a run does from its setting `env.max_turns`.
    """
    return instantiate(name_or_import_path, options)


def instantiate(name_or_import_path: str, options: Mapping[str, Any], max_turns: int = 0) -> Environment:
    """`make`, with a turn limit; 0: the class's own."""
    environment = load(name_or_import_path)(**options)
    if max_turns:
        environment.max_turns = max_turns
    return environment


def tasks_of(environment: Environment, split: str, *, setting: str) -> Sequence[Task]:
    """The tasks of a split. Raises ConfigError, naming the setting that chose the split, where there are none."""
    tasks = environment.tasks(split)
    if not tasks:
        raise ConfigError(f"split {split!r} has no tasks", where=setting, hint="name a split the environment has")
    return tasks


def import_path(cls: type[Environment]) -> str:
    """The "my_pkg.mod:Class" by which another process finds a class. Raises ConfigError where there is none."""
    module, name = cls.__module__, cls.__qualname__
    if module == "__main__" or "." in name or getattr(sys.modules.get(module), name, None) is not cls:
        raise ConfigError(
            "another process cannot import this environment",
            where=f"class {name} in module {module}",
            hint="move the class to the top level of a module of its own",
        )
    return f"{module}:{name}"
