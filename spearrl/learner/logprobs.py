"""Log-probabilities of given tokens from hidden states, a chunk of logits at a time.

With a vocabulary of 150,000 the logits of a batch take more memory than the rest of a model; only a chunk of them ever exists, and the
backward pass computes it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, bias: torch.Tensor | None = None, temperature: float = 1.0, chunk: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax((hidden weightᵀ + bias) / temperature) at the targets, and the entropy of each of these distributions.

    Computed in float32 or wider whatever the inputs' type, also inside autocast; differentiable once with respect to hidden, weight and bias.

    Args:
        hidden: [n, d].
        weight: [V, d], the language-model head. `bias`: [V].
        targets: int64 [n].
        chunk: positions whose logits exist at a time; memory is about 2 x chunk x V numbers (3 with a gradient of the entropies), whatever n.
    Returns:
        (log-probabilities [n], entropies [n] in nats).
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogprobs.apply(hidden, weight, bias, targets, temperature, chunk)


class _TokenLogprobs(torch.autograd.Function):
    """d logp_t / d z = onehot(t) - p ; d H / d z = -p (log p + H), chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, temperature: float, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        logprobs, entropies = hidden.new_empty(len(hidden), dtype=dtype), hidden.new_empty(len(hidden), dtype=dtype)
        probabilities = None
        for part, p, log_p_target, entropy in _chunks(hidden, weight, bias, targets, temperature, chunk, dtype):
            logprobs[part], entropies[part] = log_p_target, entropy
            probabilities = p
        # A single chunk is kept: the memory bound is the same and the backward pass saves a product with the head.
        single = len(hidden) <= chunk and any(ctx.needs_input_grad)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies, probabilities if single else None)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, dtype
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropies: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, entropies, kept = ctx.saved_tensors
        if grad_logprobs is None and grad_entropies is None:
            return None, None, None, None, None, None
        grad_logprobs = torch.zeros_like(entropies) if grad_logprobs is None else grad_logprobs
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=ctx.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=ctx.dtype) if needs_bias and bias is not None else None
        wide = weight.to(ctx.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            if kept is not None and len(hidden):
                parts: Iterator[tuple[slice, torch.Tensor]] = iter([(slice(0, len(hidden)), kept)])
            else:
                parts = ((part, p) for part, p, _, _ in _chunks(hidden, weight, bias, targets, ctx.temperature, ctx.chunk, ctx.dtype))
            for part, p in parts:
                upstream = None if grad_entropies is None else grad_entropies[part]
                out = torch.empty_like(p) if kept is not None else p
                grad_logits = _grad_logits(p, targets[part], entropies[part], grad_logprobs[part], upstream, out)
                grad_logits.div_(ctx.temperature)
                if grad_hidden is not None:
                    grad_hidden[part] = torch.mm(grad_logits, wide).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.T, hidden[part].to(ctx.dtype))
                if grad_bias is not None:
                    grad_bias.add_(grad_logits.sum(0))
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, temperature: float, chunk: int, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(positions, probabilities [m, V], log-probabilities of the targets [m], entropies [m]); probabilities are overwritten by the next chunk."""
    wide = weight.to(dtype)
    size = min(chunk, max(len(hidden), 1))
    logits, exponentials = hidden.new_empty(size, len(weight), dtype=dtype), hidden.new_empty(size, len(weight), dtype=dtype)
    for begin in range(0, len(hidden), chunk):
        part = slice(begin, min(begin + chunk, len(hidden)))
        count = part.stop - begin
        z, p = logits[:count], exponentials[:count]
        torch.mm(hidden[part].to(dtype).div(temperature), wide.T, out=z)
        if bias is not None:
            z.add_(bias.to(dtype).div(temperature))
        z.sub_(z.amax(-1, keepdim=True))
        torch.exp(z, out=p)
        total = p.sum(-1, keepdim=True)
        log_total = total.log().squeeze(-1)
        p.div_(total)
        log_p_target = z.gather(1, targets[part, None]).squeeze(1) - log_total
        mean_z = torch.bmm(p.unsqueeze(1), z.unsqueeze(2)).view(-1)
        yield part, p, log_p_target, log_total - mean_z


def _grad_logits(
    p: torch.Tensor, targets: torch.Tensor, entropies: torch.Tensor, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """[m, V], before the division by the temperature; `out` may be p."""
    upstream = grad_logprobs.unsqueeze(1).to(p.dtype)
    if grad_entropies is None:
        torch.mul(p, -upstream, out=out)
    else:
        weights = grad_entropies.unsqueeze(1).to(p.dtype)
        surprise = torch.special.entr(p).mul_(weights)  # -p log p, and 0 at p = 0
        torch.mul(p, -(weights * entropies.unsqueeze(1) + upstream), out=out).add_(surprise)
    return out.scatter_add_(1, targets.unsqueeze(1), upstream)
