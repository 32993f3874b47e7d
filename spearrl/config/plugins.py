"""What a user names by import path; functions are checked by their signature before a run starts."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from spearrl.errors import ConfigError, SpearError


def imported(path: str, where: str) -> Any:
    """What "package.module:name" names; modules of the current directory are found too. Raises ConfigError where that fails."""
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(import_module(module_name), name)
    except SpearError:
        raise
    except Exception as error:  # a user's module may fail in any way
        hint = "mend the module"
        if isinstance(error, ImportError | AttributeError):
            hint = f'write "package.module:{name}" as it is spelt; run in the folder that holds the package, or install it, or put its folder on PYTHONPATH'
        raise ConfigError(
            f"{path!r} cannot be imported: {type(error).__name__}: {error}", where=where, hint=hint
        ) from error


@cache
def load_function(path: str, where: str) -> Callable[..., Any]:
    """The function "package.module:name". Raises ConfigError: no such module or name, or it cannot be called."""
    found = imported(path, where)
    if not callable(found):
        raise ConfigError(f"{path!r} is a {type(found).__name__}, not a function", where=where, hint="name a function")
    return found  # type: ignore[no-any-return]


def accepted(
    path: str, where: str, *, leading: Sequence[str], required: Sequence[str], offered: Sequence[str]
) -> tuple[str, ...]:
    """The keyword arguments that the function at `path` takes of those required and offered.

    Args:
        leading: names of its first, positional parameters.
        required: keywords it must take.
        offered: further keywords it may take; every other parameter needs a default.

    Raises:
        ConfigError: it has another signature.
    """
    function = load_function(path, where)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path!r} has no signature to check: {error}", where=where, hint="wrap it in a Python function"
        ) from error
    positional = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    wanted = f"def {function.__name__}({', '.join(leading)}, *, {', '.join(required)}{', ' if required else ''}...)"
    if tuple(positional[: len(leading)]) != tuple(leading):
        raise ConfigError(f"{path!r} takes ({', '.join(positional)})", where=where, hint=f"write {wanted}")
    missing = [name for name in required if name not in parameters and not anything]
    if missing:
        raise ConfigError(f"{path!r} does not take {', '.join(missing)}", where=where, hint=f"write {wanted}")
    known = {*leading, *required, *offered}
    unknown = [
        n
        for n, p in parameters.items()
        if n not in known and p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if unknown:
        hint = f"give it a default; what can be asked for: {', '.join((*required, *offered))}"
        raise ConfigError(f"{path!r} wants {', '.join(unknown)}, which nobody passes", where=where, hint=hint)
    return tuple(name for name in (*required, *offered) if name in parameters or (anything and name in required))
