"""How models write thoughts and tool calls, and how each way is turned into the one text that environments read:

    <think>…</think> … <tool_call>{"name": …, "arguments": {…}}</tool_call>

A layout finds calls after the thought; a call that it cannot read keeps the tags, so that the environment can complain.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

THINK, THOUGHT = "<think>", "</think>"
OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKS = (THINK, THOUGHT, OPEN, CLOSE)  # in replies always, special tokens or not: environments read them
Call = tuple[str, Any]  # the tool's name, the arguments
Types = Mapping[str, Mapping[str, Any]]  # by tool and parameter: the JSON type that its schema names, else None


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to write tool calls.

    Args:
        block: finds what holds calls; group "body" goes to `read`. The end of the reply may stand for a closing tag.
        read: the calls in a body; raises ValueError where it can read none.
        noise: what else the model writes around calls and answers, left out.
        marks: control tokens that must stay in a reply's text for all this.
    """

    name: str
    block: re.Pattern[str]
    read: Callable[[re.Match[str], Types], list[Call]]
    noise: re.Pattern[str] | None = None
    marks: tuple[str, ...] = ()

    def canonical(self, reply: str, types: Types) -> str:
        """A reply as environments read it. Calls within its thought are text."""

        def rewritten(match: re.Match[str]) -> str:
            try:
                calls = self.read(match, types)
            except (ValueError, SyntaxError, RecursionError):
                return f"{OPEN}{match['body'].strip()}{CLOSE}"
            return "\n".join(call_text(name, arguments) for name, arguments in calls)

        thought, answer = split_thought(_OTHER_THOUGHT.sub(_usual_thought, reply))
        if self is HERMES:
            return thought + answer
        answer = self.block.sub(rewritten, answer)
        return thought + (self.noise.sub("", answer) if self.noise else answer)


THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")


class ResponseTemplate:
    """Reads replies by the response template that a tokenizer carries (transformers' own), through its
    `parse_response`; what that cannot read is handed on as one broken call.

    Args:
        tokenizer: one with a `response_template`.
    """

    name = "response template"

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        written = json.dumps(tokenizer.response_template, ensure_ascii=False).replace("\\", "")
        specials = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        self.marks = tuple(t for t in specials if t in written and t != tokenizer.eos_token)

    def canonical(self, reply: str, types: Types) -> str:
        """A reply as environments read it."""
        kinds = {name: {key: {"type": kind} for key, kind in found.items() if kind} for name, found in types.items()}
        tools = [{"function": {"name": name, "parameters": {"properties": found}}} for name, found in kinds.items()]
        try:
            parsed = self._tokenizer.parse_response(reply, prefix="", tools=tools)
            calls = [named_call(call) for call in parsed.get("tool_calls") or []]
        except (ValueError, TypeError, KeyError):
            before, answer = split_thought(reply)
            return f"{before}{OPEN}{answer.strip()}{CLOSE}"
        thought = next((parsed[key] for key in THOUGHT_KEYS if parsed.get(key) is not None), None)
        return said_text(thought, str(parsed.get("content") or ""), calls)


Reader = Layout | ResponseTemplate


def said_text(thought: str | None, content: str, calls: Sequence[Call], *, closed: bool = True) -> str:
    """A reply as environments read it, of its parts. `closed`: the thought has ended."""
    opened = "" if thought is None else f"{THINK}\n{thought}" + (f"\n{THOUGHT}\n\n" if closed else "")
    return opened + "\n".join([*([content] if content else []), *(call_text(*call) for call in calls)])


def call_text(name: str, arguments: Any) -> str:
    """A call as environments read it."""
    return OPEN + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + CLOSE


def split_thought(reply: str) -> tuple[str, str]:
    """A reply's thought with its tags, and the rest; a thought without an end is all of the reply."""
    before, closed, after = reply.rpartition(THOUGHT)
    if closed:
        return before + closed, after
    return (reply, "") if reply.lstrip().startswith(THINK) else ("", reply)


def parts_of(text: str) -> tuple[str | None, str, list[Call]]:
    """A canonical reply as a chat template takes it: thought, other text, calls. Calls that are broken stay text."""
    thought, answer = split_thought(text)
    calls: list[Call] = []

    def taken(match: re.Match[str]) -> str:
        try:
            calls.extend(_json_calls(match, {}))
        except (ValueError, RecursionError):
            return match.group()
        return ""

    content = HERMES.block.sub(taken, answer).strip()
    return (thought.partition(THINK)[2].removesuffix(THOUGHT).strip() if thought else None), content, calls


