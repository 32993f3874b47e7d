"""Drawing tokens: one uniform number per token from a counter hash, inverted through the distribution in float64.

A request's tokens depend on its seed and its logits alone, not on which requests share the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spearrl.batching.token_hashes import counter_uniforms
from spearrl.rollout.protocol import Sampling


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
    scores = logits.float()
    if any(s.temperature not in (0, 1) for s in samplings):
        scores = scores / torch.tensor([s.temperature or 1.0 for s in samplings], device=device)[:, None]
    restricted = [row for row, s in enumerate(samplings) if s.allowed_ids is not None]
    if restricted:
        scores = _restrict(scores, restricted, samplings)
    logprobs = torch.log_softmax(scores, dim=-1)
    if any(s.top_p < 1 for s in samplings):
        logprobs = _nucleus(logprobs, torch.tensor([s.top_p for s in samplings], device=device))
    greedy = [s.temperature == 0 for s in samplings]
    if all(greedy):
        tokens = logprobs.argmax(-1)
    else:
        tokens = _invert(logprobs, counter_uniforms([s.seed for s in samplings], positions))
        if any(greedy):
            tokens = torch.where(torch.tensor(greedy, device=device), logprobs.argmax(-1), tokens)
    return tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0].tolist()


def _invert(logprobs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Tokens [b] at which the cumulative distribution passes each number; one of probability 0 is never drawn."""
    cumulative = logprobs.exp().double().cumsum(-1)
    total = cumulative[:, -1:]
    # The product may round up to the total itself, which lies past the last token.
    targets = torch.minimum(
        numbers.to(logprobs.device)[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
    )
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=logprobs.shape[-1] - 1)


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
