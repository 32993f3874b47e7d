"""Arguments shared by the verbs that take a config, and the config they make."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spearrl.config import Resolved, RunConfig
    from spearrl.config.loading import Derive
    from spearrl.launch.devices import Machine
    from spearrl.launch.placement import Placement


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A config file and overrides in any order, and the flags for the most used settings."""
    from spearrl.config.grammar import BASES, MODULES
    from spearrl.config.presets import PRESETS

    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="FILE | section.key=value",
        help="a config file (TOML) or run directory, and settings that win over it",
    )
    parser.add_argument("--preset", metavar="NAME", help=f"start from these settings: {', '.join(PRESETS)}")
    parser.add_argument(
        "--env",
        metavar="NAME",
        help='environment: webshop, alfworld, math, sokoban, search, or "my_pkg.mod:Class" of your own',
    )
    parser.add_argument(
        "--algo", metavar="NAME", help=f"base[+module...]: {', '.join(BASES)} + {', '.join(MODULES)}; e.g. grpo+spear"
    )
    parser.add_argument("--model", metavar="DIR", help='model directory, or "tiny": build one for this environment')


def add_gpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs of the run over all machines; who gets what is worked out and printed (default: this machine's)",
    )


def config_from(args: argparse.Namespace) -> RunConfig:
    """The config that the shared arguments describe; advice about it goes to standard error. Raises ConfigError."""
    resolved = resolved_from(args)
    check_environment(resolved)
    announce(resolved)
    return resolved.config


def gpu_override(args: argparse.Namespace) -> list[str]:
    """What --gpus sets. Raises ConfigError."""
    from spearrl.errors import ConfigError

    count = getattr(args, "gpus", None)
    if count is None:
        return []
    if count < 1 or any(word.startswith("placement.gpus=") for word in args.overrides):
        what = f"--gpus {count} is not a number of GPUs" if count < 1 else "--gpus and placement.gpus= are both given"
        raise ConfigError(
            what,
            where="command line",
            hint="use --gpus 1 or more; run.device=cpu uses none" if count < 1 else "use one of them",
        )
    return [f"placement.gpus={count}"]


def check_environment(resolved: Resolved) -> None:
    """The environment's own settings, with the place they came from: config models do not know them."""
    from spearrl import envs
    from spearrl.config.problems import Problem, raise_all

    section = resolved.config.env
    complaints = envs.option_errors(envs.load(section.name), section.options)
    sources = resolved.sources
    raise_all(
        [
            Problem(text, fix, (key,), sources.get(f"env.options.{key.partition('.')[0]}", ""))
            for key, text, fix in complaints
        ]
    )


def placed_from(args: argparse.Namespace, find: Callable[[], Machine]) -> tuple[Resolved, Placement]:
    """The config with what follows from the GPUs of the machine `find` finds, and who gets which. Raises ConfigError."""
    from spearrl.launch.devices import parameters_of
    from spearrl.launch.placement import place

    found: list[Placement] = []

    def derive(config: RunConfig, unset: Collection[str]) -> Mapping[str, Any]:
        found.append(place(config, find(), derive=unset, parameters=parameters_of(config.model.path)))
        return found[0].derived

    return resolved_from(args, derive), found[0]


def resolved_from(args: argparse.Namespace, derive: Derive | None = None) -> Resolved:
    """The config with its sources, silently. Raises ConfigError."""
    from spearrl.config import resolve
    from spearrl.errors import ConfigError

    overrides = [word for word in args.overrides if _is_override(word)] + gpu_override(args)
    files = [word for word in args.overrides if not _is_override(word)]
    if len(files) > 1:
        names = ", ".join(repr(name[:60]) for name in files)
        raise ConfigError(
            f"{len(files)} config files were given ({names})",
            where="command line",
            hint="use one file; settings are section.key=value",
        )
    return resolve(
        files[0] if files else None,
        overrides,
        env=args.env,
        algo=args.algo,
        model=args.model,
        preset=args.preset,
        derive=derive,
    )


def announce(resolved: Resolved) -> None:
    """On standard error: the preset nobody asked for, and what will probably disappoint."""
    from spearrl.config import advice

    if resolved.by_default:
        text = f"no config file, preset or model was given: using preset {resolved.preset} (spearrl config show --why lists it)"
        print(text, file=sys.stderr)
    for problem in advice(resolved.config, resolved.sources):
        print(f"warning: {problem}", file=sys.stderr)


def _is_override(word: str) -> bool:
    """section.key=value; a path may hold "=" too, but only behind a "/"."""
    key, separator, _ = word.partition("=")
    return bool(separator) and "/" not in key
