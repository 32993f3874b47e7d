"""Attention of the local engine: the new tokens of several sequences in one row, each over its own slot of the cache.

Sequences that lie side by side and are about as long take part in one call. It reads keys and values where they lie,
each key-value head once for all query heads that share it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

ATTENTION = "spearrl_cache"  # its name among transformers' attention functions
WASTE = 128  # keys of padding that cost less than another call


@dataclass(frozen=True)
class Part:
    """One call: `steps` queries of each of some slots, over a range of their tokens.

    Args:
        queries: of the pass, those of a slot one after the other.
        mask: additive [slots, 1, steps, keys]; None: all see all, or what is `causal` each what is before it.
    """

    queries: slice
    slots: slice
    keys: slice
    steps: int
    mask: torch.Tensor | None
    causal: bool = False


def parts_of(rows: Sequence[tuple[int, int, int]], window: int, eager: bool, blank: torch.Tensor) -> list[Part]:
    """The calls for rows (slot, tokens it holds, new tokens), slots ascending.

    Args:
        window: tokens that a layer looks back over, itself among them; 0: all.
        eager: the function takes no causal flag.
        blank: of the masks' type and device.
    """
    parts, begin, query = [], 0, 0
    while begin < len(rows):
        slot, longest, steps = rows[begin]
        end, total = begin + 1, longest
        while end < len(rows) and steps == rows[end][2] == 1 and rows[end][0] == slot + end - begin:
            most, seen = max(longest, rows[end][1]), total + rows[end][1]
            if most * (end + 1 - begin) - seen > max(WASTE, seen // 4):
                break
            end, longest, total = end + 1, most, seen
        held = torch.tensor([row[1] for row in rows[begin:end]], device=blank.device)
        low, high, stop = int(held.min()), longest + steps, query + (end - begin) * steps
        first = max(0, low + 1 - window) if window else 0
        whole, mask = first == 0 and not 0 < window < high, None
        causal = whole and low == 0 and steps > 1 and not eager
        if not causal and not (whole and low + 1 == high):
            last = held[:, None, None] + torch.arange(steps, device=blank.device)[:, None]  # [slots, steps, 1]
            keys = torch.arange(first, high, device=blank.device)
            hidden = (keys > last) | (keys <= last - (window or high))
            mask = blank.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(blank.dtype).min)[:, None]
        slots, keys_read = slice(slot, slot + end - begin), slice(first, high)
        parts.append(Part(slice(query, stop), slots, keys_read, steps, mask, causal))
        begin, query = end, stop
    return parts


def attend(inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[torch.Tensor, None]:
    """transformers' attention function. Inputs are the module, queries [1, heads, T, d], the layer's keys and values
    [slots, tokens, key-value heads, d], and a mask of which only the last axis counts: the number of the kind of layer.
    """
    module, query, keys, values, kind = inputs
    kinds, eager = options.pop("cu_seq_lens_q")
    own = sys.modules[type(module).__module__].eager_attention_forward if eager else None
    by_token, outputs = query[0].transpose(0, 1), []
    for part in kinds[kind.shape[-1] - 1]:
        q = by_token[part.queries].unflatten(0, (-1, part.steps)).transpose(1, 2)
        k, v = (store[part.slots, part.keys].transpose(1, 2) for store in (keys, values))
        if own:
            outputs.append(own(module, q, k, v, part.mask, **options)[0].flatten(0, 1))
            continue
        grouped, mask = k.shape[1] != q.shape[1], part.mask
        settings = {"is_causal": part.causal, "scale": options.get("scaling")}
        if grouped and part.steps == 1 and q.dtype == torch.float32:
            # One row of queries a key-value head: faster on a CPU in float32 than `enable_gqa`, in bfloat16 slower.
            q, grouped = q.unflatten(1, (k.shape[1], -1)).squeeze(3), False
            mask = None if mask is None else mask.expand(-1, -1, q.shape[2], -1)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped, **settings)
        outputs.append(out.flatten(1, 2) if part.steps == 1 else out.transpose(1, 2).flatten(0, 1))
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None], None
