"""Running code that a model wrote: in a bubblewrap jail, on a SandboxFusion server or, for code you trust, unprotected.

with open_sandbox(SandboxOptions(timeout_s=5)) as sandbox:
    sandbox.run("print(6 * 7)").stdout
"""

from __future__ import annotations

import sys

from spearrl.errors import ConfigError
from spearrl.sandbox.jail import JailedSandbox
from spearrl.sandbox.jail_command import WAYS_OUT
from spearrl.sandbox.options import RunResult, Sandbox, SandboxOptions, SandboxSession
from spearrl.sandbox.selftest import check_isolation

__all__ = ["RunResult", "Sandbox", "SandboxOptions", "SandboxSession", "check_isolation", "open_sandbox"]


def open_sandbox(options: SandboxOptions) -> Sandbox:
    """A sandbox that was tried and works. It never falls back to less isolation than asked for.

    Raises:
        ConfigError: there is none here, with the reason and the ways out: isolation is missing or does not hold, a
            package is not installed, the server does not answer.
    """
    if options.kind != "fusion" and sys.platform != "linux":
        complaint, hint = f"no sandbox on {sys.platform}: it is made of Linux namespaces", "use sandbox.kind=fusion"
        raise ConfigError(complaint, where="sandbox", hint=f"{hint} with a server")
    if options.kind == "none" and not options.unsandboxed:
        complaint = "sandbox.kind=none runs code as you, with your files and your network"
        hint = f"sandbox.unsandboxed=true, if you trust it; else {WAYS_OUT}"
        raise ConfigError(complaint, where="sandbox", hint=hint)
    if options.kind == "fusion":
        from spearrl.sandbox.fusion_client import FusionSandbox  # loads an HTTP client, which a jail does not need

        sandbox: Sandbox = FusionSandbox(options)
    else:
        sandbox = JailedSandbox(options)
    if problem := _problem(sandbox, options):
        sandbox.close()
        raise ConfigError(problem, where="sandbox", hint=WAYS_OUT)
    return sandbox


def _problem(sandbox: Sandbox, options: SandboxOptions) -> str | None:
    """What a sandbox does not do as it should."""
    if options.kind == "bubblewrap":
        broken = [f"{check.what}: {check.output}" for check in check_isolation(sandbox, options) if not check.held]
        return f"isolation does not hold on this machine ({'; '.join(broken)})" if broken else None
    result = sandbox.run("print(6 * 7)")
    failure = f"the sandbox does not run code: {result.status}: {result.stderr.strip()[-500:]}"
    return None if result.stdout.strip() == "42" else failure
