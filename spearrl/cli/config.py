"""spearrl config: what a run would use and why, how two configs differ, what settings there are.

actions:
  show    the settings that a file, preset, flags and overrides amount to, as TOML
  diff    what differs between two config files, run directories or presets
  schema  every setting there is, as JSON schema (docs/config.md is the page to read)

examples:
  spearrl config show --preset tiny --why
  spearrl config show --preset webshop-1.5b --gpus 8
  spearrl config show shop.toml rollout.group_size=16 --algo grpo+sil
  spearrl config diff runs/webshop-grpo-spear-s0 runs/webshop-grpo-s0
  spearrl config diff webshop-1.5b webshop-1.5b-base
  spearrl config schema > spearrl.schema.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spearrl.cli.parsing import add_config_arguments, add_gpus, check_environment, placed_from, resolved_from
from spearrl.cli.terminal import say

if TYPE_CHECKING:
    from spearrl.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("show", "diff", "schema"), help="see below")
    add_config_arguments(parser)
    add_gpus(parser)
    parser.add_argument("--why", action="store_true", help="show: where each value came from, as a comment behind it")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    text = {"show": _show, "diff": _diff, "schema": _schema}[args.action](args)
    say(text.rstrip("\n"))
    return 0


def _show(args: argparse.Namespace) -> str:
    from spearrl.config import to_toml
    from spearrl.config.dump import without_secrets

    if args.gpus is not None:
        from spearrl.launch.describe import describe
        from spearrl.launch.devices import imagined

        resolved, placement = placed_from(args, lambda: imagined(args.gpus))
        say(describe(placement), file=sys.stderr)
    else:
        resolved = resolved_from(args, shown=True)
    if resolved.unrepeated:
        words = " ".join(argument for argument, _ in resolved.unrepeated)
        say(f"to be said again where this config is used, for it may be a stranger's:  {words}", file=sys.stderr)
    else:
        check_environment(resolved)
    if args.json:
        settings = without_secrets(resolved.config.model_dump(mode="json"))
        return json.dumps({"config": settings, "sources": dict(resolved.sources)}, indent=1)
    return to_toml(resolved.config, resolved.sources if args.why else None)


def _diff(args: argparse.Namespace) -> str:
    from spearrl.config import diff
    from spearrl.config.dump import toml_value
    from spearrl.errors import ConfigError

    if len(args.overrides) != 2 or args.preset or args.env or args.algo or args.model or args.gpus:
        hint = "use spearrl config diff A B, each a config file, a run directory or a preset"
        raise ConfigError(
            f"config diff compares two configs; {len(args.overrides)} given", where="command line", hint=hint
        )
    differences = diff(*(_named(name) for name in args.overrides))
    if args.json:
        return json.dumps({key: list(pair) for key, pair in differences.items()}, indent=1, default=str)
    width = max(map(len, differences), default=0)

    def text_of(key: str, value: Any) -> str:
        return "not given" if value is None and key.startswith("env.options.") else toml_value(value)

    lines = [f"{key:<{width}}  {text_of(key, a)} -> {text_of(key, b)}" for key, (a, b) in differences.items()]
    return "\n".join(lines) or "no difference"


def _named(name: str) -> RunConfig:
    """The config of a preset name, a file or a run directory."""
    from spearrl.config import resolve
    from spearrl.config.presets import PRESETS

    preset = name in PRESETS and not Path(name).exists()
    return (resolve(preset=name) if preset else resolve(name, shown=True)).config


def _schema(args: argparse.Namespace) -> str:
    """JSON schema of a config file (editors complete and check with it); `preset` may stand beside the sections."""
    from spearrl.config import RunConfig
    from spearrl.config.presets import PRESETS

    schema = RunConfig.model_json_schema()
    preset = {"enum": list(PRESETS), "type": "string", "description": "Preset the file starts from."}
    return json.dumps(
        {**schema, "properties": {"preset": preset, **schema["properties"]}}, indent=1, ensure_ascii=False
    )
