"""Which slot of the local engine's cache a request goes to, and how much of its prompt is there already."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from spearrl.rollout.local.cache import SlotCache
from spearrl.rollout.local.prompt import ImagePrompt
from spearrl.rollout.protocol import Completion, Request

WORTH_COPYING = 16  # a shorter common beginning is computed again


@dataclass
class Job:
    """A request in the engine."""

    request: Request
    prompt: list[int]
    future: asyncio.Future[Completion]
    submitted: float
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    min_version: int = 0
    cached: int = 0  # prompt tokens that were not computed
    images: ImagePrompt | None = None  # where the prompt has pictures

    @property
    def need(self) -> int:
        """Tokens that the request may come to."""
        return len(self.prompt) + self.request.sampling.max_tokens


@dataclass
class CacheSlot:
    """The cache of one sequence; it keeps what it holds after its job is done."""

    index: int
    held: list[int] = field(default_factory=list)  # tokens whose keys and values are there
    job: Job | None = None
    used: int = 0  # when it last took a job, for eviction
    owner: tuple[int, ...] | None = None  # the conversation it holds


class SlotTable:
    """Slots by conversation: request ids are (…, group, sibling, turn), and all but the turn name a conversation."""

    def __init__(self, cache: SlotCache):
        self.slots = [CacheSlot(index) for index in range(cache.slots)]
        self._cache = cache
        self._homes: dict[tuple[int, ...], CacheSlot] = {}
        self._donors: dict[tuple[int, ...], CacheSlot] = {}  # a slot of each group: siblings begin alike
        self._latest: CacheSlot | None = None  # prompts of all groups may begin alike too
        self._clock = 0

    def free(self) -> int:
        """How many slots can take a job."""
        return sum(slot.job is None for slot in self.slots)

    def active(self) -> list[CacheSlot]:
        """Slots with a job, ascending."""
        return [slot for slot in self.slots if slot.job]

    def flush(self) -> None:
        """Forget what idle slots hold, and that busy ones could be continued."""
        self._homes.clear()
        self._donors.clear()
        self._latest = None
        for slot in self.slots:
            slot.owner = None
            if slot.job is None:
                slot.held = []

    def admissible(self, jobs: list[Job]) -> int:
        """How many of the first jobs the cache has slots for now: at their longest all in flight must fit the bound."""
        active = self.active()
        if self._cache.room(self._cache.tokens) == len(self.slots):
            return min(len(jobs), self.free())
        most, busy = max((slot.job.need for slot in active if slot.job), default=0), {slot.index for slot in active}
        for count, job in enumerate(jobs):
            most = max(most, job.need)
            room = self._cache.room(most)
            if max(busy, default=-1) >= room or room - len(busy) <= count:
                return count
        return len(jobs)

    def assign(self, jobs: list[Job]) -> list[tuple[Job, CacheSlot]]:
        """A free slot for each job (at most the first `admissible`): the one that holds its conversation, else an empty
        or the least recently used one.

        Afterwards `slot.held` is the beginning of the prompt that need not be computed; at least one token is left to
        compute.
        """
        active = self.active()
        most = max(job.need for job in (*jobs, *(slot.job for slot in active if slot.job)))
        room = self._cache.room(most)
        homes: list[CacheSlot | None] = []
        taken: set[int] = set()
        for job in jobs:
            home = self._home(job)
            homes.append(home if home and home.index not in taken and home.index < room else None)
            taken |= {home.index} if home else set()
        rest = iter(
            sorted(
                (s for s in self.slots[:room] if s.job is None and s.index not in taken),
                key=lambda s: (s.used if s.held else -1, s.index),
            )
        )
        chosen = [home or next(rest) for home in homes]
        self._reserve(1 + max(slot.index for slot in (*chosen, *active)), most)
        for job, slot in zip(jobs, chosen, strict=True):
            self._reuse(job, slot)
            self._clock += 1
            slot.job, slot.used, slot.owner = job, self._clock, job.request.id[:-1]
            self._homes[job.request.id[:-1]] = self._donors[job.request.id[:-2]] = self._latest = slot
        return list(zip(jobs, chosen, strict=True))

    def _reserve(self, slots: int, tokens: int) -> None:
        """Have the cache hold them; idle slots forget what it no longer holds."""
        self._cache.reserve(slots, tokens)
        for slot in self.slots:
            if len(slot.held) >= (self._cache.length if slot.index < self._cache.allocated else 1):
                slot.held = []

    def share(self, source: CacheSlot, target: CacheSlot, tokens: int) -> None:
        """Give `target` the first `tokens` tokens of `source`, of which it may hold a beginning already."""
        self._cache.copy(source.index, target.index, len(target.held), tokens)
        target.held = source.held[:tokens]
        if target.job:
            target.job.cached = tokens

    def release(self, job: Job) -> None:
        """Empty the slot of a job that is given up."""
        for slot in self.slots:
            if slot.job is job:
                slot.job, slot.held, slot.owner = None, [], None

    def _home(self, job: Job) -> CacheSlot | None:
        slot = self._homes.get(job.request.id[:-1])
        usable = (
            slot is not None
            and slot.job is None
            and slot.owner == job.request.id[:-1]
            and common(slot.held, job.prompt)
        )
        return slot if usable else None

    def _reuse(self, job: Job, slot: CacheSlot) -> None:
        """Keep of `slot.held` what the prompt begins with, or copy a longer beginning from a sibling."""
        limit = len(job.prompt) - 1
        own = min(limit, common(slot.held, job.prompt))
        best, held = slot, own
        for donor in (self._donors.get(job.request.id[:-2]), self._latest):
            if donor is not None and (length := min(limit, common(donor.held, job.prompt))) >= held + WORTH_COPYING:
                best, held = donor, length
        slot.held = slot.held[:own]
        if best is not slot:
            self._cache.copy(best.index, slot.index, own, held)
            slot.held = best.held[:held]
        job.cached = held


def common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning, by bisection over slices."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
