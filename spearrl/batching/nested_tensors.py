"""Nested values of tensors and JSON, apart or as bytes: what files hold, and what learner processes send each other.

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

    text, tensors = strip(tree)
    tensors[TREE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)


def unpack(packed: torch.Tensor) -> Any:
    """The inverse of `pack`; tuples come back as lists."""
    from safetensors.torch import load

    tensors = load(packed.numpy().tobytes())
    return fill(tensors[TREE].numpy().tobytes(), tensors)


def strip(tree: Any, name: str = "value") -> tuple[str, dict[str, torch.Tensor]]:
    """A nested value as JSON, and its tensors, each under the path where it stood; `name`: how every path begins."""
    tensors: dict[str, torch.Tensor] = {}

    def stripped(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()  # safetensors refuses views of one storage
            return {TENSOR: path}
        if isinstance(value, Mapping):
            return {key: stripped(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [stripped(item, f"{path}/{index}") for index, item in enumerate(value)]
        return value

    return json.dumps(stripped(tree, name)), tensors


def fill(text: str | bytes, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `strip`; tuples come back as lists."""
    return json.loads(text, object_hook=lambda value: tensors[value[TENSOR]] if set(value) == {TENSOR} else value)
