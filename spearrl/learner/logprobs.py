"""Log-probabilities of given tokens from hidden states, a tile of logits at a time.

With a vocabulary of 150,000 the logits of a batch take more memory than the rest of a model. A tile, some positions by
some of the vocabulary, stays in a processor's cache: running maxima and sums make the softmax, and the backward pass
computes the tile again. Where the head is frozen, hidden's gradient is formed in the forward pass and it need not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

IMPOSSIBLE = -1e30  # logit of a token that is not allowed: its probability is 0, and 0 times it is 0
TILE_BYTES = {"cpu": 2**23, "cuda": 2**28}  # of logits: what stays in cache, or what keeps a GPU busy
KEPT_BYTES = 2**25  # where all logits are no more than this, the forward pass leaves them to the backward pass


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
    hidden, weight and bias. Positions whose upstream gradient is exactly 0 cost the backward pass nothing.

    Args:
        hidden: [n, d].
        weight: [V, d], the language-model head. `bias`: [V].
        targets: int64 [n].
        chunk: positions of a tile, at most. Memory beside inputs and gradients: two tiles (of TILE_BYTES each, or of
            one token by `chunk`), or KEPT_BYTES, and [n, d] where the head is frozen.
        allowed: the set of each target [n] (-1: the whole vocabulary), then owner and ids of the sets, as in
            `AllowedIds`: the softmax is over a target's set alone. Costs at most two tiles of bytes.
    Returns:
        (log-probabilities [n], entropies [n] in nats).
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    settings = _Settings(targets, temperature, chunk, dtype, allowed, torch.is_grad_enabled())
    return _TokenLogprobs.apply(hidden, weight, bias, settings)


@dataclass(frozen=True)
class _Settings:
    """Arguments of `token_logprobs` that have no gradient."""

    targets: torch.Tensor
    temperature: float
    chunk: int
    dtype: torch.dtype  # of the computation
    allowed: tuple[torch.Tensor, ...]
    differentiated: bool  # whether a backward pass may follow: inside `forward` torch no longer tells


class _Tile(NamedTuple):
    """Logits / temperature of some positions and some of the vocabulary, overwritten by the next tile."""

    rows: slice
    columns: slice
    logits: torch.Tensor
    scratch: torch.Tensor  # of the logits' shape
    weight: torch.Tensor  # of the columns, in the type of the computation
    local: torch.Tensor  # int64 [m, 1]: each target's column in the tile, where it is inside
    inside: torch.Tensor  # bool [m, 1]


class _TokenLogprobs(torch.autograd.Function):
    """d logp_t / d z = onehot(t) - p ; d H / d z = -p (log p + H), tile by tile."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: _Settings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, *needs_head = (need and settings.differentiated for need in ctx.needs_input_grad[:3])
        size = len(hidden) * len(weight) * settings.dtype.itemsize
        keep = (needs_hidden or any(needs_head)) and len(hidden) <= settings.chunk and size <= KEPT_BYTES
        form = needs_hidden and not any(needs_head) and not keep
        # The largest logit so far; with e = exp(z - top), the sums of e and of (z - top) e; and the target's logit.
        top = hidden.new_full((len(hidden), 1), IMPOSSIBLE, dtype=settings.dtype)
        total, moment, chosen = (torch.zeros_like(top) for _ in range(3))
        stored = torch.zeros_like(hidden, dtype=settings.dtype) if form else None
        with torch.autocast(hidden.device.type, enabled=False):
            for tile in _tiles(hidden, weight, bias, settings, whole=keep):
                rows, z = tile.rows, tile.logits
                highest = torch.maximum(top[rows], z.amax(-1, keepdim=True))
                lower = top[rows] - highest
                fade = lower.exp()
                chosen[rows] = torch.where(tile.inside, z.gather(1, tile.local), chosen[rows])
                e = torch.exp(z.sub_(highest), out=tile.scratch)
                moment[rows] = (moment[rows] + total[rows] * lower) * fade + z.mul_(e).sum(-1, keepdim=True)
                total[rows] = total[rows] * fade + e.sum(-1, keepdim=True)
                top[rows] = highest
                if keep:  # total (p - onehot)
                    stored = e.scatter_add_(1, tile.local, -total)
                elif stored is not None:
                    stored[rows].mul_(fade).addmm_(e, tile.weight)
        if form and stored is not None:  # the gradient of each log-probability
            stored.div_(-total).add_(weight[settings.targets]).div_(settings.temperature)
        log_total = total.log()
        entropies = log_total - moment / total
        ctx.save_for_backward(hidden, weight, bias, top, total, entropies, stored)
        ctx.settings, ctx.formed = settings, form
        ctx.set_materialize_grads(False)
        return (chosen - top - log_total).squeeze(1), entropies.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropies: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, *sums, stored = ctx.saved_tensors
        settings, curved = ctx.settings, grad_entropies is not None
        if grad_logprobs is None and not curved:
            return None, None, None, None
        if ctx.formed and grad_logprobs is not None and not curved:
            return (stored * grad_logprobs.unsqueeze(1)).to(hidden.dtype), None, None, None
        upstream = [
            torch.zeros_like(sums[0]) if grad is None else grad.unsqueeze(1) for grad in (grad_logprobs, grad_entropies)
        ]
        index: Any = (upstream[0].ne(0) | upstream[1].ne(0)).squeeze(1).nonzero().squeeze(1)
        some, index = len(index), slice(None) if len(index) == len(hidden) else index
        top, total, entropies, first, second = (vector[index].to(settings.dtype) for vector in (*sums, *upstream))
        states = hidden[index].to(settings.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(states) if needs_hidden else None
        grad_weight = (torch.empty_like if some else torch.zeros_like)(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=settings.dtype) if needs_bias else None
        # The gradient of a tile's logits is a factor per row times what becomes of the tile: e times
        # first + second (log p + H), or total (p - onehot) where entropies have no gradient.
        slope, spike = first + second * (entropies - total.log()), first * total if curved else total
        factor = (-1 if curved else -first) / (total * settings.temperature)
        scaled, column = states * factor if needs_weight else states, factor
        allowed = (settings.allowed[0][index], *settings.allowed[1:]) if settings.allowed else ()
        settings = replace(settings, targets=settings.targets[index], allowed=allowed)
        stored = None if ctx.formed or curved or stored is None else stored[index]
        with torch.autocast(hidden.device.type, enabled=False):
            for tile in _tiles(states, weight, bias, settings, stored=stored):
                rows, columns, z = tile.rows, tile.columns, tile.logits
                if curved:
                    torch.exp(z.sub_(top[rows]), out=tile.scratch)
                    z.mul_(second[rows]).add_(slope[rows]).mul_(tile.scratch)
                elif stored is None:
                    z.sub_(top[rows]).exp_()
                if stored is None:
                    z.scatter_add_(1, tile.local, torch.where(tile.inside, -spike[rows], 0.0))
                if grad_hidden is not None:
                    grad_hidden[rows].addmm_(z, tile.weight)
                if grad_weight is not None:
                    if rows.start == 0:  # no copy where the types are the same
                        column = grad_weight[columns].to(z.dtype)
                    grad_weight[columns] = column.addmm_(z.T, scaled[rows], beta=float(rows.start > 0))
                if grad_bias is not None:
                    grad_bias[columns] += z.T.mv(factor[rows].squeeze(1))
        if grad_hidden is not None:
            grad_hidden, part = torch.zeros_like(hidden), grad_hidden.mul_(factor)
            grad_hidden[index] = part.to(hidden.dtype)
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype), None


