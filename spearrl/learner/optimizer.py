"""AdamW, its learning-rate schedule, and its state on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from spearrl.config import LearnerSection
from spearrl.errors import CheckpointError

STATE, COUNTERS = "optimizer.safetensors", "learner.json"
FORMAT = "spearrl.learner/1"
CRITIC_SCALE = 10.0  # a fresh head on a trained trunk


def make_optimizer(parameters: Iterable[tuple[str, torch.Tensor]], settings: LearnerSection, *, critic: torch.nn.Module | None = None) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over what requires a gradient; vectors (norm weights, biases) are not decayed. A group has the rate times its "scale"."""
    trained = [p for _, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay, "scale": 1.0},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "scale": 1.0},
    ]
    if critic is not None:
        rate = CRITIC_SCALE if settings.critic_lr is None else settings.critic_lr / settings.lr
        groups.append({"params": list(critic.parameters()), "weight_decay": 0.0, "scale": rate})
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def learning_rate(step: int, settings: LearnerSection, total_steps: int | None) -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up, then constant, or linear to 0 at `total_steps`."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    if total_steps is None:
        return settings.lr
    return settings.lr * max(0.0, (total_steps - step) / max(1, total_steps - settings.warmup_steps))


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], steps: int) -> None:
    """Write moments under parameter names, and the step count."""
    from safetensors.torch import save_file

    tensors = {f"{names[p]}/{key}": value.detach().cpu().contiguous() for p, state in optimizer.state.items() for key, value in state.items()}
    save_file(tensors, folder / STATE)
    (folder / COUNTERS).write_text(json.dumps({"format": FORMAT, "steps": steps}) + "\n")


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> int:
    """Restore what `save_optimizer` wrote; returns the step count.

    Raises:
        CheckpointError: files are missing, or their tensors belong to another model.
    """
    from safetensors.torch import load_file

    try:
        counters, stored = json.loads((folder / COUNTERS).read_text()), load_file(folder / STATE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"optimiser state is missing or damaged: {error}", where=str(folder)) from error
    if counters.get("format") != FORMAT:
        raise CheckpointError(f"format {counters.get('format')!r}; expected {FORMAT!r}", where=str(folder / COUNTERS))
    states: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in stored.items():
        name, _, field = key.rpartition("/")
        states.setdefault(name, {})[field] = value
    unknown = set(states) - set(names.values())
    if unknown:
        raise CheckpointError(f"state of unknown parameters {sorted(unknown)[:3]}", where=str(folder / STATE), hint="load it with the model it was saved with")
    optimizer.state.clear()
    for parameter, name in names.items():
        if name in states:
            _check_shapes(states[name], parameter, name, folder)
            optimizer.state[parameter] = {field: value.to(parameter.device) for field, value in states[name].items()}
    return int(counters["steps"])


def _check_shapes(state: dict[str, torch.Tensor], parameter: torch.Tensor, name: str, folder: Path) -> None:
    for field, value in state.items():
        if value.ndim and value.shape != parameter.shape:
            raise CheckpointError(f"{name}/{field} is {list(value.shape)}; the parameter is {list(parameter.shape)}", where=str(folder / STATE))
