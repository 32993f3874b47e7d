"""The critic: a small head on the policy's hidden states."""

from __future__ import annotations

from pathlib import Path

import torch

from spearrl.models.weights import TensorFiles, write_file

STEM = "training/value_head"  # of its file in a checkpoint


class ValueHead(torch.nn.Module):
    """V(s) from the hidden state before a token: two layers in float32; every value is 0 at the start.

    No gradient flows into the hidden states: rewards of 10 make value errors that would drown the policy's own
    gradient.

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
        """Values [n] of hidden states [n, width]."""
        hidden = hidden.detach().to(self.inner.weight.dtype)
        normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
        return self.outer(torch.nn.functional.gelu(self.inner(normed))).squeeze(-1)

    def names(self) -> dict[torch.Tensor, str]:
        """Names of the parameters in a checkpoint."""
        return {parameter: name for name, parameter in self.named_parameters(prefix="value_head")}

    def save(self, folder: Path) -> None:
        """Write the weights into a checkpoint."""
        write_file(folder / f"{STEM}.safetensors", self.state_dict())

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            CheckpointError: it is missing (the run that saved it had no critic), or of another width.
        """
        TensorFiles(folder, STEM, "the critic").copy_to(self.state_dict())
