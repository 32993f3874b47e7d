"""What is not finite in an optimiser step that was left out for it, and where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from spearrl.batching import Rows
from spearrl.learner.local import LocalLearner
from spearrl.learner.loss_inputs import Share, Tally
from spearrl.learner.old_logprobs import OldLogprobs

NAMED = 3  # rows or parameters that a line names


def examine(learner: LocalLearner, shares: Sequence[Share]) -> tuple[list[str], list[str]]:
    """Make the step's forward and backward passes; nothing is trained.

    Returns:
        (what is not finite and where, a line each; the numbers that are).
    """
    broken = list(_weights(learner))
    for share in shares:
        rows, kind = share.batch.rows, share.objectives[0][0].prefix
        tensors = {**share.batch.tensors(), "logprobs of these weights": learner.logprobs(rows)}
        if share.current:  # where they are not a number the pass itself finds them
            tensors["old_logprobs"] = tensors["old_logprobs"].nan_to_num(0.0, torch.inf, -torch.inf)
        broken += [f"{kind}: {text}" for name, tensor in tensors.items() if (text := _tokens(rows, name, tensor))]
    total, tally = _total(learner, shares)
    norm = torch.nn.utils.get_total_norm([p.grad for p in learner.model.parameters() if p.grad is not None])
    sound = [f"{name} {value:.6g}" for name, value in tally.means().items() if math.isfinite(value)]
    broken += [f"{name} is {value}" for name, value in tally.means().items() if not math.isfinite(value)]
    if math.isfinite(total) and math.isfinite(norm):
        return broken, [f"loss {total:.6g}", f"gradient norm {float(norm):.6g}", *sound]
    gradients = [(n, p.grad) for n, p in learner.model.named_parameters() if p.grad is not None]
    named = [name for name, gradient in gradients if not torch.isfinite(gradient).all()]
    broken.append(f"loss {total:.6g}, gradient norm {float(norm):.6g}")
    if named:
        broken.append(f"gradient of {len(named)} of {len(gradients)} parameters: {_some(named)}")
    return broken + list(_rows(learner, shares)), sound


def _total(learner: LocalLearner, shares: Sequence[Share]) -> tuple[float, Tally]:
    """The loss of the shares, whose gradient is added up in the model."""
    tally = Tally()
    learner.optimizer.zero_grad(set_to_none=True)
    kept = [part for part in (share.with_signal() for share in shares) if len(part.batch)]
    total = sum(learner._backward(share, tally, OldLogprobs(share.batch)) for share in kept)
    return float(total), tally


def _rows(learner: LocalLearner, shares: Sequence[Share]) -> Iterator[str]:
    """Rows whose loss or gradient is not finite where each is alone in the step."""
    for share in shares:
        rows, named = share.batch.rows, []
        for row in range(len(rows)):
            alone = replace(share, batch=share.batch.select([row]), covariance=None, whole=None, index=None)
            total, _ = _total(learner, [alone])
            gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
            if not (math.isfinite(total) and math.isfinite(torch.nn.utils.get_total_norm(gradients))):
                named.append(f"row {row} (trajectory {int(rows.trajectory[row])}, group {int(rows.group[row])})")
        if named:
            yield f"{share.objectives[0][0].prefix}: {len(named)} of {len(rows)} rows by themselves: {_some(named)}"


def _weights(learner: LocalLearner) -> Iterator[str]:
    named = [name for name, value in learner.model.named_parameters() if not torch.isfinite(value).all()]
    if named:
        yield f"weights: {_some(named)}"


def _tokens(rows: Rows, name: str, tensor: torch.Tensor) -> str:
    """Which action tokens of a [B, T] tensor are not finite; "" where all are."""
    wrong = (~torch.isfinite(tensor) & rows.padded_mask).nonzero().tolist()
    if not wrong:
        return ""
    places = [
        f"row {row} (trajectory {int(rows.trajectory[row])}, group {int(rows.group[row])}) token {position} "
        f"(id {int(rows.token_ids[rows.offsets[row] + position])})"
        for row, position in wrong[:NAMED]
    ]
    return f"{name}: {len(wrong)} of {int(rows.action_mask.sum())} tokens: {_some(places, len(wrong))}"


def _some(names: Sequence[str], count: int = 0) -> str:
    return ", ".join(names[:NAMED]) + (", …" if max(count, len(names)) > NAMED else "")
