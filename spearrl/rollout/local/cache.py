"""The local engine's key-value cache: slots that grow on demand, bounded in bytes, written and read in place."""

from __future__ import annotations

from typing import Any

import torch

from spearrl.errors import ConfigError

SPAN_STEP = 32  # slots grow by so many tokens at least
MIB = 1 << 20


class SlotCache:
    """Keys and values of every layer, [allocated slots, allocated tokens, heads, head_dim] each.

    Passed to a transformers model as `past_key_values`: its layers call `update`, which writes this pass's tokens where
    `aim` says; `slot_attention.attend` reads them. Nothing is allocated before `reserve`.

    Args:
        slots: at most.
        tokens: of a slot at most.
    Raises:
        ConfigError: not even one slot of that many tokens fits `cache_mib`.
    """

    def __init__(
        self, config: Any, *, slots: int, tokens: int, cache_mib: int, dtype: torch.dtype, device: torch.device
    ):
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = config.num_hidden_layers
        self.slots, self.tokens, self._budget = slots, tokens, cache_mib * MIB
        self.bytes_per_token = layers * 2 * heads * width * dtype.itemsize
        if self.room(tokens) < 1:
            needed = -(-tokens * self.bytes_per_token // MIB)
            text = f"one sequence of {tokens} tokens needs {needed} MiB of cache, rollout.cache_mib is {cache_mib}"
            hint = f"set rollout.cache_mib to at least {needed}, or lower rollout.context_tokens"
            raise ConfigError(text, where="rollout.cache_mib", hint=hint)
        self.allocated, self.length = 0, 0  # slots, and tokens of each
        none = torch.zeros((0, 0, heads, width), dtype=dtype, device=device)
        self._keys, self._values = [none] * layers, [none] * layers

    @property
    def bytes(self) -> int:
        """Allocated now."""
        return self.allocated * self.length * self.bytes_per_token

    def room(self, tokens: int) -> int:
        """How many slots of so many tokens the bound holds."""
        return min(self.slots, self._budget // (self._whole(tokens) * self.bytes_per_token))

    def reserve(self, slots: int, tokens: int) -> None:
        """Have at least `slots` (at most `room(tokens)`) slots of `tokens` tokens: twice as many where they fit.

        What is there is kept; where the bound asks for it, only of the first `slots`, and their first `tokens` tokens.
        """
        tokens = self._whole(tokens)
        if slots <= self.allocated and tokens <= self.length:
            return
        shapes = [(max(slots, self.allocated), max(tokens, self.length)), (slots, tokens)]
        if slots > self.allocated:
            shapes.insert(0, (min(self.slots, max(slots, 2 * self.allocated)), shapes[0][1]))
        if tokens > self.length:
            shapes.insert(0, (shapes[0][0], self._whole(max(tokens, 2 * self.length))))
        self.allocated, self.length = next(shape for shape in shapes if shape[0] <= self.room(shape[1]))
        for stores in (self._keys, self._values):
            for layer, store in enumerate(stores):
                stores[layer] = store.new_zeros((self.allocated, self.length, *store.shape[2:]))
                kept = store[: self.allocated, : self.length]
                stores[layer][: kept.shape[0], : kept.shape[1]] = kept

    def _whole(self, tokens: int) -> int:
        """Rounded up, so that slots do not grow by one token at a time."""
        return min(self.tokens, -(-tokens // SPAN_STEP) * SPAN_STEP)

    def aim(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """Where the tokens of the next pass go: slots and places in them, [T] each."""
        self._target = (rows, positions)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model's layers with [1, heads, T, head_dim]; returns all that the layer's cache holds."""
        return self._write(self._keys[layer], keys), self._write(self._values[layer], values)

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Give another slot the tokens start .. stop−1 of a slot."""
        for store in (*self._keys, *self._values):
            store[target, start:stop] = store[source, start:stop]

    def get_seq_length(self, *_: Any) -> int:
        """Positions are always given explicitly."""
        return 0

    def _write(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        store[self._target] = new[0].transpose(0, 1)
        return store
