"""The embedded engine: continuous batching over a transformers model in this process, with a static key-value cache.

Requests are admitted in the order of their ids and only when every coroutine that could submit one has done so; the same requests
therefore meet the same batches, and two runs are bit-identical on a CPU.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spearrl.errors import EngineError
from spearrl.rollout.cache import SlotCache
from spearrl.rollout.engine import Completion, Request
from spearrl.rollout.sampling import draw

PREFILL_TOKENS = 8192  # padded tokens of one prefill pass
WAVE = 4  # prefill when slots / WAVE requests wait, or nothing is decoding


@dataclass
class _Job:
    request: Request
    future: asyncio.Future[Completion]
    started: float
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    min_version: int = 0
    cached: int = 0


@dataclass
class _Slot:
    index: int
    cached: tuple[int, ...] | list[int] = ()  # tokens whose keys and values the slot holds
    job: _Job | None = None
    used: int = 0  # admission clock, for eviction of the least recently used
    owner: tuple[int, ...] | None = None  # conversation the cached tokens belong to


class LocalEngine:
    """Samples from `model`, sharing its parameters with whoever trains it.

    Args:
        slots: sequences decoded at a time; fewer where cache_mib does not hold as many.
        cache_mib: bound on the key-value cache.
        context_tokens: prompt plus reply tokens of a request at most.
    Raises:
        ConfigError: not even one sequence fits the cache.
    """

    def __init__(self, model: torch.nn.Module, *, slots: int, cache_mib: int, context_tokens: int, device: str = "cpu"):
        self.model, self.version = model, 0
        self.context_tokens = context_tokens
        self.device = torch.device(device)
        parameter = next(model.parameters())
        self.cache = SlotCache(model.config, slots=slots, tokens=context_tokens, cache_mib=cache_mib, dtype=parameter.dtype, device=self.device)
        self.counters = {"prefilled_tokens": 0, "cached_tokens": 0, "sampled_tokens": 0, "passes": 0}
        self._slots = [_Slot(index) for index in range(self.cache.slots)]
        self._homes: dict[tuple[int, ...], _Slot] = {}
        self._waiting: list[_Job] = []
        self._task: asyncio.Task[None] | None = None
        self._clock = 0
        self._paused = self._closed = False

    async def generate(self, request: Request) -> Completion:
        """Sample one reply. Raises EngineError: prompt and reply exceed the context, the deadline passed, the engine failed or is closed."""
        room = self.context_tokens - len(request.token_ids)
        if self._closed or not request.token_ids or request.sampling.max_tokens < 1 or request.sampling.max_tokens > room:
            state = "the engine is closed" if self._closed else f"{len(request.token_ids)} prompt + {request.sampling.max_tokens} reply tokens"
            raise EngineError(f"{state}; the context holds {self.context_tokens}", where=f"request {request.id}", hint="raise rollout.context_tokens")
        if request.images or request.adapter:
            raise EngineError("the local engine takes neither images nor adapters", where=f"request {request.id}")
        job = _Job(request, asyncio.get_running_loop().create_future(), time.monotonic())
        self._waiting.append(job)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._serve())
        return await job.future

    async def cancel(self, request_id: tuple[int, ...]) -> None:
        """Drop a request; who waits for it gets an EngineError."""
        for job in [*self._waiting, *(s.job for s in self._slots if s.job)]:
            if job.request.id == request_id:
                self._fail(job, "cancelled")

    def pause(self) -> None:
        """Stop between two passes; what is in flight stays."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def publish(self, version: int) -> None:
        """The shared parameters changed in place: nothing that was cached before may be used again."""
        self.version = version
        self._homes.clear()
        for slot in self._slots:
            slot.owner = None
            if slot.job is None:
                slot.cached = ()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | Path, version: int) -> None:
        """Copy weights into the model (an engine with a model of its own), then `publish`. Raises EngineError for unknown or misshapen ones."""
        if isinstance(weights, Path):
            from safetensors.torch import load_file

            weights = [pair for file in sorted(weights.glob("model*.safetensors")) for pair in load_file(file).items()]
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                if name not in own or own[name].shape != tensor.shape:
                    raise EngineError(f"weight {name} {tuple(tensor.shape)} does not belong to this model", hint="publish the weights of the same architecture")
                own[name].copy_(tensor)
        self.publish(version)

    def health(self) -> bool:
        return not self._closed

    def close(self) -> None:
        """Fail what is in flight and take no more."""
        self._closed = True
        self._fail_all("the engine was closed")

    async def _serve(self) -> None:
        try:
            while self._waiting or any(s.job for s in self._slots):
                await asyncio.sleep(0)  # everyone who just got a reply submits the next request first
                if self._paused:
                    await asyncio.sleep(0.001)
                    continue
                self._expire()
                self._admit()
                self._decode()
        except asyncio.CancelledError:
            self._fail_all("the run was stopped")
            raise
        except Exception as error:  # whatever the model raises becomes every request's error
            self._fail_all(f"{type(error).__name__}: {error}")

    def _admit(self) -> None:
        """Prefill waiting requests into free slots, siblings with one prompt only once."""
        free = sum(s.job is None for s in self._slots)
        busy = len(self._slots) - free
        if not self._waiting or not free or (busy and len(self._waiting) < max(1, len(self._slots) // WAVE)):
            return
        self._waiting.sort(key=lambda job: job.request.id)
        admitted, self._waiting = self._waiting[:free], self._waiting[free:]
        fresh: dict[tuple[int, ...], list[_Slot]] = {}
        for job, slot in self._place(admitted):
            fresh.setdefault(tuple(job.request.token_ids) if not slot.cached else (job.request.id), []).append(slot)
        leaders = [members[0] for members in fresh.values()]
        logits = self._prefill(leaders)
        for leader, members in zip(leaders, fresh.values(), strict=True):
            if len(members) > 1:
                self.cache.copy(leader.index, [s.index for s in members[1:]], len(leader.cached))
                for slot in members[1:]:
                    slot.cached = list(leader.cached)
                    slot.job.cached = len(leader.cached)  # type: ignore[union-attr]
        rows = [(slot, row) for row, members in enumerate(fresh.values()) for slot in members]
        self.counters["cached_tokens"] += sum(s.job.cached for s, _ in rows if s.job)
        self._sample([slot for slot, _ in rows], logits[[row for _, row in rows]])

    def _place(self, jobs: list[_Job]) -> list[tuple[_Job, _Slot]]:
        """A free slot for each job: the one that holds its conversation, else an empty or the least recently used one."""
        placed: dict[int, _Slot] = {}
        for number, job in enumerate(jobs):
            home = self._homes.get(job.request.id[:-1])
            if home is not None and home.job is None and home.owner == job.request.id[:-1]:
                held = len(home.cached)
                if held < len(job.request.token_ids) and tuple(job.request.token_ids[:held]) == tuple(home.cached):
                    placed[number], home.job, job.cached = home, job, held
        others = sorted((s for s in self._slots if s.job is None), key=lambda s: (s.used if s.cached else -1, s.index))
        for number, job in enumerate(jobs):
            if number not in placed:
                slot = others.pop(0)
                slot.cached, slot.job, placed[number] = (), job, slot
            slot = placed[number]
            self._clock += 1
            slot.used, slot.owner, job.min_version = self._clock, job.request.id[:-1], self.version
            self._homes[job.request.id[:-1]] = slot
        return [(job, placed[number]) for number, job in enumerate(jobs)]

    def _prefill(self, slots: list[_Slot]) -> torch.Tensor:
        """Compute the prompt tokens that slots do not hold yet; [len(slots), V] logits of their last tokens."""
        new = [list(s.job.request.token_ids[len(s.cached) :]) for s in slots if s.job]
        order = sorted(range(len(slots)), key=lambda i: len(new[i]))
        logits: dict[int, torch.Tensor] = {}
        while order:
            width = len(new[order[0]])
            part = [order.pop(0)]
            while order and len(new[order[0]]) * (len(part) + 1) <= max(PREFILL_TOKENS, width) and len(new[order[0]]) <= 2 * width + 16:
                part.append(order.pop(0))
            part.sort(key=lambda i: slots[i].index)
            found = self._pass([slots[i] for i in part], [new[i] for i in part])
            logits.update(zip(part, found, strict=True))
        for slot in slots:
            slot.cached = list(slot.job.request.token_ids)  # type: ignore[union-attr]
        self.counters["prefilled_tokens"] += sum(map(len, new))
        return torch.stack([logits[i] for i in range(len(slots))])

    def _decode(self) -> None:
        """One token for every sequence in flight."""
        active = [s for s in self._slots if s.job]
        if not active:
            return
        logits = self._pass(active, [[s.job.tokens[-1]] for s in active if s.job])
        for slot in active:
            slot.cached.append(slot.job.tokens[-1])  # type: ignore[union-attr]
        self._sample(active, logits)

    def _pass(self, slots: list[_Slot], new: list[list[int]]) -> torch.Tensor:
        """Run the model over new tokens of slots (ascending); [len(slots), V] logits after each slot's last token.

        Where most slots up to the highest one take part, the others ride along with one idle token, so that the cache is read in place.
        """
        self.counters["passes"] += 1
        width, highest = max(map(len, new)), slots[-1].index + 1
        places = list(range(len(slots)))
        if width == 1 and highest <= 2 * len(slots):
            places = [s.index for s in slots]
            rows = self._slots[:highest]
            tokens = {s.index: t for s, t in zip(slots, new, strict=True)}
            new = [tokens.get(s.index, [0]) for s in rows]
        else:
            rows = slots
        with torch.inference_mode():
            starts = torch.tensor([min(len(s.cached), self.cache.tokens - 1) for s in rows], device=self.device)
            counts = torch.tensor([len(t) for t in new], device=self.device)
            ids = torch.tensor([t + [0] * (width - len(t)) for t in new], device=self.device)
            mask = self.cache.aim(torch.tensor([s.index for s in rows], device=self.device), starts, counts, width)
            positions = (starts[:, None] + torch.arange(width, device=self.device)).clamp(max=self.cache.tokens - 1)
            hidden = self._states(ids, positions, mask)
            last = hidden[torch.arange(len(rows), device=self.device), counts - 1][places]
            return self.model.get_output_embeddings()(last)

    def _states(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        model: Any = self.model.base_model
        return model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True).last_hidden_state

    def _sample(self, slots: list[_Slot], logits: torch.Tensor) -> None:
        jobs = [s.job for s in slots if s.job]
        with torch.inference_mode():
            tokens, logprobs = draw(logits, [j.request.sampling for j in jobs], [len(j.tokens) for j in jobs])
        self.counters["sampled_tokens"] += len(jobs)
        for slot, job, token, logprob in zip(slots, jobs, tokens, logprobs, strict=True):
            job.tokens.append(token)
            job.logprobs.append(logprob)
            stopped = token in job.request.sampling.stop_ids
            if stopped or len(job.tokens) >= job.request.sampling.max_tokens:
                slot.job = None
                self._finish(job, "stop" if stopped else "length")

    def _finish(self, job: _Job, reason: str) -> None:
        if not job.future.done():
            job.future.set_result(Completion(tuple(job.tokens), tuple(job.logprobs), reason, job.min_version, self.version, job.cached))

    def _expire(self) -> None:
        now = time.monotonic()
        for job in [*self._waiting, *(s.job for s in self._slots if s.job)]:
            deadline = job.request.deadline_s
            if deadline is not None and now - job.started > deadline:
                self._fail(job, f"no reply within {deadline} s")

    def _fail(self, job: _Job, reason: str) -> None:
        self._waiting = [other for other in self._waiting if other is not job]
        for slot in self._slots:
            if slot.job is job:
                slot.job, slot.cached = None, ()
        if not job.future.done():
            job.future.set_exception(EngineError(reason, where=f"request {job.request.id}"))

    def _fail_all(self, reason: str) -> None:
        for job in [*self._waiting, *(s.job for s in self._slots if s.job)]:
            self._fail(job, reason)
