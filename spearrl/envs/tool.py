"""Environments whose actions are calls of Python methods: schemas from type hints, arguments checked, mistakes told to the model.

class Calculator(ToolEnvironment):
    def begin(self, task, draw): return "what is 12 * 30?"

    @tool
    def multiply(self, a: int, b: int) -> int:
        "Multiply two numbers."
        return a * b

    @tool
    def answer(self, value: int) -> Done:
        "Give the result and end."
        return Done(reward=10.0 * (value == 360))
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from spearrl.envs.base import Environment
from spearrl.envs.signature import Signature, read_signature
from spearrl.errors import ContractError, SpearError
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
SHORT = re.compile(r"\s*([A-Za-z_]\w*)\s*\((.*)\)\s*", re.DOTALL)
NO_CALL = f'no tool was called; reply with {OPEN}{{"name": …, "arguments": {{…}}}}{CLOSE}'
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True, frozen=True)
class Done:
    """What a tool (or `answer_text`) returns to end the episode. `success` none: the reward is above 0."""

    reward: float
    success: bool | None = None
    text: str = "done"


@dataclass(slots=True, frozen=True)
class _Call:
    name: str
    arguments: Mapping[str, Any]


def tool(method: F) -> F:
    """Mark a method of a ToolEnvironment as callable by the model. Its docstring describes it; every parameter needs a type hint."""
    method._is_tool = True  # type: ignore[attr-defined]
    return method


def call(name: str, arguments: Mapping[str, Any] | None = None) -> str:
    """The action text of a tool call; what an expert returns. Example: call("add", {"a": 1, "b": 2})."""
    return _text(_Call(name, arguments or {}))


class ToolEnvironment(Environment):
    """An environment made of methods marked @tool. A user writes `tasks`, `begin` and the tools.

    A tool's return value is shown to the model: text as it is, everything else as JSON; an Observation or an Outcome goes out untouched, `Done`
    ends the episode. Whatever a tool raises, and every call that does not fit its signature, becomes an observation beginning with "error:".
    Several calls in one reply run in order.
    """

    class Options(Environment.Options):
        """Inherit from this one in a subclass."""

        describe: Literal["prompt", "template", "none"] = Field(
            "prompt",
            description="How the model learns what the tools are: from the first message, from the chat template (models trained for it), or not at all.",
        )
        max_result_chars: int = Field(4000, ge=16, description="Characters of a tool's result that are shown.")

    options: Options
    _signatures: ClassVar[dict[str, Signature]] = {}
    _over: bool | None = None  # none: no episode yet

    def __init__(self, **options: Any):
        super().__init__(**options)
        if not isinstance(self.options, ToolEnvironment.Options):
            raise ContractError(
                "Options does not inherit from ToolEnvironment.Options",
                where=type(self).__name__,
                hint="class Options(ToolEnvironment.Options)",
            )
        if "_signatures" not in vars(type(self)):
            type(self)._signatures = _signatures(type(self))

    def begin(self, task: Task, draw: random.Random) -> str | Observation:
        """Set up the episode and return what the model is asked. All randomness of the episode comes from `draw`."""
        raise NotImplementedError

    def answer_text(self, text: str) -> Any:
        """What a reply without a tool call leads to, as a tool's return value; default: the model is told to call one."""
        return f"error: {NO_CALL}"

    def reset(self, task: Task, seed: int) -> Observation:
        self._over, self._errors = False, 0
        shown = self.begin(task, random.Random(derive(seed, "episode")))
        return shown if isinstance(shown, Observation) else Observation(shown)

    def step(self, action: Action) -> Outcome:
        if self._over is None:
            raise ContractError("step() before reset()", where=type(self).__name__, hint="call reset(task, seed) first")
        if self._over:
            return Outcome(Observation("the episode is over"), 0.0, True, info={"success": False})
        calls, problem = read_calls(action.text)
        if calls is None:
            return self._outcome(
                [f"error: {problem}" if problem else self._guarded(lambda: self.answer_text(action.text))]
            )
        results: list[Any] = []
        for item in calls:
            results.append(self._guarded(lambda item=item: self._run(item)))  # type: ignore[misc]
            if isinstance(results[-1], Done) or (
                isinstance(results[-1], Outcome) and (results[-1].terminated or results[-1].truncated)
            ):
                break
        return self._outcome(results)

    def parse(self, reply: Reply) -> Action:
        """Hermes style: every <tool_call>{"name": …, "arguments": {…}}</tool_call> in the reply; text around them is left out.

        `tool_calls` counts calls of tools that exist, with arguments that fit. A broken call, or no call where the environment has no
        `answer_text`, is invalid.
        """
        calls, problem = read_calls(reply.text)
        if calls is None:
            answers = type(self).answer_text is not ToolEnvironment.answer_text
            return Action(reply.text.strip(), valid=not problem and answers and bool(reply.text.strip()))
        text = "\n".join(_text(item) for item in calls)
        return Action(text, valid=True, tool_calls=sum(self._fits(item) for item in calls))

    def format(self, text: str) -> str:
        """The reply that `parse` turns into `text`. `add(a=1, b=2)`, as people write it, becomes a call too."""
        match = SHORT.fullmatch(text)
        if match is None or match[1] not in self._signatures:
            return text
        arguments = _short_arguments(match[2])
        return text if arguments is None else _text(_Call(match[1], arguments))

    def messages(self, observation: Observation, turn: int) -> list[Message]:
        """Turn 0: what the tools are (describe="prompt") and the question; later turns: what came back."""
        if turn > 0:
            role = "tool" if self.options.describe == "template" else "user"
            return [Message(role, super().messages(observation, turn)[0].content)]
        if self.options.describe != "prompt":
            return super().messages(observation, turn)
        return super().messages(
            Observation(f"{self.instructions()}\n\n{observation.text}", images=observation.images), turn
        )

    def instructions(self) -> str:
        """What the tools are and how to call them, in words."""
        lines = [signature.line(name) for name, signature in self._signatures.items()]
        example = OPEN + '{"name": "…", "arguments": {…}}' + CLOSE
        return "\n".join(["Tools:", *lines, f"Call one with {example}"])

    def tools(self) -> list[dict[str, Any]]:
        """Function schemas; empty unless the chat template is to show them (describe="template")."""
        return self.schemas() if self.options.describe == "template" else []

    def schemas(self) -> list[dict[str, Any]]:
        """Every tool as an OpenAI-style function schema."""
        return [signature.schema(name) for name, signature in self._signatures.items()]

    def _fits(self, item: _Call) -> bool:
        if item.name not in self._signatures:
            return False
        try:
            self._signatures[item.name].arguments(item.arguments)
        except (ValidationError, RecursionError):
            return False
        return True

    def _run(self, item: _Call) -> Any:
        signature = self._signatures.get(item.name)
        if signature is None:
            return f"error: there is no tool {item.name[:80]!r}; the tools are {', '.join(self._signatures)}"
        try:
            arguments = signature.arguments(item.arguments)
        except ValidationError as error:
            return f"error: {item.name}: {_complaints(error)}; it is {signature.line(item.name)}"
        return getattr(self, item.name)(**arguments)

    def _guarded(self, function: Callable[[], Any]) -> Any:
        try:
            result = function()
            return result if isinstance(result, Done | Observation | Outcome | str) else _as_text(result)
        except SpearError:  # the environment's own contract, not the model's mistake
            raise
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"

    def _outcome(self, results: Sequence[Any]) -> Outcome:
        last = results[-1]
        self._errors += sum(isinstance(result, str) and result.startswith("error:") for result in results)
        if isinstance(last, Outcome):
            self._over = last.terminated or last.truncated
            return last
        info: dict[str, Any] = {"success": False, "tool_errors": self._errors}
        if isinstance(last, Done):
            self._over = True
            info["success"] = last.reward > 0 if last.success is None else last.success
            return Outcome(Observation(self._cut(last.text)), float(last.reward), True, info=info)
        shown = [
            result.text if isinstance(result, Observation | Done) else str(getattr(result, "observation", result))
            for result in results
        ]
        text = "\n".join(self._cut(part) for part in shown)
        if isinstance(last, Observation):
            return Outcome(replace(last, text=text), 0.0, False, info=info)
        return Outcome(Observation(text), 0.0, False, info=info)

    def _cut(self, text: str) -> str:
        most = self.options.max_result_chars
        plain = text.encode(errors="replace").decode()
        return plain if len(plain) <= most else f"{plain[:most]}… ({len(plain) - most} more characters)"


