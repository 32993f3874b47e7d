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


def random_calls(schemas: Sequence[Mapping[str, Any]], shown: str, draw: random.Random) -> list[str]:
    """One call of every tool, as action texts. Half of the numbers and words come from `shown`, the observation."""
    calls = []
    for schema in schemas:
        function = schema["function"]
        parameters = {**function["parameters"], "type": "object"}
        calls.append(call(function["name"], _value(parameters, parameters.get("$defs", {}), shown, draw, 0)))
    return calls


def _value(schema: Mapping[str, Any], types: Mapping[str, Any], shown: str, draw: random.Random, depth: int) -> Any:
    """A value that a JSON schema takes. Bounds, choices and types are kept to; patterns and formats are not."""
    if "$ref" in schema:
        return _value(types.get(schema["$ref"].rpartition("/")[2], {}), types, shown, draw, depth + 1)
    if "const" in schema or "enum" in schema:
        return draw.choice(schema.get("enum") or [schema.get("const")])
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return _value(draw.choice(schema[key]), types, shown, draw, depth + 1)
    kind = schema.get("type", "string")
    if kind in ("integer", "number"):
        return _number(schema, shown, draw)
    if kind == "boolean":
        return draw.random() < 0.5
    if kind == "array":
        least, items = schema.get("minItems", 0), schema.get("items", {})
        most = max(least, min(schema.get("maxItems", 2), 2 if depth < DEEPEST else 0))
        return [_value(items, types, shown, draw, depth + 1) for _ in range(draw.randint(least, most))]
    if kind == "object":
        required = schema.get("required", ())
        parts = [
            (name, part)
            for name, part in schema.get("properties", {}).items()
            if name in required or (depth < DEEPEST and draw.random() < 0.5)
        ]
        return {name: _value(part, types, shown, draw, depth + 1) for name, part in parts}
    if kind == "null":
        return None
    words = re.findall(r"\w+", shown)
    text = draw.choice(words) if words and draw.random() < 0.5 else draw.choice(("a", "1", "go on", ""))
    return text.ljust(schema.get("minLength", 0), "a")[: schema.get("maxLength")]


def _number(schema: Mapping[str, Any], shown: str, draw: random.Random) -> int | float:
    """Within the bounds that the schema gives."""
    low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
    high = max(low, schema.get("maximum", schema.get("exclusiveMaximum", low + 11) - 1))
    numbers = [int(digits) for digits in re.findall(r"-?\d{1,9}", shown)]
    fitting = [number for number in numbers if low <= number <= high or not schema.keys() & BOUNDS]
    if fitting and draw.random() < 0.5:
        return draw.choice(fitting)
    return draw.randint(int(low), int(high)) if schema["type"] == "integer" else draw.uniform(low, high)
