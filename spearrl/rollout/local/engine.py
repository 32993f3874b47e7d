"""The embedded engine: continuous batching over a transformers model in this process, with a cache that grows.

Requests are admitted in the order of their ids and only when every coroutine that could submit one has done so; the
same requests therefore meet the same batches, and two runs are bit-identical on a CPU.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from spearrl.errors import EngineError
from spearrl.models.vision import FORBIDDEN_LOGIT
from spearrl.rollout.local.cache import SlotCache
from spearrl.rollout.local.forward import Forward
from spearrl.rollout.local.prompt import image_prompt, whole_images
from spearrl.rollout.local.sampling import draw
from spearrl.rollout.local.scheduler import WORTH_COPYING, CacheSlot, Job, SlotTable, common
from spearrl.rollout.protocol import Completion, Request, request_problem

PREFILL_TOKENS = 8192  # of one pass
CHUNK = 2048  # new tokens of one sequence in one pass: bounds the attention mask
WAVE = 4  # prefill when 1 / WAVE of the sequences in flight wait, or nothing is decoding
DEFAULT_PROBE = 7
SETTLE = 3  # turns of the event loop in which whoever got a reply can submit the next request


class LocalEngine:
    """Samples from `model`, sharing its parameters with whoever trains it; call `publish` after they changed.

    Args:
        slots: sequences decoded at a time at most; fewer, and the others wait, while cache_mib does not hold as many.
        cache_mib: bound on the key-value cache, which grows with the requests in flight.
        probe_ids: tokens of ordinary text for the check of the cache; none: the lowest ids.
        context_tokens: prompt plus reply tokens of a request at most.
    Raises:
        ConfigError: not even one sequence fits the cache, or the model's layers do not work with a static cache.
    """

    def __init__(
        self,
        model: Any,
        *,
        slots: int,
        cache_mib: int,
        context_tokens: int,
        device: str | torch.device = "cpu",
        probe_ids: Sequence[int] = (),
    ):
        self.model = model
        self.version = 0
        self.context_tokens = context_tokens
        self.device = torch.device(device)
        self.cache = SlotCache(
            model.config.get_text_config(),
            slots=slots,
            tokens=context_tokens,
            cache_mib=cache_mib,
            dtype=next(model.parameters()).dtype,
            device=self.device,
        )
        names = ("prefilled_tokens", "cached_tokens", "decoded_tokens", "sampled_tokens", "seconds")
        self.counters: dict[str, float] = dict.fromkeys(names, 0.0)
        self._table = SlotTable(self.cache)
        probe_ids = probe_ids or range(1, min(DEFAULT_PROBE, model.get_input_embeddings().num_embeddings))
        self.forward = Forward(model, self.cache, self._table.slots, device=self.device, probe_ids=probe_ids)
        self._waiting: list[Job] = []
        self._episodes: tuple[object, ...] = ()
        self._task: asyncio.Task[None] | None = None
        self._paused = self._closed = False
        self.on_token: Callable[[Request, int], None] | None = None  # called with every token as it is drawn
        self.passing = threading.Lock()  # held during a pass; who pauses from another thread waits for it

    async def generate(self, request: Request) -> Completion:
        """Sample one reply.

        Raises EngineError: malformed request, prompt and reply exceed the context, deadline, engine failed or closed.
        """
        self._check(request)
        loop = asyncio.get_running_loop()
        images = image_prompt(request, self.forward.vision)
        prompt = images.token_ids if images else list(request.token_ids)
        job = Job(request, prompt, loop.create_future(), time.monotonic(), images=images)
        self._waiting.append(job)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._serve())
            # Ctrl-C in a pass ends the loop with it; asyncio need not tell it again.
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            return await job.future
        except asyncio.CancelledError:
            self._drop(job)
            raise

    def begin(self, episodes: tuple[object, ...]) -> None:
        """Episodes of a step or a panel begin: what is cached of other ones is not used, once none is in flight.

        So a step's log-probabilities are the same to the bit whether a panel was played before it, or the run resumed.
        """
        if episodes != self._episodes and not self._jobs():
            self._episodes = episodes
            self._table.flush()

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

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy weights by name into the model, in the model's type; for an engine that shares its model with nobody.

        Raises EngineError: one is not this model's.
        """
        own = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in weights:
            if name not in own or own[name].shape != tensor.shape:
                text = f"weight {name} {tuple(tensor.shape)} does not belong to the engine's model"
                raise EngineError(text, where="rollout.engine", hint="use rollout.dtype=fp32")
            own[name].data.copy_(tensor)
        self.forward.packed.forget()

    def publish(self, version: int) -> None:
        """The shared parameters changed in place: what was cached before is not used for a new request again."""
        self.version = version
        self._table.flush()
        self.forward.packed.forget()

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
                with self.passing, self.forward.evaluating():
                    self._admit()
                    self._decode()
                self.counters["seconds"] += time.perf_counter() - start
        except asyncio.CancelledError:
            self._fail_all("the run was stopped")
            raise
        except Exception as error:  # whatever the model raises becomes every request's error
            self._fail_all(f"{type(error).__name__}: {error}")

    def _admit(self) -> None:
        """Prefill waiting requests into free slots, those with one prompt only once."""
        free = self._table.free()
        busy = len(self._table.slots) - free
        if not self._waiting or not free or (busy and len(self._waiting) * WAVE < len(self._waiting) + busy):
            return
        self._waiting.sort(key=lambda job: job.request.id)
        count = self._table.admissible(self._waiting)
        if not count:
            return
        admitted, self._waiting = self._waiting[:count], self._waiting[count:]
        alike: dict[tuple[int, ...], list[CacheSlot]] = {}
        for job, slot in self._table.assign(admitted):
            job.min_version = self.version
            alike.setdefault(tuple(job.prompt), []).append(slot)
        leaders = [max(slots, key=lambda s: len(s.held)) for slots in alike.values()]
        logits = self._prefill_once(leaders)
        for leader, slots in zip(leaders, alike.values(), strict=True):
            for slot in slots:
                if slot is not leader:
                    self._table.share(leader, slot, len(leader.held))
                    logits[slot.index] = logits[leader.index]
        slots = [slot for same_prompt in alike.values() for slot in same_prompt]
        self.counters["cached_tokens"] += sum(slot.job.cached for slot in slots if slot.job)
        self._sample(slots, torch.stack([logits[slot.index] for slot in slots]))

    def _prefill_once(self, slots: list[CacheSlot]) -> dict[int, torch.Tensor]:
        """Logits after the prompts of slots, by slot. Beginnings that several have in common are computed for one of
        them, before the rest of the others.
        """
        logits: dict[int, torch.Tensor] = {}
        left = sorted((slot.job.prompt, slot) for slot in slots if slot.job)
        while left:
            now, later = [left[0]], list[tuple[list[int], CacheSlot, CacheSlot, int]]()
            for prompt, slot in left[1:]:
                length = min(common(now[-1][0], prompt), len(prompt) - 1)
                if length < len(slot.held) + WORTH_COPYING:
                    now.append((prompt, slot))
                else:
                    later.append((prompt, slot, now[-1][1], length))
            logits |= self._prefill([(slot, prompt[len(slot.held) :]) for prompt, slot in now])
            for _, slot, source, length in later:
                self._table.share(source, slot, length)
            left = [(prompt, slot) for prompt, slot, *_ in later]
        return logits

    def _prefill(self, left: list[tuple[CacheSlot, list[int]]]) -> dict[int, torch.Tensor]:
        """Compute new tokens of slots, in as many passes as they need; logits after the last of each, by slot."""
        self.counters["prefilled_tokens"] += sum(len(tokens) for _, tokens in left)
        left, logits = sorted(left, key=lambda pair: pair[0].index), dict[int, torch.Tensor]()
        while left:
            size, part = 0, list[tuple[CacheSlot, list[int]]]()
            for slot, tokens in left:
                cut = whole_images(tokens, CHUNK) if len(tokens) > CHUNK else len(tokens)
                if part and size + cut > PREFILL_TOKENS:
                    break
                part.append((slot, tokens[:cut]))
                size += cut
            done = self.forward.run([slot for slot, _ in part], [tokens for _, tokens in part])
            for (slot, tokens), row in zip(part, done, strict=True):
                slot.held += tokens
                logits[slot.index] = row
            cuts = [len(tokens) for _, tokens in part] + [0] * len(left)
            left = [(slot, rest) for (slot, tokens), cut in zip(left, cuts, strict=False) if (rest := tokens[cut:])]
        return logits

    def _decode(self) -> None:
        """One token for every sequence in flight."""
        active = self._table.active()
        if not active:
            return
        last = [slot.job.tokens[-1] for slot in active if slot.job]
        logits = self.forward.run(active, [[token] for token in last])
        self.counters["decoded_tokens"] += len(last)
        for slot, token in zip(active, last, strict=True):
            slot.held.append(token)
        self._sample(active, logits)

    def _sample(self, slots: list[CacheSlot], logits: torch.Tensor) -> None:
        if self.forward.vision is not None:
            logits = logits.index_fill(
                1, torch.tensor(self.forward.vision.forbidden, device=self.device), FORBIDDEN_LOGIT
            )
        jobs = [slot.job for slot in slots if slot.job]
        tokens, logprobs = draw(logits, [j.request.sampling for j in jobs], [len(j.tokens) for j in jobs])
        self.counters["sampled_tokens"] += len(jobs)
        for slot, job, token, logprob in zip(slots, jobs, tokens, logprobs, strict=True):
            if not math.isfinite(logprob):
                self._fail(job, f"token {token} has log-probability {logprob}: the model's weights are not finite")
                continue
            job.tokens.append(token)
            job.logprobs.append(logprob)
            if self.on_token is not None:
                self.on_token(job.request, token)
            stopped = token in job.request.sampling.stop_ids
            if stopped or len(job.tokens) >= job.request.sampling.max_tokens:
                slot.job = None
                slot.held = [] if slot.owner is None else slot.held  # weights changed since it began
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
