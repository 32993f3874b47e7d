"""AdamW, its learning-rate schedule, and its state on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from spearrl.config import LearnerSection
from spearrl.errors import CheckpointError
from spearrl.models.weights import Stored, write_tensors
from spearrl.schedules import schedule_value

# A folder below the model directory: vLLM loads every safetensors file that lies beside the weights.
STATE, MASTER, COUNTERS = "training/optimizer", "training/master", "training/learner.json"
FORMAT = "spearrl.learner/1"
CRITIC_SCALE = 10.0  # a fresh head on a trained trunk


def make_optimizer(
    parameters: Iterable[tuple[str, torch.Tensor]],
    settings: LearnerSection,
    *,
    critic: torch.nn.Module | None = None,
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over what requires a gradient; vectors (norm weights, biases) are not decayed. A group has the rate times its "scale".

    `kind`: "sgd" is for tests, where AdamW would hide the size of an error.
    """
    trained = [p for _, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if dimensions(p) >= 2], "weight_decay": settings.weight_decay, "scale": 1.0},
        {"params": [p for p in trained if dimensions(p) < 2], "weight_decay": 0.0, "scale": 1.0},
    ]
    if critic is not None:
        rate = CRITIC_SCALE if settings.critic_lr is None else settings.critic_lr / settings.lr
        groups.append({"params": list(critic.parameters()), "weight_decay": 0.0, "scale": rate})
    groups = [g for g in groups if g["params"]]
    if kind == "sgd":
        return torch.optim.SGD([{**g, "weight_decay": 0.0} for g in groups], lr=settings.lr)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def dimensions(parameter: torch.Tensor) -> int:
    """Axes of a parameter, also where this process holds only a shard of it (ZeRO-3)."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def learning_rate(step: int, settings: LearnerSection, total_steps: int | None, *, decay: str = "linear") -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up, then constant, or falling to 0 at `total_steps` ("linear" or "cosine")."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    if total_steps is None:
        return settings.lr
    return settings.lr * schedule_value(
        decay, step - settings.warmup_steps, max(1, total_steps - settings.warmup_steps), rising=False
    )


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], steps: int) -> None:
    """Write moments under parameter names, and the step count."""
    write_tensors(folder, STATE, named_state(optimizer, names))
    save_counters(folder, steps)


def named_state(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """("parameter/moment", tensor) of each parameter that has a name."""
    for parameter, state in optimizer.state.items():
        yield from ((f"{names[parameter]}/{key}", value) for key, value in state.items())


def save_counters(folder: Path, steps: int) -> None:
    (folder / COUNTERS).parent.mkdir(exist_ok=True)
    (folder / COUNTERS).write_text(json.dumps({"format": FORMAT, "steps": steps}) + "\n")


def load_counters(folder: Path) -> int:
    """The number of optimiser steps made. Raises CheckpointError where it is not written there."""
    try:
        counters = json.loads((folder / COUNTERS).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"optimiser state is missing or damaged: {error}", where=str(folder)) from error
    if counters.get("format") != FORMAT:
        raise CheckpointError(f"format {counters.get('format')!r}; expected {FORMAT!r}", where=str(folder / COUNTERS))
    return int(counters["steps"])


def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], *, known: Iterable[str] = ()
) -> int:
    """Restore what `save_optimizer` wrote; returns the step count.

    Args:
        known: parameters whose state is there too, and is someone else's to restore.
    Raises:
        CheckpointError: files are missing, or their tensors belong to another model.
    """
    steps, stored = load_counters(folder), Stored(folder, STATE, "optimiser state")
    states: dict[str, list[str]] = {}
    for key in stored.files:
        name, _, field = key.rpartition("/")
        states.setdefault(name, []).append(field)
    unknown = set(states) - set(names.values()) - set(known)
    if unknown:
        raise CheckpointError(
            f"state of unknown parameters {sorted(unknown)[:3]}",
            where=str(folder),
            hint="load it with the model it was saved with",
        )
    optimizer.state.clear()
    for parameter, name in names.items():
        if name in states:
            state = {field: stored.read(f"{name}/{field}") for field in states[name]}
            _check_shapes(state, parameter, name, folder)
            optimizer.state[parameter] = {field: value.to(parameter.device) for field, value in state.items()}
    return steps


def _check_shapes(state: dict[str, torch.Tensor], parameter: torch.Tensor, name: str, folder: Path) -> None:
    for field, value in state.items():
        if value.ndim and value.shape != parameter.shape:
            raise CheckpointError(
                f"{name}/{field} is {list(value.shape)}; the parameter is {list(parameter.shape)}", where=str(folder)
            )
