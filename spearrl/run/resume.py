"""What a resumed run goes on with: its newest checkpoint that can be read, and which settings may change on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spearrl.algorithm import Memory
from spearrl.algorithm.curriculum import Curriculum
from spearrl.config import RunConfig, diff, load_config, resolve
from spearrl.config.dump import flat, toml_value
from spearrl.config.foreign import refuse_links, to_repeat
from spearrl.errors import CheckpointError, ConfigError, RefusedError, SpearError
from spearrl.run.checkpoint import (
    UNREADABLE,
    checkpoints,
    defect,
    load_state,
    newest_checkpoint,
    read_manifest,
    step_of,
)
from spearrl.run.events import read_events
from spearrl.run.health import Health

# What a run is: buffers, optimiser and seeds of one with other such settings are another run's. All else may change.
FIXED = (
    "model",
    "env",
    "sft",
    "run.seed",
    "run.name",
    "run.output_dir",
    "rollout.train_split",
    "learner.lora",
    "algo.name",
    "algo.advantage",
)
RUNS_NAMED = 12  # in a message

Changes = dict[str, tuple[Any, Any]]  # dotted key -> (before, now)


class Stateful(NamedTuple):
    """The parts of a trainer that a checkpoint holds beside its counters."""

    memory: Memory
    curriculum: Curriculum
    health: Health

    @classmethod
    def begun(cls, config: RunConfig) -> Stateful:
        """As a run begins with them."""
        curriculum = Curriculum(config.algo.sil.gamma, config.algo.intrinsic.mu)
        return cls(Memory(config.algo.sil, config.run.seed), curriculum, Health())


@dataclass(frozen=True)
class Resumption:
    """What a run is resumed with.

    Args:
        changes: settings that are others than before.
        state: the checkpoint's, as `load_state`.
        parts: with that state.
        tokenizer: hash of the tokenizer it was saved with; "": not written there.
        skipped: newer checkpoints that are damaged, each with what is wrong.
    """

    config: RunConfig
    changes: Changes
    checkpoint: Path
    state: dict[str, Any]
    parts: Stateful
    tokenizer: str
    skipped: list[str]

    def events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What is to be said of it, as (kind, values) of events."""
        for text in self.skipped:
            yield "warning", {"text": f"checkpoint skipped: {text}"}
        if self.changes:
            yield "config", {"changed": self.changes}

    def summary(self) -> dict[str, Any]:
        """What a run goes on with, as values of its event."""
        memory = self.parts.memory
        stored = {"replay_stored": len(memory.replay), "baselines": len(memory.baseline)}
        return {"from": str(self.checkpoint), **stored, "text": exactness(self.config)}

    def check_tokenizer(self, found: str) -> None:
        """Raises RefusedError where the hash is not that of the run's tokenizer."""
        if self.tokenizer not in ("", found):
            text = "tokenizer or chat template are others than when the run was saved"
            raise RefusedError(text, where=str(self.checkpoint), hint="bring back the files of the model it began with")


def resumption(folder: Path, overrides: Sequence[str]) -> Resumption:
    """Read what a run goes on with; nothing is written.

    Raises:
        ConfigError: there is no such run, or settings are wrong. RefusedError: settings that cannot change.
        CheckpointError: no checkpoint can be read.
    """
    before, config = resolve(folder, shown=True).config, load_config(folder, overrides)
    found: dict[str, Any] = {}

    def accept(path: Path) -> None:
        state = load_state(path / "training", "state")
        try:
            found.update(state=state, parts=_restored(config, state, step_of(path)))
        except (*UNREADABLE, RuntimeError, ArithmeticError, SpearError) as error:
            text = f"training/state cannot be used: {type(error).__name__}: {str(error)[:200]}"
            raise CheckpointError(text, where=str(path)) from error

    checkpoint, skipped = newest_checkpoint(folder / "checkpoints", accept)
    about = read_manifest(checkpoint)
    changes = diff(before, config)
    refuse_fixed(folder, changes | _since(about.get("settings"), config))
    tokenizer = str(about.get("tokenizer", ""))
    return Resumption(config, changes, checkpoint, **found, tokenizer=tokenizer, skipped=skipped)


