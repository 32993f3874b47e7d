"""The model a run begins or goes on with, and how a new run gets its first one: loaded or built, then cold-started."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spearrl.algorithm import needs_reference
from spearrl.config import RunConfig
from spearrl.envs import Environment, tasks_of
from spearrl.errors import ConfigError
from spearrl.models import (
    build_tiny,
    directory_of,
    is_hub_name,
    load_model,
    load_tokenizer,
    model_config,
    pinned,
    save_model,
)
from spearrl.models.formats import open_format
from spearrl.rollout.local.forward import windows_of
from spearrl.seeds import derive
from spearrl.start.sft import cold_start
from spearrl.start.transcripts import Transcript, play_expert, read_conversations, texts

Report = Callable[[str, dict[str, Any]], None]
# Folders of a run directory: the weights it began with, which workers load before the bridge brings newer ones; and the
# frozen model that divergences are measured from and adapters are trained on.
START, REFERENCE = "start", "reference"
CORPUS_EPISODES = 500  # episodes whose text the tiny tokenizer is trained on, where there is no cold start


def silent(kind: str, values: dict[str, Any]) -> None:
    """A `Report` that says nothing."""


class Origin:
    """A model in memory, in a directory, or both; the other form is made when it is first asked for.

    Learners and engines in other processes load it from the directory, so a large one need never be whole in this
    process.

    Args:
        scratch: where a model that exists in memory only is written for others to load; stays for the whole run.
        name: of the hub, with its commit, where `folder` is a snapshot of it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        model: torch.nn.Module | None = None,
        folder: Path | None = None,
        scratch: Path | None = None,
        name: str | None = None,
    ):
        self.tokenizer, self._model, self._folder, self._scratch = tokenizer, model, folder, scratch
        self._name = name

    @classmethod
    def of(cls, model: str | Path) -> Origin:
        """A model given by directory or name. Raises ConfigError where there is none."""
        model = pinned(str(model))
        name = model if is_hub_name(model) else None
        return cls(load_tokenizer(model), folder=directory_of(model), name=name)

    @property
    def model(self) -> torch.nn.Module:
        """The model in this process's memory."""
        if self._model is None:
            self._model = load_model(str(self._folder))
        return self._model

    @property
    def width(self) -> int:
        """Numbers in a hidden state."""
        if self._model is not None:
            return int(self._model.get_output_embeddings().weight.shape[1])  # type: ignore[operator]
        config = json.loads((self.folder / "config.json").read_text())
        return int(config.get("text_config", config)["hidden_size"])

    @property
    def vocabulary(self) -> int:
        """Token ids that the model has an embedding of."""
        if self._model is not None:
            return int(self._model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        return int(model_config(str(self.folder)).get_text_config().vocab_size)

    @property
    def folder(self) -> Path:
        """A directory with weights and tokenizer."""
        if self._folder is None:
            self._folder = self._scratch
            save_model(self._model, self.tokenizer, str(self._scratch))
        return self._folder  # type: ignore[return-value]

    @property
    def address(self) -> str:
        """What processes on any machine of the run load it by: the directory, or the name and commit of the hub."""
        return self._name or str(self.folder)

    def settle(self, scratch: Path) -> None:
        """Have the directory lie in the run directory's `scratch` for good.

        A checkpoint of that run is linked there: it may be removed later.
        """
        if self._folder is None:
            self._scratch = scratch
        if self._folder is None or scratch.resolve().parent not in self._folder.resolve().parents:
            return
        _link_files(self._folder, scratch)
        self._folder = scratch

    def keep(self, folder: Path) -> None:
        """Make `folder` this model's directory too: written from memory, or a link to where it lies.

        The files of a checkpoint are linked one by one: its run removes it some day.
        """
        if self._model is not None:
            save_model(self._model, self.tokenizer, str(folder))
        elif self.folder.resolve().parent.name == "checkpoints":
            _link_files(self.folder, folder)
        else:
            folder.symlink_to(self.folder.resolve(), target_is_directory=True)


def starting_model(
    config: RunConfig, environment: Environment, device: str, scratch: Path | None, report: Report
) -> Origin:
    """The model a run begins with: loaded or built, then cold-started where the config asks for it.

    Raises:
        ConfigError: there is no such model, no expert, or no data to imitate.
    """
    if not config.sft.enabled and config.model.path != "tiny":
        return Origin.of(config.model.path)
    transcripts = _transcripts(config, environment)
    if config.model.path == "tiny":
        model, tokenizer = build_tiny(texts(transcripts), config.model.tiny, derive(config.run.seed, "model"))
    else:
        model, tokenizer = load_model(config.model.path), load_tokenizer(config.model.path)
    if config.sft.enabled:
        cold_start(config, model.to(device), tokenizer, transcripts, report=report)
    return Origin(tokenizer, model=model, scratch=scratch)


def with_pinned_model(config: RunConfig, environment: Environment) -> RunConfig:
    """The config of a new run, its model here and named with its commit, its chat format chosen.

    Weights are downloaded last, once it is known that the engine runs the model's layers, and that the chats of this
    environment can be written and read.

    Raises:
        ConfigError: there is no such model, or its format drops tools or pictures that the environment shows.
    """
    if config.model.path == "tiny":
        return config
    config = config.with_settings({"model.path": pinned(config.model.path, weights=False)})
    if config.rollout.engine == "local":
        windows_of(model_config(config.model.path))
    chat = open_format(load_tokenizer(config.model.path), config.model, environment.tools())
    if environment.shows_images:
        chat.check_images()
    pinned(config.model.path)
    return config.with_settings({"model.format": chat.name})


def models_of_run(
    config: RunConfig,
    environment: Environment,
    device: str,
    run_folder: Path,
    report: Report,
    *,
    checkpoint: Path | None,
) -> tuple[Origin, Path | str | None]:
    """The model a run begins or goes on with, and the frozen one's directory or name where anything needs it.

    Args:
        checkpoint: what a resumed run goes on from (its adapters are loaded later, on the frozen model); None: it is
            new.
    Raises:
        ConfigError: a resumed run needs the frozen model now, and did not keep it when it began.
    """
    adapters = config.learner.lora.rank > 0
    reference: Path | str | None = run_folder / REFERENCE if adapters or needs_reference(config.algo) else None
    if reference is not None and is_hub_name(config.model.path) and not config.sft.enabled:
        reference = config.model.path  # with its commit
    if checkpoint is None:
        origin = starting_model(config, environment, device, run_folder / START, report)
        if isinstance(reference, Path):
            origin.keep(reference)
        return origin, reference
    if isinstance(reference, Path) and not reference.is_dir():
        text = "the run began without a KL divergence or adapters and kept no reference model"
        hint = "start a new run, or leave algo.kl.loss_coef, algo.kl.reward_coef and learner.lora.rank at 0"
        raise ConfigError(text, where=str(reference), hint=hint)
    return Origin.of(reference if reference is not None and adapters else checkpoint), reference


def _transcripts(config: RunConfig, environment: Environment) -> list[Transcript]:
    """What the cold start imitates, or what the tiny tokenizer is trained on where there is none."""
    sft = config.sft
    if sft.enabled and sft.data:
        return read_conversations(sft.data)
    return play_expert(
        environment,
        tasks_of(environment, config.rollout.train_split, setting="rollout.train_split"),
        sft.episodes if sft.enabled else CORPUS_EPISODES,
        noise=sft.noise,
        recovery=sft.recovery,
        style=config.env.style,
        seed=derive(config.run.seed, "sft"),
    )


def _link_files(source: Path, target: Path) -> None:
    """Have a folder hold the model files of another one."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model") and file.name != "manifest.json":
            _link(file, target / file.name)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        target.write_bytes(source.read_bytes())
