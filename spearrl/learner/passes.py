"""Forward and backward passes over rows, a micro-batch at a time: what every learner does with the rows a device is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from spearrl.batching import Rows, forward_inputs
from spearrl.errors import ContractError
from spearrl.learner.critic import ValueHead
from spearrl.learner.minibatch import LossInputs, Share, Tally, selected_tokens
from spearrl.models.vision import Vision

EPISODE_KINDS = ("policy", "sil", "sft")  # prefixes under which the policy's entropy is reported


class Outputs(NamedTuple):
    """Of a forward pass, [b, T] each, 0 where there is no action token."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None


class Passes:
    """Passes of one device.

    Args:
        policy: a `Policy`, or what wraps one.
        critic: reads the policy's hidden states.
        backward: adds the gradient of a loss.
        vision: of the model, where it sees.
        packed: rows lie end to end in a pass.
    """

    def __init__(
        self,
        policy: Any,
        device: torch.device,
        *,
        critic: ValueHead | None,
        packed: bool = False,
        backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward,
        vision: Vision | None = None,
    ):
        self.vision = vision
        self.policy, self.device, self.critic, self.packed, self.run_backward = policy, device, critic, packed, backward

    def forward(self, rows: Rows, policy: Any = None) -> Outputs:
        """One pass over all rows at once; of `policy` instead of the trained one, where it is given. Raises ContractError for pictures of no use."""
        if self.vision is None and rows.pictures:
            raise ContractError(
                "rows with pictures", where="learner", hint="train a model that sees: one of the Qwen2-VL family"
            )
        inputs = forward_inputs(rows, packed=self.packed)
        token_ids = (
            inputs.token_ids if len(rows) else torch.zeros(1, 1, dtype=torch.int64)
        )  # a pass for company: sharded weights are gathered by all
        given = (tensor.to(self.device) for tensor in (token_ids, inputs.source, inputs.target))
        allowed = tuple(tensor.to(self.device) for tensor in inputs.allowed)
        seen = () if self.vision is None else self.vision.inputs(token_ids, rows.images, rows.pictures).to(self.device)
        logprobs, entropy, hidden = (self.policy if policy is None else policy)(
            *given, inputs.lengths, allowed, seen=seen
        )
        numbers = [logprobs, entropy] if self.critic is None else [logprobs, entropy, self.critic(hidden)]
        place = inputs.place.to(self.device)
        spread = [
            v.new_zeros(len(rows) * rows.width).index_copy(0, place, v).view(len(rows), rows.width) for v in numbers
        ]
        return Outputs(spread[0], spread[1], spread[2] if self.critic is not None else None)

    def predict(
        self, rows: Rows, pieces: Sequence[torch.Tensor], *, values: bool = False, policy: Any = None
    ) -> torch.Tensor:
        """[B, T] log-probabilities (or values) of action tokens, 0 elsewhere, on the CPU; no gradient. `pieces`: row indices of each pass."""
        asked = self.policy if policy is None else policy
        asked.eval()
        found = torch.zeros(len(rows), rows.width, dtype=asked.dtype)
        with torch.no_grad():
            for index in pieces:
                part = rows.select(index)
                outputs = self.forward(part, asked)
                wanted = outputs.values if values else outputs.logprobs
                found[index, : part.width] = torch.zeros(()) if wanted is None else wanted.to(found.dtype).cpu()
        return found

    def backward(
        self,
        share: Share,
        pieces: Sequence[torch.Tensor],
        tally: Tally,
        *,
        chosen: Mapping[int, torch.Tensor],
        held: Sequence[Outputs] = (),
    ) -> list[float]:
        """Add the gradient of a share's objectives; returns the loss of each.

        Args:
            pieces: row indices of each pass.
            chosen: bool [B, T], by place in the objectives: what a covariance rule selected in the whole mini-batch.
            held: the passes' outputs where they were computed already.
        """
        denominators, losses = share.denominators(), [0.0] * len(share.objectives)
        for number, index in enumerate(pieces):
            batch = share.batch.select(index)
            inputs = LossInputs.of(batch, self.device)
            outputs = held[number] if held else self.forward(batch.rows)
            if not len(batch):
                self.run_backward(_nothing(outputs, [objective.kind for objective, _ in share.objectives]))
                continue
            tokens = float(inputs.action_mask.sum())
            mean_entropy = float(outputs.entropy.detach().sum()) / max(tokens, 1.0)
            total: torch.Tensor = outputs.logprobs.new_zeros(())
            for i, (objective, factor) in enumerate(share.objectives):
                if i in chosen:
                    selection: torch.Tensor | None = chosen[i][index.to(self.device), : outputs.logprobs.shape[1]]
                else:  # micro-batch scope, or this pass is the whole mini-batch
                    known = share.current and objective.scope == "mini_batch"
                    selection = selected_tokens(
                        objective, inputs, inputs.old_logprobs if known else outputs.logprobs.detach(), share.seed
                    )
                predictions = {"entropy": outputs.entropy, "values": outputs.values}
                loss, metrics = objective.loss(
                    inputs, outputs.logprobs, denominator=denominators[i], covariance_tokens=selection, **predictions
                )
                loss = loss * share.part(objective, len(batch))
                total = total + factor * loss
                losses[i] += float(loss.detach())
                tally.add(
                    objective.prefix,
                    {**metrics, "entropy": mean_entropy} if objective.prefix in EPISODE_KINDS else metrics,
                    tokens,
                )
            self.run_backward(total)
        return losses


def _nothing(outputs: Outputs, kinds: Sequence[str]) -> torch.Tensor:
    """0, made of the outputs that objectives of these kinds read: sharded weights are gathered in the same order by ranks without a row."""
    read = [outputs.logprobs] if set(kinds) - {"entropy", "value"} else []
    read += [outputs.entropy] if "entropy" in kinds else []
    read += [outputs.values] if "value" in kinds and outputs.values is not None else []
    return torch.stack([tensor.sum() for tensor in read]).sum() * 0.0
