"""Sandboxes on this machine: a warm interpreter in a jail (unsandboxed: a plain process), and runs forked ahead."""

from __future__ import annotations

import array
import json
import os
import platform
import socket
import subprocess
import tempfile
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from spearrl.errors import ConfigError, SpearError, WorkerError
from spearrl.sandbox.jail_command import (
    ENVIRONMENT,
    NOBODY,
    PROGRAM,
    WAYS_OUT,
    interpreter,
    jail_command,
    package_paths,
    path_in_jail,
)
from spearrl.sandbox.jail_program import ConnectionClosed, receive, send
from spearrl.sandbox.options import RunResult, Sandbox, SandboxOptions, SandboxSession, refusal, status_of
from spearrl.sandbox.seccomp import filter_program

COMMON = "random math cmath itertools collections fractions decimal statistics datetime json"
COMMON += " threading traceback linecache heapq string"
START_S = 120.0  # a first import of sympy from a slow disk
GRACE_S = 15.0  # what a run may take beyond its deadline before the jail itself is given up
LOST = "the sandbox went down while this ran"
FORKED = "this sandbox belongs to the process that this one was forked from; open another one after the fork"
RESTARTED = "\n[the interpreter ended; the next run begins in a fresh one, without variables]\n"


class Jail:
    """A process with a warm interpreter.

    `startup` is what it said when it had started: the modules that are "missing", and the "fault" for which runs
    cannot have namespaces of their own ("" where they can).

    Raises:
        ConfigError: it does not start.
    """

    def __init__(self, command: list[str], settings: dict[str, Any]):
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the jail)
        python, program = (path_in_jail(path) if command else path for path in (interpreter(), PROGRAM))
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(python), "-sPB", "-X", "utf8", str(program)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        self._control.settimeout(START_S)
        self.startup: dict[str, Any] = {}
        with suppress(OSError):  # it is down, or late
            self._control.send(json.dumps(settings).encode())
            self.startup = json.loads(self._control.recv(1 << 16) or b"{}")
        if not self.startup:
            self._log.seek(0)
            reason = self._log.read(4000).decode(errors="replace").strip() or f"no answer in {START_S:g} s"
            self.close()
            raise ConfigError(f"isolation is missing on this machine: {reason}", where="sandbox", hint=WAYS_OUT)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fork_run(self) -> socket.socket:
        """A socket to the supervisor of a new run. Raises OSError where the jail is down."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._control.sendmsg([b"r"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))])
        return ours

    def close(self) -> None:
        """End it and everything in it."""
        self._control.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(GRACE_S)
        self._log.close()


@dataclass(slots=True)
class JailedRun:
    """A child of a jail that waits for code; `owned`: the jail is this run's alone."""

    channel: socket.socket
    jail: Jail
    owned: bool

    def execute(self, code: str, stdin: str, timeout_s: float, *, last: bool) -> tuple[RunResult, bool]:
        """(the result, whether the child has ended). `last`: no other code follows."""
        self.channel.settimeout(timeout_s + GRACE_S)
        try:
            send(self.channel, {"code": code, "stdin": stdin, "timeout_s": timeout_s, "last": last})
            report = receive(self.channel.makefile("rb"))
        except TimeoutError:
            self.jail.close()  # its supervisor hangs: nothing in there can be relied on
            return RunResult("timeout", stderr=LOST, seconds=timeout_s + GRACE_S), True
        except (ConnectionClosed, OSError, ValueError):
            return RunResult("killed", stderr=LOST), True
        exit_code, out, err = report["code"], report["stdout"], report["stderr"]
        status = status_of(exit_code, report["timeout"], err)
        result = RunResult(status, out, err, exit_code, report["seconds"], report["cut"])
        return result, report["ended"] or last

    def close(self) -> None:
        self.channel.close()
        if self.owned:
            self.jail.close()


