"""Does a jail hold? Six snippets that try to get out, run where snippets are run."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass

from spearrl.config.tables import table
from spearrl.sandbox.options import Sandbox, SandboxOptions


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold. `said` is what the snippet printed where it does not."""

    name: str
    what: str
    held: bool
    said: str


def probe(sandbox: Sandbox, options: SandboxOptions) -> list[Check]:
    """The checks, in the order of selftest.toml."""
    with tempfile.NamedTemporaryFile("w") as secret, socket.create_server(("127.0.0.1", 0)) as server:
        secret.write("seen")
        secret.flush()
        os.chmod(secret.name, 0o644)
        spaces = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "net", "mnt", "ipc", "user")}
        given = {
            "file": secret.name,
            "port": server.getsockname()[1],
            "namespaces": spaces,
            "bytes": 4 * options.memory_mib << 20,
        }
        given["processes"] = options.processes
        found = []
        for name, check in table(__file__, "selftest.toml").items():
            result = sandbox.run(check["code"].format(**given))
            said = result.stdout.strip()
            found.append(
                Check(name, check["what"], said == "held", said or f"{result.status}: {result.stderr.strip()[-300:]}")
            )
    return found
