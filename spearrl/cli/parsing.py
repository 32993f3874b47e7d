"""Arguments shared by the verbs that take a config, and the config they make."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spearrl.cli.terminal import say

if TYPE_CHECKING:
    from spearrl.config import Resolved, RunConfig
    from spearrl.config.loading import Derive
    from spearrl.launch.devices import Machine
    from spearrl.launch.placement import Placement


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A config file and overrides in any order, and the flags for the most used settings."""
    from spearrl.config.grammar import BASES, MODULES
    from spearrl.config.presets import PRESETS

    overrides_help = "a config file (TOML) or run directory, and settings that win over it"
    parser.add_argument("overrides", nargs="*", metavar="FILE | section.key=value", help=overrides_help)
    parser.add_argument("--preset", metavar="NAME", help=f"start from these settings: {', '.join(PRESETS)}")
    env_help = 'environment: webshop, alfworld, math, sokoban, search, or "my_pkg.mod:Class" of your own'
    parser.add_argument("--env", metavar="NAME", help=env_help)
    parser.add_argument(
        "--algo", metavar="NAME", help=f"base[+module...]: {', '.join(BASES)} + {', '.join(MODULES)}; e.g. grpo+spear"
    )
    model_help = 'directory, or name (Qwen/Qwen2.5-0.5B-Instruct, org/name@revision, smollm2-135m); "tiny": build one'
    parser.add_argument("--model", metavar="MODEL", help=model_help)


def add_gpus(parser: argparse.ArgumentParser) -> None:
    """The flag for the number of GPUs."""
    gpus_help = "GPUs of the run over all machines; who gets what is worked out and printed (default: this machine's)"
    parser.add_argument("--gpus", type=_count, metavar="N", help=gpus_help)


def add_unsandboxed(parser: argparse.ArgumentParser) -> None:
    """The flag without which no config switches the sandbox off."""
    flag_help = "with sandbox.kind=none and sandbox.unsandboxed=true: code that the model writes runs as you"
    parser.add_argument("--i-know-tools-are-unsandboxed", dest="unsandboxed", action="store_true", help=flag_help)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GPUs: use 1 or more; run.device=cpu uses none")
    return int(text)


def config_from(args: argparse.Namespace) -> RunConfig:
    """The config that the shared arguments describe, sizes that fit a large model on processors in it.

    Advice, and what was worked out, go to standard error. Raises ConfigError.
    """
    from spearrl.launch.devices import detect

    fitting: dict[str, Any] = {}

    def derive(config: RunConfig, unset: Collection[str]) -> Mapping[str, Any]:
        fitting.update(_sizes(config, unset, detect()))
        return fitting

    resolved = resolved_from(args, derive)
    check_environment(resolved)
    if fitting:
        values = " ".join(f"{key}={value}" for key, value in fitting.items())
        say(f"worked out for this model on processors: {values}", file=sys.stderr)
    return resolved.config


def check_environment(resolved: Resolved) -> None:
    """Check the environment's own settings, which the config's sections do not know. Raises ConfigError.

    Told on standard error: the preset that nobody named, and what will probably disappoint.
    """
    from spearrl import envs
    from spearrl.config import advice
    from spearrl.config.problems import Problem, raise_all

    env, sources = resolved.config.env, resolved.sources
    errors = envs.option_errors(envs.load(env.name), env.options)
    where = [sources.get(f"env.options.{key.partition('.')[0]}", "") for key, _, _ in errors]
    raise_all([Problem(message, fix, source) for (_, message, fix), source in zip(errors, where, strict=True)])
    if resolved.by_default:
        using = f"using preset {resolved.preset} (spearrl config show --why lists it)"
        say(f"no config file, preset or model was given: {using}", file=sys.stderr)
    for problem in advice(resolved.config, sources):
        say(f"warning: {problem}", file=sys.stderr)


def _sizes(config: RunConfig, unset: Collection[str], machine: Machine) -> Mapping[str, Any]:
    """Sizes that a large model gets on processors.

    A model of the hub whose chats cannot be used is refused before its weights are downloaded. Raises ConfigError.
    """
    from spearrl.launch.factories import make_environment
    from spearrl.launch.processors import sizes
    from spearrl.models import is_hub_name
    from spearrl.start.origin import with_pinned_model

    if machine.present and is_hub_name(config.model.path):
        with_pinned_model(config, make_environment(config))
    return sizes(config, unset) if machine.present and not machine.gpus else {}


def placed_from(args: argparse.Namespace, machine: Callable[[], Machine]) -> tuple[Resolved, Placement]:
    """The config with what follows from the machine's GPUs, and which of them do what. Raises ConfigError.

    A model of the hub is downloaded, unless the machine is only thought of. Without GPUs, sizes of a step are worked
    out too.
    """
    from spearrl.launch.devices import parameters_of
    from spearrl.launch.placement import place
    from spearrl.models import directory_of

    placements: list[Placement] = []

    def derive(config: RunConfig, unset: Collection[str]) -> Mapping[str, Any]:
        host, model = machine(), config.model.path
        fitting = _sizes(config, unset, host)
        folder = directory_of(model) if host.present and model != "tiny" else model
        config = config.with_settings(fitting)
        placement = place(config, host, derive=unset, parameters=parameters_of(str(folder)))
        placements.append(replace(placement, derived={**fitting, **placement.derived}))
        return placements[0].derived

    return resolved_from(args, derive), placements[0]


def resolved_from(args: argparse.Namespace, derive: Derive | None = None, *, shown: bool = False) -> Resolved:
    """The config with its sources, silently; `shown`: it is only looked at. Raises ConfigError, RefusedError."""
    from spearrl.config import resolve
    from spearrl.errors import ConfigError

    overrides = [word for word in args.overrides if is_override(word)]
    files = [word for word in args.overrides if not is_override(word)]
    if len(files) > 1:
        names = ", ".join(repr(name[:60]) for name in files)
        hint = "use one file; settings are section.key=value"
        raise ConfigError(f"{len(files)} config files were given ({names})", where="command line", hint=hint)
    flags: dict[str, Any] = {name: getattr(args, name, None) for name in ("env", "algo", "model", "preset", "gpus")}
    return resolve(files[0] if files else None, overrides, **flags, derive=derive, shown=shown)


def is_override(word: str) -> bool:
    """section.key=value; a path may hold "=" too, but only behind a "/"."""
    key, separator, _ = word.partition("=")
    return bool(separator) and "/" not in key
