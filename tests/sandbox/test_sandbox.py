"""The sandbox: hostile code gets nowhere and leaves nothing, and where isolation is missing nothing is run."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

from spearrl.errors import ConfigError
from spearrl.sandbox import SandboxOptions, open_sandbox, selftest
from spearrl.sandbox import jail as jailed
from spearrl.sandbox.seccomp import filter_program

HOSTILE = tomllib.loads(Path(__file__).with_name("hostile.toml").read_text())
PLENTY_S = 60.0  # for what takes milliseconds on an idle machine
ROOT = Path(__file__).resolve().parents[2]


def why_not() -> str:
    """Why there is no sandbox on this machine; "" where there is one."""
    try:
        open_sandbox(SandboxOptions(packages=())).close()
    except ConfigError as error:
        return error.message
    return ""


WHY_NOT = why_not()
needs_isolation = pytest.mark.skipif(bool(WHY_NOT), reason=f"no isolation on this machine: {WHY_NOT[:120]}")


def processes(ancestor: int) -> dict[int, str]:
    """Command lines of the processes that descend from one."""
    parents, words = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                words[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if stat.rpartition(")")[2].split()[0] != "Z":
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    descendants, todo = {}, [ancestor]
    while todo:
        pid = todo.pop()
        children = [child for child, parent in parents.items() if parent == pid]
        descendants |= {child: words[child] for child in children}
        todo += children
    return descendants


def eventually(true) -> bool:
    """Whether something becomes true within a long time."""
    end = time.monotonic() + PLENTY_S
    while not (done := true()) and time.monotonic() < end:
        time.sleep(0.01)
    return done


def at_rest(sandbox) -> bool:
    """Whether nothing runs in the jail but the interpreter, and a supervisor and a child for every run to come."""
    inside = processes(sandbox._jail._process.pid)
    return (
        all("jail_program.py" in words for words in inside.values())
        and sum("bwrap" not in words for words in inside.values()) <= 1 + 2 * sandbox.concurrency
    )


def hostile_sockets() -> list[str]:
    """The port and the abstract unix socket that hostile.toml tries to open, where this machine has them."""
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return [words[1] for words in lines if words[1].endswith(f":{47123:04X}")] + re.findall(
        r"@spearrl\S*", Path("/proc/net/unix").read_text()
    )


@pytest.fixture(scope="module")
def sandbox():
    os.environ["SPEARRL_SECRET"] = "hostile-secret"
    with open_sandbox(SandboxOptions(timeout_s=PLENTY_S, concurrency=2)) as opened:
        yield opened
    del os.environ["SPEARRL_SECRET"]


@pytest.fixture(scope="module")
def single():
    """A sandbox on a machine that lets bubblewrap make namespaces, but not what runs in it."""
    plain = jailed.jail_command
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jailed, "jail_command", lambda *arguments: plain(*arguments)[:-1] + ["--disable-userns", "--"])
        opened = open_sandbox(SandboxOptions(timeout_s=PLENTY_S, concurrency=1, packages=()))
    with opened:
        assert opened.startup["fault"]
        yield opened


@needs_isolation
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_gets_nowhere(sandbox, name):
    case = HOSTILE[name]
    if case.get("needs_process_limit"):
        held = sandbox.run("import resource; print(resource.getrlimit(resource.RLIMIT_NPROC)[1])")
        assert int(held.stdout) == 24, "no process limit is in force: nothing may fork freely"
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = case["code"].replace("{port}", str(server.getsockname()[1]))
        result = sandbox.run(code, timeout_s=case.get("timeout_s"))
    assert result.status in case["status"], result
    assert "ESCAPED" not in result.stdout, result
    assert result.cut == case.get("cut", False)
    assert len(result.stdout) < 70_000 and len(result.stderr) < 70_000
    assert sandbox.run("print(6 * 7)").stdout == "42\n"
    assert eventually(lambda: at_rest(sandbox)), processes(os.getpid())
    assert not hostile_sockets()
    assert not [path for path in ("/usr/spearrl-hostile", "/spearrl-hostile", "/tmp/hostile") if os.path.exists(path)]


@needs_isolation
@pytest.mark.parametrize(
    "name",
    [
        "ignores_sigterm",
        "daemon",
        "fork_bomb",
        "kill_all",
        "kill_parent",
        "nested_user_namespace",
        "ptrace",
        "tmp_fill",
        "reads_passwd",
    ],
)
def test_hostile_code_in_a_jail_of_its_own(single, name):
    case = HOSTILE[name]
    result = single.run(case["code"], timeout_s=case.get("timeout_s"))
    assert result.status in (*case["status"], "killed"), result
    assert (
        "ESCAPED" not in result.stdout or name == "kill_parent"
    )  # here the parent is in the jail: it ends itself only
    assert single.run("import os; print(os.listdir('/tmp'))").stdout == "[]\n"
    assert eventually(lambda: not any("sleep" in words for words in processes(os.getpid()).values()))


@needs_isolation
def test_the_self_test_says_what_holds(sandbox, single):
    for one in (sandbox, single):
        checks = selftest.check_isolation(one, one.options)
        assert len(checks) == 6 and all(check.held for check in checks), checks


@needs_isolation
def test_runs_do_not_see_each_other(sandbox):
    leaves = "import sys, random, builtins; open('/tmp/x', 'w').write('1'); builtins.print = None; random.seed(5)"
    leaves += "; sys.modules['numpy'] = None"
    assert sandbox.run(leaves).status == "ok"
    for _ in range(3):
        result = sandbox.run(
            "import os, numpy; print(os.listdir('/tmp'), os.listdir('/dev/shm'), os.listdir('/dev/pts'), os.getpid())"
        )
        assert result.stdout == "[] [] [] 1\n", result


@needs_isolation
def test_a_gigabyte_of_output_stays_out_of_this_process(sandbox):
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident_peak()
    result = sandbox.run("import os\nfor _ in range(16384): os.write(1, b'x' * 65536)\nos.write(1, b'end')")
    assert result.status == "ok" and result.cut and result.stdout.endswith("xend")
    assert f"[... {(1 << 30) + 3 - 65536:,} characters cut]" in result.stdout
    assert resident_peak() - before < 20 << 20


def resident_peak() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


@needs_isolation
@pytest.mark.parametrize(
    ("code", "status", "exit_code", "said"),
    [
        ("print(input()[::-1])", "ok", 0, "olleh\n"),
        ("import numpy, sympy; print(sympy.factor('x**2 - 1'), numpy.arange(4).sum())", "ok", 0, "(x - 1)*(x + 1) 6\n"),
        ("import sys; print('a'); sys.exit(3)", "error", 3, "a\n"),
        ("exit()", "ok", 0, ""),
        ("import os; os._exit(4)", "error", 4, ""),
        (
            "import os, signal; os.kill(os.fork() or os.getpid(), signal.SIGKILL); os.wait(); print('on')",
            "ok",
            0,
            "on\n",
        ),
        ("import threading\nthreading.Timer(0.05, print, ['late']).start()", "ok", 0, "late\n"),
        ("import atexit; atexit.register(print, 'bye')", "ok", 0, "bye\n"),
        ("if __name__ == '__main__':\n    print('é', '\\ud800')", "ok", 0, "é ?\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\nprint(A())", "ok", 0, "A(x=1)\n"),
        (
            "import subprocess; print(subprocess.run(['echo', 'hi'], capture_output=True, text=True).stdout)",
            "ok",
            0,
            "hi\n\n",
        ),
        (
            "import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p: print(p.map(abs, [-1, -2]))",
            "ok",
            0,
            "[1, 2]\n",
        ),
        ("print(1", "error", 1, ""),
        ("x = '\ud800'", "error", 1, ""),
        ("", "ok", 0, ""),
    ],
)
def test_what_becomes_of_code(sandbox, code, status, exit_code, said):
    result = sandbox.run(code, stdin="hello\n")
    assert (result.status, result.exit_code, result.stdout) == (status, exit_code, said), result


@needs_isolation
def test_tracebacks_are_pythons_own(sandbox):
    result = sandbox.run("def f():\n    return 1 / 0\nf()")
    assert result.stderr.startswith(
        'Traceback (most recent call last):\n  File "snippet.py", line 3, in <module>\n    f()\n'
    )
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n") and "jail_program.py" not in result.stderr


@needs_isolation
def test_the_same_code_draws_the_same_numbers(sandbox):
    code = "import random, numpy; print(random.random(), numpy.random.rand(), {'a', 'b', 'c', 'd'})"
    with open_sandbox(SandboxOptions(timeout_s=PLENTY_S)) as another:
        assert len({one.run(code).stdout for one in (sandbox, sandbox, another)}) == 1


@needs_isolation
def test_a_session_keeps_variables_until_its_interpreter_ends(sandbox):
    session = sandbox.session()
    assert session.run("x = 5").status == "ok"
    assert session.run("import sys; sys.exit(7)").exit_code == 7
    assert session.run("print(x, input())", stdin="in").stdout == "5 in\n"
    assert session.run("1/0").status == "error"
    ended = session.run("while True: pass", timeout_s=0.5)
    assert ended.status == "timeout" and "without variables" in ended.stderr
    assert "NameError" in session.run("print(x)").stderr
    died = session.run("import os; os._exit(9)")
    assert died.exit_code == 9 and "without variables" in died.stderr
    assert session.run("import subprocess; subprocess.Popen(['sleep', '777003']); print('y')").stdout == "y\n"
    other = sandbox.session()
    assert "NameError" in other.run("y = 1; print(x)").stderr
    session.close()
    session.close()
    other.close()
    assert eventually(lambda: at_rest(sandbox))


@needs_isolation
def test_a_jail_that_is_killed_is_replaced(sandbox):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(sandbox.run("import subprocess; subprocess.run(['sleep', '777005'])"))
    )
    thread.start()
    jail = sandbox._jail
    assert eventually(lambda: any("777005" in words for words in processes(jail._process.pid).values()))
    jail._process.kill()
    thread.join(PLENTY_S)
    assert results[0].status == "killed" and "went down" in results[0].stderr
    assert [sandbox.run("print(1)").stdout for _ in range(4)] == ["1\n"] * 4
    assert sandbox._jail is not jail


@needs_isolation
def test_nothing_is_left_after_close_or_kill(tmp_path):
    script = """
