"""What a sandbox is told, what it answers, and what every kind of it can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["ok", "error", "timeout", "memory", "killed", "unavailable"]
MAX_CODE = 1 << 20  # characters


class SandboxOptions(BaseModel):
    """Where and within which limits code that a model wrote is run (`env.options.sandbox.<key>`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["bubblewrap", "fusion", "none"] = Field(
        "bubblewrap", description="bubblewrap: a jail on this machine; fusion: a SandboxFusion server."
    )
    url: str = Field("", description="Address of the SandboxFusion server, such as http://sandbox:8080.")
    timeout_s: float = Field(10.0, gt=0, le=3600, description="Seconds a run may take.")
    memory_mib: int = Field(256, ge=16, description="MiB a run may use, on top of the interpreter with its packages.")
    output_chars: int = Field(65536, ge=16, description="Characters kept of stdout and of stderr: first and last half.")
    concurrency: int = Field(0, ge=0, description="Runs at a time; 0: one per processor.")
    processes: int = Field(24, ge=1, description="Processes and threads a run may have.")
    tmp_mib: int = Field(64, ge=1, description="Size of a run's /tmp.")
    session: bool = Field(False, description="Keep one interpreter for an episode, variables included.")
    packages: tuple[str, ...] = Field(
        ("numpy", "sympy"), description="Installed distributions that a run can import; they are loaded ahead."
    )
    unsandboxed: bool = Field(False, description="Needed for kind=none: code runs as you, limited but not isolated.")


@dataclass(frozen=True, slots=True)
class RunResult:
    """What became of a run.

    Args:
        status: "ok"; "error": it raised, or exited with another code than 0; "timeout"; "memory": it ran out of it;
            "killed": a signal, or the sandbox itself, ended it; "unavailable": it did not run.
        stdout, stderr: at most `output_chars` each, "[... N characters cut]" in the middle where `cut`.
        exit_code: negative for a signal; None where there was no exit.
        seconds: of wall time.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    seconds: float = 0.0
    cut: bool = False


class CodeRunner(ABC):
    """Runs Python code; closed at the end of a with block."""

    @abstractmethod
    def run(self, code: str, *, stdin: str = "", timeout_s: float | None = None) -> RunResult:
        """Run code; never raises for what the code does."""

    @abstractmethod
    def close(self) -> None:
        """End everything this started. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SandboxSession(CodeRunner):
    """An interpreter that keeps its variables from run to run; for one thread at a time.

    After a run that ends the interpreter (status "timeout" or "killed"), the next begins in a fresh one.
    """


class Sandbox(CodeRunner):
    """Runs code in fresh interpreters, `concurrency` runs at a time; others wait for their turn. Safe to share between
    threads.
    """

    concurrency: int

    @abstractmethod
    def session(self) -> SandboxSession:
        """A new interpreter for an episode."""

    @abstractmethod
    def describe(self) -> str:
        """What keeps code in, in words."""


def refusal(code: str) -> RunResult | None:
    """The result of code that is too long to be run; None for other code."""
    if len(code) <= MAX_CODE:
        return None
    words = f"the code has {len(code):,} characters; at most {MAX_CODE:,} are run"
    return RunResult("error", stderr=words, exit_code=1)


def status_of(exit_code: int | None, timeout: bool, stderr: str) -> Status:
    """The status of a run, by how it ended and by the last line it wrote to stderr."""
    if timeout:
        return "timeout"
    if exit_code is None or exit_code < 0:
        return "killed"
    exception = stderr.rstrip().rpartition("\n")[2].partition(":")[0]
    if exit_code and exception.endswith(("MemoryError", "ArrayMemoryError")):
        return "memory"
    return "error" if exit_code else "ok"
