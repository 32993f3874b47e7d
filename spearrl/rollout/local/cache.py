"""The local engine's key-value cache: fixed slots, bounded in bytes, written and read in place."""

from __future__ import annotations

from typing import Any

import torch

from spearrl.errors import ConfigError

SPAN_STEP = 32  # attention spans are rounded up to this, so that few shapes occur
MIB = 1 << 20


class SlotCache:
    """Keys and values of every layer, [slots, heads, tokens, head_dim] each.

    Passed to a transformers model as `past_key_values`: its layers call `update`, which writes this pass's tokens where
    `aim` says and returns what the rows of the pass may look at.

    Raises:
        ConfigError: not even one slot fits `cache_mib`.
    """

    def __init__(
        self, config: Any, *, slots: int, tokens: int, cache_mib: int, dtype: torch.dtype, device: torch.device
    ):
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = config.num_hidden_layers
        self.bytes_per_slot = layers * 2 * heads * width * tokens * dtype.itemsize
        self.slots = min(slots, cache_mib * MIB // self.bytes_per_slot)
        if self.slots < 1:
            needed = -(-self.bytes_per_slot // MIB)
            text = f"one sequence of {tokens} tokens needs {needed} MiB of cache, rollout.cache_mib is {cache_mib}"
            hint = f"set rollout.cache_mib to at least {needed}, or lower rollout.context_tokens"
            raise ConfigError(text, where="rollout.cache_mib", hint=hint)
        self.bytes, self.tokens = self.slots * self.bytes_per_slot, tokens
        shape = (self.slots, heads, tokens, width)
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self._rows: torch.Tensor | slice = slice(0, 0)

    def aim(self, rows: list[int], starts: torch.Tensor, counts: torch.Tensor, width: int) -> torch.Tensor:
        """Prepare a pass over `width` new tokens of each row, of which the first `counts` are real; returns its
        attention mask, bool [b, 1, width, span].

        Args:
            rows: b distinct slots. 0 .. b−1 in order is read without copying.
            starts: [b] tokens each row holds already.
        """
        device = starts.device
        index = torch.tensor(rows, device=device)
        steps = torch.arange(width, device=device)
        positions = starts[:, None] + steps
        self._single = width == 1
        self._write_rows, self._write_positions = index, starts
        if not self._single:
            self._real = steps < counts[:, None]
            self._write_rows = index[:, None].expand_as(positions)[self._real]
            self._write_positions = positions[self._real]
        self._span = min(self.tokens, -(-int((starts + counts).max()) // SPAN_STEP) * SPAN_STEP)
        self._rows = slice(0, len(rows)) if rows == list(range(len(rows))) else index
        return (torch.arange(self._span, device=device) <= positions[:, :, None])[:, None]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model's layers with [b, heads, width, head_dim]; returns [b, heads, span, head_dim] of both."""
        return self._exchange(self._keys[layer], keys), self._exchange(self._values[layer], values)

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Give another slot the tokens start .. stop−1 of a slot."""
        for store in (*self._keys, *self._values):
            store[target, :, start:stop] = store[source, :, start:stop]

    def get_seq_length(self, *_: Any) -> int:
        """Positions are always given explicitly."""
        return 0

    def _exchange(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        arranged = new[:, :, 0] if self._single else new.transpose(1, 2)[self._real]
        store[self._write_rows, :, self._write_positions] = arranged
        return store[self._rows, :, : self._span]
