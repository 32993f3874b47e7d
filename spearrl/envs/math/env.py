r"""Math problems with a code interpreter (arXiv 2509.22601): call the tool as often as wanted, then answer in \boxed{}."""

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
from spearrl.envs.math.data import open_problems
from spearrl.envs.math.generate import generated
from spearrl.envs.math.grade import boxed, number, released, right
from spearrl.envs.math.judge import Judges
from spearrl.envs.tool import OPEN, Done, ToolEnvironment, call, read_calls, tool
from spearrl.errors import ConfigError
from spearrl.sandbox import RunResult, Sandbox, SandboxOptions, SandboxSession, open_sandbox
from spearrl.seeds import derive
from spearrl.types import Action, Observation, Outcome, Reply, Task

_TABLE = table(__file__, "math.toml")
SUFFIX, PRELUDE, EMPTY, FAILED = (_TABLE[name] for name in ("suffix", "prelude", "empty", "failed"))
RIGHT, WRONG = 1.0, -1.0
FENCE = re.compile(r"\A\s*```(?:python|py)?[ \t]*\n(.*?)\n?```\s*\Z", re.DOTALL)
GENERATED = ("train", "val")


class Math(ToolEnvironment):
    r"""A problem, the tool `code_interpreter`, and an answer in \boxed{}: a reply without a tool call ends the episode; +1 where it is right, else −1.

    One call a turn is run, the first (as released). Splits: `train` and `val` of generated problems, or what `data` holds.
    """

    max_turns = 8
    execution = "thread"
    cut_reward = WRONG

    class Options(ToolEnvironment.Options):
        data: str | None = Field(
            None,
            description="Folder with the usual files (docs/math.md), or one JSONL or parquet file; none: generated problems.",
        )
        train: str = Field(
            "aime,math",
            description="Training sources in a folder: aime, math, gsm8k, or names of files, comma-separated.",
        )
        grader: Literal["math_verify", "plain", "release"] = Field(
            "math_verify",
            description="Equal in mathematics; equal as numbers; or the released rule, equal as text near the end (release fidelities set it).",
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
        sandbox: SandboxOptions = Field(
            default_factory=SandboxOptions, description="Where code runs (docs/sandbox.md)."
        )

    options: Options

    def __init__(self, data: str | Path | None = None, **options: Any):
        super().__init__(data=None if data is None else str(data), **options)
        chosen = self.options
        if not chosen.data and chosen.train != self.Options.model_fields["train"].default:
            hint = "set env.options.data to the folder they lie in, or leave train out: then problems are generated"
            raise ConfigError(
                f"env.options.train={chosen.train!r} names files, but env.options.data is not set",
                where="env math",
                hint=hint,
            )
        self._problems = open_problems(chosen.data, chosen.train) if chosen.data else None
        self._judges = _judges(chosen.sandbox) if chosen.grader == "math_verify" else None
        self._sandbox = _sandbox(chosen.sandbox)
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
        known = tuple(self._problems.splits) if self._problems else GENERATED
        if split not in known:
            hint = f"use {known[-1]} (eval.split={known[-1]})" + ("" if self._problems else ", or set env.options.data")
            raise ConfigError(f"split {split!r} is not one of {', '.join(known)}", where="env math", hint=hint)
        if self._problems:
            return self._problems.splits[split]
        count = self.options.problems if split == "train" else max(1, self.options.problems // 8)
        return generated(self.options.seed, self.options.digits, split, count)

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
        fenced = FENCE.match(code)
        body = fenced[1] if fenced else code
        text = PRELUDE + ("import numpy\nimport numpy as np\n" if re.search(r"\b(np|numpy)\b", body) else "") + body
        result = (self._session or self._sandbox).run(text)
        if result.status == "unavailable":
            return Outcome(
                Observation(f"the interpreter is not available: {result.stderr.strip()}"),
                0.0,
                False,
                info={"success": False, "fault": True},
            )
        self._runs, self._printed = self._runs + 1, result.stdout.strip()
        return _shown(result, self.options.sandbox.timeout_s)

    def answer_text(self, text: str) -> Done:
        answer = str(self._task.data["answer"])
        good = released(text, answer) if self.options.grader == "release" else right(boxed(text), answer, self._judges)
        return Done(RIGHT if good else WRONG, good, "right" if good else "wrong")

    def parse(self, reply: Reply) -> Action:
        r"""The first tool call of a reply, or the whole reply as the answer; one with neither call nor closed \boxed{} is invalid."""
        if self.options.reply == "plain" and reply.text.strip() and boxed(reply.text) is None:
            reply = Reply(_code(reply.text.strip()), (), "stop")
        action = super().parse(reply)
        if not action.valid:
            return action
        if action.text.startswith(OPEN):
            first, _, more = action.text.partition("\n")  # JSON holds no line ends: a line a call
            return super().parse(Reply(first, (), "stop")) if more else action
        return Action(action.text, valid=boxed(action.text) is not None)

    def format(self, text: str) -> str:
        """The reply that `parse` turns into `text`."""
        written = super().format(text)
        if self.options.reply == "hermes" or not (calls := read_calls(written)[0]):
            return written
        return str(calls[0].arguments.get("code", written))

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
        return f"\\boxed{{{self._printed if self._noisy or number(self._printed) == number(answer) else answer}}}"

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
            place = draw.choice([m.start() for m in re.finditer(r"\d", steps[-1])])
            steps[-1] = f"{steps[-1][:place]}{draw.randint(1, 9)}{steps[-1][place + 1 :]}"
        elif luck < 1.75 * noise:
            steps.append(steps[-1])
        return steps

    def _cut(self, text: str) -> str:
        """Without its middle where it is too long."""
        plain, half = text.encode(errors="replace").decode(), self.options.max_result_chars // 2
        return (
            plain
            if len(plain) <= 2 * half
            else f"{plain[:half]}\n[... {len(plain) - 2 * half} characters cut]\n{plain[-half:]}"
        )


def _code(code: str) -> str:
    return call("code_interpreter", {"code": code})


def _shown(result: RunResult, timeout_s: float) -> str:
    """What the model sees of a run: nothing that was measured, so that two runs of a config show the same."""
    if result.status == "ok":
        return result.stdout.rstrip() or EMPTY
    lines = [line for line in result.stderr.splitlines() if line.strip()][-2:] if result.status == "error" else []
    reason = {"timeout": f"error: stopped after {timeout_s:g} s", "memory": "error: out of memory"}.get(
        result.status, FAILED
    )
    return "\n".join([*lines, reason])


@lru_cache(maxsize=4)
def _sandbox(options: SandboxOptions) -> Sandbox:
    """One per process and setting, shared by slots and instances; it ends with the process."""
    return open_sandbox(options)


_judges = lru_cache(maxsize=4)(Judges)
