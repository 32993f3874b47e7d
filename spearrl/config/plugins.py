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
    """What "package.module:name" names; the current directory's modules count too. Raises ConfigError if it fails."""
    module_name, _, name = path.partition(":")
    if module_name.partition(".")[0] in sys.stdlib_module_names - {"test"}:
        text, hint = f"{path!r} is of Python's standard library, which has none", "name a class or function of your own"
        raise ConfigError(text, where=where, hint=hint)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(import_module(module_name), name)
    except SpearError:
        raise
    except Exception as error:  # a user's module may fail in any way
        hint = "mend the module"
        if isinstance(error, ImportError | AttributeError):
            hint = (
                f'write "package.module:{name}" as it is spelt; run in the folder that holds the package, or install '
            )
            hint += "it, or put its folder on PYTHONPATH"
        raise ConfigError(
            f"{path!r} cannot be imported: {type(error).__name__}: {error}", where=where, hint=hint
        ) from error


@cache
def load_function(path: str, where: str) -> Callable[..., Any]:
    """The function "package.module:name". Raises ConfigError: no such module or name, or it cannot be called."""
    function: Callable[..., Any] = imported(path, where)
    if not callable(function):
        kind = type(function).__name__
        raise ConfigError(f"{path!r} is a {kind}, not a function", where=where, hint="name a function")
    return function


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
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    expected = f"def {function.__name__}({', '.join(leading)}, *, {', '.join(required)}{', ' if required else ''}...)"
    if tuple(positional[: len(leading)]) != tuple(leading):
        raise ConfigError(f"{path!r} takes ({', '.join(positional)})", where=where, hint=f"write {expected}")
    if missing := [name for name in required if name not in parameters and not takes_all]:
        raise ConfigError(f"{path!r} does not take {', '.join(missing)}", where=where, hint=f"write {expected}")
    passed, optional = (
        {*leading, *required, *offered},
        (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL),
    )
    if unknown := [
        n for n, p in parameters.items() if n not in passed and p.default is p.empty and p.kind not in optional
    ]:
        hint = f"give it a default; what can be asked for: {', '.join((*required, *offered))}"
        raise ConfigError(f"{path!r} wants {', '.join(unknown)}, which nobody passes", where=where, hint=hint)
    return tuple(name for name in (*required, *offered) if name in parameters or (takes_all and name in required))
