"""A method's signature as a function schema, and its arguments checked by pydantic."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.errors import PydanticSchemaGenerationError

from spearrl.errors import ContractError

_SECTION = re.compile(r"^\s*(args|arguments|parameters|params):\s*$", re.IGNORECASE)
_ITEM = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?\s*:\s*(.+)$")
_END = re.compile(r"^\s*(returns?|raises|yields?|examples?|notes?):\s*$", re.IGNORECASE)


class Signature:
    """What a tool takes.

    Args:
        model: one field per parameter, under an alias, so that no parameter name can collide with a pydantic attribute.
    """

    def __init__(self, model: type[BaseModel], description: str, hints: Mapping[str, str]):
        self._model, self._description, self._hints = model, description, hints

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, converted to their types. Raises pydantic.ValidationError."""
        checked = self._model.model_validate(dict(given))
        return {str(info.alias): getattr(checked, name) for name, info in self._model.model_fields.items()}

    def schema(self, name: str) -> dict[str, Any]:
        """OpenAI-style: {"type": "function", "function": {"name", "description", "parameters"}}."""
        parameters = _without_titles(self._model.model_json_schema(by_alias=True))
        parameters.setdefault("required", [])
        parameters.pop("additionalProperties", None)
        return {
            "type": "function",
            "function": {"name": name, "description": self._description, "parameters": parameters},
        }

    def line(self, name: str) -> str:
        """As a programmer would write it: add(a: int, b: int = 0): Add two numbers."""
        first = self._description.partition("\n")[0]
        text = f"{name}({', '.join(self._hints.values())})"
        return f"{text}: {first}" if first else text


def read_signature(method: Callable[..., Any], where: str) -> Signature:
    """Read a method's type hints and docstring (an "Args:" section describes the parameters).

    Raises:
        ContractError: a parameter without a type hint, of a type that has no schema, or of a kind that cannot be passed by name.
    """
    if inspect.iscoroutinefunction(method):
        raise ContractError(
            "a tool is a plain function",
            where=where,
            hint='leave "async" out; execution="thread" keeps slow tools off the loop',
        )
    try:
        types = get_type_hints(method, include_extras=True)
    except (NameError, TypeError) as error:
        raise ContractError(
            f"a type hint cannot be resolved: {error}", where=where, hint="import the type at the top of the module"
        ) from error
    description, documented = _docstring(inspect.getdoc(method) or "")
    fields: dict[str, Any] = {}
    hints: dict[str, str] = {}
    for name, parameter in list(inspect.signature(method).parameters.items())[1:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ContractError(
                f"parameter {parameter} cannot be passed by name", where=where, hint="use plain parameters in a @tool"
            )
        if name not in types:
            raise ContractError(
                f"parameter {name!r} has no type hint", where=where, hint=f"write {name}: int, or whatever it is"
            )
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[f"field_{len(fields)}"] = (types[name], Field(default, alias=name, description=documented.get(name)))
        hints[name] = str(parameter).replace("'", "") if isinstance(parameter.annotation, str) else str(parameter)
    config = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=False)
    try:
        model = create_model(where.rpartition(".")[2], __config__=config, **fields)
        model.model_json_schema()
    except (PydanticSchemaGenerationError, TypeError) as error:
        raise ContractError(
            f"a parameter's type has no schema: {error}",
            where=where,
            hint="use int, float, str, bool, Literal, list, dict or a pydantic model",
        ) from error
    return Signature(model, description, hints)


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """The description, and what the "Args:" section says of each parameter."""
    head: list[str] = []
    items: dict[str, str] = {}
    inside, last = False, ""
    for line in text.splitlines():
        if _SECTION.match(line):
            inside = True
        elif _END.match(line):
            break
        elif not inside:
            head.append(line)
        elif item := _ITEM.match(line):
            last = item[1]
            items[last] = item[2].strip()
        elif last and line.strip():
            items[last] += f" {line.strip()}"
    return "\n".join(head).strip(), items


def _without_titles(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_titles(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _properties(item) if key == "properties" else _without_titles(item)
        for key, item in value.items()
        if key != "title"
    }


def _properties(value: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter may itself be called "title"."""
    return {name: _without_titles(item) for name, item in value.items()}
