"""The trained model as one torch module: token ids in, log-probabilities of given tokens out. Every learner's forward pass is this one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from spearrl.config import LearnerSection
from spearrl.errors import ConfigError
from spearrl.learner.attention import Float32Attention
from spearrl.learner.logprobs import token_logprobs
from spearrl.learner.packed import HINT, attend_by_rows, packed_arguments
from spearrl.models.vision import FORBIDDEN_LOGIT, vision_of


class Policy(torch.nn.Module):
    """A causal language model without dropout, its logits computed a chunk at a time and only where they are asked for.

    Args:
        model: a transformers model; its hidden states times its output embedding must be its logits (`check_head`).
        temperature: log-probabilities are of logits / temperature, as sampled.
        bf16: compute under autocast.
    Raises:
        ConfigError: packing, of a model that sees.
    """

    def __init__(self, model: Any, settings: LearnerSection, *, temperature: float, bf16: bool = False):
        super().__init__()
        self.model, self.vision = model, vision_of(model)
        if settings.packing and self.vision is not None:
            raise ConfigError("rows with pictures are not packed", where="learner.packing", hint=HINT)
        self.bf16, self.checkpointing = bf16, settings.gradient_checkpointing
        _without_dropout(model)
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        if settings.packing:
            attend_by_rows(model)
        self.scorer = _Scorer(
            model.get_output_embeddings(),
            temperature,
            settings.lm_head_chunk,
            self.vision.forbidden if self.vision else (),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of log-probabilities: float32, or wider where the weights are."""
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    def forward(
        self,
        token_ids: torch.Tensor,
        source: torch.Tensor,
        target: torch.Tensor,
        lengths: tuple[int, ...] = (),
        allowed: tuple[torch.Tensor, ...] = (),
        *,
        seen: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(log-probabilities [n], entropies [n], hidden states [n, d] without a gradient) of `target` [n] at places `source` [n] of the flattened [b, L].

        `lengths`: of the rows that lie end to end in token_ids [1, L]. `allowed`: as `token_logprobs` takes it. `seen`: a `vision.ImageInputs`, where the model
        sees. Without a target it is the probe of `check_head`: the model's logits, and those of its head, [b, L, V].
        """
        if target is None:
            return self._probe(token_ids)
        with self._precision(token_ids.device.type):
            given = {"input_ids": token_ids, **packed_arguments(self.model, lengths, token_ids.device)}
            if self.vision is not None and seen:
                given = {"inputs_embeds": self.vision.embed(self.model, token_ids, *seen[1:]), "position_ids": seen[0]}
            states = self.model.base_model(**given, use_cache=False).last_hidden_state
        hidden = states.reshape(-1, states.shape[-1])[source]
        return *self.scorer(hidden, target, allowed), hidden.detach()

    def _probe(self, token_ids: torch.Tensor) -> Any:
        plain = self.model(input_ids=token_ids, use_cache=False).logits
        return (
            plain,
            self.model.get_output_embeddings()(
                self.model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
            ),
            None,
        )

    @staticmethod
    def probe(policy: Any, token_ids: Sequence[int], device: torch.device) -> list[float]:
        """Log-probabilities of token_ids[1:] at temperature 1, in the weights' own precision. `policy`: this one, or what wraps it."""
        policy.eval()
        ids = torch.tensor([list(token_ids)], device=device)
        with torch.no_grad():
            logits, _, _ = policy(ids, None, None)
        return logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1).tolist()

    @contextmanager
    def _precision(self, device: str) -> Iterator[None]:
        with ExitStack() as stack:
            if self.bf16:
                stack.enter_context(torch.autocast(device, dtype=torch.bfloat16))
            # A checkpointed layer runs again inside the backward pass, where no such context reaches.
            if self.bf16 and device == "cpu" and not self.checkpointing:
                stack.enter_context(Float32Attention())
            yield


class _Scorer(torch.nn.Module):
    """The output layer's parameters under a module of their own: where parameters are sharded, calling it is what gathers them.

    `forbidden`: tokens that no reply holds; the softmax leaves them out.
    """

    def __init__(self, head: Any, temperature: float, chunk: int, forbidden: Sequence[int] = ()):
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        if forbidden:
            size = int(getattr(head.weight, "ds_shape", head.weight.shape)[0])
            del self.bias  # of which this family has none
            self.register_buffer(
                "bias",
                torch.zeros(size, device=head.weight.device).index_fill(
                    0, torch.tensor(forbidden).to(head.weight.device), FORBIDDEN_LOGIT
                ),
                False,
            )
        self.temperature, self.chunk = temperature, chunk

    def forward(
        self, hidden: torch.Tensor, target: torch.Tensor, allowed: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(
            hidden, self.weight, target, bias=self.bias, temperature=self.temperature, chunk=self.chunk, allowed=allowed
        )


def check_head(policy: Any, name: str, device: torch.device) -> None:
    """Logits of a probe must be hidden states times the head: some models scale or cap them afterwards. Raises ConfigError where they are not."""
    policy.eval()
    with torch.no_grad():
        expected, found, _ = policy(torch.arange(4, device=device).unsqueeze(0), None, None)
    if not torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ConfigError(
            f"{name} changes its logits after the output layer (a cap or a scale)",
            where="model.path",
            hint="use a model with a plain head",
        )


def use_bf16(precision: str, device: torch.device) -> bool:
    """What learner.precision means on this device."""
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