def _tiles(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    settings: _Settings,
    *,
    whole: bool = False,
    stored: torch.Tensor | None = None,
) -> Iterator[_Tile]:
    """Every tile: one slice of the vocabulary after the other, with all positions each.

    Args:
        whole: in one tile.
        stored: taken for the logits, as one tile.
    """
    n, dtype, whole = len(hidden), settings.dtype, whole or stored is not None
    height = max(1, min(settings.chunk, n))
    room = TILE_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"] // (height * dtype.itemsize)
    width = len(weight) if whole else max(1, min(len(weight), room))
    states, parts = hidden.to(dtype), [slice(begin, min(begin + height, n)) for begin in range(0, n, height)]
    buffers = [hidden.new_empty(height * width if stored is None else 0, dtype=dtype) for _ in range(2)]
    masks = _forbidden(settings.allowed, parts, len(weight), width) if settings.allowed and stored is None else None
    for begin in range(0, len(weight), width):
        columns = slice(begin, min(begin + width, len(weight)))
        wide, size = weight[columns].to(dtype), columns.stop - begin
        for rows in parts:
            local = settings.targets[rows].unsqueeze(1) - begin
            where = (local.clamp(0, size - 1), local.ge(0).logical_and_(local.lt(size)))
            if stored is not None:
                yield _Tile(rows, columns, stored, stored, wide, *where)
                continue
            z, scratch = (buffer[: len(local) * size].view(len(local), size) for buffer in buffers)
            torch.mm(states[rows], wide.T, out=z)
            if bias is not None:
                z.add_(bias[columns])
            if settings.temperature != 1:
                z.div_(settings.temperature)
            if masks is not None:
                z.masked_fill_(next(masks), IMPOSSIBLE)
            yield _Tile(rows, columns, z, scratch, wide, *where)


def _forbidden(
    allowed: tuple[torch.Tensor, ...], parts: Sequence[slice], vocabulary: int, width: int
) -> Iterator[torch.Tensor]:
    """bool [m, columns] of each tile: tokens that the sets of its positions leave out."""
    index, owner, (ids, order) = *allowed[:2], allowed[2].sort(stable=True)
    owner, used_of_part = owner[order], [index[rows].unique(return_inverse=True) for rows in parts]
    for begin in range(0, vocabulary, width):
        size = min(width, vocabulary - begin)
        inside = slice(*torch.searchsorted(ids, ids.new_tensor([begin, begin + size])).tolist())
        for used, row in used_of_part:
            index_in_used = torch.searchsorted(used, owner[inside]).clamp(max=len(used) - 1)
            present = used[index_in_used] == owner[inside]
            table = (used >= 0).unsqueeze(1).repeat(1, size)
            table[index_in_used[present], ids[inside][present] - begin] = False
            yield table[row]