def _signatures(cls: type[ToolEnvironment]) -> dict[str, Signature]:
    """The tools of a class, in the order they are written; those of base classes first."""
    names = dict.fromkeys(
        name
        for base in reversed(cls.__mro__)
        for name, value in vars(base).items()
        if getattr(value, "_is_tool", False)
    )
    found = {name: read_signature(getattr(cls, name), f"{cls.__name__}.{name}") for name in names}
    if not found and cls.answer_text is ToolEnvironment.answer_text:
        raise ContractError(
            "no method is marked @tool", where=cls.__name__, hint="put @tool above the methods that the model may call"
        )
    return found


def read_calls(text: str) -> tuple[list[_Call] | None, str]:
    """The calls in a text, and what is wrong: no calls and no problem where there is no tag."""
    calls: list[_Call] = []
    rest = text
    while OPEN in rest:
        body, closed, rest = rest.partition(OPEN)[2].partition(CLOSE)
        found = _read_one(body)
        if isinstance(found, str):
            return None, found if closed else f"{found}; {CLOSE} is missing"
        calls.append(found)
    return (calls, "") if calls else (None, "")


def _read_one(body: str) -> _Call | str:
    """One call, or what is wrong with it."""
    try:
        value = json.loads(body)
        json.dumps(value)  # what is nested too deeply to be written again
    except (ValueError, RecursionError) as error:
        return f"the tool call is not JSON: {error}"
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not NAME.fullmatch(value["name"]):
        return 'a tool call is {"name": "…", "arguments": {…}}'
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return f"the arguments of {value['name']} must be a JSON object"
    return _Call(value["name"], arguments)


def _text(item: _Call) -> str:
    return OPEN + json.dumps({"name": item.name, "arguments": item.arguments}, ensure_ascii=False) + CLOSE


def _short_arguments(text: str) -> dict[str, Any] | None:
    """`a=1, b="x"` as a dict, each value JSON; None where it is something else."""
    found: dict[str, Any] = {}
    decoder, position = json.JSONDecoder(), 0
    while position < len(text.rstrip()):
        match = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*").match(text, position)
        if match is None:
            return None
        try:
            found[match[1]], position = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            return None
        rest = re.compile(r"\s*(,|$)").match(text, position)
        if rest is None:
            return None
        position = rest.end()
    return found


def _complaints(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'arguments'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False)[:4]
    )


def _as_text(value: Any) -> str:
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    return json.dumps(value, ensure_ascii=False, default=str)
