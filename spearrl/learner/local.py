"""The learner in this process: one model on one device, plain torch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spearrl.batching import Batch, Rows, forward_inputs, micro_batches, mini_batches
from spearrl.config import LearnerSection
from spearrl.errors import ConfigError, ContractError
from spearrl.learner.attention import Float32Attention
from spearrl.learner.critic import ValueHead
from spearrl.learner.logprobs import token_logprobs
from spearrl.learner.minibatch import LossInputs, Share, Tally, Weighted, row_keys, selected_tokens, split_objectives
from spearrl.learner.optimizer import learning_rate, load_optimizer, make_optimizer, save_optimizer
from spearrl.learner.protocol import UpdateResult
from spearrl.learner.weights import load_weights
from spearrl.losses import Objective
from spearrl.models import save_weights
from spearrl.seeds import derive

EPISODE_KINDS = ("policy", "sil", "sft")  # prefixes under which the policy's entropy is reported


class _Outputs(NamedTuple):
    """Of a forward pass, [b, T] each, 0 where there is no action token."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None


class LocalLearner:
    """Trains a transformers causal language model in place.

    Args:
        model: a transformers model; its hidden states times its output embedding must be its logits.
        temperature: log-probabilities are of logits / temperature, as sampled.
        total_steps: optimiser steps over which the rate falls to 0; None: it stays.
        joint: one optimiser step for on-policy and replay rows, J + γ J_SIL (arXiv 2509.22601), instead of steps of their own.
        reference: the frozen model that KL divergences are measured from.
        critic: the value head, trained along by objectives of kind "value".
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
        joint: bool = False,
        reference: Any = None,
        critic: ValueHead | None = None,
    ):
        self.model = model.to(device)
        self.reference = None if reference is None else reference.to(device).eval().requires_grad_(False)
        self.critic = None if critic is None else critic.to(device)
        self.settings, self.temperature, self.total_steps, self.joint = settings, temperature, total_steps, joint
        self.device = torch.device(device)
        self.steps = 0
        self._bf16 = _use_bf16(settings.precision, self.device)
        _without_dropout(self.model)
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self._check_head()
        self.optimizer = make_optimizer(self.model.named_parameters(), settings, critic=self.critic)

    def logprobs(self, rows: Rows, *, reference: bool = False) -> torch.Tensor:
        """[B, T] log-probabilities of action tokens at the temperature, 0 elsewhere; no gradient. Raises ContractError where there is no reference."""
        if reference and self.reference is None:
            raise ContractError("this learner has no reference model", where="Learner.logprobs", hint="build it with reference=")
        return self._predict(rows, values=False, model=self.reference if reference else self.model)

    def values(self, rows: Rows) -> torch.Tensor:
        """[B, T] the critic's value of the state before each action token, 0 elsewhere; no gradient. Raises ContractError where there is no critic."""
        if self.critic is None:
            raise ContractError("this learner has no critic", where="Learner.values", hint="build it with critic=")
        return self._predict(rows, values=True, model=self.model)

    def _predict(self, rows: Rows, *, values: bool, model: Any) -> torch.Tensor:
        self.model.eval()
        found = torch.zeros(len(rows), rows.width, dtype=_logprob_dtype(model))
        with torch.no_grad():
            for index in micro_batches(rows.lengths, self.settings.micro_batch_tokens):
                part = rows.select(index)
                outputs = self._forward(part, model)
                wanted = outputs.values if values else outputs.logprobs
                found[index, : part.width] = torch.zeros(()) if wanted is None else wanted.to(found.dtype).cpu()
        return found

    def update(self, on_policy: Batch, replay: Batch | None, *, gamma: float, objectives: Sequence[Objective], seed: int) -> UpdateResult:
        """Optimiser steps on the on-policy rows, then on the replayed ones with weight γ (or both in each step: `joint`).

        The gradient of a step does not depend on micro-batches, padding or the order of rows. A step whose loss or gradient is not
        finite is skipped and counted.
        """
        started, tally, skipped, before = time.monotonic(), Tally(), 0, self.steps
        on_objectives, replay_objectives = split_objectives(objectives, gamma)
        self.model.train(self.settings.gradient_checkpointing)
        for shares in self._plan((on_policy, on_objectives), (replay, replay_objectives), seed):
            fresh = self.steps == before
            skipped += not self._step([Share(s.batch, s.objectives, s.seed, s.current and fresh) for s in shares], tally)
        self.model.eval()
        tokens = len(on_policy.rows.token_ids) + (len(replay.rows.token_ids) if replay is not None and replay_objectives else 0)
        metrics = {**tally.means(), "policy/updates": float(self.steps - before), "policy/lr": self._rate(max(0, self.steps - 1))}
        seconds = time.monotonic() - started
        return UpdateResult({**metrics, "update/tokens": float(tokens), "update/seconds": seconds}, skipped)

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter once (tied ones under their first name), as named in a model directory."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def save(self, folder: str | Path) -> None:
        """Write weights (a model directory), optimiser state and step count, all safetensors and JSON."""
        folder = Path(folder)
        save_weights(self.model, folder)
        if self.critic is not None:
            self.critic.save(folder)
        save_optimizer(folder, self.optimizer, self._names(), self.steps)

    def load(self, folder: str | Path) -> None:
        """Restore exactly what `save` wrote. Raises CheckpointError where files are missing or belong to another model."""
        folder = Path(folder)
        load_weights(self.model, folder)
        if self.critic is not None:
            self.critic.load(folder)
        self.steps = load_optimizer(folder, self.optimizer, self._names())

    def _plan(self, policy: tuple[Batch, Weighted], imitation: tuple[Batch | None, Weighted], seed: int) -> list[list[Share]]:
        """The shares of each optimiser step, in order."""
        (on_policy, on_objectives), (replay, replay_objectives) = policy, imitation
        parts = self._parts(len(on_policy))
        size = math.ceil(len(on_policy) / parts)
        steps = [[share] for share in _shares(on_policy, on_objectives, parts, derive(seed, "on-policy"), current=True)]
        if replay is None or not replay_objectives:
            return steps
        rows = self.settings.mini_batch_rows
        # Never more replay steps than on-policy ones: after a step that lost most of its rows `size` says little.
        alternating = math.ceil(len(replay) / rows) if rows else min(parts, math.ceil(len(replay) / max(size, 1)))
        replay_parts = parts if self.joint else max(1, alternating)
        replayed = _shares(replay, replay_objectives, replay_parts, derive(seed, "replay"), current=False)
        if not self.joint:
            return steps + [[share] for share in replayed]
        if not steps:
            return [[share] for share in replayed]
        for number, share in enumerate(replayed):
            steps[number % len(steps)].append(share)
        return steps

    def _parts(self, rows: int) -> int:
        wanted = math.ceil(rows / self.settings.mini_batch_rows) if self.settings.mini_batch_rows else self.settings.mini_batches
        return max(1, min(wanted, rows))

    def _step(self, shares: list[Share], tally: Tally) -> bool:
        """One optimiser step; False where it was skipped for a loss or gradient that is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        total = sum(self._backward(share, tally) for share in shares)
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
        self.steps += 1
        return True

    def _backward(self, share: Share, tally: Tally) -> float:
        """Add a share's gradient; returns its loss."""
        pieces = micro_batches(share.batch.rows.lengths, self.settings.micro_batch_tokens)
        whole = [i for i, (objective, _) in enumerate(share.objectives) if objective.scope == "mini_batch"] if len(pieces) > 1 else []
        held = self._hold(share, pieces) if whole and not share.current else []
        chosen = self._selections(share, whole, pieces, held)
        denominators, losses = share.denominators(), [0.0] * len(share.objectives)
        for number, index in enumerate(pieces):
            batch = share.batch.select(index)
            inputs = LossInputs.of(batch, self.device)
            outputs = held[number] if held else self._forward(batch.rows, self.model)
            tokens = float(inputs.action_mask.sum())
            mean_entropy = float(outputs.entropy.detach().sum()) / max(tokens, 1.0)
            total: torch.Tensor = outputs.logprobs.new_zeros(())
            for i, (objective, factor) in enumerate(share.objectives):
                if i in chosen:
                    selection: torch.Tensor | None = chosen[i][index.to(self.device), : outputs.logprobs.shape[1]]
                else:  # micro-batch scope, or this pass is the whole mini-batch
                    known = share.current and objective.scope == "mini_batch"
                    selection = selected_tokens(objective, inputs, inputs.old_logprobs if known else outputs.logprobs.detach(), share.seed)
                predictions = {"entropy": outputs.entropy, "values": outputs.values}
                loss, metrics = objective.loss(inputs, outputs.logprobs, denominator=denominators[i], selection=selection, **predictions)
                loss = loss * share.part(objective, len(batch))
                total = total + factor * loss
                losses[i] += float(loss.detach())
                tally.add(objective.prefix, {**metrics, "entropy": mean_entropy} if objective.prefix in EPISODE_KINDS else metrics, tokens)
            total.backward()
        for (objective, _), value in zip(share.objectives, losses, strict=True):
            tally.add(objective.prefix, {"loss": value}, 1.0)
        return sum(factor * value for (_, factor), value in zip(share.objectives, losses, strict=True))

    def _hold(self, share: Share, pieces: list[torch.Tensor]) -> list[_Outputs]:
        """The forward passes of a mini-batch that fits into one micro-batch's memory altogether: nothing is computed twice then. Else none."""
        padded = sum(len(index) * int(share.batch.rows.lengths[index].max()) for index in pieces)
        if padded > self.settings.micro_batch_tokens:
            return []
        return [self._forward(share.batch.rows.select(index), self.model) for index in pieces]

    def _selections(self, share: Share, objectives: list[int], pieces: list[torch.Tensor], held: list[_Outputs]) -> dict[int, torch.Tensor]:
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
        found = {i: selected_tokens(share.objectives[i][0], inputs, logprobs, share.seed) for i in objectives}
        return {i: selection for i, selection in found.items() if selection is not None}

    def _forward(self, rows: Rows, model: Any) -> _Outputs:
        inputs = forward_inputs(rows)
        head = model.get_output_embeddings()
        with self._precision():
            states = model.base_model(input_ids=inputs.token_ids.to(self.device), use_cache=False).last_hidden_state
        hidden = states.reshape(-1, states.shape[-1])[inputs.source.to(self.device)]
        numbers = [
            *token_logprobs(hidden, head.weight, inputs.target.to(self.device), bias=head.bias, temperature=self.temperature, chunk=self.settings.lm_head_chunk)
        ]
        if self.critic is not None:
            numbers.append(self.critic(hidden))
        place = inputs.place.to(self.device)
        spread = [v.new_zeros(len(rows) * rows.width).index_copy(0, place, v).view(len(rows), rows.width) for v in numbers]
        return _Outputs(spread[0], spread[1], spread[2] if self.critic is not None else None)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._bf16:
                stack.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16))
            # A checkpointed layer runs again inside the backward pass, where no such context reaches.
            if self._bf16 and self.device.type == "cpu" and not self.settings.gradient_checkpointing:
                stack.enter_context(Float32Attention())
            yield

    def _rate(self, step: int) -> float:
        return learning_rate(step, self.settings, self.total_steps)

    def _names(self) -> dict[torch.Tensor, str]:
        critic = () if self.critic is None else self.critic.named_parameters(prefix="value_head")
        return {parameter: name for name, parameter in (*self.model.named_parameters(), *critic)}

    def _check_head(self) -> None:
        """Logits of a probe must be hidden states times the head: some models scale or cap them afterwards."""
        head = self.model.get_output_embeddings()
        probe = torch.arange(4, device=self.device).remainder(len(head.weight)).unsqueeze(0)
        self.model.eval()
        with torch.no_grad():
            expected = self.model(input_ids=probe, use_cache=False).logits.float()
            found = head(self.model.base_model(input_ids=probe, use_cache=False).last_hidden_state).float()
        if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            name = type(self.model).__name__
            raise ConfigError(f"{name} changes its logits after the output layer (a cap or a scale)", where="model.path", hint="use a model with a plain head")


def _shares(batch: Batch, objectives: Weighted, parts: int, seed: int, *, current: bool) -> list[Share]:
    """Parts of equal size by keyed hash of row; parts without an action token say nothing and are left out."""
    if not objectives:
        return []
    pieces = [batch.select(index.sort().values) for index in mini_batches(row_keys(batch.rows.uid, seed), parts)]
    return [Share(piece, objectives, derive(seed, number), current) for number, piece in enumerate(pieces) if bool(piece.action_mask.any())]


def _logprob_dtype(model: torch.nn.Module) -> torch.dtype:
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


def _use_bf16(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())


def _without_dropout(model: torch.nn.Module) -> None:
    """Dropout would make the ratio of new to old probabilities noise."""
    module: Any
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
