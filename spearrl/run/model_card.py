"""A run's checkpoint as a model directory to serve or upload, with a model card that says where it came from."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from spearrl.config import RunConfig, resolve
from spearrl.errors import RefusedError
from spearrl.learner.lora import FOLDER
from spearrl.models import is_hub_name
from spearrl.run.events import read_events, skipped_lines

OF_THE_MODEL = ("config.json", "generation_config.json", "model")  # how files begin that adapters alone do without


def export_checkpoint(run: Path, checkpoint: Path, folder: Path, *, apart: bool) -> str:
    """Write a sound checkpoint into an empty folder: weights, tokenizer, chat template, config.toml, README.md.

    Args:
        apart: its adapters in peft's format, instead of the weights they are merged in.
    Returns:
        The model that training began with: name, directory, or "tiny".
    Raises:
        RefusedError: it has no adapters to be kept apart.
    """
    if apart and not (checkpoint / FOLDER).is_dir():
        hint = "leave --adapters out; only runs with learner.lora.rank above 0 have any"
        raise RefusedError(f"{checkpoint} has no adapters", hint=hint)
    for file in checkpoint.iterdir():
        left_out = file.name == "manifest.json" or (apart and file.name.startswith(OF_THE_MODEL))
        if file.is_file() and not left_out:
            shutil.copy(file, folder)
    config = resolve(run, shown=True).config
    base = str((run / "reference").resolve()) if (run / "reference").is_dir() else config.model.path
    if apart:
        shutil.copy(checkpoint / FOLDER / "adapter_model.safetensors", folder)
        settings = json.loads((checkpoint / FOLDER / "adapter_config.json").read_text())
        name, _, commit = base.partition("@")
        settings |= {"base_model_name_or_path": name, "revision": commit or None}
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    shutil.copy(run / "config.toml", folder)
    (folder / "README.md").write_text(model_card(run, config, step=int(checkpoint.name[5:]), apart=apart))
    return base


def model_card(run: Path, config: RunConfig, *, step: int, apart: bool) -> str:
    """The card of a run's checkpoint of `step`, in Markdown with the hub's header."""
    base, _, commit = config.model.path.partition("@")
    origin = "built from scratch" if base == "tiny" else f"`{base}`" + (f", commit `{commit}`" if commit else "")
    named, adapters = is_hub_name(config.model.path), config.learner.lora.rank
    versions = _versions(run)
    facts = {
        "environment": f"`{config.env.name}`, prompts in the style `{config.env.style}`",
        "algorithm": f"`{config.algo.name}`",
        "steps": f"{step} of {config.run.steps}, with the seed {config.run.seed}",
        "base model": origin,
        "cold start": (config.sft.data or f"{config.sft.episodes} expert episodes") if config.sft.enabled else "none",
        "adapters": f"rank {adapters}, {'apart' if apart else 'merged into the weights'}" if adapters else "none",
        "success": _success(run, config, step),
        "made with": ", ".join(
            f"{name} {versions.get(name, 'unknown')}" for name in ("spearrl", "torch", "transformers")
        ),
    }
    return "\n".join(
        [
            "---",
            f"library_name: {'peft' if apart else 'transformers'}",
            *([f"base_model: {base}"] if named else []),
            "tags: [reinforcement-learning, agent, spearrl]",
            "---",
            f"# {run.resolve().name}",
            "",
            "A language-model agent, trained by reinforcement learning with spearrl.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items()),
            "",
            "`config.toml` holds every setting; `spearrl eval` of this directory plays the panel again.",
            "",
        ]
    )


def _versions(run: Path) -> dict[str, Any]:
    """What the run noted of its machine and packages; nothing where the file is not readable."""
    try:
        noted = json.loads((run / "versions.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{run / 'versions.json'} cannot be read: {error}", stacklevel=2)
        return {}
    return noted if isinstance(noted, dict) else {}


def _success(run: Path, config: RunConfig, step: int) -> str:
    """The last panel played by then, with its 95 % interval."""
    events, skipped = read_events(run)
    if skipped:
        warnings.warn(skipped_lines(skipped), stacklevel=2)
    numbers = ("success", "low", "high")
    panels = [event for event in events if event["event"] == "eval" and event["step"] <= step]
    panels = [event for event in panels if all(isinstance(event.get(name), int | float) for name in numbers)]
    if not panels:
        return "not measured"
    last = panels[-1]
    rate, low, high = (100 * last[key] for key in numbers)
    return (
        f"{rate:.1f} % (95 % interval {low:.1f} to {high:.1f}) of {last.get('tasks')} tasks of the split "
        f"`{config.eval.split}` at temperature {config.eval.temperature:g}, after step {last['step']} "
        f"(panel {last.get('panel')})"
    )
