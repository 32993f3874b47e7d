"""AdamW, its learning-rate schedule, and its state on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from spearrl.config.sections import LearnerSection
from spearrl.errors import CheckpointError
from spearrl.models.weights import TensorFiles, write_tensors
from spearrl.schedules import schedule_value

# A folder below the model directory: vLLM loads every safetensors file that lies beside the weights.
STATE, MASTER, COUNTERS = "training/optimizer", "training/master", "training/learner.json"
FORMAT = "spearrl.learner/1"
CRITIC_SCALE = 10.0  # the critic's rate as a multiple of the policy's: a fresh head on a trained model


def make_optimizer(
    parameters: Iterable[tuple[str, torch.Tensor]],
    settings: LearnerSection,
    *,
    critic: torch.nn.Module | None = None,
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over parameters that require a gradient; norm weights and biases are not decayed.

    Args:
        critic: has a group of its own. The rate of a group is the learning rate times its "scale".
        kind: "sgd" is for tests, where AdamW would hide the size of an error.
    """
    trained = [p for _, p in parameters if p.requires_grad]
    matrices, vectors = [p for p in trained if _axes(p) >= 2], [p for p in trained if _axes(p) < 2]
    groups = [(matrices, settings.weight_decay, 1.0), (vectors, 0.0, 1.0)]
    if critic is not None:
        scale = CRITIC_SCALE if settings.critic_lr is None else settings.critic_lr / settings.lr
        groups.append((list(critic.parameters()), 0.0, scale))
    options = [{"params": own, "weight_decay": decay, "scale": scale} for own, decay, scale in groups if own]
    if kind == "sgd":
        return torch.optim.SGD([{**group, "weight_decay": 0.0} for group in options], lr=settings.lr)
    return torch.optim.AdamW(options, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def learning_rate(step: int, settings: LearnerSection, total_steps: int | None, *, decay: str = "linear") -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up, then constant, or falling to 0 at `total_steps`.

    Args:
        decay: "linear" or "cosine".
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    if total_steps is None:
        return settings.lr
    return settings.lr * schedule_value(decay, step - warmup, max(1, total_steps - warmup), rising=False)


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], steps: int) -> None:
    """Write moments under parameter names, and the number of optimiser steps made."""
    write_tensors(folder, STATE, named_state(optimizer, names))
    save_counters(folder, steps)


def named_state(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """("parameter/moment", tensor) of each parameter that has state."""
    for parameter, state in optimizer.state.items():
        yield from ((f"{names[parameter]}/{key}", value) for key, value in state.items())


def save_counters(folder: Path, steps: int) -> None:
    """Write the number of optimiser steps made."""
    (folder / COUNTERS).parent.mkdir(exist_ok=True)
    (folder / COUNTERS).write_text(json.dumps({"format": FORMAT, "steps": steps}) + "\n")


def load_counters(folder: Path) -> int:
    """The number of optimiser steps made. Raises CheckpointError where it is not written there."""
    try:
        counters = json.loads((folder / COUNTERS).read_bytes())
        stated, steps = counters["format"], counters["steps"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"optimiser state is missing or damaged: {error}", where=str(folder)) from error
    if stated != FORMAT or type(steps) is not int:
        text = f"format {str(stated)[:40]!r} with steps {str(steps)[:40]}; expected {FORMAT!r} with an integer"
        raise CheckpointError(text, where=str(folder / COUNTERS))
    return steps


def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], *, known: Iterable[str] = ()
) -> int:
    """Restore what `save_optimizer` wrote; returns the number of optimiser steps made.

    Args:
        known: parameters whose state is there too, and is someone else's to restore.
    Raises:
        CheckpointError: files are missing, or their tensors belong to another model.
    """
    steps, stored = load_counters(folder), TensorFiles(folder, STATE, "optimiser state")
    fields: dict[str, list[str]] = {}
    for key in stored.files:
        name, _, field = key.rpartition("/")
        fields.setdefault(name, []).append(field)
    unknown = set(fields) - set(names.values()) - set(known)
    if unknown:
        hint = "load it with the model it was saved with"
        raise CheckpointError(f"state of unknown parameters {sorted(unknown)[:3]}", where=str(folder), hint=hint)
    optimizer.state.clear()
    for parameter, name in names.items():
        if name not in fields:
            continue
        state = {field: stored.read(f"{name}/{field}") for field in fields[name]}
        for field, value in state.items():
            if value.ndim and value.shape != parameter.shape:
                text = f"{name}/{field} is {list(value.shape)}; the parameter is {list(parameter.shape)}"
                raise CheckpointError(text, where=str(folder))
        optimizer.state[parameter] = {field: value.to(parameter.device) for field, value in state.items()}
    return steps


def _axes(parameter: torch.Tensor) -> int:
    """Of a parameter, also where this process holds only a shard of it (ZeRO-3)."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
