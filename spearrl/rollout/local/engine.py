"""The embedded engine: continuous batching over a transformers model in this process, with a static key-value cache.

Requests are admitted in the order of their ids and only when every coroutine that could submit one has done so; the same requests
therefore meet the same batches, and two runs are bit-identical on a CPU.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from spearrl.errors import ConfigError, EngineError
from spearrl.models.vision import FORBIDDEN_LOGIT, vision_of
from spearrl.rollout.local.cache import SlotCache
from spearrl.rollout.local.prompt import image_prompt, whole_pictures
from spearrl.rollout.local.sampling import draw
from spearrl.rollout.local.scheduler import CacheSlot, Job, SlotTable
from spearrl.rollout.protocol import Completion, Request, request_problem

PREFILL_TOKENS = 8192  # padded tokens of one prefill pass
CHUNK = 2048  # new tokens of one sequence in one pass: bounds the attention mask
WAVE = 4  # prefill when 1 / WAVE of the sequences in flight wait, or nothing is decoding
SETTLE = 3  # turns of the event loop in which whoever got a reply can submit the next request
PROBE = 6  # tokens on which the engine is compared with the model's own forward


class LocalEngine:
    """Samples from `model`, sharing its parameters with whoever trains it; call `publish` after they changed.

    Args:
        slots: sequences decoded at a time; fewer, with a warning, where cache_mib does not hold as many.
        cache_mib: bound on the key-value cache.
        context_tokens: prompt plus reply tokens of a request at most.
    Raises:
        ConfigError: not even one sequence fits the cache, or the model's layers do not work with a static cache.
    """

    def __init__(
        self, model: Any, *, slots: int, cache_mib: int, context_tokens: int, device: str | torch.device = "cpu"
    ):
        self.model = model
        self.version = 0
        self.context_tokens = context_tokens
        self.device = torch.device(device)
        self._vision = vision_of(model)
        config = self.model.config.get_text_config()
        self._dtype = next(model.parameters()).dtype
        self.cache = SlotCache(
            config, slots=slots, tokens=context_tokens, cache_mib=cache_mib, dtype=self._dtype, device=self.device
        )
        self.slots = self.cache.slots
        if self.slots < slots:
            each = self.cache.bytes_per_slot / (1 << 20)
            text = f"rollout.cache_mib={cache_mib} holds {self.slots} of {slots} sequences ({each:.1f} MiB each at {context_tokens} tokens)"
            warnings.warn(text, stacklevel=2)
        self.counters: dict[str, float] = {
            "prefilled_tokens": 0,
            "cached_tokens": 0,
            "sampled_tokens": 0,
            "passes": 0,
            "seconds": 0.0,
        }
        self._additive = getattr(config, "_attn_implementation", None) == "eager"
        # Such rotary embeddings replace their buffers in the forward pass; under inference_mode the trainer could not use them.
        scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        self._mode = torch.no_grad if "dynamic" in str(scaling) or "longrope" in str(scaling) else torch.inference_mode
        self._table = SlotTable(self.cache)
        self._waiting: list[Job] = []
        self._task: asyncio.Task[None] | None = None
        self._paused = self._closed = False
        self.passing = threading.Lock()  # held during a pass; who pauses from another thread waits for it
        self._verify()

    async def generate(self, request: Request) -> Completion:
        """Sample one reply. Raises EngineError: malformed request, prompt and reply exceed the context, deadline, engine failed or closed."""
        self._check(request)
        loop = asyncio.get_running_loop()
        images = image_prompt(request, self._vision)
        prompt = images.token_ids if images else list(request.token_ids)
        job = Job(request, prompt, loop.create_future(), time.monotonic(), images=images)
        self._waiting.append(job)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._serve())
        try:
            return await job.future
        except asyncio.CancelledError:
            self._drop(job)
            raise

    async def cancel(self, request_id: tuple[int, ...]) -> None:
        """Drop a request; who waits for it gets an EngineError."""
        for job in self._jobs():
            if job.request.id == request_id:
                self._fail(job, "cancelled")

    def pause(self) -> None:
        """Stop between two passes; what is in flight stays."""
        self._paused = True

    def resume(self) -> None:
        """Go on where `pause` stopped."""
        self._paused = False

    def publish(self, version: int) -> None:
        """The shared parameters changed in place: what was cached before is not used for a new request again."""
        self.version = version
        self._table.flush()

    def health(self) -> bool:
        """Whether requests are taken."""
        return not self._closed

    def close(self) -> None:
        """Fail what is in flight and take no more."""
        self._closed = True
        self._fail_all("the engine was closed")

    async def _serve(self) -> None:
        try:
            while self._jobs():
                for _ in range(SETTLE):
                    await asyncio.sleep(0)
                self._expire()
                if self._paused:
                    await asyncio.sleep(0.002)
                    continue
                start = time.perf_counter()
                with self.passing, self.evaluating():
                    self._admit()
                    self._decode()
                self.counters["seconds"] += time.perf_counter() - start
        except asyncio.CancelledError:
            self._fail_all("the run was stopped")
            raise
        except Exception as error:  # whatever the model raises becomes every request's error
            self._fail_all(f"{type(error).__name__}: {error}")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A trainer leaves the model in training mode, where dropout and gradient checkpointing (which drops the cache) are active."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with self._mode():
                yield
        finally:
            if training:
                self.model.train()

    def _admit(self) -> None:
        """Prefill waiting requests into free slots, those with one prompt only once."""
        free = self._table.free()
        busy = self.slots - free
        if not self._waiting or not free or (busy and len(self._waiting) * WAVE < len(self._waiting) + busy):
            return
        self._waiting.sort(key=lambda job: job.request.id)
        admitted, self._waiting = self._waiting[:free], self._waiting[free:]
        alike: dict[tuple[int, ...], list[CacheSlot]] = {}
        for job, slot in self._table.place(admitted):
            job.min_version = self.version
            alike.setdefault(tuple(job.prompt), []).append(slot)
        leaders = [max(members, key=lambda s: len(s.held)) for members in alike.values()]
        logits = self._prefill(leaders)
        rows: list[int] = []
        for row, (leader, members) in enumerate(zip(leaders, alike.values(), strict=True)):
            rows += [row] * len(members)
            for slot in members:
                if slot is not leader:
                    self._table.share(leader, slot, len(leader.held))
        slots = [slot for members in alike.values() for slot in members]
        self.counters["cached_tokens"] += sum(slot.job.cached for slot in slots if slot.job)
        self._sample(slots, logits[rows])

    def _prefill(self, slots: list[CacheSlot]) -> torch.Tensor:
        """Compute the prompt tokens that slots do not hold yet; [len(slots), V] logits of their last tokens."""
        new = [s.job.prompt[len(s.held) :] for s in slots if s.job]
        self.counters["prefilled_tokens"] += sum(map(len, new))
        for slot, tokens in zip(slots, new, strict=True):
            while len(tokens) > CHUNK:
                cut = whole_pictures(tokens, CHUNK)
                self._pass([slot], [tokens[:cut]])
                slot.held += tokens[:cut]
                del tokens[:cut]
        order = sorted(range(len(slots)), key=lambda i: len(new[i]))
        logits: dict[int, torch.Tensor] = {}
        while order:
            least = len(new[order[0]])
            size = 1
            while (
                size < len(order)
                and (width := len(new[order[size]])) <= 2 * least + 16
                and width * (size + 1) <= PREFILL_TOKENS
            ):
                size += 1
            part, order = sorted(order[:size], key=lambda i: slots[i].index), order[size:]
            logits.update(zip(part, self._pass([slots[i] for i in part], [new[i] for i in part]), strict=True))
        for slot, tokens in zip(slots, new, strict=True):
            slot.held += tokens
        return torch.stack([logits[i] for i in range(len(slots))])

    def _decode(self) -> None:
        """One token for every sequence in flight."""
        active = self._table.active()
        if not active:
            return
        last = [slot.job.tokens[-1] for slot in active if slot.job]
        logits = self._pass(active, [[token] for token in last])
        for slot, token in zip(active, last, strict=True):
            slot.held.append(token)
        self._sample(active, logits)

    def _pass(self, slots: list[CacheSlot], new: list[list[int]]) -> torch.Tensor:
        """Run the model over new tokens of slots (ascending); [len(slots), V] logits after each slot's last token.

        In a decoding pass where most slots up to the highest one take part, the others ride along with one idle token, written behind what they
        hold, so that the cache is read in place.
        """
        self.counters["passes"] += 1
        width, reach = max(map(len, new)), slots[-1].index + 1
        rows, places = slots, list(range(len(slots)))
        if width == 1 and reach <= 2 * len(slots):
            rows, places = self._table.slots[:reach], [s.index for s in slots]
            fed = dict(zip(places, new, strict=True))
            new = [fed.get(row, [0]) for row in range(reach)]
        limit = self.cache.tokens - 1
        starts = torch.tensor([min(len(s.held), limit) for s in rows], device=self.device)
        counts = torch.tensor([len(tokens) for tokens in new], device=self.device)
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in new], device=self.device)
        mask = self.cache.aim([s.index for s in rows], starts, counts, width)
        if self._additive:
            mask = torch.zeros(mask.shape, dtype=self._dtype, device=self.device).masked_fill_(
                ~mask, torch.finfo(self._dtype).min
            )
        positions = (starts[:, None] + torch.arange(width, device=self.device)).clamp(max=limit)
        given = {"input_ids": ids, "position_ids": positions}
        if self._vision is not None and any(slot.job and slot.job.images for slot in rows):
            given = self._image_inputs(rows, ids, positions)
        hidden = self.model.base_model(
            **given, attention_mask=mask, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        last = hidden[:, 0] if width == 1 else hidden[torch.arange(len(rows), device=self.device), counts - 1]
        return self.model.get_output_embeddings()(last if len(places) == len(rows) else last[places])

    def _image_inputs(
        self, rows: list[CacheSlot], ids: torch.Tensor, positions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What a pass gives the model where some prompts have pictures: positions that follow from them, and embeddings where some are new."""
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
        if not images or self._vision is None:
            return {"input_ids": ids, "position_ids": positions}
        tensors = (tensor.to(self.device) for tensor in self._vision.join(images))
        embedded = self._vision.embed(self.model, ids.masked_fill(ids < 0, self._vision.image_id), *tensors)
        return {"inputs_embeds": embedded, "position_ids": positions}

    def _sample(self, slots: list[CacheSlot], logits: torch.Tensor) -> None:
        if self._vision is not None:
            logits = logits.index_fill(1, torch.tensor(self._vision.forbidden, device=self.device), FORBIDDEN_LOGIT)
        jobs = [slot.job for slot in slots if slot.job]
        tokens, logprobs = draw(logits, [j.request.sampling for j in jobs], [len(j.tokens) for j in jobs])
        self.counters["sampled_tokens"] += len(jobs)
        for slot, job, token, logprob in zip(slots, jobs, tokens, logprobs, strict=True):
            if not math.isfinite(logprob):
                self._fail(job, f"token {token} has log-probability {logprob}: the model's weights are not finite")
                continue
            job.tokens.append(token)
            job.logprobs.append(logprob)
            stopped = token in job.request.sampling.stop_ids
            if stopped or len(job.tokens) >= job.request.sampling.max_tokens:
                slot.job = None
                self._finish(job, "stop" if stopped else "length")

    def _finish(self, job: Job, reason: str) -> None:
        if not job.future.done():
            job.future.set_result(
                Completion(tuple(job.tokens), tuple(job.logprobs), reason, job.min_version, self.version, job.cached)
            )

    def _check(self, request: Request) -> None:
        """Raises EngineError for a request that cannot be served."""
        problem = request_problem(
            request, vocabulary=self.model.get_input_embeddings().num_embeddings, context_tokens=self.context_tokens
        )
        if self._closed:
            problem = "the engine is closed"
        if problem:
            raise EngineError(problem, where=f"request {request.id}")

    def _verify(self) -> None:
        """Compare cached passes with the model's own forward: architectures with other layers or scaled logits must not sample wrongly unseen."""
        config = self.model.config.get_text_config()
        kind, window = type(self.model).__name__, getattr(config, "sliding_window", None)
        hint = "use rollout.engine=vllm for this model"
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or (
            window and getattr(config, "use_sliding_window", True) and window < self.context_tokens
        ):
            raise ConfigError(
                f"{kind} has attention layers that the local engine does not run ({sorted(kinds)})",
                where="model.path",
                hint=hint,
            )
        count = min(PROBE, self.context_tokens)
        ids = [1 + i % max(1, self.model.get_input_embeddings().num_embeddings - 1) for i in range(count)]
        slot = self._table.slots[0]
        try:
            with self.evaluating():
                self._pass([slot], [ids[:-1]])
                slot.held = ids[:-1]
                found = torch.log_softmax(self._pass([slot], [ids[-1:]])[0].float(), -1)
                wanted = torch.log_softmax(
                    self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
                    .logits[0, -1]
                    .float(),
                    -1,
                )
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:
            raise ConfigError(
                f"{kind} does not run with the local engine's cache: {type(error).__name__}: {error}",
                where="model.path",
                hint=hint,
            ) from error
        slot.held, self.counters["passes"] = [], 0
        bound = 1e-3 if self._dtype == torch.float32 else 0.5
        difference = float((found - wanted).abs().max())
        if not difference <= bound and bool(wanted.isfinite().all()):
            raise ConfigError(
                f"{kind}: the local engine's log-probabilities are off by {difference:.3g}",
                where="model.path",
                hint=hint,
            )

    def _jobs(self) -> list[Job]:
        return [*self._waiting, *(slot.job for slot in self._table.slots if slot.job)]

    def _expire(self) -> None:
        now = time.monotonic()
        for job in self._jobs():
            deadline = job.request.deadline_s
            if deadline is not None and now - job.submitted > deadline:
                self._fail(job, f"no reply within {deadline} s")

    def _drop(self, job: Job) -> None:
        self._waiting = [other for other in self._waiting if other is not job]
        self._table.release(job)

    def _fail(self, job: Job, reason: str) -> None:
        self._drop(job)
        if not job.future.done():
            job.future.set_exception(EngineError(reason, where=f"request {job.request.id}"))

    def _fail_all(self, reason: str) -> None:
        for job in self._jobs():
            self._fail(job, reason)