def types_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The JSON types that function schemas give their parameters."""
    functions = [tool.get("function", tool) for tool in tools]
    properties = {f["name"]: f.get("parameters", {}).get("properties", {}) for f in functions if "name" in f}
    return {name: {key: schema.get("type") for key, schema in found.items()} for name, found in properties.items()}


# Other marks of thoughts: Gemma 4, Cohere, Mistral, gpt-oss, Muse.
_OTHER_THOUGHT = re.compile(
    r"(?:<\|channel>thought\n|<\|START_THINKING\|>|\[THINK\]|<\|channel\|>analysis<\|message\|>|"
    r"\s*to=self<\|message\|>)"
    r"(?P<thought>.*?)(?P<end><channel\|>|<\|END_THINKING\|>|\[/THINK\]|<\|end\|>|<\|eom\|>|\Z)",
    re.DOTALL,
)


def _usual_thought(match: re.Match[str]) -> str:
    return f"{THINK}\n{match['thought']}" + (f"\n{THOUGHT}\n" if match["end"] else "")


def named_call(value: Any) -> Call:
    """A call that JSON describes, whatever its keys are called."""
    value = (
        value.get("function", value) if isinstance(value, dict) and isinstance(value.get("function"), dict) else value
    )
    if not isinstance(value, dict):
        raise ValueError("a call is a JSON object")
    name = value.get("name", value.get("tool_name"))
    arguments = value.get("arguments", value.get("parameters", {}))
    arguments = json.loads(arguments, strict=False) if isinstance(arguments, str) else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("a call has a name and arguments")
    return name, arguments


def _json_calls(match: re.Match[str], types: Types) -> list[Call]:
    """A JSON object, a list of them, or several one after the other."""
    text, position, calls = match["body"].strip(), 0, []
    decoder = json.JSONDecoder(strict=False)
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        calls += [named_call(item) for item in (value if isinstance(value, list) else [value])]
        while position < len(text) and text[position] in "; \n\t":
            position += 1
    return calls


def _named_json(match: re.Match[str], types: Types) -> list[Call]:
    """The name outside of the JSON object that holds the arguments."""
    return [named_call({"name": match["name"], "arguments": json.loads(match["body"].strip() or "{}", strict=False)})]


def _value(text: str, kind: Any) -> Any:
    """A bare value: text where the schema says so; where it says nothing, JSON only of objects and lists."""
    if kind == "string" or (kind is None and text.lstrip()[:1] not in ("{", "[")):
        return text
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def _tagged(call: str, parameter: str) -> Callable[[re.Match[str], Types], list[Call]]:
    """Reads calls whose arguments stand between tags, by patterns with groups name and body, key and value."""
    calls, parameters = re.compile(call, re.DOTALL), re.compile(parameter, re.DOTALL)

    def read(match: re.Match[str], types: Types) -> list[Call]:
        found = []
        for one in calls.finditer(match["body"]):
            kinds = types.get(one["name"], {})
            pairs = [(p["key"], p["value"]) for p in parameters.finditer(one["body"])]
            found.append((one["name"], {key: _value(value, kinds.get(key)) for key, value in pairs}))
        if not found:
            raise ValueError("no call between the tags")
        return found

    return read


def _python_calls(match: re.Match[str], types: Types) -> list[Call]:
    """[look(at="lamp"), wait()]"""
    body = match["body"].strip()
    try:
        tree = ast.parse(body, mode="eval").body
    except SyntaxError:  # strings with real line ends
        tree = ast.parse(body.replace("\n", "\\n"), mode="eval").body
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    if not all(isinstance(node, ast.Call) and not node.args for node in nodes):
        raise ValueError("calls have named arguments only")
    return [
        (ast.unparse(node.func), {str(k.arg): ast.literal_eval(k.value) for k in node.keywords})
        for node in nodes
        if isinstance(node, ast.Call)
    ]


_QUOTED = re.compile(r'<\|"\|>(.*?)<\|"\|>', re.DOTALL)
_BARE_KEY = re.compile(r"([{,]\s*)([A-Za-z_][\w.-]*)\s*:")


def _gemma_calls(match: re.Match[str], types: Types) -> list[Call]:
    """call:look{at:<|"|>lamp<|"|>,times:2}; strings without their quotes are read up to the next key."""
    name, body = match["name"], match["body"]
    pieces = _QUOTED.split("{" + body + "}")
    quoted = "".join(json.dumps(p) if i % 2 else _BARE_KEY.sub(r'\1"\2":', p) for i, p in enumerate(pieces))
    try:
        return [named_call({"name": name, "arguments": json.loads(quoted, strict=False)})]
    except ValueError:
        pairs = re.split(r"(?:^|,)\s*([A-Za-z_]\w*)\s*:", body)[1:]
        if len(pairs) < 2:
            raise
        kinds = types.get(name, {})
        return [
            (name, {key: _value(value, kinds.get(key)) for key, value in zip(pairs[::2], pairs[1::2], strict=True)})
        ]


def _layout(
    name: str,
    block: str,
    read: Callable[[re.Match[str], Types], list[Call]],
    *,
    noise: str = "",
    marks: Sequence[str] = (),
) -> Layout:
    return Layout(name, re.compile(block, re.DOTALL), read, re.compile(noise) if noise else None, tuple(marks))


HERMES = _layout("hermes", rf"{OPEN}(?P<body>.*?)(?:{CLOSE}|\Z)", _json_calls)
_FUNCTION = r"<function=(?P<name>[^>\s]+)>(?P<body>.*?)(?:</function>|\Z)"
_PARAMETER = r"<parameter=(?P<key>[^>\s]+)>\n?(?P<value>.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)"
_NAMED = r"\s*(?P<name>[^\s<{]+)(?P<body>.*)"
_ARGUMENT = r"<arg_key>\s*(?P<key>.*?)\s*</arg_key>\s*<arg_value>(?P<value>.*?)(?:</arg_value>|\Z)"
_INVOKE = r'<(?:\w+:)?invoke name="(?P<name>[^"]+)">(?P<body>.*?)(?:</(?:\w+:)?invoke>|\Z)'
_INVOKED = r'<(?:\w+:)?parameter name="(?P<key>[^"]+)"[^>]*>(?P<value>.*?)(?:</(?:\w+:)?parameter>|\Z)'
LAYOUTS = (
    HERMES,  # Qwen2.5, Qwen3, and every template that leaves the layout to the environment
    _layout(  # Qwen3-Coder, Qwen3.5, Nemotron 3
        "function tags",
        rf"(?:{OPEN}\s*)?(?P<body><function=.*?(?:</function>|\Z))(?:\s*{CLOSE})?",
        _tagged(_FUNCTION, _PARAMETER),
    ),
    _layout("argument tags", rf"{OPEN}(?P<body>\s*[^\s<{{].*?)(?:{CLOSE}|\Z)", _tagged(_NAMED, _ARGUMENT)),  # GLM
    _layout(  # Llama 3
        "bare JSON",
        r"(?:\A|<\|python_tag\|>)\s*(?P<body>\{\s*\"(?:type|name)\".*\})\s*\Z",
        _json_calls,
        marks=("<|python_tag|>",),
    ),
    _layout(  # Gemma 4
        "gemma",
        r"<\|tool_call>\s*call:(?P<name>[\w.-]+)\{(?P<body>.*?)\}(?:<tool_call\|>|\Z)",
        _gemma_calls,
        noise=r"<\|tool_response>",
        marks=("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"),
    ),
    _layout(  # gpt-oss
        "harmony",
        r"(?:<\|start\|>assistant)?\s*(?:<\|channel\|>(?:commentary|analysis)\s*)?to=(?:functions\.)?"
        r"(?P<name>[\w.-]+?)\s*(?:<\|channel\|>)?(?:commentary|analysis)?\s*(?:<\|constrain\|>)?\s*(?:json)?\s*"
        r"(?:<\|message\|>)?(?P<body>\{.*?)(?:<\|call\|>|(?=<\|start\|>)|\Z)",
        _named_json,
        noise=r"<\|start\|>assistant|<\|channel\|>(?:final|commentary)\s*(?:<\|constrain\|>\w+)?<\|message\|>|"
        r"<\|end\|>",
        marks=("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>"),
    ),
    _layout(  # MiniMax M2, Muse
        "invoke tags",
        r"<(?P<tag>\w+:(?:tool_call|function_calls))>(?P<body>.*?)(?:</(?P=tag)>|\Z)",
        _tagged(_INVOKE, _INVOKED),
        noise=r"(?:<\|start\|>assistant)?\s*to=[\w.-]+<\|message\|>",
        marks=("<|start|>", "<|message|>", "<|eom|>"),
    ),
    _layout(  # Kimi K2
        "kimi",
        r"<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[\w.-]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>"
        r"(?P<body>.*?)(?:<\|tool_call_end\|>|\Z)",
        _named_json,
        noise=r"<\|tool_calls_section_(?:begin|end)\|>",
        marks=[f"<|tool_{part}|>" for part in ("call_begin", "call_argument_begin", "call_end")],
    ),
    _layout(  # DeepSeek V3, R1, V3.1
        "deepseek",
        "<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[\\w.-]+)(?:<｜tool▁sep｜>|\\n)\\s*(?:```json\\s*)?"
        "(?P<body>.*?)(?:\\s*```)?\\s*(?:<｜tool▁call▁end｜>|\\Z)",
        _named_json,
        noise="<｜tool▁calls▁(?:begin|end)｜>",
        marks=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    ),
    _layout(  # LFM2
        "python list",
        r"<\|tool_call_start\|>(?P<body>.*?)(?:<\|tool_call_end\|>|\Z)",
        _python_calls,
        marks=("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    _layout(  # Mistral, the newer ones
        "named arguments",
        r"\[TOOL_CALLS\]\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\](?P<body>\{.*?\})(?=\s*(?:\[TOOL_CALLS\]|\Z))",
        _named_json,
        marks=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"),
    ),
    _layout(  # Mistral, Phi-4, Granite, Command R7B
        "JSON list",
        r"(?:\[TOOL_CALLS\]|<\|tool_call\|>|<\|START_ACTION\|>)(?P<body>.*?)"
        r"(?:<\|/tool_call\|>|<\|END_ACTION\|>|\Z)",
        _json_calls,
        noise=r"<\|(?:START|END)_(?:RESPONSE|TEXT)\|>",
        marks=("[TOOL_CALLS]", "<|tool_call|>", "<|/tool_call|>")
        + tuple(f"<|{side}_{kind}|>" for side in ("START", "END") for kind in ("ACTION", "THINKING")),
    ),
)
BY_NAME = {layout.name: layout for layout in LAYOUTS}
