"""One pass of the local engine's model over new tokens of cache slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from spearrl.errors import ConfigError
from spearrl.models.vision import vision_of
from spearrl.rollout.local.cache import SlotCache
from spearrl.rollout.local.packed import PackedLinears
from spearrl.rollout.local.scheduler import CacheSlot
from spearrl.rollout.local.slot_attention import ATTENTION, attend, parts_of

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
        self._blank = torch.zeros((), dtype=self._dtype, device=device)
        self._windows = windows_of(model.config)
        self._config = config = model.config.get_text_config()
        from transformers.modeling_utils import AttentionInterface

        self._eager = getattr(config, "_attn_implementation", None) == "eager"
        AttentionInterface.register(ATTENTION, lambda *inputs, **options: attend(inputs, options))
        # Such rotary embeddings replace their buffers in the forward pass; under inference_mode the trainer could not
        # use them.
        scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        self._mode = torch.no_grad if "dynamic" in str(scaling) or "longrope" in str(scaling) else torch.inference_mode
        self.packed = PackedLinears(model)
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
            with self._mode(), self.packed.used():
                yield
        finally:
            if training:
                self.model.train()

    def run(self, slots: list[CacheSlot], new: list[list[int]]) -> torch.Tensor:
        """Run the model over new tokens of slots (ascending), all in one row without padding; [len(slots), V] logits
        after each slot's last token.
        """
        counts = [len(tokens) for tokens in new]
        rows = [(slot.index, len(slot.held), count) for slot, count in zip(slots, counts, strict=True)]
        places = [place for _, held, count in rows for place in range(held, held + count)]
        positions = torch.tensor(places, device=self.device)
        self.cache.aim(torch.tensor([r[0] for r in rows for _ in range(r[2])], device=self.device), positions)
        ids = torch.tensor([[token for tokens in new for token in tokens]], device=self.device)
        kinds = [parts_of(rows, window, self._eager, self._blank) for window in self._windows.values()]
        # transformers takes a mask of four axes for a finished one and makes none.
        flags = torch.ones(1, 1, 1, len(kinds), dtype=torch.bool, device=self.device)
        masks = {kind: flags[..., : number + 1] for number, kind in enumerate(self._windows)}
        inputs = {"input_ids": ids, "position_ids": positions[None]}
        if self.vision is not None and any(slot.job and slot.job.images for slot in slots):
            inputs = self._image_inputs(slots, counts, ids, positions)
        attention, self._config._attn_implementation = self._config._attn_implementation, ATTENTION
        try:
            output = self.model.base_model(
                **inputs,
                attention_mask=masks if len(masks) > 1 else flags,
                past_key_values=self.cache,
                use_cache=True,
                cu_seq_lens_q=(kinds, self._eager),  # transformers hands it to attention
            )
        finally:
            self._config._attn_implementation = attention  # the learner's
        hidden = output.last_hidden_state[0]
        last = hidden if len(places) == len(slots) else hidden[torch.tensor(counts, device=self.device).cumsum(0) - 1]
        return self.model.get_output_embeddings()(last)

    def _image_inputs(
        self, slots: list[CacheSlot], counts: list[int], ids: torch.Tensor, positions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The model's inputs where prompts have pictures: positions by M-RoPE, embeddings where some are new."""
        axes, images, end = positions.repeat(3, 1), [], 0
        for slot, count in zip(slots, counts, strict=True):
            begin, end = end, end + count
            if prompt := slot.job.images if slot.job else None:
                held = len(slot.held)
                part = prompt.positions[:, held : held + count].to(self.device)
                axes[:, begin + part.shape[1] : end] += prompt.shift
                axes[:, begin : begin + part.shape[1]] = part
                images += prompt.within(held, held + count)
        if not images or self.vision is None:
            return {"input_ids": ids, "position_ids": axes[:, None]}
        tensors = (tensor.to(self.device) for tensor in self.vision.join(images))
        embedded = self.vision.embed(self.model, ids.masked_fill(ids < 0, self.vision.image_id), *tensors)
        return {"inputs_embeds": embedded, "position_ids": axes[:, None]}

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
