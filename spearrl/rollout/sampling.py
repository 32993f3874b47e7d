"""Drawing tokens: one uniform number per token from a counter hash, inverted through the distribution.

A request's tokens depend on its seed and its logits alone, not on which requests share the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from spearrl.rollout.engine import Sampling

MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for a token (SplitMix64 of seed and position; doi:10.1145/2660193.2660195)."""
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return float((z ^ (z >> 31)) >> 11) / (1 << 53)


def draw(logits: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> tuple[list[int], list[float]]:
    """Next token and its log-probability for each row.

    Args:
        logits: [b, V].
        samplings: of each row's request.
        positions: how many tokens each request has drawn already.
    """
    temperatures = torch.tensor([s.temperature if s.temperature > 0 else 1.0 for s in samplings], device=logits.device)
    scores = logits.float() / temperatures[:, None]
    for row, sampling in enumerate(samplings):
        if sampling.allowed_ids is not None:
            scores[row] = _only(scores[row], torch.tensor(sampling.allowed_ids, device=scores.device))
    logprobs = torch.log_softmax(scores, dim=-1)
    if any(s.top_p < 1 for s in samplings):
        logprobs = torch.log_softmax(_nucleus(logprobs, torch.tensor([s.top_p for s in samplings], device=logits.device)), dim=-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    numbers = np.array([uniform(s.seed, p) for s, p in zip(samplings, positions, strict=True)])
    targets = torch.from_numpy(numbers).to(logits.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    greedy = torch.tensor([s.temperature == 0 for s in samplings], device=logits.device)
    tokens = torch.where(greedy, logprobs.argmax(-1), tokens)
    return tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0].tolist()


def _only(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    return torch.full_like(scores, -torch.inf).index_copy(0, allowed, scores[allowed])


def _nucleus(logprobs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of tokens whose probability reaches top_p (arXiv 1904.09751)."""
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p[:, None])
    return logprobs.masked_fill(dropped, -torch.inf)
