"""The program inside the jail: a warm interpreter that forks a supervisor and a child for every run.

    host ──(fd 0: one socket a run)──► zygote ──fork──► supervisor ──fork──► child, which runs the code

Supervisor and child have user, process, mount and IPC namespaces of their own. The child is process 1 of its
namespace: when it ends, the kernel ends everything it started. It can name no process outside, and has no file
descriptor but its own three and the link to its supervisor. The supervisor keeps the deadline and the cap on output;
it believes nothing that comes over the link. Standard library only: nothing else of ours is in the jail.
"""

from __future__ import annotations

import codecs
import ctypes
import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

PIECE = 1 << 16
NEW_USER, NEW_MOUNTS, NEW_PIDS, NEW_IPC = 0x10000000, 0x00020000, 0x20000000, 0x08000000
NO_SUID, NO_DEVICES = 2, 4
DEATH_SIGNAL, SET_SECCOMP, NO_NEW_PRIVILEGES = 1, 22, 38  # prctl(2)
CAPABILITIES_V3 = 0x20080522
LIBC = ctypes.CDLL(None, use_errno=True)
SESSION_CPU_S = 600  # of processor time in all of a session, its idle time included


class ConnectionClosed(Exception):
    """The other end closed."""


def send(peer: socket.socket, message: dict[str, Any]) -> None:
    """One message: a line of JSON."""
    peer.sendall(json.dumps(message).encode() + b"\n")


def receive(reader: BinaryIO) -> dict[str, Any]:
    """The next message of a peer's makefile("rb"). Raises ConnectionClosed at its end."""
    if not (line := reader.readline()):
        raise ConnectionClosed
    return json.loads(line)


