"""Sandboxes on this machine: a jail (or, unsandboxed, a plain process) with a warm interpreter, and runs forked from it ahead of time."""

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
from spearrl.sandbox.command import (
    ENVIRONMENT,
    NOBODY,
    PROGRAM,
    WAYS_OUT,
    interpreter,
    jail_command,
    package_paths,
    seen_at,
)
from spearrl.sandbox.inside import Gone, receive, send
from spearrl.sandbox.options import Result, Sandbox, SandboxOptions, Session, refusal, verdict
from spearrl.sandbox.seccomp import program

COMMON = [
    "random",
    "math",
    "cmath",
    "itertools",
    "collections",
    "fractions",
    "decimal",
    "statistics",
    "datetime",
    "json",
    "threading",
    "traceback",
    "linecache",
    "heapq",
    "string",
]
START_S = 120.0  # a first import of sympy from a slow disk
GRACE_S = 15.0  # what a run may take beyond its deadline before the jail itself is given up
LOST = "the sandbox went down while this ran"
RESTARTED = "\n[the interpreter ended; the next run begins in a fresh one, without variables]\n"


class Jail:
    """A process with a warm interpreter; `channel` forks a run from it."""

    def __init__(self, command: list[str], settings: dict[str, Any]):
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the jail)
        python, program_file = (seen_at(path) if command else path for path in (interpreter(), PROGRAM))
        words = [*command, str(python), "-sPB", "-X", "utf8", str(program_file)]
        with theirs:
            self._process = subprocess.Popen(
                words,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        self._control.settimeout(START_S)
        self.hello: dict[str, Any] = {}
        with suppress(OSError):  # it is down, or late
            self._control.send(json.dumps(settings).encode())
            self.hello = json.loads(self._control.recv(1 << 16) or b"{}")
        if not self.hello:
            self._log.seek(0)
            said = self._log.read(4000).decode(errors="replace").strip() or f"no answer in {START_S:g} s"
            self.close()
            raise ConfigError(f"isolation is missing on this machine: {said}", where="sandbox", hint=WAYS_OUT)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def channel(self) -> socket.socket:
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
class Run:
    """A child that waits for code."""

    channel: socket.socket
    jail: Jail
    owned: bool  # the jail is this run's alone

    def play(self, code: str, stdin: str, timeout_s: float, *, last: bool) -> tuple[Result, bool]:
        """(what became of the code, whether the child is gone)."""
        self.channel.settimeout(timeout_s + GRACE_S)
        try:
            send(self.channel, {"code": code, "stdin": stdin, "timeout_s": timeout_s, "last": last})
            report = receive(self.channel.makefile("rb"))
        except TimeoutError:
            self.jail.close()  # its supervisor hangs: nothing in there can be relied on
            return Result("timeout", stderr=LOST, seconds=timeout_s + GRACE_S), True
        except (Gone, OSError, ValueError):
            return Result("killed", stderr=LOST), True
        status = verdict(report["code"], report["timeout"], report["stderr"])
        return Result(
            status, report["stdout"], report["stderr"], report["code"], report["seconds"], report["cut"]
        ), report["ended"] or last

    def close(self) -> None:
        self.channel.close()
        if self.owned:
            self.jail.close()


class JailedSandbox(Sandbox):
    """One warm jail, and `concurrency` children forked from it that wait for code; each serves one run or one session.

    Where children cannot have namespaces of their own (Ubuntu's AppArmor profile for bubblewrap), every child gets a jail of its own instead.

    Args:
        options: kind bubblewrap or none.
    """

    def __init__(self, options: SandboxOptions):
        self.options = options
        isolate = options.kind == "bubblewrap"
        packages, modules = package_paths(options.packages)
        self._command = jail_command(packages, options.tmp_mib) if isolate else []
        roots = list(dict.fromkeys(str((seen_at(path) if isolate else path).parent) for path in packages))
        self._settings = {
            "isolate": isolate,
            "path": roots,
            "preload": [*COMMON, *modules],
            "filter": program().hex() if isolate else "",
            **options.model_dump(include={"memory_mib", "output_chars", "processes", "tmp_mib"}),
        }
        self.concurrency = self._count = options.concurrency or len(os.sched_getaffinity(0))
        self._slots = threading.BoundedSemaphore(self._count)
        # bwrap --die-with-parent means the parent's *thread*: this one lives as long as the sandbox.
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="sandbox")
        self._jail: Jail | None = None
        self._spares: deque[Future[Run]] = deque()
        self._closed, self._process = False, os.getpid()
        try:
            self.hello = self._keeper.submit(self._shared).result().hello
        except BaseException:
            self._keeper.shutdown()
            raise
        if self.hello["missing"]:
            self.close()
            hint = "reinstall it where other users can read it, or leave it out of packages"
            raise ConfigError(
                f"not importable in the sandbox: {'; '.join(self.hello['missing'])}",
                where="sandbox.packages",
                hint=hint,
            )
        for _ in range(self._count):
            self._refill()

    def run(self, code: str, *, stdin: str = "", timeout_s: float | None = None) -> Result:
        return self.play(None, code, stdin, timeout_s)[0]

    def session(self) -> Session:
        return JailedSession(self)

    def play(
        self, run: Run | None, code: str, stdin: str, timeout_s: float | None, *, last: bool = True
    ) -> tuple[Result, Run | None]:
        """(result, the child where it can go on). Without a child a waiting one is taken."""
        if refused := refusal(code):
            return refused, run
        if os.getpid() != self._process:  # the keeper's thread is not in a fork, and the sockets are the parent's
            return Result(
                "unavailable",
                stderr="this sandbox belongs to the process that this one was forked from; open another one after the fork",
            ), None
        seconds = timeout_s or self.options.timeout_s
        with self._slots:
            try:
                run = run or self._take()
            except (SpearError, OSError, RuntimeError) as error:
                return Result("unavailable", stderr=str(error)), None
            result, ended = run.play(code, stdin, seconds, last=last)
            self._refill()
            if ended:
                run.close()
        return result, None if ended else run

    def means(self) -> str:
        if self.options.kind == "none":
            return "none: code runs as this user, with limits of memory, file size and time"
        shared = (
            f"a jail a run, because {self.hello['fault']}"
            if self.hello["fault"]
            else "namespaces of its own for every run"
        )
        filtered = (
            "a system-call filter"
            if self._settings["filter"]
            else f"no system-call filter, as {platform.machine()} is not known"
        )
        user = f"user {NOBODY}" if os.geteuid() == 0 else "this user"
        return f"bubblewrap as {user}: {shared}, {filtered}, at most {self.options.processes} processes (RLIMIT_NPROC), no network"

    def close(self) -> None:
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        self._keeper.submit(self._release).result()
        self._keeper.shutdown()

    def _release(self) -> None:
        """In the keeper's thread, where nothing else is under way."""
        with suppress(IndexError):
            while future := self._spares.popleft():
                if not future.cancel() and future.exception() is None:
                    future.result().close()
        if self._jail is not None:
            self._jail.close()

    def _refill(self) -> None:
        """Have a new child made, after the run: before, it would take processors from it."""
        if len(self._spares) < self._count:
            with suppress(RuntimeError):  # closed meanwhile
                self._spares.append(self._keeper.submit(self._open))

    def _take(self) -> Run:
        """A child that waits for code."""
        for _ in range(2 * self._count + 2):
            try:
                future = self._spares.popleft()
            except IndexError:
                future = self._keeper.submit(self._open)
            run = future.result()
            if run.jail.alive:
                return run
            run.close()
        raise WorkerError(
            "the sandbox goes down again and again",
            where="sandbox",
            hint="look for what kills bwrap: the kernel's log names it",
        )

    def _open(self) -> Run:
        """In the keeper's thread: a new child, from a new jail where the old one is down."""
        for _ in range(2):
            jail = self._shared()
            owned = bool(self.hello["fault"]) and self.options.kind == "bubblewrap"
            if owned:
                self._jail = None
            try:
                return Run(jail.channel(), jail, owned)
            except OSError:
                jail.close()
        raise WorkerError(
            "the sandbox goes down as soon as it is up",
            where="sandbox",
            hint="spearrl doctor says what is wrong with isolation",
        )

    def _shared(self) -> Jail:
        if self._jail is None or not self._jail.alive:
            self._jail = Jail(self._command, self._settings)
        return self._jail


class JailedSession(Session):
    """A child that goes on waiting for code."""

    def __init__(self, sandbox: JailedSandbox):
        self._sandbox = sandbox
        self._run: Run | None = None

    def run(self, code: str, *, stdin: str = "", timeout_s: float | None = None) -> Result:
        result, self._run = self._sandbox.play(self._run, code, stdin, timeout_s, last=False)
        if self._run is None and result.status != "unavailable":
            return replace(result, stderr=f"{result.stderr}{RESTARTED}")
        return result

    def close(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None
