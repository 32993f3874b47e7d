"""What a config may not decide that comes with a directory, which may be a stranger's: a run, or a model.

A file that is named on the command line is the user's own. Settings of a directory's config that run code, send text to
other machines, open ports to them or take protection away count only where the command line, or the overrides of
`load_config` and `Trainer.resume`, say them again. Code that this process has imported already is not run anew by its
name. A config that switches the sandbox off needs a word beside it, wherever it comes from.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spearrl.config.dump import flat, toml_value
from spearrl.config.fields import OPTIONS, Key, dotted, is_option
from spearrl.config.sections import RunConfig
from spearrl.errors import RefusedError

IMPORTS: tuple[Key, ...] = (("env", "name"), ("algo", "loss"), ("algo", "advantage"))
SERVERS: Key = ("vllm", "servers")
LAUNCHER: Key = ("rollout", "launcher")
LOOPBACK = re.compile(r"https?://(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d{1,5})?(/[\w./~-]*)?", re.ASCII)
REFERENCE = "reference"
SWITCH, FLAG = "unsandboxed", "--i-know-tools-are-unsandboxed"
_BARE = re.compile(r"[A-Za-z_][\w.:/,@+-]*", re.ASCII)
_BESIDE = ("checkpoints", "events.jsonl", "tokenizer_config.json")  # the config of a run, or of a model


def in_directory(path: str | Path) -> bool:
    """Whether a config comes with a directory: that was named, or the file lies in one of a run or a model."""
    folder = os.path.dirname(path)
    return os.path.isdir(path) or any(os.path.exists(os.path.join(folder, name)) for name in _BESIDE)


def refuse_links(folder: str | Path) -> None:
    """Raise RefusedError where a run or model directory holds links, pipes or devices, which lead out of it.

    Only `reference` may be a link, to the folder of a frozen model: nothing is written there.
    """
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            entry = os.path.join(path, name)
            mode = os.lstat(entry).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and entry != os.path.join(folder, REFERENCE):
                kind = f"a link to {os.readlink(entry)}" if stat.S_ISLNK(mode) else "no regular file"
                hint = "a directory may be a stranger's, so nothing leads out of it: put the file itself there"
                raise RefusedError(f"it is {kind}", where=entry, hint=hint)


def dangers(settings: Mapping[Key, Any], imported: Container[str] = ()) -> list[tuple[str, str]]:
    """Settings that a stranger must not decide: (the argument that says them again, what they do).

    Args:
        imported: modules that are here already.
    """
    found = []
    for key, value in (item for pair in settings.items() for item in singles(*pair)):
        if key in IMPORTS and str(value).partition(":")[0] in imported:
            continue
        reason = next(filter(None, (_danger(*item) for item in singles(key, value, lists=True))), "")
        found += [(argument(key, value), reason)] if reason else []
    return found


def refuse(path: str | Path, found: Sequence[tuple[str, str]]) -> None:
    """Raise RefusedError where settings are found that have to be said again, with what to type."""
    if found:
        listed = "".join(f"\n  {words}: {reason}" for words, reason in found)
        text = f"a directory's config may be a stranger's; what these settings do has to be asked for{listed}"
        hint = f"if you trust them, add to the command (or to overrides):  {' '.join(words for words, _ in found)}"
        raise RefusedError(text, where=str(path), hint=hint)


def to_repeat(config: RunConfig) -> str:
    """What has to be typed behind a command that takes its settings from this run's directory; begins with a space."""
    settings = {tuple(name.split(".", 2)): value for name, value in flat(config).items()}
    return "".join(f" {words}" for words, _ in dangers(settings))


def argument(key: Key, value: Any) -> str:
    """A setting as a shell takes it."""
    bare = isinstance(value, str) and _BARE.fullmatch(value) and value not in ("true", "false", "inf", "nan")
    return shlex.quote(f"{dotted(key)}={value if bare else toml_value(value)}")


def unsandboxed(options: Mapping[str, Any], allowed: bool) -> str:
    """A warning where an environment's options switch its sandbox off, else "".

    Raises RefusedError where that is not `allowed` by the caller: a config alone does not do it.
    """
    if not any(key[-1] == SWITCH and value for key, value in singles(OPTIONS, options, lists=True)):
        return ""
    if not allowed:
        text = "the sandbox is switched off: code that the model writes would run as you"
        hint = f"add {FLAG} (in Python unsandboxed_tools=True), or leave sandbox.{SWITCH} out"
        raise RefusedError(text, where="env.options", hint=hint)
    return "the sandbox is switched off: code that the model writes runs as you, with your files and your network"


def warn_unsandboxed(options: Mapping[str, Any], allowed: bool) -> None:
    """`unsandboxed`, as Python's warning."""
    if text := unsandboxed(options, allowed):
        warnings.warn(text, stacklevel=1)


def singles(key: Key, value: Any, *, lists: bool = False) -> Iterator[tuple[Key, Any]]:
    """The single values of a setting: those in tables, and with `lists` those in lists."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from singles((*key, str(name)), item, lists=lists)
    elif lists and isinstance(value, list | tuple):
        for item in value:
            yield from singles(key, item, lists=lists)
    else:
        yield key, value


def _danger(key: Key, value: Any) -> str:
    """What a setting does that a stranger must not decide; "" for any other."""
    if key in IMPORTS:
        return "imports and runs that code" if ":" in str(value) else ""
    if key == SERVERS:
        far = [url for url in str(value).split(",") if url.strip() and not LOOPBACK.fullmatch(url.strip())]
        return "sends prompts, and a token, to other machines" if far else ""
    if key == LAUNCHER:
        return "opens Ray's ports, and whoever reaches them runs code as you" if value == "ray" else ""
    if not is_option(key):
        return ""
    if (key[-1] == SWITCH and value) or (key[-2:] == ("sandbox", "kind") and value == "none"):
        return "takes away the sandbox of code that a model writes"
    address = isinstance(value, str) and ("://" in value or value.startswith("//"))
    return "reaches another machine" if address and not LOOPBACK.fullmatch(value.strip()) else ""
