"""A method's signature as a function schema, and its arguments checked by pydantic."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.errors import PydanticSchemaGenerationError

from spearrl.errors import ContractError

_SECTION = re.compile(
    r"^\s*(args|arguments|parameters|params|returns?|raises|yields?|examples?|notes?):\s*$",
    re.IGNORECASE | re.MULTILINE,
)
_ARGUMENT = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?\s*:\s*(.+)$")


class Signature:
    """What a tool is called with.

    Args:
        model: one field per parameter. The parameter's name is the field's alias, so that it cannot collide with an
            attribute that every pydantic model has.
        description: of the tool, for the model that calls it.
        parameters: each as it stands in the source, such as "a: int = 1".
    """

    def __init__(self, model: type[BaseModel], description: str, parameters: list[str]):
        self._model, self._description, self._parameters = model, description, parameters

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, converted to their types. Raises pydantic.ValidationError."""
        checked = self._model.model_validate(dict(values))
        return {str(field.alias): getattr(checked, name) for name, field in self._model.model_fields.items()}

    def schema(self, name: str) -> dict[str, Any]:
        """OpenAI-style: {"type": "function", "function": {"name", "description", "parameters"}}."""
        parameters = _without_titles(self._model.model_json_schema(by_alias=True))
        parameters.setdefault("required", [])
        parameters.pop("additionalProperties", None)
        function = {"name": name, "description": self._description, "parameters": parameters}
        return {"type": "function", "function": function}

    def line(self, name: str) -> str:
        """As a programmer would write it: add(a: int, b: int = 0): Add two numbers."""
        summary = self._description.partition("\n")[0]
        text = f"{name}({', '.join(self._parameters)})"
        return f"{text}: {summary}" if summary else text


def read_signature(method: Callable[..., Any], where: str) -> Signature:
    """Read a method's type hints and its docstring, whose "Args:" section describes the parameters.

    Args:
        where: how errors name the method, "Class.method".
    Raises:
        ContractError: a parameter has no type hint, a type without a schema, or cannot be passed by name.
    """

    def broken(complaint: str, hint: str) -> ContractError:
        return ContractError(complaint, where=where, hint=hint)

    if inspect.iscoroutinefunction(method):
        hint = 'leave "async" out; execution="thread" keeps slow tools off the loop'
        raise broken("a tool is a plain function", hint)
    try:
        types = get_type_hints(method, include_extras=True)
    except (NameError, TypeError) as error:
        hint = "import the type at the top of the module"
        raise broken(f"a type hint cannot be resolved: {error}", hint) from error
    description, described = _read_docstring(inspect.getdoc(method) or "")
    fields: dict[str, Any] = {}
    parameters = list(inspect.signature(method).parameters.items())[1:]  # without self
    for name, parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise broken(f"parameter {parameter} cannot be passed by name", "use plain parameters in a @tool")
        if name not in types:
            raise broken(f"parameter {name!r} has no type hint", f"write {name}: int, or whatever it is")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[f"field_{len(fields)}"] = (types[name], Field(default, alias=name, description=described.get(name)))
    config = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=False)
    try:
        model = create_model(where.rpartition(".")[2], __config__=config, **fields)
        model.model_json_schema()
    except (PydanticSchemaGenerationError, TypeError) as error:
        hint = "use int, float, str, bool, Literal, list, dict or a pydantic model"
        raise broken(f"a parameter's type has no schema: {error}", hint) from error
    return Signature(model, description, [_source(parameter) for _, parameter in parameters])


def _source(parameter: inspect.Parameter) -> str:
    """A parameter as it is written; an annotation that is a string loses its quotes."""
    return str(parameter).replace("'", "") if isinstance(parameter.annotation, str) else str(parameter)


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The description, and what the "Args:" section says of each parameter."""
    description, *sections = _SECTION.split(text)
    titled = zip(map(str.lower, sections[::2]), sections[1::2], strict=True)
    arguments = next((body for title, body in titled if title.startswith(("arg", "param"))), "")
    described: dict[str, str] = {}
    for line in filter(str.strip, arguments.splitlines()):
        if match := _ARGUMENT.match(line):
            described[match[1]] = match[2].strip()
        elif described:
            described[list(described)[-1]] += f" {line.strip()}"
    return description.strip(), described


def _without_titles(value: Any, *, properties: bool = False) -> Any:
    """A schema without pydantic's "title" entries. In `properties` the keys are parameters: one may be called title."""
    if isinstance(value, list):
        return [_without_titles(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_titles(item, properties=key == "properties" and not properties)
        for key, item in value.items()
        if properties or key != "title"
    }
