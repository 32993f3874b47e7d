"""The program inside the jail: a warm interpreter that forks a supervisor and a child for every run. Standard library only.

    host ──(fd 0: one socket a run)──► zygote ──fork──► supervisor ──fork──► child, which runs the code

Supervisor and child have user, process, mount and IPC namespaces of their own. The child is process 1 of its namespace, so that when it ends
the kernel ends everything it started; it can name no process outside, and has no file descriptor but its own three and the link to its
supervisor. The supervisor keeps the deadline and the cap on output; it believes nothing that comes over the link.
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
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

PIECE = 1 << 16
NEW_USER, NEW_MOUNTS, NEW_PIDS, NEW_IPC = 0x10000000, 0x00020000, 0x20000000, 0x08000000
NO_SUID, NO_DEVICES = 2, 4
DEATH_SIGNAL, SET_SECCOMP, NO_NEW_PRIVILEGES = 1, 22, 38  # prctl(2)
CAPABILITIES_V3 = 0x20080522
SESSION_CPU_S = 600  # of processor time in all of a session, its idle time included


class Gone(Exception):
    """The other end closed."""


def send(peer: socket.socket, message: dict[str, Any]) -> None:
    """One message: a line of JSON."""
    peer.sendall(json.dumps(message).encode() + b"\n")


def receive(reader: BinaryIO) -> dict[str, Any]:
    """The next message of a peer's makefile("rb"). Raises Gone at its end."""
    if not (line := reader.readline()):
        raise Gone
    return json.loads(line)  # type: ignore[no-any-return]