def config_file(folder: Path) -> Path:
    """The config of a run directory.

    Raises ConfigError that lists the runs there are, where this is none; RefusedError where links lead out of it.
    """
    path = folder / "config.toml"
    refuse_links(folder)
    if path.is_file():
        return path
    around = [*folder.parent.glob("*/config.toml"), *Path("runs").glob("*/config.toml")]
    names = list(dict.fromkeys(str(file.parent) for file in sorted(around)))
    more = f", and {len(names) - RUNS_NAMED} others" if len(names) > RUNS_NAMED else ""
    hint = f"give one of these runs: {', '.join(names[:RUNS_NAMED])}{more}"
    if not names:
        hint = "give the folder that `spearrl train` printed; there is no run in runs/ or beside it"
    raise ConfigError(f"{folder} is no run directory: it holds no config.toml", where="--resume", hint=hint)


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that make a run what it is, as JSON values, by dotted key."""
    settings = {key: value for key, value in flat(config).items() if _is_fixed(key)}
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def refuse_fixed(folder: Path, changes: Changes) -> None:
    """Raises RefusedError where one of the changes makes another run of it."""
    fixed = {key: pair for key, pair in changes.items() if _is_fixed(key)}
    if fixed:
        words = " ".join(f"{key}={_shown(now)}" for key, (_, now) in fixed.items() if now is not None)
        text = f"a run cannot change these settings:\n{shown(fixed)}"
        hint = "leave them as they are, or begin a new run with its weights: "
        raise RefusedError(text, where=str(folder), hint=f"{hint}spearrl train --resume {folder} --fork NAME {words}")


def exactness(config: RunConfig) -> str:
    """How far a resumed run is what it would have been without the stop."""
    if config.rollout.max_staleness:
        return "episodes under way are played again with their seeds; what the newer weights make of them may differ"
    if config.rollout.engine == "vllm":
        return "tasks, seeds and optimiser go on exactly; vLLM's samples may differ, since its batches do"
    return "goes on exactly as if it had not stopped, on the same machine and number of processes"


def shown(changes: Changes) -> str:
    """Changed settings, one a line."""
    width = max(map(len, changes))
    return "\n".join(f"  {key:<{width}}  {_shown(old)} -> {_shown(new)}" for key, (old, new) in changes.items())


def nothing_left(folder: Path, overrides: Sequence[str]) -> str:
    """Why there is nothing left to train in a run, and how to go on; "" where there is something.

    The evaluation after the last step belongs to training.
    """
    config = load_config(config_file(folder).parent, overrides)
    newest = checkpoints(folder / "checkpoints")[-1:]
    if not newest or (step := step_of(newest[0])) < config.run.steps or defect(newest[0]) is not None:
        return ""
    if not any(event["event"] == "eval" and event["step"] == step for event in read_events(folder)[0]):
        return ""
    more = f"spearrl train --resume {folder} run.steps={step + max(1, config.run.steps)}{to_repeat(config)}"
    return f"nothing left to train: {folder} is at step {step} of {config.run.steps}. Go on with more steps:  {more}"


def fork_settings(folder: Path, name: str) -> list[str]:
    """Settings on top of a run's config, for a new run beside it that begins with the newest checkpoint's weights.

    Raises CheckpointError.
    """
    checkpoint, _ = newest_checkpoint(folder / "checkpoints")
    start = [f"model.path={checkpoint}", "sft.enabled=false", f"run.name={name}"]
    return [*start, f"run.output_dir={folder.resolve().parent}"]


def _restored(config: RunConfig, state: dict[str, Any], step: int) -> Stateful:
    """The parts as a checkpoint's state has them. Raises whatever a state that is none makes it raise."""
    parts = Stateful.begun(config)
    for name, part in parts._asdict().items():
        part.load_state_dict(state[name])
    counters = (state["policy_version"], state["episodes"]["groups_played"])
    if state["step"] != step or not all(type(counter) is int for counter in counters):
        raise ValueError(f"step {state['step']}, policy_version and groups_played {counters}")
    return parts


def _is_fixed(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in FIXED)


def _since(stored: Any, config: RunConfig) -> Changes:
    """Fixed settings that are others than when the checkpoint was written: config.toml may have been edited."""
    now = fixed_settings(config)
    old: Mapping[str, Any] = stored if isinstance(stored, dict) else {}
    options = [key for key in now if key.startswith("env.options.") and old]
    keys = dict.fromkeys([*filter(_is_fixed, old), *options])  # a setting that is new in this version is no change
    return {key: (old.get(key), now.get(key)) for key in keys if old.get(key) != now.get(key)}


def _shown(value: Any) -> str:
    return "not given" if value is None else toml_value(value)
