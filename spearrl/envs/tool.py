"""Environments whose actions are calls of Python methods: you write the methods, the rest is derived from them.

Schemas come from type hints, arguments are checked, and the model is told of its mistakes.

    class Calculator(ToolEnvironment):
        def tasks(self, split):
            return [Task(f"{split}-{i}", split) for i in range(100)]

        def begin(self, task, draw):
            self.a, self.b = draw.randint(2, 9), draw.randint(2, 9)
            return f"What is {self.a} * {self.b}?"

        @tool
        def multiply(self, a: int, b: int) -> int:
            "Multiply two numbers."
            return a * b

        @tool
        def answer(self, value: int) -> Done:
            "Give the result; this ends the task."
            return Done(reward=10.0 * (value == self.a * self.b))
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from spearrl.envs.base import Environment
from spearrl.envs.signature import Signature, read_signature
from spearrl.envs.tool_calls import CLOSE, NO_CALL, OPEN, ToolCall, after_thought, read_calls
from spearrl.errors import ContractError, SpearError
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task

PYTHON_CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*\((.*)\)\s*", re.DOTALL)
KEYWORD = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*")
SEPARATOR = re.compile(r"\s*(,|$)")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True, frozen=True)
class Done:
    """What a tool (or `answer_text`) returns to end the episode.

    `success` None: the task is solved where the reward is above 0. `text` is shown as the last observation.
    """

    reward: float
    success: bool | None = None
    text: str = "done"


def tool(method: F) -> F:
    """Mark a method of a ToolEnvironment as callable by the model.

    Its docstring describes it to the model; every parameter needs a type hint.
    """
    method._is_tool = True  # type: ignore[attr-defined]
    return method


def call(name: str, arguments: Mapping[str, Any] | None = None) -> str:
    """The action text of a tool call; what an expert returns. Example: call("add", {"a": 1, "b": 2})."""
    return ToolCall(name, arguments or {}).text


class ToolEnvironment(Environment):
    """An environment made of methods marked @tool. You write `tasks`, `begin` and the tools.

    A tool's return value is shown to the model: text as it is, everything else as JSON. An Observation or an Outcome
    goes out untouched, and `Done` ends the episode. Whatever a tool raises, and every call that does not fit its
    signature, becomes an observation that begins with "error:". Several calls in one reply run in order.

    Raises:
        ContractError: no method is marked @tool, or one has a signature that cannot be called by name.
    """

    class Options(Environment.Options):
        """Inherit from this one in a subclass."""

        describe: Literal["prompt", "template", "none"] = Field(
            "prompt",
            description="How the model learns what the tools are: from the first message, from the chat template "
            "(models trained for it), or not at all.",
        )
        max_result_chars: int = Field(4000, ge=16, description="Characters of a tool's result that are shown.")

    options: Options
    _signatures: ClassVar[dict[str, Signature]] = {}
    _over: bool | None = None  # None: no episode has begun

    def __init__(self, **options: Any):
        super().__init__(**options)
        if not isinstance(self.options, ToolEnvironment.Options):
            complaint = "Options does not inherit from ToolEnvironment.Options"
            hint = "class Options(ToolEnvironment.Options)"
            raise ContractError(complaint, where=type(self).__name__, hint=hint)
        if "_signatures" not in vars(type(self)):
            type(self)._signatures = _signatures_of(type(self))

    def begin(self, task: Task, draw: random.Random) -> str | Observation:
        """Set up the episode and return what the model is asked. Draw all chance of the episode from `draw`."""
        raise NotImplementedError

    def answer_text(self, text: str) -> Any:
        """What a reply without a tool call leads to, as a tool would return it. Default: an error text."""
        return f"error: {NO_CALL}"

    def reset(self, task: Task, seed: int) -> Observation:
        self._over, self._errors = False, 0
        first = self.begin(task, random.Random(derive(seed, "episode")))
        return first if isinstance(first, Observation) else Observation(first)

    def step(self, action: Action) -> Outcome:
        if self._over is None:
            raise ContractError("step() before reset()", where=type(self).__name__, hint="call reset(task, seed) first")
        if self._over:
            return Outcome(Observation("the episode is over"), 0.0, True, info={"success": False})
        calls = read_calls(action.text)
        if not calls:
            return self._outcome([self._guarded(partial(self.answer_text, action.text))])
        results: list[Any] = []
        ran = 0
        for tool_call in calls:
            arguments = f"error: {tool_call}" if isinstance(tool_call, str) else self._arguments(tool_call)
            if isinstance(tool_call, str) or isinstance(arguments, str):
                results.append(arguments)
                continue
            ran += 1
            result = self._guarded(partial(getattr(self, tool_call.name), **arguments))
            results.append(result)
            if isinstance(result, Done) or (isinstance(result, Outcome) and (result.terminated or result.truncated)):
                break
        return replace(self._outcome(results), tool_calls=ran)

    def parse(self, reply: Reply) -> Action:
        """Every <tool_call>{"name": …, "arguments": {…}}</tool_call> after the thought; text around them is left out.

        `tool_calls` counts calls of tools that exist, with arguments that fit. A broken call is reported by `step`
        beside what the others returned. An action is invalid where no call can be read, unless there is none at all
        and the environment writes its own `answer_text`.
        """
        text = after_thought(reply.text).strip()
        calls = read_calls(text)
        whole = [tool_call for tool_call in calls if isinstance(tool_call, ToolCall)]
        if whole:
            text = "\n".join(tool_call.text for tool_call in whole) if len(whole) == len(calls) else text
            fitting = sum(isinstance(self._arguments(tool_call), dict) for tool_call in whole)
            return Action(text, valid=True, tool_calls=fitting)
        takes_text = not calls and type(self).answer_text is not ToolEnvironment.answer_text
        return Action(text if calls else reply.text.strip(), valid=takes_text and bool(reply.text.strip()))

    def format(self, text: str) -> str:
        """The reply that `parse` turns into `text`. `add(a=1, b=2)`, as people write it, becomes a call too."""
        match = PYTHON_CALL.fullmatch(text)
        if match is None or match[1] not in self._signatures:
            return text
        arguments = _python_arguments(match[2])
        return text if arguments is None else call(match[1], arguments)

    def messages(self, observation: Observation, turn: int) -> list[Message]:
        """Turn 0: what the tools are (describe="prompt") and the question; later turns: what came back."""
        if turn == 0 and self.options.describe == "prompt":
            observation = Observation(f"{self.instructions()}\n\n{observation.text}", images=observation.images)
        messages = super().messages(observation, turn)
        if turn > 0 and self.options.describe == "template":
            return [Message("tool", messages[0].content)]
        return messages

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

    def _arguments(self, tool_call: ToolCall) -> dict[str, Any] | str:
        """What a tool is called with; a text says why it cannot be called."""
        name, signature = tool_call.name, self._signatures.get(tool_call.name)
        if signature is None:
            return f"error: there is no tool {name[:80]!r}; the tools are {', '.join(self._signatures)}"
        try:
            return signature.arguments(tool_call.arguments)
        except RecursionError as error:
            return f"error: RecursionError: {error}"
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, item['loc'])) or 'arguments'}: {item['msg']}"
                for item in error.errors(include_url=False, include_input=False)[:4]
            ]
            return f"error: {name}: {'; '.join(problems)}; it is {signature.line(name)}"

    def _guarded(self, function: Callable[[], Any]) -> Any:
        """What a tool returned, as text unless it is a record; what it raised, as an error text."""
        try:
            result = function()
            if isinstance(result, Done | Observation | Outcome | str):
                return result
            if isinstance(result, BaseModel):
                return result.model_dump_json()
            return json.dumps(result, ensure_ascii=False, default=str)
        except SpearError:  # the environment's own contract, not the model's mistake
            raise
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"

    def _outcome(self, results: Sequence[Any]) -> Outcome:
        """The outcome of a reply, from what its calls returned; the last one decides what kind it is."""
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
        shown = [getattr(result, "observation", result) for result in results]
        texts = [part if isinstance(part, str) else part.text for part in shown]
        text = "\n".join(map(self._cut, texts))
        observation = replace(last, text=text) if isinstance(last, Observation) else Observation(text)
        return Outcome(observation, 0.0, False, info=info)

    def _cut(self, text: str) -> str:
        most = self.options.max_result_chars
        plain = text.encode(errors="replace").decode()
        return plain if len(plain) <= most else f"{plain[:most]}… ({len(plain) - most} more characters)"


def _signatures_of(cls: type[ToolEnvironment]) -> dict[str, Signature]:
    """The tools of a class, in the order they are written; those of base classes first."""
    members = [item for base in reversed(cls.__mro__) for item in vars(base).items()]
    names = dict.fromkeys(name for name, value in members if getattr(value, "_is_tool", False))
    if not names and cls.answer_text is ToolEnvironment.answer_text:
        hint = "put @tool above the methods that the model may call"
        raise ContractError("no method is marked @tool", where=cls.__name__, hint=hint)
    return {name: read_signature(getattr(cls, name), f"{cls.__name__}.{name}") for name in names}


def _python_arguments(text: str) -> dict[str, Any] | None:
    """`a=1, b="x"` as a dict, each value JSON; None where it is something else."""
    arguments: dict[str, Any] = {}
    decoder, position = json.JSONDecoder(), 0
    while position < len(text.rstrip()):
        match = KEYWORD.match(text, position)
        if match is None:
            return None
        try:
            arguments[match[1]], position = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            return None
        separator = SEPARATOR.match(text, position)
        if separator is None:
            return None
        position = separator.end()
    return arguments
