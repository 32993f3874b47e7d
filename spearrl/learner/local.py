"""The learner in this process: one model on one device, plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from spearrl.batching import Rows
from spearrl.config.sections import LearnerSection
from spearrl.learner.critic import ValueHead
from spearrl.learner.lora import Export, adapter_weights, add_adapters, load_adapters, model_weights
from spearrl.learner.loss_inputs import Share, Tally
from spearrl.learner.old_logprobs import OldLogprobs
from spearrl.learner.optimizer import load_optimizer, make_optimizer, save_optimizer, set_rate
from spearrl.learner.passes import Outputs, Passes
from spearrl.learner.policy import Policy, use_bf16
from spearrl.learner.protocol import Learner
from spearrl.models import save_weights
from spearrl.models.weights import load_weights


class LocalLearner(Learner):
    """Trains a transformers causal language model in place.

    Args:
        model: a transformers model; its hidden states times its output embedding must be its logits.
        temperature: log-probabilities are of logits / temperature, as sampled.
        total_steps: optimiser steps over which the rate falls to 0, by the schedule `decay`; None: it stays.
        joint: one optimiser step for on-policy and replay rows, J + γ J_SIL (arXiv 2509.22601), instead of steps of
            their own.
        reference: the frozen model that KL divergences are measured from. With adapters (settings.lora.rank above 0) it
            is the model without them.
        critic: the value head, trained along by objectives of kind "value".
        seed: of the adapters' initial weights.
    Raises:
        ConfigError: a model whose head is not a plain linear map, or whose rows cannot be packed.
    """

    def __init__(
        self,
        model: Any,
        settings: LearnerSection,
        *,
        temperature: float = 1.0,
        device: str | torch.device = "cpu",
        total_steps: int | None = None,
        decay: str = "linear",
        joint: bool = False,
        reference: Any = None,
        critic: ValueHead | None = None,
        seed: int = 0,
    ):
        super().__init__(settings, total_steps=total_steps, decay=decay, joint=joint)
        self.device, self.model = torch.device(device), model.to(device)
        if settings.lora.rank:
            add_adapters(self.model, settings.lora, seed)
        options: dict[str, Any] = {"temperature": temperature, "bf16": use_bf16(settings.precision, self.device)}
        self.policy = Policy(self.model, settings, **options)
        if reference is not None:
            reference = Policy(reference.to(device).eval().requires_grad_(False), settings, **options)
        self.critic = None if critic is None else critic.to(device)
        self.has_reference, self.has_critic = reference is not None or settings.lora.rank > 0, critic is not None
        self.passes = Passes(self.policy, self.model, settings, self.device, reference=reference, critic=self.critic)
        self.why_padded = self.passes.why_padded
        self.optimizer = make_optimizer(self.model.named_parameters(), settings, critic=self.critic)

    def probe(self, token_ids: Sequence[int], dtype: torch.dtype | None = None) -> list[float]:
        return self.policy.probe(self.policy, token_ids, self.device, dtype)

    @cached_property
    def _model_weights(self) -> list[Export]:
        return model_weights(self.model)

    def export(self, folder: str | Path) -> None:
        save_weights(self.model, folder, dict(self.full_parameters()) if self.settings.lora.rank else None)

    def load(self, folder: str | Path) -> None:
        folder = Path(folder)
        (load_adapters if self.settings.lora.rank else load_weights)(self.model, folder)
        if self.critic is not None:
            self.critic.load(folder)
        self.steps = load_optimizer(folder, self.optimizer, self._names())

    def release(self) -> None:
        torch.cuda.empty_cache()  # torch keeps what activations took

    def close(self) -> None:
        """Nothing to end."""

    def _save_training(self, folder: Path) -> None:
        if self.critic is not None:
            self.critic.save(folder)
        save_optimizer(folder, self.optimizer, self._names(), self.steps)

    def _predict(self, rows: Rows, *, reference: bool, values: bool) -> torch.Tensor:
        return self.passes.predict(rows, self.passes.pieces(rows), reference=reference, values=values)

    def _weights(self, *, adapters: bool) -> Iterator[tuple[str, torch.Tensor]]:
        for export in adapter_weights(self.model) if adapters else self._model_weights:
            yield from zip(export.portion.stored, export.tensors(), strict=True)

    def _one_pass(self, rows: Rows) -> bool:
        return len(self.passes.pieces(rows)) == 1

    def _step(self, shares: list[Share], tally: Tally, old: OldLogprobs) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train(self.settings.gradient_checkpointing)
        total = sum(self._backward(share, tally, old) for share in shares)
        self.model.eval()
        # The critic's gradient is clipped by itself: its size says nothing about the policy's.
        parts = [list(self.model.parameters()), [] if self.critic is None else list(self.critic.parameters())]
        norms = [torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in parts]
        if not all(math.isfinite(value) for value in (total, *norms)):
            self.optimizer.zero_grad(set_to_none=True)
            return False
        tally.add(shares[0].objectives[0][0].prefix, {"grad_norm": float(norms[0])}, 1.0)
        for part, norm in zip(parts, norms, strict=True):
            torch.nn.utils.clip_grads_with_norm_(part, self.settings.grad_clip, norm)
        set_rate(self.optimizer, self._rate(self.steps))
        self.optimizer.step()
        return True

    def _backward(self, share: Share, tally: Tally, old: OldLogprobs) -> float:
        """Add a share's gradient; returns its loss."""
        pieces = self.passes.pieces(share.batch.rows)
        covariance = {i: tokens.to(self.device) for i, tokens in (share.covariance or {}).items()}
        computed: list[Outputs] = []
        if share.whole is not None:
            others = self._logprobs(share.whole[0].rows.select(share.others))
            computed = self._compute(share, pieces)
            covariance = share.covariance_of_whole(self._current_logprobs(share, pieces, computed), others)
        gradient = self.passes.backward(share, pieces, tally, covariance=covariance, computed=computed)
        if share.current and share.index is not None:
            old.record(share.index, gradient.logprobs)
        return share.total(gradient.losses, tally)

    def _compute(self, share: Share, pieces: list[torch.Tensor]) -> list[Outputs]:
        """The forward passes of a mini-batch, so that nothing is computed twice.

        None where its passes do not fit together into the memory of one micro-batch.
        """
        padded = sum(len(index) * int(share.batch.rows.lengths[index].max()) for index in pieces)
        if len(pieces) > 1 and padded > self.settings.micro_batch_tokens:
            return []
        return [self.passes.forward(share.batch.rows.select(index)) for index in pieces]

    def _current_logprobs(self, share: Share, pieces: list[torch.Tensor], computed: list[Outputs]) -> torch.Tensor:
        """[B, T] of the current policy: from the passes that were computed, or from passes of their own."""
        rows = share.batch.rows
        if not computed:
            return self._logprobs(rows)
        logprobs = torch.zeros(len(rows), rows.width, dtype=computed[0].logprobs.dtype, device=self.device)
        for index, outputs in zip(pieces, computed, strict=True):
            logprobs[index.to(self.device), : outputs.logprobs.shape[1]] = outputs.logprobs.detach()
        return logprobs

    def _logprobs(self, rows: Rows) -> torch.Tensor:
        """[B, T] from passes without gradient in between."""
        if not len(rows):
            return torch.zeros(0, rows.width, device=self.device)
        logprobs = self.logprobs(rows).to(self.device)
        self.model.train(self.settings.gradient_checkpointing)
        return logprobs

    def _names(self) -> dict[torch.Tensor, str]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return names if self.critic is None else names | self.critic.names()
