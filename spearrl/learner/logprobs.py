"""Log-probabilities of given tokens from hidden states, a chunk of logits at a time.

With a vocabulary of 150,000 the logits of a batch take more memory than the rest of a model; only a chunk of them ever
exists, and the backward pass computes it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

IMPOSSIBLE = -1e30  # logit of a token that is not allowed: its probability is 0, and 0 times it is 0


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 4096,
    allowed: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax((hidden weightᵀ + bias) / temperature) at the targets, and the entropy of each distribution.

    Computed in float32 or wider whatever the inputs' type, also inside autocast; differentiable once with respect to
    hidden, weight and bias.

    Args:
        hidden: [n, d].
        weight: [V, d], the language-model head. `bias`: [V].
        targets: int64 [n].
        chunk: positions whose logits exist at a time; memory is about 2 x chunk x V numbers (3 with a gradient of the
            entropies), whatever n.
        allowed: the set of each target [n] (-1: the whole vocabulary), then owner and ids of the sets, as in
            `AllowedIds`: the softmax is over a target's set alone. Costs at most 2 x chunk x V bytes.
    Returns:
        (log-probabilities [n], entropies [n] in nats).
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    return _TokenLogprobs.apply(hidden, weight, bias, _Settings(targets, temperature, chunk, dtype, allowed))


@dataclass(frozen=True)
class _Settings:
    """Arguments of `token_logprobs` that have no gradient."""

    targets: torch.Tensor
    temperature: float
    chunk: int
    dtype: torch.dtype  # of the computation
    allowed: tuple[torch.Tensor, ...]


class _TokenLogprobs(torch.autograd.Function):
    """d logp_t / d z = onehot(t) - p ; d H / d z = -p (log p + H), chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: _Settings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = hidden.new_empty(len(hidden), dtype=settings.dtype)
        entropies, probabilities = torch.empty_like(logprobs), None
        for part, p, log_p_target, entropy in _chunks(hidden, weight, bias, settings):
            logprobs[part], entropies[part], probabilities = log_p_target, entropy, p
        # A single chunk is kept: the memory bound is the same and the backward pass saves a product with the head.
        single = len(hidden) <= settings.chunk and any(ctx.needs_input_grad)
        ctx.save_for_backward(hidden, weight, bias, settings.targets, entropies, probabilities if single else None)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropies: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, entropies, stored = ctx.saved_tensors
        if grad_logprobs is None and grad_entropies is None:
            return None, None, None, None
        grad_logprobs = torch.zeros_like(entropies) if grad_logprobs is None else grad_logprobs
        dtype, wide = ctx.settings.dtype, weight.to(ctx.settings.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        chunks: Iterable[tuple[slice, torch.Tensor]] = [(slice(0, len(hidden)), stored)]
        if stored is None:
            chunks = (chunk[:2] for chunk in _chunks(hidden, weight, bias, ctx.settings))
        for part, p in chunks:
            grad_logits = p if stored is None else torch.empty_like(p)
            upstream = grad_logprobs[part].unsqueeze(1).to(dtype)
            if grad_entropies is None:
                torch.mul(p, -upstream, out=grad_logits)
            else:
                weights = grad_entropies[part].unsqueeze(1).to(dtype)
                surprise = torch.special.entr(p).mul_(weights)  # -p log p, and 0 at p = 0
                torch.mul(p, -(weights * entropies[part].unsqueeze(1) + upstream), out=grad_logits).add_(surprise)
            grad_logits.scatter_add_(1, targets[part].unsqueeze(1), upstream).div_(ctx.settings.temperature)
            with torch.autocast(hidden.device.type, enabled=False):
                if grad_hidden is not None:
                    grad_hidden[part] = torch.mm(grad_logits, wide).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.T, hidden[part].to(dtype))
                if grad_bias is not None:
                    grad_bias.add_(grad_logits.sum(0))
        grads = ((grad_weight, weight), (grad_bias, bias))
        return grad_hidden, *(None if grad is None else grad.to(like.dtype) for grad, like in grads), None


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: _Settings
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(positions, probabilities [m, V], log-probabilities of the targets [m], entropies [m]) of each chunk.

    Probabilities are overwritten by the next chunk.
    """
    dtype, temperature, wide = settings.dtype, settings.temperature, weight.to(settings.dtype)
    shift = None if bias is None else bias.to(dtype).div(temperature)
    size = min(settings.chunk, max(len(hidden), 1))
    logits = hidden.new_empty(size, len(weight), dtype=dtype)
    exponentials = torch.empty_like(logits)
    for begin in range(0, len(hidden), settings.chunk):
        part = slice(begin, min(begin + settings.chunk, len(hidden)))
        z, p = logits[: part.stop - begin], exponentials[: part.stop - begin]
        with torch.autocast(hidden.device.type, enabled=False):
            torch.mm(hidden[part].to(dtype).div(temperature), wide.T, out=z)
        if shift is not None:
            z.add_(shift)
        if settings.allowed:
            z.masked_fill_(_forbidden(settings.allowed, part, len(weight)), IMPOSSIBLE)
        z.sub_(z.amax(-1, keepdim=True))
        torch.exp(z, out=p)
        total = p.sum(-1, keepdim=True)
        log_total = total.log().squeeze(-1)
        p.div_(total)
        log_p_target = z.gather(1, settings.targets[part, None]).squeeze(1) - log_total
        with torch.autocast(hidden.device.type, enabled=False):
            mean_z = torch.bmm(p.unsqueeze(1), z.unsqueeze(2)).view(-1)
        yield part, p, log_p_target, log_total - mean_z


def _forbidden(allowed: tuple[torch.Tensor, ...], part: slice, vocabulary: int) -> torch.Tensor:
    """bool [m, V]: tokens that the sets of these positions leave out."""
    index, owner, ids = allowed
    used, row = index[part].unique(return_inverse=True)
    index_in_used = torch.searchsorted(used, owner).clamp(max=len(used) - 1)
    present = used[index_in_used] == owner
    table = (used >= 0).unsqueeze(1).repeat(1, vocabulary)
    table[index_in_used[present], ids[present]] = False
    return table[row]