class JailedSandbox(Sandbox):
    """One warm jail, and `concurrency` children forked from it that wait for code; each serves one run or one session.

    Where children cannot have namespaces of their own (Ubuntu's AppArmor profile for bubblewrap), every child gets a
    jail of its own instead. `startup` is that of the first jail.

    Args:
        options: kind bubblewrap or none.
    """

    def __init__(self, options: SandboxOptions):
        self.options = options
        isolate = options.kind == "bubblewrap"
        packages, modules = package_paths(options.packages)
        self._command = jail_command(packages, options.tmp_mib) if isolate else []
        folders = [str((path_in_jail(path) if isolate else path).parent) for path in packages]
        self._settings = {
            "isolate": isolate,
            "path": list(dict.fromkeys(folders)),
            "preload": [*COMMON.split(), *modules],
            "filter": filter_program().hex() if isolate else "",
            **options.model_dump(include={"memory_mib", "output_chars", "processes", "tmp_mib"}),
        }
        self.concurrency = options.concurrency or len(os.sched_getaffinity(0))
        self._turns = threading.BoundedSemaphore(self.concurrency)
        # bwrap --die-with-parent means the parent's *thread*: this one lives as long as the sandbox, and starts all.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox")
        self._jail: Jail | None = None
        self._waiting: deque[Future[JailedRun]] = deque()
        self._closed, self._pid = False, os.getpid()
        try:
            self.startup = self._starter.submit(self._running_jail).result().startup
        except BaseException:
            self._starter.shutdown()
            raise
        if missing := self.startup["missing"]:
            self.close()
            hint = "reinstall it where other users can read it, or leave it out of packages"
            complaint = f"not importable in the sandbox: {'; '.join(missing)}"
            raise ConfigError(complaint, where="sandbox.packages", hint=hint)
        for _ in range(self.concurrency):
            self._refill()

    def run(self, code: str, *, stdin: str = "", timeout_s: float | None = None) -> RunResult:
        return self.execute(None, code, stdin, timeout_s)[0]

    def session(self) -> SandboxSession:
        return JailedSession(self)

    def execute(
        self, run: JailedRun | None, code: str, stdin: str, timeout_s: float | None, *, last: bool = True
    ) -> tuple[RunResult, JailedRun | None]:
        """(the result, the child where it can go on). Without a child (`run`) a waiting one is taken."""
        if refused := refusal(code):
            return refused, run
        if os.getpid() != self._pid:  # the starter's thread is not in a fork, and the sockets are the parent's
            return RunResult("unavailable", stderr=FORKED), None
        with self._turns:
            try:
                run = run or self._next_run()
            except (SpearError, OSError, RuntimeError) as error:
                return RunResult("unavailable", stderr=str(error)), None
            result, ended = run.execute(code, stdin, timeout_s or self.options.timeout_s, last=last)
            self._refill()
            if ended:
                run.close()
        return result, None if ended else run

    def describe(self) -> str:
        if self.options.kind == "none":
            return "none: code runs as this user, with limits of memory, file size and time"
        user = f"user {NOBODY}" if os.geteuid() == 0 else "this user"
        fault, machine = self.startup["fault"], platform.machine()
        spaces = f"a jail a run, because {fault}" if fault else "namespaces of its own for every run"
        calls = "a system-call filter"
        if not self._settings["filter"]:
            calls = f"no system-call filter, as {machine} is not known"
        limit = f"at most {self.options.processes} processes (RLIMIT_NPROC)"
        return f"bubblewrap as {user}: {spaces}, {calls}, {limit}, no network"

    def close(self) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._starter.submit(self._close_all).result()
        self._starter.shutdown()

    def _close_all(self) -> None:
        """In the starter's thread, where nothing else is under way."""
        with suppress(IndexError):
            while future := self._waiting.popleft():
                if not future.cancel() and future.exception() is None:
                    future.result().close()
        if self._jail is not None:
            self._jail.close()

    def _refill(self) -> None:
        """Have a new child made, after the run: before, it would take processors from it."""
        if len(self._waiting) < self.concurrency:
            with suppress(RuntimeError):  # closed meanwhile
                self._waiting.append(self._starter.submit(self._new_run))

    def _next_run(self) -> JailedRun:
        """A child that waits for code."""
        for _ in range(2 * self.concurrency + 2):
            try:
                future = self._waiting.popleft()
            except IndexError:
                future = self._starter.submit(self._new_run)
            run = future.result()
            if run.jail.alive:
                return run
            run.close()
        hint = "look for what kills bwrap: the kernel's log names it"
        raise WorkerError("the sandbox goes down again and again", where="sandbox", hint=hint)

    def _new_run(self) -> JailedRun:
        """In the starter's thread: a new child, from a new jail where the old one is down."""
        for _ in range(2):
            jail = self._running_jail()
            owned = bool(self.startup["fault"]) and self.options.kind == "bubblewrap"
            if owned:
                self._jail = None
            try:
                return JailedRun(jail.fork_run(), jail, owned)
            except OSError:
                jail.close()
        hint = "spearrl doctor says what is wrong with isolation"
        raise WorkerError("the sandbox goes down as soon as it is up", where="sandbox", hint=hint)

    def _running_jail(self) -> Jail:
        if self._jail is None or not self._jail.alive:
            self._jail = Jail(self._command, self._settings)
        return self._jail


class JailedSession(SandboxSession):
    """A child that goes on waiting for code."""

    def __init__(self, sandbox: JailedSandbox):
        self._sandbox = sandbox
        self._run: JailedRun | None = None

    def run(self, code: str, *, stdin: str = "", timeout_s: float | None = None) -> RunResult:
        result, self._run = self._sandbox.execute(self._run, code, stdin, timeout_s, last=False)
        if self._run is None and result.status != "unavailable":
            return replace(result, stderr=f"{result.stderr}{RESTARTED}")
        return result

    def close(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None
