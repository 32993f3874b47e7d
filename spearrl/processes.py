"""Processes of this machine that run a module of ours and speak over a socket: how they begin, and how they end."""

from __future__ import annotations

import atexit
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from spearrl.errors import ContractError, EnvironmentFault, SpearError, is_secret

PARENT_CHECK_S = 1.0
# The environment variables that processes of ours get; those that look like a secret, or hold one, are left out.
PASSED = re.compile(
    "PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|TZ|TERM|TMPDIR|TEMP|TMP|CC|CXX|LD_LIBRARY_PATH|LD_PRELOAD|VIRTUAL_ENV|"
    "CONDA_PREFIX|(?i:https?_proxy|no_proxy)|(PYTHON|TORCH).*|"
    "(LC|XDG|SSL_CERT|SPEARRL|HF|TRANSFORMERS|TOKENIZERS|VLLM|FLASHINFER|PYTORCH|TRITON|DS|RAY|OMP|MKL|KMP|GOMP|"
    "OPENBLAS|NUMEXPR|MALLOC|CUDA|NVIDIA|HIP|ROCR|HSA|NCCL|GLOO|UCX|FI)_.*"
)
PASS_MORE = "SPEARRL_PASS_VARIABLES"  # further names, with commas
TAIL_LINES, TAIL_BYTES = 8, 4000  # of a process's log, in error messages


class AtDeath:
    """What a shell does once this process is gone, however it ends: no code of this process could after a kill -9.

    Processes that end themselves when their parent is gone cannot while they are stuck in C code.
    """

    SCRIPT = """
while read -r what rest; do case $what in kill) groups=$rest;; rm) folders=$rest;; esac; done
[ -z "$groups" ] || kill -9 $groups  # no "--": dash has none
[ -z "$folders" ] || rm -rf -- $folders
"""

    def __init__(self) -> None:
        self._words: dict[str, set[str]] = {"kill": set(), "rm": set()}
        self._shell: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def set(self, command: str, word: str, *, due: bool) -> None:
        """Have `command` ("kill" a process group, "rm" a folder) done to `word`, which has no blanks; or no more."""
        with self._lock:
            (self._words[command].add if due else self._words[command].discard)(word)
            if self._shell is None:
                quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                shell = ["/bin/sh", "-c", self.SCRIPT]
                self._shell = subprocess.Popen(shell, stdin=subprocess.PIPE, start_new_session=True, **quiet)
                atexit.register(self._end)
            if self._shell.stdin is not None:
                with suppress(BrokenPipeError):  # somebody killed the shell
                    self._shell.stdin.write(" ".join([command, *sorted(self._words[command])]).encode() + b"\n")
                    self._shell.stdin.flush()

    def _end(self) -> None:
        if self._shell is not None and self._shell.stdin is not None:
            with suppress(BrokenPipeError):
                self._shell.stdin.close()
            self._shell.wait()


AT_DEATH = AtDeath()


class Child:
    """`python -m <module>` in a session of its own, at the other end of `connection`.

    The module's first call is `connection_to_parent`. Messages are bytes; they may be sent and received by different
    threads.

    Args:
        environment: variables besides those of `child_environment`.
        log: a file that its output is added to. None: it goes to standard error, since standard output is for results.
    """

    def __init__(self, module: str, environment: Mapping[str, str], *, log: Path | None = None):
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") if log else nullcontext(2) as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**child_environment(), **environment},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        AT_DEATH.set("kill", f"-{self.process.pid}", due=True)
        self.connection, self._log = Connection(ours.detach()), log
        self._killing, self._sending = threading.Lock(), threading.Lock()

    def send(self, data: bytes) -> None:
        """Raises ConnectionError where the process is gone."""
        try:
            with self._sending:
                self.connection.send_bytes(data)
        except OSError as error:
            raise ConnectionError(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> bytes:
        """The next message. Raises TimeoutError, or ConnectionError where the process is gone, or killed meanwhile."""
        try:
            if self.connection.poll(timeout_s):
                return self.connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise ConnectionError(str(error)) from error
        raise TimeoutError(f"no answer within {timeout_s:g} s")

    def kill(self) -> None:
        """End it and everything it started. May be called again, and from any thread."""
        # The group outlives its leader (an engine's core). While nobody has waited for the leader, the group's number
        # belongs to nobody else.
        with self._killing:
            if self.process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                AT_DEATH.set("kill", f"-{self.process.pid}", due=False)  # before the number may be another's
                self.process.wait()

    def end(self, wait_s: float) -> None:
        """Wait for it to end by itself, then end it by force."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(wait_s)
        self.kill()

    def ending(self, wait_s: float = 0.0) -> str:
        """How it ended, in words, within `wait_s`; and the last lines of its log."""
        try:
            code = self.process.wait(wait_s)
            text = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            text = "its connection broke"
        return f"{text}{log_tail(self._log)}" if self._log else text


def log_tail(log: Path) -> str:
    """The last lines of a process's log, to be added to an error message."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    return "".join([f"; the end of {log}:", *(f"\n  | {line}" for line in lines)])


def pickled(value: Any, what: str = "a value") -> bytes:
    """A value for another process. Raises ContractError for one that cannot travel; `what` names it there."""
    try:
        return pickle.dumps(value)
    except Exception as error:  # whatever the type of a user's value raises
        raise _cannot_travel(what, error) from error


def unpickled(data: bytes) -> Any:
    """What `pickled` was given. Raises ContractError where its types cannot be imported here."""
    try:
        return pickle.loads(data)
    except Exception as error:
        raise _cannot_travel("a value", error) from error


def _cannot_travel(what: str, error: Exception) -> ContractError:
    text = f"{what} cannot travel between processes: {error}"
    hint = "use plain values in Task.data, Observation.anchor and Outcome.info: numbers, text, tuples, dicts"
    return ContractError(text, where="env", hint=hint)


def portable(error: Exception, *, where: str | None = None, hint: str | None = None) -> SpearError:
    """An error for another process to raise: spearrl's own as they are, others as the text of their traceback."""
    text = "".join(traceback.format_exception(error)).rstrip()
    return error if isinstance(error, SpearError) else EnvironmentFault(text, where=where, hint=hint)


def child_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that a process of ours gets: those it needs and those named in SPEARRL_PASS_VARIABLES, no secrets.

    With them a Python process finds the modules that this one finds.
    """
    paths, named = [os.path.abspath(entry) for entry in sys.path], environ.get(PASS_MORE, "").replace(",", " ").split()

    def passes(name: str, value: str) -> bool:
        with_password = "@" in value and name.lower().endswith("proxy")
        return name in named or bool(PASSED.fullmatch(name) and not is_secret(name) and not with_password)

    kept = {name: value for name, value in environ.items() if passes(name, value)}
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


@contextmanager
def as_for_children(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside, this process's environment is that of a child, with `variables`: libraries start processes with it."""
    before = dict(os.environ)
    for name in before.keys() - child_environment().keys():
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def version_of(package: str) -> str:
    """Of an installed package; "" where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def under_launcher(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or the deepspeed launcher started this process."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def connection_to_parent(end: Callable[[], Any] = lambda: os._exit(1)) -> Connection:
    """For the process of a Child: its socket. Ctrl-C is left to the parent.

    Once the parent has gone, `end` is called, whatever this process is doing then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_S)
        end()

    threading.Thread(target=watch, daemon=True).start()
    return Connection(int(sys.argv[1]))
