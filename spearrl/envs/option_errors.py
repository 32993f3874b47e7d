"""What is wrong with an environment's options, in words, with a fix."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError


def option_errors(cls: type[Any], options: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What is wrong with options of an environment's class: (key, complaint, fix) each; empty where they are fine."""
    try:
        cls.Options(**options)
    except ValidationError as error:
        return complaints(cls, error)
    return []


def complaints(cls: type[Any], error: ValidationError) -> list[tuple[str, str, str]]:
    """(key, complaint, fix) of each mistake in the options of an environment's class."""
    return [_complaint(cls, item) for item in error.errors()]


def _complaint(cls: type[Any], item: Mapping[str, Any]) -> tuple[str, str, str]:
    path = ["env.options", *map(str, item["loc"])]
    key, name, message = ".".join(path[1:]), ".".join(path), item["msg"].removeprefix("Value error, ")
    if not key:  # settings that are fine one by one
        return key, f"{name}: {message}", "change one of these settings"
    if item["type"] != "extra_forbidden":
        return key, f"{name}={item['input']!r}: {message}", f"use a value that {cls.__name__} takes"
    if key == "max_turns":
        return key, f"{name} is not a setting of {cls.__name__}", "use env.max_turns"
    fields: Any = cls.Options.model_fields
    for part in item["loc"][:-1]:
        fields = getattr(getattr(fields.get(part), "annotation", None), "model_fields", {})
    near = difflib.get_close_matches(path[-1], fields, n=1)
    fix = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"use one of: {', '.join(fields) or 'none'}"
    return key, f"{name} is not a setting of {cls.__name__}", fix
