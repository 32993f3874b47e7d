"""Models by name: `Qwen/Qwen2.5-1.5B-Instruct`, `org/name@revision`, `smollm2-135m`, or a directory of this machine.

A name of the hub is downloaded once, by huggingface_hub: its progress bars, its cache (HF_HOME), its settings
(HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE). Weights come as safetensors only; no code of a repository is downloaded or run.
A run keeps the commit it began with (`pinned`), so that workers, ranks and a resumed run load the same files.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from spearrl.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:@[\w./-]+)?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
# What a model directory is made of; not pickles (.bin, .pt), code (.py), other formats in folders, or Mistral's own.
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
OTHERS = ["*/*", "consolidated*"]


def made_here(name: str) -> Path:
    """Where a model made on this machine lies: in $SPEARRL_HOME/models, else in ~/.cache/spearrl/models."""
    return Path(os.environ.get("SPEARRL_HOME") or Path.home() / ".cache" / "spearrl") / "models" / name


def is_hub_name(model: str) -> bool:
    """Whether `model` names a repository of the hub (a directory of that name on this machine goes first)."""
    return NAME.fullmatch(model) is not None and not Path(model).exists()


def directory_of(model: str, *, weights: bool = True) -> Path:
    """The directory of a model given by directory or by name; files of a name that are not here yet are downloaded.

    Args:
        weights: download these too; without them configs, tokenizer and chat template come.
    Raises:
        ConfigError: neither a directory nor a name, or the name's files cannot be had.
    """
    if Path(model).is_dir():
        return Path(model)
    if "/" not in model and (made_here(model) / "config.json").is_file():
        return made_here(model)
    if is_hub_name(model):
        return _snapshot(model, weights)
    raise ConfigError(
        f"model {model!r} is neither a directory on this machine nor the name of a model",
        where="model.path",
        hint="give a model directory, a name such as Qwen/Qwen2.5-0.5B-Instruct, smollm2-135m after `spearrl fetch "
        'smollm2-135m`, or "tiny": it is built',
    )


def pinned(model: str, *, weights: bool = True) -> str:
    """A name of the hub with the commit that it stands for now ("org/name@0123…"), downloaded; others as they are.

    Raises:
        ConfigError: there is no such model.
    """
    folder = directory_of(model, weights=weights)
    return f"{model.partition('@')[0]}@{folder.name}" if is_hub_name(model) else model


def _snapshot(name: str, weights: bool) -> Path:
    """The files of `org/name[@revision]`, in a folder that is named after the commit. Raises ConfigError."""
    from httpx import HTTPError
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.partition("@")
    others = OTHERS if weights else [*OTHERS, "*.safetensors"]
    wanted: dict[str, Any] = {"revision": revision or None, "allow_patterns": FILES, "ignore_patterns": others}
    if COMMIT.fullmatch(revision):  # a commit never changes: where its files are here, nobody is asked
        try:
            if _is_whole(folder := Path(snapshot_download(repository, local_files_only=True, **wanted)), weights):
                return folder
        except errors.LocalEntryNotFoundError:
            folder = Path()  # not here yet
    try:
        folder = Path(snapshot_download(repository, **wanted))
    except (OSError, ValueError, RuntimeError, HTTPError, errors.XetDownloadError) as error:
        what, hint = _explained(error, repository, revision)
        raise ConfigError(
            f"{name} is no directory on this machine, and {what}", where="model.path", hint=hint
        ) from error
    if weights and not _is_whole(folder, weights):
        text = f"{name} has no config.json with all of its weights as safetensors, and nothing else is loaded"
        hint = "choose a repository with .safetensors files, or convert it and give the directory"
        raise ConfigError(text, where="model.path", hint=hint)
    return folder


def _is_whole(folder: Path, weights: bool) -> bool:
    """Whether there are a config and weights; where an index names several files of them, all of these.

    Without `weights`: whether there are a config and a tokenizer.
    """
    if not weights:
        return (folder / "config.json").is_file() and any(folder.glob("tokenizer*"))
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    whole = all((folder / name).is_file() for name in files) if files else any(folder.glob("*.safetensors"))
    return whole and (folder / "config.json").is_file()


def _explained(error: Exception, repository: str, revision: str) -> tuple[str, str]:
    """What went wrong with a download, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        hint = "accept its licence on its page, then set HF_TOKEN to a token of that account"
        return f"{repository} is gated on the hub: only accounts that accepted its licence may download it", hint
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "check the spelling; a private repository needs HF_TOKEN, the token of an account that may read it"
        return f"the hub shows no repository {repository}", hint
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}", "name a branch, tag or commit that it has"
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"the hub refuses its files ({message})", "check HF_TOKEN: it may be wrong or out of date"
    return (
        f"it cannot be downloaded ({message})",
        f"without a connection, download {repository} elsewhere (`hf download {repository} --local-dir DIR`) and give "
        "its folder, or set HF_ENDPOINT to a mirror; after a broken download repeat the command: whole files are kept",
    )
