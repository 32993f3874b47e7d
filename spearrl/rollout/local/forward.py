"""One pass of the local engine's model over new tokens of cache slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from spearrl.errors import ConfigError
from spearrl.models.vision import vision_of
from spearrl.rollout.local.cache import SlotCache
from spearrl.rollout.local.scheduler import CacheSlot

DECODED = 4  # tokens of the probe that are fed one by one
LIKELIEST = 20  # tokens of a position that are compared: in the tail of a distribution rounding is larger
FLOOR = 1e-3  # nats that are never a fault
OTHER_ENGINE = "set rollout.engine=vllm for this model, or take another model"
ROUNDINGS = 4  # of the largest compared logit in the model's type: nats that are none either


def windows_of(config: Any) -> dict[str, int]:
    """Kinds of attention layers of a model, each with how many tokens it looks back over; 0: all.

    Raises:
        ConfigError: there are others, whose state is not keys and values of every token.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if others := kinds - {"full_attention", "sliding_attention"}:
        text = f"{config.model_type} has {', '.join(sorted(others))}, which the local engine does not run"
        raise ConfigError(text, where="model.path", hint=OTHER_ENGINE)
    return {kind: window or 0 if kind == "sliding_attention" else 0 for kind in sorted(kinds)}


class Forward:
    """Runs `model` with the keys and values that `cache` holds for `slots`.

    Args:
        probe_ids: tokens of ordinary text, on which cached passes are compared with the model's own forward.
    Raises:
        ConfigError: the model's layers do not work with a static cache.
    """

    def __init__(
        self, model: Any, cache: SlotCache, slots: list[CacheSlot], *, device: torch.device, probe_ids: Sequence[int]
    ):
        self.model, self.cache, self.slots, self.device = model, cache, slots, device
        self.vision = vision_of(model)
        self._dtype = next(model.parameters()).dtype
        self._windows = windows_of(model.config)
        config = model.config.get_text_config()
        self._additive = getattr(config, "_attn_implementation", None) == "eager"
        # Such rotary embeddings replace their buffers in the forward pass; under inference_mode the trainer could not
        # use them.
        scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        self._mode = torch.no_grad if "dynamic" in str(scaling) or "longrope" in str(scaling) else torch.inference_mode
        self._verify(list(probe_ids[: cache.tokens]))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A trainer leaves the model in training mode, where dropout and gradient checkpointing (which drops the cache)
        are active.
        """
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with self._mode():
                yield
        finally:
            if training:
                self.model.train()

    def run(self, slots: list[CacheSlot], new: list[list[int]]) -> torch.Tensor:
        """Run the model over new tokens of slots (ascending); [len(slots), V] logits after each slot's last token.

        In a decoding pass where most slots up to the highest one take part, the others ride along with one idle token,
        written behind what they hold, so that the cache is read in place.
        """
        width, reach = max(map(len, new)), slots[-1].index + 1
        rows, indices = slots, list(range(len(slots)))
        if width == 1 and reach <= 2 * len(slots):
            rows, indices = self.slots[:reach], [s.index for s in slots]
            by_row = dict(zip(indices, new, strict=True))
            new = [by_row.get(row, [0]) for row in range(reach)]
        limit = self.cache.tokens - 1
        starts = torch.tensor([min(len(s.held), self.cache.length - 1) for s in rows], device=self.device)
        counts = torch.tensor([len(tokens) for tokens in new], device=self.device)
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in new], device=self.device)
        mask = self._masks(self.cache.aim([s.index for s in rows], starts, counts, width), starts)
        positions = (starts[:, None] + torch.arange(width, device=self.device)).clamp(max=limit)
        inputs = {"input_ids": ids, "position_ids": positions}
        if self.vision is not None and any(slot.job and slot.job.images for slot in rows):
            inputs = self._image_inputs(rows, ids, positions)
        output = self.model.base_model(**inputs, attention_mask=mask, past_key_values=self.cache, use_cache=True)
        hidden = output.last_hidden_state
        last = hidden[:, 0] if width == 1 else hidden[torch.arange(len(rows), device=self.device), counts - 1]
        return self.model.get_output_embeddings()(last if len(indices) == len(rows) else last[indices])

    def _masks(self, causal: torch.Tensor, starts: torch.Tensor) -> Any:
        """The model's attention mask: of its one kind of layers, or of each by name."""
        masks, (width, span) = {}, causal.shape[2:]
        steps = torch.arange(max(width, span), device=self.device)
        for kind, window in self._windows.items():
            first = starts[:, None, None] + steps[:width, None] - window  # the last token that is too far away
            mask = causal & (steps[:span] > first)[:, None] if 0 < window < span else causal
            if self._additive:
                zeros = torch.zeros(mask.shape, dtype=self._dtype, device=self.device)
                mask = zeros.masked_fill_(~mask, torch.finfo(self._dtype).min)
            masks[kind] = mask
        return masks if len(masks) > 1 else mask

    def _image_inputs(
        self, rows: list[CacheSlot], ids: torch.Tensor, positions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The model's inputs where prompts have pictures: positions by M-RoPE, embeddings where some are new."""
        prompts = [slot.job.images if slot.job else None for slot in rows]
        after_all = all(not p or len(slot.held) + 1 >= len(p.token_ids) for slot, p in zip(rows, prompts, strict=True))
        if ids.shape[1] == 1 and after_all:
            shifts = torch.tensor([[p.shift if p else 0] for p in prompts], device=self.device)
            return {"input_ids": ids, "position_ids": positions + shifts}
        positions, width, images = positions.repeat(3, 1, 1), ids.shape[1], []
        for row, (slot, prompt) in enumerate(zip(rows, prompts, strict=True)):
            if prompt:
                begin = len(slot.held)
                part = prompt.positions[:, begin : begin + width]
                positions[:, row, : part.shape[1]] = part.to(self.device)
                images += prompt.within(begin, begin + width)
        if not images or self.vision is None:
            return {"input_ids": ids, "position_ids": positions}
        tensors = (tensor.to(self.device) for tensor in self.vision.join(images))
        embedded = self.vision.embed(self.model, ids.masked_fill(ids < 0, self.vision.image_id), *tensors)
        return {"inputs_embeds": embedded, "position_ids": positions}

    def _verify(self, ids: list[int]) -> None:
        """Compare cached passes with the model's own forward: other layers or scaled logits must not go unnoticed."""
        kind, where = type(self.model).__name__, {"where": "model.path", "hint": OTHER_ENGINE}
        start = max(1, len(ids) - DECODED)
        try:
            with self.evaluating():
                cached = self._cached_logprobs(ids, start)
                whole = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0]
        except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            text = f"{kind} does not run with the local engine's cache: {type(error).__name__}: {error}"
            raise ConfigError(text, **where) from error
        expected = torch.log_softmax(whole[start - 1 :].float(), -1)
        likeliest = expected.topk(min(LIKELIEST, expected.shape[-1]), -1).indices
        scale = float(whole[start - 1 :].gather(-1, likeliest).abs().max())
        bound = max(FLOOR, ROUNDINGS * torch.finfo(self._dtype).eps * scale)
        difference = float((cached - expected).gather(-1, likeliest).abs().max())
        if not difference <= bound and bool(expected.isfinite().all()):
            text = f"{kind}: the local engine's log-probabilities are off by {difference:.3g}"
            raise ConfigError(f"{text} (rounding explains {bound:.1g})", **where)

    def _cached_logprobs(self, ids: list[int], start: int) -> torch.Tensor:
        """[len(ids) - start + 1, V] after the first `start` tokens, computed at once, and after each of the others."""
        slot = self.slots[0]
        self.cache.reserve(1, len(ids))
        logits, slot.held = [self.run([slot], [ids[:start]])[0]], ids[:start]
        for token in ids[start:]:
            logits.append(self.run([slot], [[token]])[0])
            slot.held.append(token)
        slot.held = []
        return torch.log_softmax(torch.stack(logits).float(), -1)
