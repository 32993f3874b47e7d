"""Forward and backward passes over rows, a micro-batch at a time: what every learner does with the rows of a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from spearrl.batching import Rows, forward_inputs, sequences, tree_passes
from spearrl.config.sections import LearnerSection
from spearrl.errors import ContractError
from spearrl.faults import strike
from spearrl.learner.critic import ValueHead
from spearrl.learner.lora import without_adapters
from spearrl.learner.loss_inputs import LossInputs, Share, Tally, covariance_tokens
from spearrl.learner.minibatches import micro_batches
from spearrl.learner.packing import check_packing, why_padded
from spearrl.learner.policy import check_head
from spearrl.models.vision import vision_of

LOG = logging.getLogger(__name__)
EPISODE_PREFIXES = ("policy", "sil", "sft")  # of metrics, under which the policy's entropy is reported


class Outputs(NamedTuple):
    """Of a forward pass, [b, T] each, 0 where there is no action token. `values` are None without a critic."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None = None


class Gradient(NamedTuple):
    """What `Passes.backward` returns: the loss of each objective, and the current log-probabilities [B, T]."""

    losses: list[float]
    logprobs: torch.Tensor


class Passes:
    """Passes of one device.

    Args:
        policy: a `Policy` of `model`, or what wraps one.
        reference: another one, whose predictions can be asked for; with adapters it is `model` without them.
        critic: reads the policy's hidden states.
        backward: adds the gradient of a loss.
    Raises:
        ConfigError: a model whose head is not a plain linear map, or whose rows cannot be packed.
    """

    def __init__(
        self,
        policy: Any,
        model: Any,
        settings: LearnerSection,
        device: torch.device,
        *,
        reference: Any,
        critic: ValueHead | None,
        backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward,
    ):
        self.policy, self.model, self.settings, self.device = policy, model, settings, device
        self.reference, self.critic, self.vision, self._backward = reference, critic, vision_of(model), backward
        name = type(model).__name__
        check_head(policy, name, device)
        self.why_padded = policy.why_padded or why_padded(settings, lambda: check_packing(policy, name, device))
        self.tree = not self.why_padded

    def pieces(self, rows: Rows) -> list[torch.Tensor]:
        """Row indices of each pass."""
        if self.tree:
            return tree_passes(sequences(rows), self.settings.micro_batch_tokens)
        return micro_batches(rows.lengths, self.settings.micro_batch_tokens)

    def forward(self, rows: Rows, policy: Any = None) -> Outputs:
        """One pass over all rows at once.

        Args:
            policy: used instead of the trained one.
        Raises:
            ContractError: the rows hold images that the model does not take.
        """
        if self.vision is None and rows.pictures:
            hint = "train a vision model of the Qwen2-VL family"
            raise ContractError("rows with pictures", where="learner", hint=hint)
        inputs = forward_inputs(rows, tree=self.tree)
        # Without rows the pass is still made: all processes take part in gathering sharded weights.
        token_ids = inputs.token_ids if len(rows) else torch.zeros(1, 1, dtype=torch.int64)
        tensors = (tensor.to(self.device) for tensor in (token_ids, inputs.source, inputs.target))
        allowed = tuple(tensor.to(self.device) for tensor in inputs.allowed)
        images = None
        if self.vision is not None:
            images = self.vision.inputs(token_ids, rows.images, rows.pictures).to(self.device)
        policy = self.policy if policy is None else policy
        logprobs, entropy, hidden = policy(*tensors, inputs.tree, allowed, images=images)
        outputs = [logprobs, entropy] if self.critic is None else [logprobs, entropy, self.critic(hidden)]
        index, shape = inputs.padded.to(self.device), (len(rows), rows.width)
        flat = (output.new_zeros(len(rows) * rows.width).index_copy(0, index, output) for output in outputs)
        return Outputs(*(tensor.view(shape) for tensor in flat))

    def predict(self, rows: Rows, pieces: Sequence[torch.Tensor], *, reference: bool, values: bool) -> torch.Tensor:
        """Log-probabilities (or values) of action tokens, [B, T] on the CPU, 0 elsewhere; no gradient.

        Args:
            pieces: row indices of each pass.
            reference: of the reference model.
        """
        adapters = reference and self.settings.lora.rank > 0
        policy = self.reference if reference and not adapters else self.policy
        policy.eval()
        predictions = torch.zeros(len(rows), rows.width, dtype=policy.dtype)
        with torch.no_grad(), without_adapters(self.model) if adapters else nullcontext():
            for number, index in enumerate(pieces, 1):
                LOG.info("log-probabilities: pass %d of %d", number, len(pieces))
                part = rows.select(index)
                outputs = self.forward(part, policy)
                predicted = outputs.values if values else outputs.logprobs
                if predicted is not None:
                    predictions[index, : part.width] = predicted.to(predictions.dtype).cpu()
        return predictions

    def backward(
        self,
        share: Share,
        pieces: Sequence[torch.Tensor],
        tally: Tally,
        *,
        covariance: Mapping[int, torch.Tensor],
        computed: Sequence[Outputs] = (),
    ) -> Gradient:
        """Add the gradient of a share's objectives.

        Args:
            pieces: row indices of each pass.
            covariance: bool [B, T] by index of the objective, `Share.covariance_tokens` of the whole mini-batch.
            computed: outputs of the passes, where they were made already.
        """
        losses, rows = [0.0] * len(share.objectives), share.batch.rows
        found = torch.zeros(len(rows), rows.width, dtype=self.policy.dtype)
        for number, index in enumerate(pieces):
            LOG.info("update: pass %d of %d of an optimiser step", number + 1, len(pieces))
            batch = share.batch.select(index)
            outputs = computed[number] if computed else self.forward(batch.rows)
            if not len(batch):
                self._backward(_zero_loss(outputs, {objective.kind for objective, _ in share.objectives}))
                continue
            logprobs = outputs.logprobs
            inputs = LossInputs.of(batch, self.device, logprobs.detach() if share.current else None)
            found[index, : logprobs.shape[1]] = logprobs.detach().cpu()
            tokens = float(inputs.action_mask.sum())
            entropy = {"entropy": float(outputs.entropy.detach().sum()) / max(tokens, 1.0)}
            total = logprobs.new_zeros(())
            for i, (objective, factor) in enumerate(share.objectives):
                if i in covariance:
                    rule_tokens: torch.Tensor | None = covariance[i][index.to(self.device), : logprobs.shape[1]]
                else:  # a rule over micro-batches
                    rule_tokens = covariance_tokens(objective, inputs, logprobs.detach(), share.seed)
                loss, metrics = objective.loss(
                    inputs,
                    logprobs,
                    denominator=share.denominators[i],
                    covariance_tokens=rule_tokens,
                    entropy=outputs.entropy,
                    values=outputs.values,
                )
                if objective.denominator == "micro_batch":  # as released: a mean over each, weighted by its rows
                    loss = loss * (len(batch) / share.rows)
                total = total + factor * loss
                losses[i] += float(loss.detach())
                episodes = objective.prefix in EPISODE_PREFIXES
                tally.add(objective.prefix, metrics | entropy if episodes else metrics, tokens)
            self._backward(total * float("nan") if strike("learner.backward") else total)
        return Gradient(losses, found)


def _zero_loss(outputs: Outputs, kinds: set[str]) -> torch.Tensor:
    """0, made of the outputs that objectives of these kinds read.

    Processes without a row then gather sharded weights in the same order as the others.
    """
    read = [outputs.logprobs] if kinds - {"entropy", "value"} else []
    read += [outputs.entropy] if "entropy" in kinds else []
    read += [outputs.values] if "value" in kinds and outputs.values is not None else []
    return torch.stack([tensor.sum() for tensor in read]).sum() * 0.0