import sys, threading, time
from spearrl.sandbox import *
s = open_sandbox(SandboxOptions(packages=(), timeout_s=600))
threading.Thread(target=s.run, args=(sys.argv[1],), daemon=True).start()
print('up', flush=True)
time.sleep(600)
"""
    code = HOSTILE["daemon"]["code"] + "\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", script, code], cwd=ROOT, stdout=subprocess.PIPE) as host:
        assert host.stdout.readline() == b"up\n"
        assert eventually(lambda: any("777001" in words for words in processes(host.pid).values()))
        running = processes(host.pid)
        host.kill()
    assert len(running) > 4
    assert eventually(
        lambda: (
            not [pid for pid, words in running.items() if Path(f"/proc/{pid}/cmdline").exists() and still(pid, words)]
        )
    )
    with open_sandbox(SandboxOptions(packages=())) as opened:
        pid = opened._jail._process.pid
        inside = processes(pid)
    assert eventually(lambda: not any(still(pid, words) for pid, words in inside.items()))
    opened.close()
    assert opened.run("print(1)").status == "unavailable"


def still(pid: int, words: str) -> bool:
    try:
        return words.encode() == Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return False


@needs_isolation
def test_a_fork_of_this_process_is_refused_and_does_no_harm(tmp_path):
    script = """
