"""math-verify inside a sandbox: what a model wrote reaches sympy there only, under a deadline.

An interpreter that overruns it is killed and replaced.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue

from spearrl.errors import ConfigError, EnvironmentFault
from spearrl.sandbox import RunResult, Sandbox, SandboxOptions, SandboxSession, open_sandbox

COUNT = 2  # judges at a time
DEADLINE_S = 5.0  # for one answer
MOST = 256  # answers of one interpreter: its memory grows and its processor time is limited
WARM_S = 60.0  # for what an interpreter loads with its first judgement
MEMORY_MIB = 1024
PROGRAM = Path(__file__).with_name("verify.py").read_text(encoding="utf-8")  # runs in the sandbox


class Judges:
    """A few interpreters that keep math-verify loaded, shared by all slots. Thread-safe.

    Args:
        options: of the environment's sandbox. Where that is a remote server, which has no math-verify, judges are in a
            jail here if there can be one, else they have its limits only, with a warning.
    Raises:
        ConfigError: math-verify is not installed, or the sandbox cannot be had.
    """

    def __init__(self, options: SandboxOptions, deadline_s: float = DEADLINE_S):
        if find_spec("math_verify") is None:
            hint = "pip install 'spearrl[envs]', or env.options.grader=plain, which compares numbers"
            reason = "this grader needs math-verify, which is not installed"
            raise ConfigError(reason, where="env.options.grader", hint=hint)
        limits = {"concurrency": COUNT, "timeout_s": deadline_s, "memory_mib": MEMORY_MIB}
        self._sandbox = _open_local(options.model_copy(update={"packages": ("math-verify",), **limits}))
        # a session (none: yet to be started), and how many answers it has judged
        self._free: SimpleQueue[tuple[SandboxSession | None, int]] = SimpleQueue()
        for _ in range(COUNT):
            self._free.put((None, 0))

    def equal(self, prediction: str, answer: str) -> bool:
        """Whether two answers are the same in mathematics. False where they cannot be compared within the deadline.

        A judge that was late or died is asked once more, in a fresh interpreter that has just compared two numbers in
        time: where it fails again, the answer is to blame and not the machine.

        Raises:
            EnvironmentFault: there is no judge to be had.
        """
        result = self._judge(prediction, answer)
        if result.status not in ("ok", "error", "unavailable"):
            result = self._judge(prediction, answer, fresh=True)
        if result.status == "unavailable":
            reason = f"answers cannot be graded: {result.stderr.strip()}"
            raise EnvironmentFault(reason, where="env math", hint="spearrl doctor says what is in force")
        return result.status == "ok" and result.stdout.split()[-1:] == ["True"]

    def _judge(self, prediction: str, answer: str, *, fresh: bool = False) -> RunResult:
        session, judged = self._free.get()
        try:
            if fresh and session is not None:
                session.close()
                session = None
            if session is None:
                session, judged = self._sandbox.session(), 0
                ready = session.run(_program(r"\frac{1}{2}", "0.5"), timeout_s=WARM_S)
                if ready.status != "ok":
                    session.close()
                    session = None
                    return replace(ready, status="unavailable", stderr=f"a judge did not start: {ready.status}")
            result = session.run(_program(prediction, answer))
            if result.status not in ("ok", "error") or judged + 1 == MOST:
                session.close()
                session, judged = None, -1
            return result
        finally:
            self._free.put((session, judged + 1))

    def close(self) -> None:
        """End the interpreters. May be called twice."""
        self._sandbox.close()


def _open_local(options: SandboxOptions) -> Sandbox:
    if options.kind != "fusion":
        return open_sandbox(options)
    try:
        return open_sandbox(options.model_copy(update={"kind": "bubblewrap"}))
    except ConfigError as error:
        warnings.warn(f"answers are graded here, under limits of memory and time but in no jail: {error}", stacklevel=4)
        return open_sandbox(options.model_copy(update={"kind": "none", "unsandboxed": True}))


def _program(prediction: str, answer: str) -> str:
    return f"{PROGRAM}\nprint(equal({prediction!r}, {answer!r}))\n"
