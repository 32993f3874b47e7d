"""spearrl init: a working example of an environment of your own, with a config, a test and a README.

examples:
  spearrl init my_agent
  spearrl init my_agent --name Guess
"""

from __future__ import annotations

import argparse
import json
import keyword
import re
from importlib.util import find_spec
from pathlib import Path

from spearrl.cli.target import refuse_full
from spearrl.cli.terminal import say

FILES = ("env.py", "config.toml", "test_env.py", "README.md")
IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,39}", re.ASCII)
CLASS = re.compile(r"[A-Z][A-Za-z0-9]{0,39}", re.ASCII)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="DIR", help="folder to make; its last part becomes the name of a Python package"
    )
    parser.add_argument("--name", help="name of the environment's class (default: made from DIR)")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    from spearrl.errors import StorageError

    folder = Path(args.folder)
    package = _package(folder)
    name = _class_name(args.name, package)
    _check_free(folder, package)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            with (folder / file).open("x", encoding="utf-8") as handle:  # "x": somebody may have been quicker
                handle.write(_filled(file, package, name))
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}", where="init") from error
    if args.json:
        say(json.dumps({"folder": str(folder), "environment": f"{package}.env:{name}", "files": list(FILES)}))
        return 0
    here = folder.resolve().parent == Path.cwd()
    say(f"{folder}: {', '.join(FILES)}")
    say("next:" if here else f"next:\n  cd {folder.resolve().parent}")
    for command in ("check-env", "play", "train"):
        say(f"  spearrl {command} {package}/config.toml")
    return 0


def _package(folder: Path) -> str:
    from spearrl.errors import RefusedError

    package = folder.resolve().name
    if not IDENTIFIER.fullmatch(package) or keyword.iskeyword(package):
        near = re.sub(r"[^a-z0-9]+", "_", package.lower()).strip("_0123456789") or "my_agent"
        hint = f"use lower-case letters, digits and _, e.g. {near if not keyword.iskeyword(near) else near + '_env'}"
        raise RefusedError(f"{package[:60]!r} cannot be the name of a Python package", where="init", hint=hint)
    return package


def _class_name(name: str | None, package: str) -> str:
    from spearrl.errors import RefusedError

    name = name or "".join(part.capitalize() for part in package.split("_") if part)
    if not CLASS.fullmatch(name) or name in ("Environment", "ConfigError", "Observation", "Outcome", "Task"):
        message = f"{name[:60]!r} cannot be the name of the class"
        raise RefusedError(message, where="--name", hint="use a name of your own such as MyEnvironment")
    return name


def _check_free(folder: Path, package: str) -> None:
    """Nothing is overwritten, and the new package hides no installed one (nor is hidden by it)."""
    from spearrl.errors import RefusedError

    refuse_full(folder)
    spec = find_spec(package)
    if spec is not None and spec.origin is not None:
        message = f"there is a Python module {package!r} already ({spec.origin})"
        raise RefusedError(message, where="init", hint=f"use another name, e.g. {package}_env")


def _filled(file: str, package: str, name: str) -> str:
    from importlib.resources import files
    from string import Template

    text = files("spearrl.cli").joinpath("scaffold", f"{file}.txt").read_text(encoding="utf-8")
    return Template(text).substitute(package=package, name=name, run=package.replace("_", "-"))
