"""The trained model as one torch module, token ids in, log-probabilities out: every learner's forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from spearrl.batching import PrefixTree
from spearrl.config.sections import LearnerSection
from spearrl.errors import ConfigError
from spearrl.learner.attention import Float32Attention
from spearrl.learner.logprobs import token_logprobs
from spearrl.learner.packing import attend_by_tree, packed_arguments, why_padded
from spearrl.models.vision import FORBIDDEN_LOGIT, ImageInputs, vision_of


class Policy(torch.nn.Module):
    """A causal language model without dropout; its logits are computed a chunk at a time, and only where asked for.

    Args:
        model: a transformers model; its hidden states times its output embedding must be its logits (`check_head`).
        temperature: log-probabilities are of logits / temperature, as sampled.
        bf16: compute under autocast.
    Raises:
        ConfigError: packing="tree", of a model that cannot.
    """

    def __init__(self, model: Any, settings: LearnerSection, *, temperature: float, bf16: bool = False):
        super().__init__()
        self.model, self.vision = model, vision_of(model)
        self.bf16, self.checkpointing = bf16, settings.gradient_checkpointing
        _without_dropout(model)
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        self.why_padded = why_padded(settings, lambda: attend_by_tree(model, pictures=self.vision is not None))
        forbidden = () if self.vision is None else self.vision.forbidden
        self.scorer = _Scorer(model.get_output_embeddings(), temperature, settings.lm_head_chunk, forbidden)

    @property
    def dtype(self) -> torch.dtype:
        """Of log-probabilities: float32, or wider where the weights are."""
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    def forward(
        self,
        token_ids: torch.Tensor,
        source: torch.Tensor | None,
        target: torch.Tensor | None,
        tree: PrefixTree | None = None,
        allowed: tuple[torch.Tensor, ...] = (),
        *,
        images: ImageInputs | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(log-probabilities [n], entropies [n] in nats, hidden states [n, d] without a gradient) of n targets.

        Without targets it is the probe of `check_head`: (the model's logits, those of its head), [b, L, V] each. The
        probe goes this way too because sharded weights are gathered by calling the module.

        Args:
            token_ids: int64 [b, L].
            source: int64 [n], index into the flattened [b, L] of the token before each target.
            target: int64 [n], token ids.
            tree: of the rows, where they lie packed in one sequence [1, L].
            allowed: as `token_logprobs` takes it.
            images: of a vision model.
            dtype: that the probe is computed in; None: the weights'.
        """
        device = token_ids.device.type
        if source is None or target is None:
            with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                states = self.model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
                logits = self.model(input_ids=token_ids, use_cache=False).logits
                return logits, self.model.get_output_embeddings()(states), None
        # A checkpointed layer runs again inside the backward pass, where the context of attention does not reach.
        wide = self.bf16 and device == "cpu" and not self.checkpointing
        autocast = torch.autocast(device, dtype=torch.bfloat16) if self.bf16 else nullcontext()
        with autocast, Float32Attention() if wide else nullcontext():
            inputs = {"input_ids": token_ids, **packed_arguments(tree, token_ids.device)}
            if self.vision is not None and images is not None:
                embedded = self.vision.embed(self.model, token_ids, *images[1:])
                inputs = {"inputs_embeds": embedded, "position_ids": images.positions}
            states = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        hidden = states.reshape(-1, states.shape[-1])[source]
        return *self.scorer(hidden, target, allowed), hidden.detach()

    @staticmethod
    def probe(policy: Any, token_ids: Sequence[int], device: torch.device, dtype: torch.dtype | None) -> list[float]:
        """Log-probabilities of token_ids[1:] at temperature 1, computed in `dtype`; None: in that of the weights.

        Args:
            policy: a Policy, or what wraps one.
        """
        policy.eval()
        ids = torch.tensor([list(token_ids)], device=device)
        with torch.no_grad():
            logits, _, _ = policy(ids, None, None, dtype=dtype)
        return logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1).tolist()


class _Scorer(torch.nn.Module):
    """The output layer's parameters in a module of their own: where parameters are sharded, calling it gathers them.

    Args:
        forbidden: token ids that no reply holds; the softmax leaves them out.
    """

    def __init__(self, head: Any, temperature: float, chunk: int, forbidden: Sequence[int]):
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.temperature, self.chunk = temperature, chunk
        if forbidden:
            size, device = int(getattr(head.weight, "ds_shape", head.weight.shape)[0]), head.weight.device
            del self.bias  # vision models have none
            bias = torch.zeros(size, device=device)
            self.register_buffer("bias", bias.index_fill(0, torch.tensor(forbidden).to(device), FORBIDDEN_LOGIT), False)

    def forward(
        self, hidden: torch.Tensor, target: torch.Tensor, allowed: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(
            hidden, self.weight, target, bias=self.bias, temperature=self.temperature, chunk=self.chunk, allowed=allowed
        )


def check_head(policy: Any, name: str, device: torch.device) -> None:
    """Check that logits are hidden states times the head: some models scale or cap them afterwards.

    Args:
        policy: a Policy, or what wraps one.
        name: of the model, for the error.
    Raises:
        ConfigError: they are not.
    """
    policy.eval()
    with torch.no_grad():
        expected, logits, _ = policy(torch.arange(4, device=device).unsqueeze(0), None, None)
    if not torch.allclose(logits.float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        text = f"{name} changes its logits after the output layer (a cap or a scale)"
        raise ConfigError(text, where="model.path", hint="use a model with a plain head")


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether `learner.precision` means bfloat16 on this device."""
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
