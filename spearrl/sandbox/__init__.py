"""Running code that a model wrote: in a bubblewrap jail on this machine, on a SandboxFusion server or, for code you trust, unprotected.

with open_sandbox(SandboxOptions(timeout_s=5)) as sandbox:
    sandbox.run("print(6 * 7)").stdout
"""

from __future__ import annotations

import sys

from spearrl.errors import ConfigError
from spearrl.sandbox.command import WAYS_OUT
from spearrl.sandbox.fusion import FusionSandbox
from spearrl.sandbox.jailed import JailedSandbox
from spearrl.sandbox.options import Result, Sandbox, SandboxOptions, Session
from spearrl.sandbox.selftest import probe

__all__ = ["Result", "Sandbox", "SandboxOptions", "Session", "open_sandbox", "probe"]


def open_sandbox(options: SandboxOptions) -> Sandbox:
    """A sandbox that was seen to work. Never falls back to less isolation than asked for.

    Raises:
        ConfigError: it cannot be had here, with the reason and the ways out: isolation is missing or does not hold, a package is not there, the
            server does not answer.
    """
    if options.kind == "fusion":
        return _working(FusionSandbox(options))
    if sys.platform != "linux":
        raise ConfigError(
            f"no sandbox on {sys.platform}: it is made of Linux namespaces",
            where="sandbox",
            hint="use sandbox.kind=fusion with a server",
        )
    if options.kind == "none":
        if not options.unsandboxed:
            hint = f"sandbox.unsandboxed=true, if you trust it; else {WAYS_OUT}"
            raise ConfigError(
                "sandbox.kind=none runs code as you, with your files and your network", where="sandbox", hint=hint
            )
        return _working(JailedSandbox(options))
    sandbox = JailedSandbox(options)
    broken = [check for check in probe(sandbox, options) if not check.held]
    if broken:
        sandbox.close()
        what = "; ".join(f"{check.what}: {check.said}" for check in broken)
        raise ConfigError(f"isolation does not hold on this machine ({what})", where="sandbox", hint=WAYS_OUT)
    return sandbox


def _working(sandbox: Sandbox) -> Sandbox:
    result = sandbox.run("print(6 * 7)")
    if result.stdout.strip() != "42":
        sandbox.close()
        raise ConfigError(
            f"the sandbox does not run code: {result.status}: {result.stderr.strip()[-500:]}",
            where="sandbox",
            hint=WAYS_OUT,
        )
    return sandbox
