"""The critic: a small head on the policy's hidden states."""

from __future__ import annotations

from pathlib import Path

import torch

from spearrl.errors import CheckpointError

FILE = "training/value_head.safetensors"


class ValueHead(torch.nn.Module):
    """V(s) from the hidden state before a token: two layers, float32, 0 everywhere at the start.

    It reads the hidden states without a gradient to them: rewards of 10 make value errors that would drown the policy's own gradient.

    Args:
        width: of the hidden states.
        seed: of the initial weights.
    """

    def __init__(self, width: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            self.inner = torch.nn.Linear(width, width)
            self.outer = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.outer.weight)
        torch.nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, width] → [n]."""
        hidden = hidden.detach().to(self.inner.weight.dtype)
        normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
        return self.outer(torch.nn.functional.gelu(self.inner(normed))).squeeze(-1)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        (folder / FILE).parent.mkdir(exist_ok=True)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, folder / FILE
        )

    def load(self, folder: Path) -> None:
        """Exactly what `save` wrote. Raises CheckpointError where it is missing or of another width."""
        from safetensors.torch import load_file

        try:
            self.load_state_dict(load_file(folder / FILE))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the critic cannot be restored: {error}",
                where=str(folder / FILE),
                hint="resume with the algorithm that saved it",
            ) from error
