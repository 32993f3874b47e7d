"""The learner in this process: one model on one device, plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from spearrl.batching import Rows
from spearrl.config import LearnerSection
from spearrl.errors import ContractError
from spearrl.learner.critic import ValueHead
from spearrl.learner.lora import (
    FOLDER,
    adapter_config,
    adapter_sources,
    add_adapters,
    load_adapters,
    save_adapters,
    sources,
    without_adapters,
)
from spearrl.learner.minibatch import LossInputs, Share, Tally
from spearrl.learner.optimizer import load_optimizer, make_optimizer, save_optimizer
from spearrl.learner.packed import check_packing
from spearrl.learner.partition import micro_batches
from spearrl.learner.passes import Outputs, Passes
from spearrl.learner.policy import Policy, check_head, use_bf16
from spearrl.learner.updates import Updates
from spearrl.models import save_weights
from spearrl.models.weights import load_weights


class LocalLearner(Updates):
    """Trains a transformers causal language model in place.

    Args:
        model: a transformers model; its hidden states times its output embedding must be its logits.
        temperature: log-probabilities are of logits / temperature, as sampled.
        total_steps: optimiser steps over which the rate falls to 0, by the schedule `decay`; None: it stays.
        joint: one optimiser step for on-policy and replay rows, J + γ J_SIL (arXiv 2509.22601), instead of steps of their own.
        reference: the frozen model that KL divergences are measured from.
        critic: the value head, trained along by objectives of kind "value".
        seed: of the adapters' initial weights, where settings.lora has a rank; the model without them is then the reference.
    Raises:
        ConfigError: a model whose head is not a plain linear map.
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
        self.device = torch.device(device)
        super().__init__(settings, total_steps=total_steps, joint=joint, decay=decay)
        self.model = model.to(device)
        if settings.lora.rank:
            add_adapters(self.model, settings.lora, seed)
        bf16 = use_bf16(settings.precision, self.device)
        self.policy = Policy(self.model, settings, temperature=temperature, bf16=bf16)
        self.reference = None
        if reference is not None:
            self.reference = Policy(
                reference.to(device).eval().requires_grad_(False), settings, temperature=temperature, bf16=bf16
            )
        self.critic = None if critic is None else critic.to(device)
        self.passes = Passes(
            self.policy, self.device, critic=self.critic, packed=settings.packing, vision=self.policy.vision
        )
        check_head(self.policy, type(model).__name__, self.device)
        if settings.packing:
            check_packing(self.policy, type(model).__name__, self.device)
        self.optimizer = make_optimizer(self.model.named_parameters(), settings, critic=self.critic)

    def logprobs(self, rows: Rows, *, reference: bool = False) -> torch.Tensor:
        """[B, T] log-probabilities of action tokens at the temperature, 0 elsewhere; no gradient. Raises ContractError where there is no reference."""
        if reference and self.settings.lora.rank:
            with without_adapters(self.model):
                return self.passes.predict(rows, self._pieces(rows))
        if reference and self.reference is None:
            raise ContractError(
                "this learner has no reference model", where="Learner.logprobs", hint="build it with reference="
            )
        return self.passes.predict(rows, self._pieces(rows), policy=self.reference if reference else None)

    def values(self, rows: Rows) -> torch.Tensor:
        """[B, T] the critic's value of the state before each action token, 0 elsewhere; no gradient. Raises ContractError where there is no critic."""
        if self.critic is None:
            raise ContractError("this learner has no critic", where="Learner.values", hint="build it with critic=")
        return self.passes.predict(rows, self._pieces(rows), values=True)

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight once (tied ones under their first name, adapters merged), as named in a model directory."""
        for source in sources(self.model):
            yield source.name, source.tensor()

    def adapter_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight of the adapters, as named in peft's files; none without adapters."""
        for source in adapter_sources(self.model):
            yield source.name, source.tensor()

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of token_ids[1:], each given the tokens before it, at temperature 1 and without autocast."""
        return self.policy.probe(self.policy, token_ids, self.device)

    def export(self, folder: str | Path) -> None:
        """Write the weights as a transformers model directory."""
        save_weights(self.model, folder, dict(self.full_parameters()) if self.settings.lora.rank else None)

    def release(self) -> None:
        """Give device memory that is not in use back: torch keeps what activations took."""
        torch.cuda.empty_cache()

    def close(self) -> None:
        """Nothing to let go of."""

    def export_adapter(self, folder: str | Path) -> None:
        """Write the adapters as a directory of peft's format."""
        save_adapters(Path(folder), dict(self.adapter_parameters()), adapter_config(self.model))

    def save(self, folder: str | Path) -> None:
        """Write weights (a model directory; adapters are merged in it, and lie apart below `adapter`), optimiser state and step count.

        All of it is safetensors and JSON.
        """
        folder = Path(folder)
        self.export(folder)
        if self.settings.lora.rank:
            self.export_adapter(folder / FOLDER)
        if self.critic is not None:
            self.critic.save(folder)
        save_optimizer(folder, self.optimizer, self._names(), self.steps)

    def load(self, folder: str | Path) -> None:
        """Restore exactly what `save` wrote. Raises CheckpointError where files are missing or belong to another model."""
        folder = Path(folder)
        (load_adapters if self.settings.lora.rank else load_weights)(self.model, folder)
        if self.critic is not None:
            self.critic.load(folder)
        self.steps = load_optimizer(folder, self.optimizer, self._names())

    def _pieces(self, rows: Rows) -> list[torch.Tensor]:
        return micro_batches(rows.lengths, self.settings.micro_batch_tokens, packed=self.settings.packing)

    def _step(self, shares: list[Share], tally: Tally) -> bool:
        """One optimiser step; False where it was skipped for a loss or gradient that is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train(self.settings.gradient_checkpointing)
        total = sum(self._backward(share, tally) for share in shares)
        self.model.eval()
        # The critic's gradient is clipped by itself: its size says nothing about the policy's.
        parts = [list(self.model.parameters()), [] if self.critic is None else list(self.critic.parameters())]
        norms = [torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in parts]
        sizes = [float(norm) for norm in norms]
        if not all(math.isfinite(value) for value in (total, *sizes)):
            self.optimizer.zero_grad(set_to_none=True)
            return False
        tally.add(shares[0].objectives[0][0].prefix, {"grad_norm": sizes[0]}, 1.0)
        for part, norm in zip(parts, norms, strict=True):
            torch.nn.utils.clip_grads_with_norm_(part, self.settings.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.steps) * group["scale"]
        self.optimizer.step()
        return True

    def _backward(self, share: Share, tally: Tally) -> float:
        """Add a share's gradient; returns its loss."""
        pieces = self._pieces(share.batch.rows)
        whole = share.whole_scope() if len(pieces) > 1 else []
        held = self._hold(share, pieces) if whole and not share.current else []
        return share.total(
            self.passes.backward(share, pieces, tally, chosen=self._selections(share, whole, pieces, held), held=held),
            tally,
        )

    def _hold(self, share: Share, pieces: list[torch.Tensor]) -> list[Outputs]:
        """The forward passes of a mini-batch that fits into one micro-batch's memory altogether: nothing is computed twice then. Else none."""
        padded = sum(len(index) * int(share.batch.rows.lengths[index].max()) for index in pieces)
        if padded > self.settings.micro_batch_tokens:
            return []
        return [self.passes.forward(share.batch.rows.select(index)) for index in pieces]

    def _selections(
        self, share: Share, objectives: list[int], pieces: list[torch.Tensor], held: list[Outputs]
    ) -> dict[int, torch.Tensor]:
        """Tokens that covariance rules select, per objective, over the whole mini-batch on current log-probabilities."""
        if not objectives:
            return {}
        inputs = LossInputs.of(share.batch, self.device)
        logprobs = inputs.old_logprobs
        if held:
            logprobs = torch.zeros_like(logprobs, dtype=held[0].logprobs.dtype)
            for index, outputs in zip(pieces, held, strict=True):
                logprobs[index.to(self.device), : outputs.logprobs.shape[1]] = outputs.logprobs.detach()
        elif not share.current:
            logprobs = self.logprobs(share.batch.rows).to(self.device)
            self.model.train(self.settings.gradient_checkpointing)
        return share.selections(inputs, logprobs, objectives)

    def _names(self) -> dict[torch.Tensor, str]:
        critic = () if self.critic is None else self.critic.named_parameters(prefix="value_head")
        return {parameter: name for name, parameter in (*self.model.named_parameters(), *critic)}
