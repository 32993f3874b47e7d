"""What check-env says to an environment: hostile replies, and tool calls drawn from the tools' schemas."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spearrl.envs.tool import call

DEEPEST = 4  # levels of a nested argument
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
HOSTILE = {
    "nothing": "",
    "spaces": " \n\t ",
    "200,000 characters": "a" * 200_000,
    "a NUL": "a\x00b",
    "half a character": "\udc80\ud800",
    "not English": "日本語 العربية 🙂‍↔️ \u202e",
    "deep brackets": "[" * 5000 + "{" * 5000,
    "JSON": '{"name": ["x"], "arguments": null}',
    "a broken tool call": '<tool_call>{"name": "x", "arguments": {"a": NaN}}</tool_call><tool_call>',
    "tags": "<think></action><action></think>",
    "control tokens": "<|im_end|><|im_start|>system\n</s>",
    "format signs": "%s%n {0} {x!r} $(id) `id` '; --",
    "a path": "../../../../etc/passwd",
    "numbers": "1e999 -0 " + "9" * 5000,
}


def random_calls(schemas: Sequence[Mapping[str, Any]], text: str, draw: random.Random) -> list[str]:
    """One call of every tool, as action texts. Half of the numbers and words come from `text`, the observation's."""
    functions = [schema["function"] for schema in schemas]
    return [call(function["name"], _Sampler(function["parameters"], text, draw).value()) for function in functions]


class _Sampler:
    """Draws values that a JSON schema takes. Bounds, choices and types are kept to; patterns and formats are not."""

    def __init__(self, schema: Mapping[str, Any], text: str, draw: random.Random):
        self.schema, self.text, self.draw = {**schema, "type": "object"}, text, draw

    def value(self, schema: Mapping[str, Any] | None = None, depth: int = 0) -> Any:
        """A value for a part of the schema; None: for the whole."""
        schema, draw = self.schema if schema is None else schema, self.draw
        if "$ref" in schema:
            return self.value(self.schema.get("$defs", {}).get(schema["$ref"].rpartition("/")[2], {}), depth + 1)
        if "const" in schema or "enum" in schema:
            return draw.choice(schema.get("enum") or [schema.get("const")])
        if options := next((schema[key] for key in ("anyOf", "oneOf", "allOf") if schema.get(key)), None):
            return self.value(draw.choice(options), depth + 1)
        match schema.get("type"):
            case "integer" | "number":
                return self.number(schema)
            case "boolean":
                return draw.random() < 0.5
            case "null":
                return None
            case "array":
                least = schema.get("minItems", 0)
                most = max(least, min(schema.get("maxItems", 2), 2 if depth < DEEPEST else 0))
                return [self.value(schema.get("items", {}), depth + 1) for _ in range(draw.randint(least, most))]
            case "object":
                required, properties = schema.get("required", ()), schema.get("properties", {})
                names = [name for name in properties if name in required or (depth < DEEPEST and draw.random() < 0.5)]
                return {name: self.value(properties[name], depth + 1) for name in names}
        words = re.findall(r"\w+", self.text)
        word = draw.choice(words) if words and draw.random() < 0.5 else draw.choice(("a", "1", "go on", ""))
        return word.ljust(schema.get("minLength", 0), "a")[: schema.get("maxLength")]

    def number(self, schema: Mapping[str, Any]) -> int | float:
        """A number within the bounds, which those of `text` need not keep to where there are none."""
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        high = max(low, schema.get("maximum", schema.get("exclusiveMaximum", low + 11) - 1))
        numbers = [int(digits) for digits in re.findall(r"-?\d{1,9}", self.text)]
        fitting = [number for number in numbers if low <= number <= high or not schema.keys() & BOUNDS]
        if fitting and self.draw.random() < 0.5:
            return self.draw.choice(fitting)
        return self.draw.randint(int(low), int(high)) if schema["type"] == "integer" else self.draw.uniform(low, high)
