r"""Math problems with a code interpreter (arXiv 2509.22601): call the tool, or answer in \boxed{}."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from spearrl.config.tables import table
from spearrl.envs.base import check_split
from spearrl.envs.math.answers import boxed, number
from spearrl.envs.math.data import open_problems
from spearrl.envs.math.generate import generate_problems
from spearrl.envs.math.grade import is_right, is_right_as_released
from spearrl.envs.math.judge import Judges
from spearrl.envs.tool import Done, ToolEnvironment, call, tool
from spearrl.envs.tool_calls import ToolCall, after_thought, read_calls
from spearrl.errors import ConfigError
from spearrl.sandbox import RunResult, SandboxOptions, SandboxSession, open_sandbox
from spearrl.seeds import derive
from spearrl.types import Action, Observation, Outcome, Reply, Task

_TABLE = table(__file__, "math.toml")
SUFFIX, PRELUDE, EMPTY, FAILED = (_TABLE[name] for name in ("suffix", "prelude", "empty", "failed"))
RIGHT, WRONG = 1.0, -1.0
# Code between fences that begin a line: ```python, ~~~, or all of it on one line.
FENCE = re.compile(
    r"^[ \t]*(?:```|~~~)[ \t]*(?:(?i:python3?|py)\b)?[ \t]*\n?(.*?)\n?[ \t]*(?:```|~~~)[ \t]*$", re.S | re.M
)
GENERATED = ("train", "val")


class Math(ToolEnvironment):
    r"""A problem, the tool `code_interpreter`, and an answer in \boxed{}: +1 where it is right, else −1.

    A reply without a tool call ends the episode. One call a turn is run, the first (as released). Splits: `train` and
    `val` of generated problems, or what `data` holds.
    """

    max_turns = 8
    execution = "thread"
    cut_reward = WRONG

    class Options(ToolEnvironment.Options):
        data: str | None = Field(
            None, description="Folder with the usual files (docs/math.md), or a JSONL or parquet file; none: generated."
        )
        train: str = Field(
            "aime,math", description="Training sources in a folder: aime, math, gsm8k, or names of files, with commas."
        )
        grader: Literal["math_verify", "plain", "release"] = Field(
            "math_verify",
            description="Equal in mathematics; equal as numbers; or the released rule: equal as text near the end.",
        )
        seed: int = Field(0, ge=0, description="Fixes the generated problems.")
        digits: int = Field(3, ge=2, le=12, description="Digits of the numbers in generated problems.")
        problems: int = Field(4000, ge=1, description="Generated training problems; an eighth as many are for val.")
        describe: Literal["prompt", "template", "none"] = Field(
            "template", description="How the model learns of the tool; none also leaves out how to answer."
        )
        reply: Literal["hermes", "plain"] = Field(
            "hermes", description="A tool call as hermes writes it; plain: code as it is, for tiny models."
        )
        max_result_chars: int = Field(
            16384, ge=16, description="Characters of a result that are shown; a longer one loses its middle."
        )
        sandbox: SandboxOptions = Field(SandboxOptions(), description="Where code runs (docs/sandbox.md).")

    options: Options

    def __init__(self, data: str | Path | None = None, **options: Any):
        super().__init__(data=None if data is None else str(data), **options)
        settings = self.options
        if not settings.data and settings.train != self.Options.model_fields["train"].default:
            reason = f"env.options.train={settings.train!r} names files, but env.options.data is not set"
            hint = "set env.options.data to the folder they lie in, or leave train out: then problems are generated"
            raise ConfigError(reason, where="env math", hint=hint)
        self._problems = open_problems(settings.data, settings.train) if settings.data else None
        self._judges = _judges(settings.sandbox) if settings.grader == "math_verify" else None
        self._sandbox = _sandbox(settings.sandbox)
        self.threads = self._sandbox.concurrency  # what waits for its turn does so before its step's deadline begins
        self._session: SandboxSession | None = None

    def spawn(self) -> Math:
        """A slot that shares problems, sandbox and judges."""
        slot = copy.copy(self)
        slot._session, slot._over = None, None
        return slot

    def close(self) -> None:
        """End the slot's interpreter session; the sandbox is shared by all slots of the process and ends with it."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def tasks(self, split: str) -> Sequence[Task]:
        """Problems of a split. Raises ConfigError for an unknown one."""
        splits = tuple(self._problems or GENERATED)
        hint = f"use {splits[-1]} (eval.split={splits[-1]})" + ("" if self._problems else ", or set env.options.data")
        check_split(split, splits, "env math", hint)
        if self._problems:
            return self._problems[split]
        count = self.options.problems if split == "train" else max(1, self.options.problems // 8)
        return generate_problems(self.options.seed, self.options.digits, split, count)

    def begin(self, task: Task, draw: random.Random) -> str:
        self.close()
        if self.options.sandbox.session:
            self._session = self._sandbox.session()
        self._plan: list[str] | None = None
        self._task, self._seed, self._runs, self._printed = task, draw.getrandbits(63), 0, ""
        return str(task.data["problem"]) + (SUFFIX if self.options.describe != "none" else "")

    @tool
    def code_interpreter(self, code: str) -> Any:
        """Run Python code. Only what it prints comes back.

        Args:
            code: the code to run; print() what you want to see
        """
        body = "\n".join(FENCE.findall(code.replace("\r\n", "\n"))) or code
        text = PRELUDE + ("import numpy\nimport numpy as np\n" if re.search(r"\b(np|numpy)\b", body) else "") + body
        result = (self._session or self._sandbox).run(text)
        if result.status == "unavailable":
            text = f"the interpreter is not available: {result.stderr.strip()}"
            return Outcome(Observation(text), 0.0, False, info={"success": False, "fault": True})
        self._runs, self._printed = self._runs + 1, result.stdout.strip()
        return _shown(result, self.options.sandbox.timeout_s)

    def answer_text(self, text: str) -> Done:
        answer = str(self._task.data["answer"])
        if self.options.grader == "release":
            correct = is_right_as_released(text, answer)
        else:  # a box in the thought counts where there is none after it
            box = boxed(after_thought(text))
            correct = is_right(boxed(text) if box is None else box, answer, self._judges)
        return Done(RIGHT if correct else WRONG, correct, "right" if correct else "wrong")

    def parse(self, reply: Reply) -> Action:
        r"""The first tool call of a reply, or the whole reply as the answer; invalid without call and \boxed{}."""
        if self.options.reply == "plain" and reply.text.strip() and boxed(reply.text) is None:
            reply = Reply(_code(reply.text.strip()), (), "stop")
        action = super().parse(reply)
        calls = read_calls(action.text)
        first = next((tool_call for tool_call in calls if isinstance(tool_call, ToolCall)), None)
        if first is not None and len(calls) > 1:
            return super().parse(Reply(first.text, (), "stop"))
        return action if calls else Action(action.text, valid=boxed(action.text) is not None)

    def format(self, text: str) -> str:
        """The reply that `parse` turns into `text`."""
        written = super().format(text)
        calls = read_calls(written) if self.options.reply == "plain" else []
        return str(calls[0].arguments.get("code", written)) if calls and isinstance(calls[0], ToolCall) else written

    def expert(self) -> str | None:
        """Runs the problem's steps and boxes what the last one printed.

        With noise n it guesses with chance n, miscopies a digit with n/4 and runs the last step twice with n/2.
        """
        if "steps" not in self._task.data:
            return None
        if self._plan is None:
            self._plan = self._make_plan(list(self._task.data["steps"]))
        if self._runs < len(self._plan):
            step = self._plan[self._runs]
            return step if boxed(step) else _code(step)
        answer = str(self._task.data["answer"])
        trusts = self._noisy or number(self._printed) == number(answer)
        return f"\\boxed{{{self._printed if trusts else answer}}}"

    def _make_plan(self, steps: list[str]) -> list[str]:
        draw, noise = random.Random(derive(self._seed, "expert")), self.expert_noise
        luck = draw.random()
        self._noisy = luck < 1.25 * noise
        if luck < noise:
            length = len(str(self._task.data["answer"]))
            return [f"\\boxed{{{draw.randint(10 ** (length - 1), 10**length - 1)}}}"]
        if not steps:  # a solution without calculations
            self._noisy = False
        elif self._noisy:
            position = draw.choice([m.start() for m in re.finditer(r"\d", steps[-1])])
            steps[-1] = f"{steps[-1][:position]}{draw.randint(1, 9)}{steps[-1][position + 1 :]}"
        elif luck < 1.75 * noise:
            steps.append(steps[-1])
        return steps

    def _cut(self, text: str) -> str:
        """Without its middle where it is too long."""
        plain, half = text.encode(errors="replace").decode(), self.options.max_result_chars // 2
        extra = len(plain) - 2 * half
        return plain if extra <= 0 else f"{plain[:half]}\n[... {extra} characters cut]\n{plain[-half:]}"


def _code(code: str) -> str:
    return call("code_interpreter", {"code": code})


def _shown(result: RunResult, timeout_s: float) -> str:
    """What the model sees of a run: nothing that was measured, so that two runs of a config show the same."""
    if result.status == "ok":
        return result.stdout.rstrip() or EMPTY
    lines = [line for line in result.stderr.splitlines() if line.strip()][-2:] if result.status == "error" else []
    reasons = {"timeout": f"error: stopped after {timeout_s:g} s", "memory": "error: out of memory"}
    return "\n".join([*lines, reasons.get(result.status, FAILED)])


# one per process and setting, shared by slots and instances; they end with the process
_sandbox, _judges = lru_cache(maxsize=4)(open_sandbox), lru_cache(maxsize=4)(Judges)