class OutputBuffer:
    """The beginning and the end of a stream of text, `limit` characters together, in bounded memory."""

    def __init__(self, limit: int):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._half, self._head, self._tail, self._total = max(1, limit // 2), "", "", 0

    def add(self, data: bytes) -> None:
        """Append bytes of the stream."""
        text = self._decoder.decode(data)
        self._total += len(text)
        room = self._half - len(self._head)
        self._head += text[:room]
        self._tail = (self._tail + text[room:])[-self._half :]

    @property
    def cut(self) -> int:
        """Characters that are missing."""
        return self._total - len(self._head) - len(self._tail)

    def text(self) -> str:
        """The kept text, with a note in the middle where characters are missing."""
        return f"{self._head}\n[... {self.cut:,} characters cut]\n{self._tail}" if self.cut else self._head + self._tail


def zygote() -> None:
    """Read the settings, import what snippets use, say so, then serve sockets until the host closes."""
    control = socket.socket(fileno=os.dup(0))
    settings = json.loads(control.recv(1 << 18))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path += settings["path"]
    missing = []
    for name in settings["preload"]:
        try:
            import_module(name)
        except Exception as error:  # a package may fail in any way; the host decides
            missing.append(f"{name}: {type(error).__name__}: {error}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody is waited for
    fault = _try_namespaces(settings) if settings["isolate"] else "not asked for"
    settings["nested"] = not fault
    control.send(json.dumps({"missing": missing, "fault": fault}).encode())
    _seed_generators()  # numpy loads its generators when they are first used
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        if os.fork() == 0:
            control.close()
            try:
                supervise(socket.socket(fileno=descriptors[0]), settings)
            finally:
                os._exit(0)
        os.close(descriptors[0])


def _try_namespaces(settings: dict[str, Any]) -> str:
    """Why runs in this jail cannot have namespaces of their own; "" where they can."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            enter_namespaces(settings)
            if os.fork() == 0:
                _mount("proc", "/proc", "")
                os.write(writer, b"yes")
        except OSError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    answer = os.read(reader, 1000).decode()
    os.close(reader)
    return "" if answer == "yes" else answer or "a process that tried died"


def enter_namespaces(settings: dict[str, Any]) -> None:
    """Give this process namespaces of its own with an empty /tmp and /dev/shm; its children get a process namespace."""
    user, group = os.getuid(), os.getgid()
    _check(LIBC.unshare(NEW_USER | NEW_MOUNTS | NEW_PIDS | NEW_IPC), "unshare")
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(line)
    _mount("tmpfs", "/tmp", f"size={settings['tmp_mib']}m,nr_inodes=4096,mode=0700,uid={user},gid={group}")
    _mount("tmpfs", "/dev/pts", "size=4k,mode=0500")
    _mount("tmpfs", "/dev/shm", f"size=8m,nr_inodes=256,mode=0700,uid={user},gid={group}")


def supervise(channel: socket.socket, settings: dict[str, Any]) -> None:
    """Start a child and pass on what the host sends, run by run, until the child or the host ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if settings["nested"]:
        enter_namespaces(settings)
    folder = "/tmp" if settings["isolate"] else tempfile.mkdtemp(prefix="spearrl-run-")
    link, theirs = socket.socketpair()
    pipes = [os.pipe(), os.pipe()]
    pid = os.fork()
    if pid == 0:
        try:
            run_child(theirs, (pipes[0][1], pipes[1][1]), folder, settings)
        except BaseException as error:
            os.write(2, f"the sandbox failed: {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(70)
    theirs.close()
    for _, writer in pipes:
        os.close(writer)
    ended, requests, outputs = False, channel.makefile("rb"), [reader for reader, _ in pipes]
    try:
        while not ended:
            request = receive(requests)
            report = WatchedRun(pid, link, outputs, channel, settings["output_chars"]).run(request)
            ended = report["ended"]
            send(channel, report)
            if request["last"]:
                raise ConnectionClosed
    except (ConnectionClosed, OSError):  # the host has closed, or this was the last run
        ended = ended or _kill(pid) is not None
    finally:
        if not settings["isolate"]:
            shutil.rmtree(folder, ignore_errors=True)


def _kill(pid: int) -> int:
    """Kill the child with all it started; its exit status, negative for a signal."""
    for kill in (os.killpg, os.kill):  # the group: without namespaces the child's own children live on
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class WatchedRun:
    """One run of the child: output is kept up to the cap; at the deadline the child is killed with all it started."""

    def __init__(self, pid: int, link: socket.socket, outputs: list[int], channel: socket.socket, limit: int):
        self.pid, self.link, self.channel = pid, link, channel
        self.buffers = {fd: OutputBuffer(limit) for fd in outputs}

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """The report: exit code (None: no exit), both texts, seconds, whether the child has ended."""
        start = time.monotonic()
        code, ended = self._wait(request, start + request["timeout_s"])
        timeout = code is None and not ended
        if ended or timeout:
            status, ended = _kill(self.pid), True
            code = code if code is not None else status
        self._read_rest()
        out, err = self.buffers.values()
        return {
            "code": None if timeout else code,
            "timeout": timeout or code == -signal.SIGXCPU,
            "stdout": out.text(),
            "stderr": err.text(),
            "cut": bool(out.cut or err.cut),
            "seconds": time.monotonic() - start,
            "ended": ended,
        }

    def _wait(self, request: dict[str, Any], deadline: float) -> tuple[int | None, bool]:
        """(exit code that the child reported, whether it has ended); (None, False) at the deadline."""
        self.link.settimeout(max(0.01, request["timeout_s"]))
        try:
            send(self.link, request)
        except TimeoutError:
            return None, False
        except OSError:
            return None, True
        process = os.pidfd_open(self.pid)
        poll = select.poll()
        for fd in (*self.buffers, self.link.fileno(), process):
            poll.register(fd, select.POLLIN)
        poll.register(self.channel.fileno(), select.POLLHUP)
        try:
            while (left := deadline - time.monotonic()) > 0:
                events = [fd for fd, _ in poll.poll(1000 * left)]
                if self.channel.fileno() in events:
                    raise ConnectionClosed
                for fd in events:
                    if fd in self.buffers and not self._read(fd):
                        poll.unregister(fd)
                if process in events:
                    return None, True
                if self.link.fileno() in events:
                    data = self.link.recv(4)
                    if len(data) == 4:
                        return struct.unpack(">i", data)[0], False
                    poll.unregister(self.link.fileno())  # closed by the snippet: its death will tell
        finally:
            os.close(process)
        return None, False

    def _read(self, fd: int) -> bool:
        data = os.read(fd, PIECE)
        self.buffers[fd].add(data)
        return bool(data)

    def _read_rest(self) -> None:
        """Read what is left in the pipes: at most what they hold, whoever may go on writing."""
        for fd in self.buffers:
            for _ in range(16):
                if not select.select([fd], [], [], 0)[0] or not self._read(fd):
                    break


def run_child(link: socket.socket, outputs: tuple[int, int], folder: str, settings: dict[str, Any]) -> NoReturn:
    """The child: give up everything, then run what comes over the link."""
    _check(LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
    os.setsid()
    if settings["nested"]:
        _mount("proc", "/proc", "")
    os.chdir(folder)
    os.dup2(outputs[0], 1)
    os.dup2(outputs[1], 2)
    if (fd := link.detach()) != 3:
        os.dup2(fd, 3, inheritable=False)
    link = socket.socket(fileno=3)
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0] if settings["isolate"] else 4096)
    _drop_privileges(settings)
    output: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "buffering": 1, "closefd": False}
    sys.stdout, sys.stderr = open(1, "w", **output), open(2, "w", **output)  # noqa: SIM115
    sys.argv = ["snippet.py"]
    main = sys.modules["__main__"] = ModuleType("__main__")
    _seed_generators()
    requests = link.makefile("rb")
    while True:
        request = receive(requests)
        _limit("CPU", int(request["timeout_s"]) + 2 if request["last"] else SESSION_CPU_S)
        _set_stdin(request["stdin"], folder)
        code = _execute(request, main)
        if request["last"]:
            _run_exit_handlers()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # the snippet may have put anything there
                stream.flush()
        link.sendall(struct.pack(">i", code))


def _drop_privileges(settings: dict[str, Any]) -> None:
    """Limits, then capabilities, then the right to gain any, then system calls."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, the kernel takes this one
    except OSError:
        gc.collect()  # it takes another one then
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {"AS": used + (settings["memory_mib"] << 20), "FSIZE": 16 << 20, "NOFILE": 64, "CORE": 0}
    if settings["isolate"]:
        limits["NPROC"] = settings["processes"]
    for name, value in limits.items():
        _limit(name, value)
    if settings["isolate"]:
        header, nothing = struct.pack("Ii", CAPABILITIES_V3, 0), bytes(24)
        _check(LIBC.capset(header, nothing), "capset")
    _check(LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    if code := bytes.fromhex(settings["filter"]):
        instructions = ctypes.create_string_buffer(code)
        program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions))
        _check(LIBC.prctl(SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _limit(name: str, value: int) -> None:
    """Set a resource limit for good, never above the one that is in force."""
    kind = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(kind)[1]
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (bound, bound))


def _seed_generators() -> None:
    """Snippets that do not seed their generators draw the same numbers in every run."""
    import random

    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


def _set_stdin(text: str, folder: str) -> None:
    """Make a text standard input, in a file without a name (files in memory are denied)."""
    with tempfile.TemporaryFile(dir=folder) if text else open(os.devnull, "r+b") as file:
        file.write(text.encode("utf-8", "replace"))
        file.seek(0)
        os.dup2(file.fileno(), 0)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115


def _execute(request: dict[str, Any], main: ModuleType) -> int:
    """Run the code as the main module; its exit code. Tracebacks go to stderr as Python writes them."""
    import linecache
    import traceback

    source, name = request["code"], "snippet.py"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    try:
        exec(compile(source, name, "exec"), main.__dict__)
    except SystemExit as done:
        if done.code is None or isinstance(done.code, int):
            return (done.code or 0) & 0xFF
        print(done.code, file=sys.stderr)
        return 1
    except BaseException as error:  # whatever a snippet raises
        try:
            frames = error.__traceback__.tb_next if error.__traceback__ else None
            traceback.print_exception(type(error), error, frames, limit=-1000)  # of a million frames, the last
        except BaseException:  # no memory left to say it in full
            os.write(2, f"{type(error).__name__}\n".encode())
        return 1
    return 0


def _run_exit_handlers() -> None:
    """What the interpreter does at its end, short of taking itself apart: a snippet's threads end, then its atexit."""
    import atexit
    import threading

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException as error:
        os.write(2, f"{type(error).__name__} at exit\n".encode())


def _mount(kind: str, target: str, options: str) -> None:
    source, flags = kind.encode(), NO_SUID | NO_DEVICES
    _check(LIBC.mount(source, target.encode(), source, flags, options.encode()), f"mount {kind} on {target}")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    zygote()
