"""spearrl check-env: does an environment keep its contract? Exit code 0 or 1.

examples:
  spearrl check-env my_pkg.my_env:MyEnvironment
  spearrl check-env webshop env.options.observation=compact
  spearrl check-env my_agent/config.toml --split train --json
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from spearrl.cli.parsing import add_unsandboxed
from spearrl.cli.target import OVERRIDES_HELP, TARGET_HELP, config_of
from spearrl.cli.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="ENV", help=TARGET_HELP)
    parser.add_argument("overrides", nargs="*", metavar="env.options.key=value", help=OVERRIDES_HELP)
    parser.add_argument(
        "--split", action="append", help="split whose tasks are looked at; may be repeated (default: train and val)"
    )
    parser.add_argument(
        "--deadline", type=float, default=10.0, metavar="SECONDS", help="seconds a single call may take (default: 10)"
    )
    add_unsandboxed(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    from spearrl.config.foreign import warn_unsandboxed
    from spearrl.envs.check import check_environment, failures
    from spearrl.errors import ConfigError

    if not args.deadline > 0:
        raise ConfigError(
            f"--deadline {args.deadline:g} is not a time", where="command line", hint="use a number of seconds above 0"
        )
    env = config_of(args.target, args.overrides).env
    warn_unsandboxed(env.options, args.unsandboxed)
    limits: dict[str, Any] = {"max_turns": env.max_turns, "splits": args.split, "deadline_s": args.deadline}
    findings = check_environment(env.name, env.options, **limits)
    failed = failures(findings)
    if args.json:
        entries = [finding.as_json() for finding in findings]
        say(json.dumps({"environment": env.name, "ok": not failed, "findings": entries}, indent=1))
        return 1 if failed else 0
    say("\n".join(map(str, findings)))
    broken = f": {len(failed)} of {len(findings)} rules broken"
    say(f"{env.name}{broken if failed else ' keeps its contract'}")
    return 1 if failed else 0