class Kept:
    """The beginning and the end of a stream of text, `limit` characters together; memory stays bounded."""

    def __init__(self, limit: int):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._half, self._head, self._tail, self._total = max(1, limit // 2), "", "", 0

    def add(self, data: bytes) -> None:
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
        return f"{self._head}\n[... {self.cut:,} characters cut]\n{self._tail}" if self.cut else self._head + self._tail


def zygote() -> None:
    """Read the settings, import what snippets use, say so, then serve sockets until the host closes."""
    control = socket.socket(fileno=os.dup(0))
    settings = json.loads(control.recv(1 << 18))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path += settings["path"]
    missing = [f"{name}: {problem}" for name in settings["preload"] if (problem := _import(name))]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody is waited for
    fault = _try_namespaces(settings) if settings["isolate"] else "not asked for"
    settings["nested"] = not fault
    control.send(json.dumps({"missing": missing, "fault": fault, "python": sys.version.split()[0]}).encode())
    _same_draws()  # numpy loads its generators when they are first used
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page
    while True:
        word, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not word:
            return
        if os.fork() == 0:
            control.close()
            try:
                supervise(socket.socket(fileno=descriptors[0]), settings)
            finally:
                os._exit(0)
        os.close(descriptors[0])


def _import(name: str) -> str:
    try:
        import_module(name)
    except Exception as error:  # a package may fail in any way; the host decides
        return f"{type(error).__name__}: {error}"
    return ""


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
    said = os.read(reader, 1000).decode()
    os.close(reader)
    return "" if said == "yes" else said or "a process that tried died"


def enter_namespaces(settings: dict[str, Any]) -> None:
    """Namespaces of this process's own, with an empty /tmp and /dev/shm in them. Children will be in a process namespace of theirs."""
    user, group = os.getuid(), os.getgid()
    _checked(libc().unshare(NEW_USER | NEW_MOUNTS | NEW_PIDS | NEW_IPC), "unshare")
    for name, words in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(words)
    _mount("tmpfs", "/tmp", f"size={settings['tmp_mib']}m,nr_inodes=4096,mode=0700,uid={user},gid={group}")
    _mount("tmpfs", "/dev/pts", "size=4k,mode=0500")
    _mount("tmpfs", "/dev/shm", f"size=8m,nr_inodes=256,mode=0700,uid={user},gid={group}")


def supervise(channel: socket.socket, settings: dict[str, Any]) -> None:
    """Start a child and pass it what the host sends, run by run, until it or the host ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if settings["nested"]:
        enter_namespaces(settings)
    folder = "/tmp" if settings["isolate"] else tempfile.mkdtemp(prefix="spearrl-run-")
    link, theirs = socket.socketpair()
    pipes = [os.pipe(), os.pipe()]
    pid = os.fork()
    if pid == 0:
        try:
            serve(theirs, (pipes[0][1], pipes[1][1]), folder, settings)
        except BaseException as error:
            os.write(2, f"the sandbox failed: {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(70)
    theirs.close()
    for _, writer in pipes:
        os.close(writer)
    ended, requests = False, channel.makefile("rb")
    try:
        while not ended:
            request = receive(requests)
            report = Watch(pid, link, [reader for reader, _ in pipes], channel, settings).run(request)
            ended = report["ended"]
            send(channel, report)
            if request["last"]:
                raise Gone
    except (Gone, OSError):  # the host is not interested any more
        ended = ended or _end(pid) is not None
    finally:
        if not settings["isolate"]:
            shutil.rmtree(folder, ignore_errors=True)


def _end(pid: int) -> int:
    """Kill the child with all it started; its exit status, negative for a signal."""
    for kill in (os.killpg, os.kill):  # the group: without namespaces the child's own children live on
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Watch:
    """One run of the child, watched: output is kept up to the cap, and at the deadline the child is killed with all it started."""

    def __init__(
        self, pid: int, link: socket.socket, outputs: list[int], channel: socket.socket, settings: dict[str, Any]
    ):
        self.pid, self.link, self.channel = pid, link, channel
        self.kept = {fd: Kept(settings["output_chars"]) for fd in outputs}

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """The report: status of the process, texts, seconds, whether the child is gone."""
        begun = time.monotonic()
        code, ended = self._until(request, begun + request["timeout_s"])
        timeout = code is None and not ended
        if ended or timeout:
            status, ended = _end(self.pid), True
            code = code if code is not None else status
        self._drain()
        out, err = self.kept.values()
        return {
            "code": None if timeout else code,
            "timeout": timeout or code == -signal.SIGXCPU,
            "stdout": out.text(),
            "stderr": err.text(),
            "cut": bool(out.cut or err.cut),
            "seconds": time.monotonic() - begun,
            "ended": ended,
        }

    def _until(self, request: dict[str, Any], deadline: float) -> tuple[int | None, bool]:
        """(exit code the child reported, whether it is gone); (None, False) at the deadline."""
        self.link.settimeout(max(0.01, request["timeout_s"]))
        try:
            send(self.link, request)
        except TimeoutError:
            return None, False
        except OSError:
            return None, True
        process = os.pidfd_open(self.pid)
        poll = select.poll()
        for fd in (*self.kept, self.link.fileno(), process):
            poll.register(fd, select.POLLIN)
        poll.register(self.channel.fileno(), select.POLLHUP)
        try:
            while (left := deadline - time.monotonic()) > 0:
                events = [fd for fd, _ in poll.poll(1000 * left)]
                if self.channel.fileno() in events:
                    raise Gone
                for fd in events:
                    if fd in self.kept and not self._read(fd):
                        poll.unregister(fd)
                if process in events:
                    return None, True
                if self.link.fileno() in events:
                    word = self.link.recv(4)
                    if len(word) == 4:
                        return struct.unpack(">i", word)[0], False
                    poll.unregister(self.link.fileno())  # closed by the snippet: its death will tell
        finally:
            os.close(process)
        return None, False

    def _read(self, fd: int) -> bool:
        data = os.read(fd, PIECE)
        self.kept[fd].add(data)
        return bool(data)

    def _drain(self) -> None:
        """What lies in the pipes still: at most what they hold, whoever may go on writing."""
        for fd in self.kept:
            for _ in range(16):
                if not select.select([fd], [], [], 0)[0] or not self._read(fd):
                    break


def serve(link: socket.socket, outputs: tuple[int, int], folder: str, settings: dict[str, Any]) -> NoReturn:
    """The child: give up everything, then run what comes over the link."""
    _checked(libc().prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
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
    _give_up(settings)
    sys.stdout, sys.stderr = (
        open(fd, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False) for fd in (1, 2)
    )  # noqa: SIM115
    sys.argv = ["snippet.py"]
    main = sys.modules["__main__"] = ModuleType("__main__")
    _same_draws()
    requests = link.makefile("rb")
    while True:
        request = receive(requests)
        _limit("CPU", int(request["timeout_s"]) + 2 if request["last"] else SESSION_CPU_S)
        _give(request["stdin"], folder)
        code = _execute(request, main)
        if request["last"]:
            _finish()
        _flush()
        link.sendall(struct.pack(">i", code))


def _give_up(settings: dict[str, Any]) -> None:
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
        _checked(libc().capset(header, nothing), "capset")
    _checked(libc().prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    if code := bytes.fromhex(settings["filter"]):
        kept = ctypes.create_string_buffer(code)
        program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(kept))
        _checked(libc().prctl(SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _limit(name: str, value: int) -> None:
    """Set a resource limit for good, never above the one that is in force."""
    kind = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(kind)[1]
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (bound, bound))


def _same_draws() -> None:
    """Snippets that do not seed their generators draw the same numbers in every run."""
    import random

    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


def _give(text: str, folder: str) -> None:
    """Make a text standard input, in a file without a name (files in memory are denied)."""
    with tempfile.TemporaryFile(dir=folder) if text else open(os.devnull, "r+b") as given:
        given.write(text.encode("utf-8", "replace"))
        given.seek(0)
        os.dup2(given.fileno(), 0)
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


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # the snippet may have put anything there
            continue


def _finish() -> None:
    """What the interpreter does at its end, without taking itself apart."""
    import atexit
    import threading

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException as error:
        os.write(2, f"{type(error).__name__} at exit\n".encode())


def libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _mount(kind: str, target: str, options: str) -> None:
    _checked(
        libc().mount(kind.encode(), target.encode(), kind.encode(), NO_SUID | NO_DEVICES, options.encode()),
        f"mount {kind} on {target}",
    )


def _checked(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    zygote()
