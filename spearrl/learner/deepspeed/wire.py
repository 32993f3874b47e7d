"""Nested values of tensors and JSON, as bytes or apart: what learner processes send each other.

Nothing that arrives runs code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

TREE, TENSOR = "tree", "__tensor__"


def pack(tree: Any) -> torch.Tensor:
    """uint8 [n] from dicts, lists, JSON values and tensors."""
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(strip(tree, tensors)).encode()
    tensors[TREE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)


def unpack(packed: torch.Tensor) -> Any:
    """The inverse of `pack`; tuples come back as lists."""
    from safetensors.torch import load

    tensors = load(packed.numpy().tobytes())
    return fill(json.loads(tensors[TREE].numpy().tobytes()), tensors)


def strip(value: Any, tensors: dict[str, torch.Tensor], path: str = "value") -> Any:
    """The JSON of a nested value; its tensors are put into `tensors`, each under the path where it stood."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()  # safetensors refuses views of one storage
        return {TENSOR: path}
    if isinstance(value, Mapping):
        return {key: strip(item, tensors, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strip(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
    return value


def fill(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `strip`; tuples come back as lists."""
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: fill(item, tensors) for key, item in value.items()}
    return [fill(item, tensors) for item in value] if isinstance(value, list) else value
