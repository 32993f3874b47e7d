"""math-verify inside a sandbox: what a model wrote reaches sympy there only, under a deadline.

An interpreter that overruns it is killed and replaced.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from queue import SimpleQueue

from spearrl.errors import ConfigError, EnvironmentFault
from spearrl.sandbox import RunResult, Sandbox, SandboxOptions, SandboxSession, open_sandbox

COUNT = 2  # judges at a time
DEADLINE_S = 5.0  # for one answer
MOST = 256  # answers of one interpreter: its memory grows and its processor time is limited
WARM_S = 60.0  # for what an interpreter loads with its first judgement
MEMORY_MIB = 1024
CODE = r"""
from math_verify import parse, verify
prediction, answer = (parse("\\boxed{%s}" % text, parsing_timeout=None) for text in PAIR)
print(verify(answer, prediction, timeout_seconds=None))
"""


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
        """Whether two answers are the same in mathematics; false where the judge failed or took too long.

        Raises:
            EnvironmentFault: there is no judge to be had.
        """
        result = self._judge(prediction, answer)
        if result.status in ("killed", "memory"):  # perhaps through no fault of this answer
            result = self._judge(prediction, answer)
        if result.status == "unavailable":
            reason = f"answers cannot be graded: {result.stderr.strip()}"
            raise EnvironmentFault(reason, where="env math", hint="spearrl doctor says what is in force")
        return result.status == "ok" and result.stdout.split()[-1:] == ["True"]

    def _judge(self, *pair: str) -> RunResult:
        session, judged = self._free.get()
        try:
            if session is None:
                session = self._sandbox.session()
                session.run(CODE.replace("PAIR", repr((r"\frac{1}{2}", "0.5"))), timeout_s=WARM_S)
            result = session.run(CODE.replace("PAIR", repr(pair)))
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
