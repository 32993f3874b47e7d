"""Plays episodes: all of a step at once over one engine, each going on as soon as its own reply is there."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from spearrl.envs import Environment
from spearrl.envs.pool import Pool, PooledSlot, SlotLost, open_pool
from spearrl.errors import ConfigError, ContractError, EngineError, EnvironmentFault, WorkerError
from spearrl.faults import strike
from spearrl.models.chat_format import ChatFormat, next_prompt
from spearrl.rollout.loop_watch import loop_watched
from spearrl.rollout.player import Episode, Player, Seed
from spearrl.rollout.protocol import Completion, Engine, Request, Sampling
from spearrl.seeds import derive
from spearrl.types import Image, Message, Observation, Reply, Status, Task, Trajectory, Turn

LOG = logging.getLogger(__name__)
MAX_SIBLINGS = 4096  # trajectory id = group id * this + sibling
FATAL = (ContractError, ConfigError, WorkerError)  # end the run
CUT_SHORT = (Status.CONTEXT_LIMIT, Status.OVERLONG)
ATTEMPTS = 2  # a faulty episode is played once more with the same seeds
ENGINE_SLACK_S = 5.0  # over a reply's deadline: the engine's own error says more
ALL_FAILED = 8  # episodes that all end in engine errors, twice in a row: nothing better is to be expected of it
MEASURES = ("env_seconds", "sampled_tokens", "prefilled_tokens", "cached_tokens")
T = TypeVar("T")


@dataclass
class _Episode:
    """The running state of one episode."""

    trajectory: Trajectory
    slot: PooledSlot
    sampling_seed: Seed
    observation: Observation
    messages: list[Message]  # of the next prompt, as the environment gives them
    tools: list[dict[str, Any]]
    conversation: list[Message] = field(default_factory=list)
    reply_tokens: int = 0


class RolloutProgress:
    """Of the episodes that begin now. As text: episodes and tokens since then, at the moment it is printed."""

    def __init__(self, collector: Collector, episodes: Sequence[Episode]):
        self._collector, self._episodes = collector, len(episodes)
        self._purpose = str(episodes[0][3][0]) if episodes else "nothing to play"
        self._began, self._before = time.monotonic(), collector.counts()

    def __str__(self) -> str:
        ended, tokens = (now - before for now, before in zip(self._collector.counts(), self._before, strict=True))
        rate = tokens / max(time.monotonic() - self._began, 1e-3)
        return f"{self._purpose}: {ended:.0f} of {self._episodes} episodes, {tokens:,.0f} tokens, {rate:.0f} tokens/s"


class Collector(Player):
    """Plays tasks with an engine.

    How an episode goes. A slot of the pool resets its environment with a seed that all siblings share. Then, turn by
    turn: the environment's messages become prompt ids; the engine samples a reply, with a seed of this sibling and
    turn; the reply is parsed and stepped, which gives reward, next observation and next messages. What the engine
    sampled is kept as token ids and never tokenised again. The episode ends with

    - SUCCESS or FAILURE, where the environment terminates it;
    - TURN_LIMIT, where the environment truncates it, or after `max_turns` turns;
    - CONTEXT_LIMIT, where the prompt leaves no room for a reply, or OVERLONG, where `max_response_tokens` are used up:
      before the turn is played.

    An episode that runs into one of the Collector's own limits (`max_turns`, context, response tokens) gets the
    environment's `cut_reward` on its last turn. One whose environment or engine fails is played once more from the
    start, with the same seeds, and is ENV_ERROR or ENGINE_ERROR where it fails again. One whose slot is lost through
    another's fault is played again, as often as the pool's budget allows.

    Args:
        style: "chat" (one growing conversation) or "windowed" (a fresh prompt every turn).
        max_reply_tokens: reply tokens of a turn.
        max_response_tokens: reply tokens of an episode; 0: no limit.
        context_tokens: prompt plus reply tokens of one request.
        reply_deadline_s: seconds the engine may take over one reply; none: any.
        pool: where the environment steps (two collectors may share one); none: a pool of its own with default limits.
    Raises:
        ConfigError: the environment's `execution` is not known; style "windowed" with an environment that offers no
            windowed prompts.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: ChatFormat,
        environment: Environment,
        *,
        style: str,
        max_turns: int,
        max_reply_tokens: int,
        max_response_tokens: int,
        context_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        reply_deadline_s: float | None = None,
        pool: Pool | None = None,
    ):
        self.engine, self.encoder, self.environment = engine, encoder, environment
        self.style, self.max_turns, self.max_reply_tokens = style, max_turns, max_reply_tokens
        self.max_response_tokens, self.context_tokens = max_response_tokens, context_tokens
        self.temperature, self.top_p, self.reply_deadline_s = temperature, top_p, reply_deadline_s
        self.pool = pool or open_pool(environment, style=style)
        self.measures: dict[str, float] = dict.fromkeys(MEASURES, 0.0)
        # Tokens (prompt and reply) of each episode under way, by sampling seed: ids of a step may be an evaluation's
        # too.
        self.tokens_held: dict[Seed, int] = {}
        self.on_turn: Callable[[Turn], None] | None = None  # called with every turn as it ends
        self._ended = 0  # episodes, ever
        self._failures = 0  # calls of `collect` in a row in which all failed

    def counts(self) -> tuple[float, float]:
        """(episodes that ended, tokens sampled), ever."""
        return self._ended, self.engine.counters.get("sampled_tokens", 0.0)

    def _play(self, episodes: Sequence[Episode]) -> list[Trajectory]:
        async def played() -> list[Trajectory]:
            calls = (self.play(task, group, sibling, seed=seed) for task, group, sibling, seed in episodes)
            with loop_watched(self.pool.deadline_s, self.reply_deadline_s, lambda: self.pool.busy):
                return await asyncio.gather(*calls)

        budget = self.pool.budget
        budget.refill()
        restarts, deadlines = budget.restarts, budget.deadlines
        start, busy = time.monotonic(), self.engine.counters.get("seconds", 0.0)
        self.measures = dict.fromkeys(MEASURES, 0.0)
        LOG.info("%s", RolloutProgress(self, episodes))
        trajectories = _run(played())
        self._check_engine(trajectories)
        self.measures |= {
            "seconds": time.monotonic() - start,
            "engine_seconds": self.engine.counters.get("seconds", 0.0) - busy,
            "env/restarts": float(budget.restarts - restarts),
            "env/deadline": float(budget.deadlines - deadlines),
        }
        return trajectories

    def close(self) -> None:
        """Close every environment slot, and end what steps them."""
        self.pool.close()

    def _check_engine(self, trajectories: Sequence[Trajectory]) -> None:
        failed = [trajectory for trajectory in trajectories if trajectory.status is Status.ENGINE_ERROR]
        self._failures = self._failures + 1 if len(failed) == len(trajectories) >= ALL_FAILED else 0
        if failed and (not self.engine.health() or self._failures > 1):
            fault = (failed[0].error or "").strip().rpartition("\n")[2]
            text = f"{len(failed)} of {len(trajectories)} episodes ended in engine errors: {fault}"
            hint = (
                "its own output says why; resume the run from its last checkpoint "
                "(with rollout.workers=1 an engine that dies is replaced)"
            )
            raise EngineError(text, where="engine", hint=hint)

    async def play(self, task: Task, group: int, sibling: int, *, seed: Seed) -> Trajectory:
        """Play one episode, twice where it is faulty.

        `seed`: (purpose, run seed, step, position of the task in its step).
        """
        if (begin := getattr(self.engine, "begin", None)) is not None:
            begin(seed[:3])
        try:
            faults = 0
            while True:
                trajectory = Trajectory(task, group, sibling, group * MAX_SIBLINGS + sibling)
                try:
                    await self._attempt(trajectory, seed)
                except SlotLost:  # its worker fell to another episode; the pool's budget bounds how often
                    continue
                except Exception as error:  # whatever an environment raises costs its own episode only
                    if isinstance(error, FATAL) and not isinstance(error, (EngineError, EnvironmentFault)):
                        raise
                    trajectory.status = Status.ENGINE_ERROR if isinstance(error, EngineError) else Status.ENV_ERROR
                    trajectory.error = traceback.format_exc()
                faults += trajectory.status.is_error
                if not trajectory.status.is_error or faults == ATTEMPTS:
                    return trajectory
        finally:
            self._ended += 1
            self.tokens_held.pop((*seed, sibling), None)

    async def _attempt(self, trajectory: Trajectory, seed: Seed) -> None:
        """Play the episode in a slot, which is used again unless its environment failed or was left in the middle of a
        call.
        """
        slot = self.pool.acquire()
        try:
            await self._episode(trajectory, slot, seed)
        except EngineError:
            self.pool.release(slot)
            raise
        except BaseException:
            self._discard(slot)
            raise
        self.pool.release(slot)

    async def _episode(self, trajectory: Trajectory, slot: PooledSlot, seed: Seed) -> None:
        start = await self._timed(self.pool.start(slot, trajectory.task, derive("env", *seed)))
        sampling_seed = (*seed, trajectory.sibling)
        episode = _Episode(trajectory, slot, sampling_seed, start.observation, start.messages, start.tools)
        trajectory.status = Status.TURN_LIMIT
        for number in range(self.max_turns):
            ended = await self._turn(episode, number)
            if ended is not None:
                trajectory.status = ended
                if ended not in CUT_SHORT:
                    return
                break
        if trajectory.turns:
            trajectory.turns[-1].reward += self.environment.cut_reward

    async def _turn(self, episode: _Episode, number: int) -> Status | None:
        """One prompt, reply and step; the status where the episode ended."""
        trajectory, observation = episode.trajectory, episode.observation
        prompt = self._prompt(episode)
        room = self.context_tokens - len(prompt)
        left = self.max_response_tokens - episode.reply_tokens if self.max_response_tokens else room
        if room < 1:
            if not trajectory.turns:
                trajectory.error = (
                    f"a first prompt of {len(prompt)} tokens; rollout.context_tokens={self.context_tokens}"
                )
            return Status.CONTEXT_LIMIT
        if left < 1:
            return Status.OVERLONG
        request = self._request(episode, number, prompt, min(self.max_reply_tokens, room, left))
        self.tokens_held[episode.sampling_seed] = len(prompt)
        completion = await self._completion(request)
        tokens = completion.token_ids
        self.tokens_held[episode.sampling_seed] += len(tokens)
        self.measures["sampled_tokens"] += len(tokens)
        self.measures["cached_tokens"] += completion.cached_tokens
        self.measures["prefilled_tokens"] += len(prompt) - completion.cached_tokens
        text = self.encoder.reply_text(tokens, prompt)
        reply = Reply(text, tokens, completion.finish_reason)
        played = await self._timed(self.pool.act(episode.slot, reply, number + 1 == self.max_turns))
        outcome = played.outcome
        trajectory.turns.append(
            Turn(
                prompt_ids=prompt,
                token_ids=tokens,
                logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
                reply=text,
                observation=observation.text,
                anchor=observation.anchor,
                action=played.action,
                reward=float(outcome.reward),
                min_version=completion.min_version,
                max_version=completion.max_version,
                images=request.images,
                allowed_ids=request.sampling.allowed_ids,
            )
        )
        if self.on_turn is not None:
            self.on_turn(trajectory.turns[-1])
        trajectory.info = dict(outcome.info)
        trajectory.faults += bool(outcome.info.get("fault"))
        episode.reply_tokens += len(tokens)
        episode.conversation.append(Message("assistant", text))
        episode.observation, episode.messages = outcome.observation, played.messages
        if outcome.terminated:
            return Status.SUCCESS if outcome.info.get("success") else Status.FAILURE
        return Status.TURN_LIMIT if outcome.truncated else None

    async def _completion(self, request: Request) -> Completion:
        """Of the engine; its own deadline comes first. Raises EngineError."""
        spoilt = strike("engine.generate", EngineError)
        limit = None if request.deadline_s is None else request.deadline_s + ENGINE_SLACK_S
        try:
            async with asyncio.timeout(limit):
                completion = await self.engine.generate(request)
        except TimeoutError as error:
            text = f"no reply within {limit:g} s, and no error: the engine hangs"
            hint = "rollout.reply_deadline_s bounds a reply; with rollout.workers=1 an engine that hangs is replaced"
            raise EngineError(text, where=f"request {request.id}", hint=hint) from error
        return replace(completion, logprobs=(math.nan,) * len(completion.token_ids)) if spoilt else completion

    def _request(self, episode: _Episode, number: int, prompt: tuple[int, ...], max_tokens: int) -> Request:
        trajectory, allowed = episode.trajectory, episode.observation.allowed_ids
        sampling = Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=max_tokens,
            stop_ids=self.encoder.stop_ids,
            allowed_ids=None if allowed is None else tuple(sorted({*allowed, *self.encoder.stop_ids})),
            seed=derive(*episode.sampling_seed, number),
        )
        messages = episode.messages if self.style == "windowed" else episode.conversation
        images: tuple[Image, ...] = tuple(image for message in messages for image in message.images)
        request_id = (trajectory.group, trajectory.sibling, number)
        return Request(request_id, prompt, images, sampling, deadline_s=self.reply_deadline_s)

    def _prompt(self, episode: _Episode) -> tuple[int, ...]:
        turns, new = episode.trajectory.turns, episode.messages
        if self.style == "windowed":
            return self.encoder.start(new, episode.tools)
        episode.conversation.extend(new)
        if not turns:
            return self.encoder.start(new, episode.tools)
        turn = turns[-1].prompt_ids, turns[-1].token_ids
        prompt, known = next_prompt(self.encoder, turn, episode.conversation, new, episode.tools), turn[0] + turn[1]
        episode.trajectory.rewrites += prompt[: len(known)] != known
        return prompt

    async def _timed(self, call: Awaitable[T]) -> T:
        start = time.perf_counter()
        try:
            return await call
        finally:
            self.measures["env_seconds"] += time.perf_counter() - start

    def _discard(self, slot: PooledSlot) -> None:
        """A slot that raised is not trusted again."""
        try:
            self.pool.discard(slot)
        except Exception:
            traceback.print_exc()


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, also from inside a running loop (a notebook)."""
    running = True
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        running = False
    if not running:  # outside of the handler: its error would stand in every traceback
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
