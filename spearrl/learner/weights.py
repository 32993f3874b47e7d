"""Restoring a model's weights in place."""

from __future__ import annotations

from pathlib import Path

import torch

from spearrl.errors import CheckpointError


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy the weights of a model directory into `model`. Raises CheckpointError where they are missing or another model's."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError("no model*.safetensors", where=str(folder))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    # Tied parameters are stored once; named_parameters yields each once too.
    own = dict(model.named_parameters())
    missing, unknown = sorted(set(own) - set(stored)), sorted(set(stored) - set(model.state_dict()))
    wrong = [name for name, tensor in own.items() if name in stored and stored[name].shape != tensor.shape]
    if missing or unknown or wrong:
        found = f"missing {missing[:3]}, unknown {unknown[:3]}, other shape {wrong[:3]}"
        raise CheckpointError(f"weights of another model: {found}", where=str(folder), hint="load the checkpoint with the model it was saved with")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])
