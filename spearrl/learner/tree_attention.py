"""Attention over a prefix tree: a token sees its own segment up to itself, and its ancestors.

On a CPU each segment attends to itself causally, and all that descend from a piece of an earlier segment attend to that
piece in one call: keys are read where they lie, no mask is made. Partial results are put together by the
log-sum-exp of their scores, as in flash attention (arXiv 2205.14135, section 3.1) and cascade inference
(arXiv 2501.01005). On CUDA it is FlexAttention (written, not yet run).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from spearrl.batching import PrefixTree

Range = tuple[slice, slice, bool]  # queries, keys, causal


@dataclass(frozen=True)
class AttentionPlan:
    """A tree, and what attention on a device makes of it once for all layers."""

    tree: PrefixTree
    mask: Any = None  # CUDA: FlexAttention's block mask

    @classmethod
    def of(cls, tree: PrefixTree, device: torch.device) -> AttentionPlan:
        if device.type != "cuda":
            return cls(tree)
        from torch.nn.attention.flex_attention import create_block_mask

        last, size = tree.last_descendants().to(device), tree.bounds[-1]
        mask = create_block_mask(
            lambda b, h, q, k: (k <= q) & (q < last[k]), None, None, size, size, device=str(device)
        )
        return cls(tree, mask)


def attend(inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[torch.Tensor, None]:
    """transformers' attention function. Inputs are the module, query, key and value [1, heads, U, d], and the mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plan = options.pop("cu_seq_lens_q", None)
    if plan is None:
        return sdpa_attention_forward(*inputs, **options)
    query, key, value = inputs[1:4]
    return tree_attention(query, key, value, plan, options.get("scaling")).transpose(1, 2), None


def tree_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale · query keyᵀ) value over what each token sees, [1, heads, U, d].

    Args:
        query: [1, heads, U, d]; `key` and `value` [1, some divisor of heads, U, d].
        scale: 1/sqrt(d) where None.
    """
    if query.is_cuda:
        return _flex_attention()(query, key, value, block_mask=plan.mask, scale=scale, enable_gqa=True)
    # In bfloat16 torch's backward pass is slower on a CPU, and partial results would be rounded where they meet.
    wide = torch.promote_types(query.dtype, torch.float32)
    tensors = (tensor.to(wide) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _TreeAttention.apply(*tensors, (plan.tree, scale)).to(query.dtype)


class _TreeAttention(torch.autograd.Function):
    """Softmax over several ranges of keys: out = Σ exp(lse_i - lse) out_i, lse = log Σ exp(lse_i).

    The backward pass of a range is that of its own call given the whole output and log-sum-exp.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: tuple[PrefixTree, float]
    ) -> torch.Tensor:
        tree, scale = settings
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:3])
        for queries, keys, causal in _ranges(tree):
            part, score = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, causal, scale=scale
            )
            if causal:  # each token's own segment comes first
                out[:, :, queries], lse[:, :, queries] = part, score
                continue
            total = torch.logaddexp(lse[:, :, queries], score)
            out[:, :, queries].mul_((lse[:, :, queries] - total).exp_().unsqueeze(-1))
            out[:, :, queries].addcmul_(part, (score - total).exp_().unsqueeze(-1))
            lse[:, :, queries] = total
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tree, ctx.scale = tree, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for queries, keys, causal in _ranges(ctx.tree):
            tensors = (query[:, :, queries], key[:, :, keys], value[:, :, keys], out[:, :, queries], lse[:, :, queries])
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, queries], *tensors, 0.0, causal, scale=ctx.scale
            )
            for total, part, where in zip(grads, parts, (queries, keys, keys), strict=True):
                total[:, :, where] += part
        return *grads, None


def _ranges(tree: PrefixTree) -> Iterator[Range]:
    """Every segment with itself, then all shared pieces with what descends from them."""
    for begin, end in tree.segments:
        if end > begin:
            yield slice(begin, end), slice(begin, end), True
    for part in tree.shared:
        yield slice(part.begin, part.end), slice(part.key_begin, part.key_end), False


@cache
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