import os
from spearrl.sandbox import *
s = open_sandbox(SandboxOptions(packages=(), concurrency=1))
pid = os.fork()
result = s.run('print(6 * 7)')
if pid == 0:
    s.close()
    print('child', result.status, result.stderr, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print('parent', result.stdout, s.run('print(43)').stdout)
s.close()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PLENTY_S)
    child, parent = done.stdout.split("\n", 1)
    assert child.startswith("child unavailable ") and "forked" in child and parent.split() == ["parent", "42", "43"], (
        done
    )


@needs_isolation
def test_no_more_runs_at_a_time_than_allowed(monkeypatch):
    active, most, lock, play = [0], [0], threading.Lock(), jailed.JailedRun.execute

    def count(change):
        with lock:
            active[0] += change
            most[0] = max(most[0], active[0])

    monkeypatch.setattr(
        jailed.JailedRun, "execute", lambda self, *a, **k: (count(1), play(self, *a, **k), count(-1))[1]
    )
    with open_sandbox(SandboxOptions(packages=(), concurrency=2, timeout_s=PLENTY_S)) as opened:
        threads = [threading.Thread(target=opened.run, args=("import time; time.sleep(0.02)",)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PLENTY_S)
    assert most[0] == 2 and active[0] == 0


@needs_isolation
def test_as_another_user():
    """Everything above ran as whoever runs the tests; here the other kind of user does, if root runs them."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    prefix = [
        "setpriv",
        "--reuid=54321",
        "--regid=54321",
        "--clear-groups",
        "env",
        "-i",
        "PATH=/usr/bin:/bin",
        f"PYTHONPATH={':'.join([str(ROOT), *sys.path[1:]])}",
    ]
    pythons = [sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"]
    version = f"import sys, pydantic; print(sys.version_info[:2] == {tuple(sys.version_info[:2])})"
    fit = [
        one
        for one in pythons
        if subprocess.run([*prefix, one, "-c", version], capture_output=True, cwd="/").stdout == b"True\n"
    ]
    if not fit:
        pytest.skip("no Python of this version that another user may run")
    script = """
import sys, tomllib
from spearrl.sandbox import *
s = open_sandbox(SandboxOptions())
for case in tomllib.loads(sys.stdin.read()).values():
    r = s.run(case['code'], timeout_s=case.get('timeout_s', 60))
    assert r.status in case['status'] and 'ESCAPED' not in r.stdout, (case, r)
print('held', s.startup['fault'])
"""
    done = subprocess.run(
        [*prefix, fit[0], "-c", script],
        input=(ROOT / "tests/sandbox/hostile.toml").read_text(),
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.stdout == "held \n", done


def test_without_bubblewrap_nothing_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        open_sandbox(SandboxOptions())
    assert "not installed" in str(caught.value)
    for way in ("apt-get install bubblewrap", "user namespaces", "sandbox.kind=fusion", "unsandboxed=true"):
        assert way in str(caught.value)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions to create new namespace"),
        (
            'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
            "isolation (does not hold|is missing)",
        ),  # below /tmp it does not even start
    ],
)
def test_a_jail_that_does_not_hold_is_refused(monkeypatch, tmp_path, script, reason):
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(
        jailed, "interpreter", lambda: Path(shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable)
    )
    with pytest.raises(ConfigError, match=reason) as caught:
        open_sandbox(SandboxOptions(packages=()))
    assert "sandbox.kind=fusion" in str(caught.value)


def test_unsandboxed_code_needs_a_yes_and_still_has_limits():
    with pytest.raises(ConfigError, match="your files and your network"):
        open_sandbox(SandboxOptions(kind="none"))
    with open_sandbox(SandboxOptions(kind="none", unsandboxed=True, packages=(), timeout_s=PLENTY_S)) as opened:
        folder = opened.run("import os; open('x', 'w'); print(os.getcwd())").stdout.strip()
        assert "spearrl-run-" in folder and eventually(lambda: not os.path.exists(folder))
        assert opened.run(HOSTILE["allocates_1_gib"]["code"]).status == "memory"
        late = opened.run(
            "import subprocess; subprocess.Popen(['sleep', '777004']); print(1, flush=True)\nwhile True: pass",
            timeout_s=0.5,
        )
        assert (late.status, late.stdout) == ("timeout", "1\n")
        assert eventually(lambda: not any("777004" in words for words in processes(os.getpid()).values()))
        assert "SPEARRL_SECRET" not in opened.run("import os; print(dict(os.environ))").stdout


def test_packages_that_are_not_there_are_named():
    with pytest.raises(ConfigError, match="no-such-thing"):
        open_sandbox(SandboxOptions(packages=("no-such-thing",)))


def test_code_that_is_too_long_is_not_run():
    with open_sandbox(SandboxOptions(kind="none", unsandboxed=True, packages=())) as opened:
        result = opened.run("#" * ((1 << 20) + 1))
    assert result.status == "error" and "1,048,577 characters" in result.stderr


@pytest.mark.parametrize(("machine", "arch", "clone"), [("x86_64", 0xC000003E, 56), ("aarch64", 0xC00000B7, 220)])
def test_the_filter_decides_as_the_kernel_would(machine, arch, clone):
    allow, refuse = 0x7FFF0000, 0x00050001
    table = tomllib.loads((ROOT / "spearrl/sandbox/seccomp.toml").read_text())
    column = 0 if machine == "x86_64" else 1
    denied = {numbers[column] for numbers in table.values()} - {-1}
    assert len(denied) > 50
    code = filter_program(machine)
    for number in range(500):
        expected = refuse if number in denied else 0x00050026 if number == 435 else allow
        assert decide(code, arch, number, 17) == expected, number
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert decide(code, arch, clone, flag | 17) == refuse
    assert decide(code, arch, 0x40000000 + 165, 0) == refuse
    assert decide(code, arch ^ 1, 1, 0) == 0x80000000
    assert filter_program("riscv64") == b""


def decide(code: bytes, arch: int, number: int, argument: int) -> int:
    """What a classic BPF program returns for a system call."""
    import struct

    data = struct.pack("<IIQQ", number, arch, 0, argument)
    steps, at, value = list(struct.iter_unpack("HBBI", code)), 0, 0
    while True:
        kind, yes, no, constant = steps[at]
        at += 1
        if kind == 0x20:
            value = struct.unpack_from("<I", data, constant)[0]
        elif kind == 0x06:
            return constant
        else:
            at += yes if {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[kind] else no
