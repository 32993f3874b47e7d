"""What settings exist: their keys, and their kinds and constraints in words."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from spearrl.config.algo import CALLABLE, Section, Threshold
from spearrl.config.sections import ENVIRONMENT, LIST, PLAIN_TEXT, RUN_NAME, VARIABLE, RunConfig

Key = tuple[str, ...]
OPTIONS: Key = ("env", "options")  # below this key any name may stand; the environment knows which mean something
_PATTERNS = {
    RUN_NAME: "text of a-z, 0-9, '.', '_' and '-' that begins with a letter or digit, at most 64 characters",
    PLAIN_TEXT: "text without control characters, not empty",
    LIST: "names with commas between them, or empty",
    VARIABLE: "SPEARRL_…_TOKEN (or _KEY, _PASSWORD)",
    ENVIRONMENT: 'a built-in name such as "webshop", or an import path "my_pkg.mod:Class"',
    CALLABLE: 'an import path "my_pkg.mod:fn"',
}
_KINDS = {int: "integer", float: "number", bool: "true or false", str: "text", dict: "table"}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def dotted(key: Key) -> str:
    """("run", "seed") -> "run.seed"."""
    return ".".join(key)


def is_option(key: Key) -> bool:
    """Whether the key is an option of the environment, or below one."""
    return key[: len(OPTIONS)] == OPTIONS and key != OPTIONS


@cache
def sections() -> dict[Key, type[Section]]:
    """Every section by its key; () is the whole config. A parent comes just before its children."""
    return dict(_below((), RunConfig))


def _below(key: Key, section: type[Section]) -> Iterator[tuple[Key, type[Section]]]:
    yield key, section
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from _below((*key, name), info.annotation)


@cache
def leaves() -> dict[Key, FieldInfo]:
    """Every setting that is a value, by its key."""
    keys = {(*parent, name): info for parent, model in sections().items() for name, info in model.model_fields.items()}
    return {key: info for key, info in keys.items() if key not in sections()}


def base_type(info: FieldInfo) -> Any:
    """The annotation without "or None": a plain type, or a Literal."""
    if get_origin(info.annotation) in (Literal, dict):
        return info.annotation if get_origin(info.annotation) is Literal else dict
    members = [member for member in get_args(info.annotation) if member is not NoneType]
    return members[0] if members else info.annotation


def accepts_none(info: FieldInfo) -> bool:
    return NoneType in get_args(info.annotation)


def choices(info: FieldInfo) -> tuple[Any, ...]:
    """The words or numbers a Literal field accepts; () for other fields."""
    return get_args(info.annotation) if get_origin(info.annotation) is Literal else ()


def built_in(info: FieldInfo) -> tuple[str, ...]:
    """The built-in names of a setting that also takes an import path; () for other fields."""
    return tuple(info.examples or ())


def takes_quantile(info: FieldInfo) -> bool:
    return info.annotation == Threshold


def default_of(info: FieldInfo) -> Any:
    return info.get_default(call_default_factory=True)


def constraint(info: FieldInfo) -> str:
    """Kind and bounds in words. Example: "number > 0 and < 1"."""
    if choices(info):
        listed = (f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices(info))
        words = f"one of {', '.join(listed)}"
    else:
        pattern = next((item.pattern for item in info.metadata if getattr(item, "pattern", None)), None)
        words = _PATTERNS[pattern] if pattern else _KINDS[base_type(info)]
        if built_in(info):
            words = ", ".join((*(f'"{name}"' for name in built_in(info)), f"or {words}"))
        bounds = [
            f"{sign} {getattr(item, bound):g}"
            for item in info.metadata
            for bound, sign in _BOUNDS
            if hasattr(item, bound)
        ]
        words += f" {' and '.join(bounds)}" if bounds else ""
        words += ', or "quantile:0.8"' if takes_quantile(info) else ""
    return f'{words}, or "none"' if accepts_none(info) else words
