"""Linear layers in bfloat16 with weights in the order in which oneDNN multiplies fastest on a processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ROWS = 32  # of the products that the order is chosen for


class PackedLinears:
    """A second copy of such weights, which the model multiplies with inside `used`; its parameters stay as they are."""

    def __init__(self, model: Any):
        capable = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        layers = [m for m in model.modules() if type(m) is torch.nn.Linear and capable]
        self._layers = [m for m in layers if (m.weight.dtype, m.weight.device.type) == (torch.bfloat16, "cpu")]
        self._forwards: list[Any] = []

    def forget(self) -> None:
        """The parameters changed."""
        self._forwards = []

    @contextmanager
    def used(self) -> Iterator[None]:
        """Multiply with packed weights; after `forget` they are packed again."""
        self._forwards = self._forwards or [_forward(layer) for layer in self._layers]
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.__dict__["forward"]


def _forward(layer: torch.nn.Linear) -> Any:
    packed, bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS), layer.bias
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
