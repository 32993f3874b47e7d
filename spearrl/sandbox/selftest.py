"""Does a jail hold? Six snippets that try to get out, run where snippets are run.

Each prints "held" where the jail holds.
"""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass

from spearrl.sandbox.options import Sandbox, SandboxOptions

NAMESPACES = ("pid", "net", "mnt", "ipc", "user")

SNIPPETS = {
    "files of this machine cannot be read": """
try:
    print(open({file!r}).read())
except OSError:
    print("held")
""",
    "nothing can be written outside /tmp": """
import os, sys
written = []
for folder in ("/", "/usr", "/usr/lib", "/dev", "/home", os.path.dirname(os.__file__), *sys.path):
    try:
        open(os.path.join(folder, "spearrl-probe"), "w").close()
        written.append(folder)
    except OSError:
        pass
print(written or "held")
""",
    "no network, this machine's own ports included": """
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), timeout=2)
    print("connected")
except OSError:
    print("held")
""",
    "processes, network, mounts and users are in namespaces apart": """
import os
shared = [name for name, host in {namespaces!r}.items() if os.readlink("/proc/self/ns/" + name) == host]
print(shared or "held")
""",
    "no new namespaces, no mounts": """
import ctypes
libc = ctypes.CDLL(None)
refused = libc.unshare(0x10000000) < 0 and libc.unshare(0x20000) < 0
refused = refused and libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) < 0
print("held" if refused else "made one")
""",
    "memory and the number of processes are limited": """
import resource
kinds = (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)
limits = [resource.getrlimit(kind)[1] for kind in kinds]
status = open("/proc/self/status").read()
powerless = "NoNewPrivs:\\t1" in status and "CapEff:\\t0000000000000000" in status
try:
    bytearray({bytes})
    print("more memory than the limit")
except MemoryError:
    print("held" if min(limits) > 0 and limits[1] <= {processes} and powerless else (limits, status))
""",
}


@dataclass(frozen=True, slots=True)
class IsolationCheck:
    """One thing that must hold, and what the snippet printed (or how it ended)."""

    what: str
    held: bool
    output: str


def check_isolation(sandbox: Sandbox, options: SandboxOptions) -> list[IsolationCheck]:
    """Run every snippet of `SNIPPETS` in the sandbox."""
    checks = []
    with tempfile.NamedTemporaryFile("w") as secret, socket.create_server(("127.0.0.1", 0)) as server:
        secret.write("read")
        secret.flush()
        os.chmod(secret.name, 0o644)
        values = {
            "file": secret.name,
            "port": server.getsockname()[1],
            "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES},
            "bytes": 4 * options.memory_mib << 20,
            "processes": options.processes,
        }
        for what, code in SNIPPETS.items():
            result = sandbox.run(code.format(**values))
            output = result.stdout.strip() or f"{result.status}: {result.stderr.strip()[-300:]}"
            checks.append(IsolationCheck(what, output == "held", output))
    return checks
