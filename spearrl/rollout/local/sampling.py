"""Drawing tokens: one uniform number per token from a counter hash, inverted through running sums in float64.

A request's tokens depend on its seed and its logits alone, not on which requests share the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spearrl.batching.token_hashes import counter_uniforms
from spearrl.rollout.protocol import Sampling

BLOCK = 256  # tokens


def draw(
    logits: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Next token and its log-probability for each row; a log-probability is not finite where the row's logits are not.

    Args:
        logits: [b, V].
        samplings: of each row's request.
        positions: how many tokens each request has drawn already.
    """
    device = logits.device
    scores = logits
    if any(s.temperature not in (0, 1) for s in samplings):
        scores = scores.float() / torch.tensor([s.temperature or 1.0 for s in samplings], device=device)[:, None]
    restricted = [row for row, s in enumerate(samplings) if s.allowed_ids is not None]
    if restricted:
        scores = _restrict(scores, restricted, samplings)
    if any(s.top_p < 1 for s in samplings):
        top_p = torch.tensor([s.top_p for s in samplings], device=device)
        scores = _nucleus(torch.log_softmax(scores.float(), dim=-1), top_p)
    # One tensor of the vocabulary's width, worked on in place: making another costs more than what is done with it.
    most = scores.amax(-1, keepdim=True).float()
    weights = torch.sub(scores, most).exp_()
    greedy = torch.tensor([s.temperature == 0 for s in samplings], device=device)
    numbers = counter_uniforms([s.seed for s in samplings], positions).to(device)
    tokens, totals = _invert(weights, numbers)
    if bool(greedy.any()):
        tokens = torch.where(greedy, scores.argmax(-1), tokens)
    logprobs = (scores.gather(1, tokens[:, None]).double() - most)[:, 0] - totals.log()
    return tokens.tolist(), logprobs.float().tolist()


def _invert(weights: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [b] at which the running sum of weights [b, V] passes each number's share of the total, and the totals; a
    token of weight 0 is never drawn.
    """
    # By blocks first: a running sum over the whole vocabulary takes longer than all else here.
    size, rows = weights.shape[-1], torch.arange(len(weights), device=weights.device)
    if size % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -size % BLOCK))
    blocks = weights.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1).double().cumsum(-1)
    block, rest = _passed(sums, numbers[:, None] * sums[:, -1:])
    index = _passed(blocks[rows, block[:, 0]].double().cumsum(-1), rest)[0]
    return (block * BLOCK + index)[:, 0].clamp(max=size - 1), sums[:, -1]  # NaN passes all


def _passed(sums: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where running sums [b, n] pass each target [b, 1], and how much of it is left there."""
    # Rounding may put a target on the last sum, which lies past the last token.
    targets = torch.minimum(targets, torch.nextafter(sums[:, -1:], torch.zeros_like(targets)))
    index = torch.searchsorted(sums, targets, right=True).clamp(max=sums.shape[-1] - 1)
    before = torch.where(index > 0, sums.gather(1, (index - 1).clamp(min=0)), 0.0)
    return index, targets - before


def _restrict(scores: torch.Tensor, rows: list[int], samplings: Sequence[Sampling]) -> torch.Tensor:
    """Minus infinity for what a row's allowed_ids leave out."""
    allowed = torch.ones_like(scores, dtype=torch.bool)
    allowed[rows] = False
    for row in rows:
        allowed[row, list(samplings[row].allowed_ids or ())] = True
    return scores.masked_fill(~allowed, -torch.inf)


def _nucleus(logprobs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest set of tokens whose probability reaches top_p (arXiv 1904.09751), renormalised.

    Rows of top_p = 1 stay as they are.
    """
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().double().cumsum(-1) - ordered.exp().double()
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p[:, None])
    cut = torch.log_softmax(logprobs.masked_fill(dropped, -torch.inf), dim=-1)
    return torch.where(top_p[:, None] < 1, cut, logprobs)
