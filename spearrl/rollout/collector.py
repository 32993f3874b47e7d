"""Plays episodes: all of a step at once over one engine, each going on as soon as its own reply is there."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from spearrl.envs import Environment
from spearrl.envs.pool import Pool, PooledSlot, SlotLost, open_pool
from spearrl.errors import ConfigError, ContractError, EngineError, EnvironmentFault, WorkerError
from spearrl.models.chat import ChatEncoder
from spearrl.rollout.protocol import Engine, Request, Sampling
from spearrl.seeds import derive
from spearrl.types import Group, Image, Message, Observation, Reply, Status, Task, Trajectory, Turn

MAX_SIBLINGS = 4096  # trajectory id = group id * this + sibling
CUT = (Status.CONTEXT_LIMIT, Status.OVERLONG)
ATTEMPTS = 2  # a faulty episode is played once more with the same seeds
ALL_FAILED = 8  # episodes that all end in engine errors, twice in a row: nothing better is to be expected of it
MEASURED = ("env_seconds", "sampled_tokens", "prefilled_tokens", "cached_tokens")
T = TypeVar("T")


class Player(Protocol):
    """Plays episodes: a Collector in this process, or a fleet of workers."""

    measures: dict[
        str, float
    ]  # of the last collect(): seconds, engine_seconds, env_seconds, tokens, env/…; of a fleet also rollout/…

    def collect(
        self,
        tasks: Sequence[Task],
        group_size: int,
        *,
        run_seed: int,
        step: int,
        first_group_id: int,
        purpose: str = "rollout",
    ) -> list[Group]: ...

    def submit(self, task: Task, group: int, sibling: int, *, seed: tuple[int | str, ...]) -> Future[Trajectory]: ...

    def poll(self) -> None:
        """To be called now and then by whoever waits for submitted episodes, from the thread that owns the learner."""
        ...

    def measure(self) -> None:
        """`measures` of what was submitted: since the last `measure` or `collect`."""
        ...

    def close(self) -> None: ...


@dataclass
class _Episode:
    """The running state of one episode."""

    trajectory: Trajectory
    slot: PooledSlot
    sampling_seed: tuple[int | str, ...]
    observation: Observation
    messages: list[Message]  # of the next prompt, as the environment gives them
    tools: list[dict[str, Any]]
    conversation: list[Message] = field(default_factory=list)
    said: int = 0  # reply tokens so far


class Collector:
    """Plays tasks with an engine.

    Args:
        style: "chat" (one growing conversation) or "windowed" (a fresh prompt every turn).
        max_response_tokens: reply tokens of an episode; 0: no limit.
        context_tokens: prompt plus reply tokens of one request.
        reply_deadline_s: seconds the engine may take over one reply; none: any.
        pool: where the environment steps (two collectors may share one); none: a pool of its own with default limits.
    Raises:
        ConfigError: the environment's `execution` is not known; style "windowed" with an environment that offers no windowed prompts, or
            function schemas with a chat template that does not show them (at the first episode).
    """

    def __init__(
        self,
        engine: Engine,
        encoder: ChatEncoder,
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
        self.style, self.max_turns = style, max_turns
        self.max_reply_tokens, self.max_response_tokens, self.context_tokens = (
            max_reply_tokens,
            max_response_tokens,
            context_tokens,
        )
        self.temperature, self.top_p, self.reply_deadline_s = temperature, top_p, reply_deadline_s
        self._in_vain = 0
        self.measures: dict[str, float] = dict.fromkeys(MEASURED, 0.0)
        self.held: dict[
            tuple[int | str, ...], int
        ] = {}  # tokens (prompt and reply) of each episode under way, by sampling seed: ids may meet an evaluation's
        self.pool = pool or open_pool(environment, style=style)
        self._shown_tools = False  # whether the template was seen to show function schemas

    def collect(
        self,
        tasks: Sequence[Task],
        group_size: int,
        *,
        run_seed: int,
        step: int,
        first_group_id: int,
        purpose: str = "rollout",
    ) -> list[Group]:
        """Play each task `group_size` times. Every random draw derives from (run_seed, step, group, sibling, turn).

        Siblings share the environment's seed and differ in the sampling seed.

        Raises:
            ContractError: the environment paid a reward that is not a finite number.
            WorkerError: environment workers had to be replaced more often than allowed.
            EngineError: the engine is gone, or answers nothing but errors.
        """
        budget = self.pool.budget
        budget.refill()
        before = (budget.restarts, budget.deadlines)
        start, busy = time.monotonic(), self.engine.counters.get("seconds", 0.0)
        self.measures = dict.fromkeys(MEASURED, 0.0)
        groups = _run(self._collect(tasks, group_size, (purpose, run_seed, step), first_group_id))
        self._check_engine([trajectory for group in groups for trajectory in group.trajectories])
        self.measures["seconds"] = time.monotonic() - start
        self.measures["engine_seconds"] = self.engine.counters.get("seconds", 0.0) - busy
        self.measures |= {
            "env/restarts": float(budget.restarts - before[0]),
            "env/deadline": float(budget.deadlines - before[1]),
        }
        return groups

    def _check_engine(self, played: Sequence[Trajectory]) -> None:
        failed = [trajectory for trajectory in played if trajectory.status is Status.ENGINE_ERROR]
        self._in_vain = self._in_vain + 1 if len(failed) == len(played) >= ALL_FAILED else 0
        if failed and (not self.engine.health() or self._in_vain > 1):
            fault = (failed[0].error or "").strip().rpartition("\n")[2]
            hint = "its own output says why; resume the run from its last checkpoint (with rollout.workers=1 an engine that dies is replaced)"
            raise EngineError(
                f"{len(failed)} of {len(played)} episodes ended in engine errors: {fault}", where="engine", hint=hint
            )

    def submit(self, task: Task, group: int, sibling: int, *, seed: tuple[int | str, ...]) -> Future[Trajectory]:
        """Not offered: generation ahead of the learner needs workers."""
        raise ConfigError(
            "episodes cannot be played ahead in the trainer's own process",
            where="rollout.max_staleness",
            hint="set rollout.workers=1 or more",
        )

    def poll(self) -> None:
        """Nothing needs tending in one process."""

    def measure(self) -> None:
        """Nothing is submitted in one process."""

    def close(self) -> None:
        """Close every environment slot, and end what steps them."""
        self.pool.close()

    async def _collect(
        self, tasks: Sequence[Task], group_size: int, seed: tuple[int | str, ...], first_group_id: int
    ) -> list[Group]:
        groups = [Group(first_group_id + place, task) for place, task in enumerate(tasks)]
        members = [(g, place, sibling) for place, g in enumerate(groups) for sibling in range(group_size)]
        coroutines = [
            self.play(Trajectory(g.task, g.id, s, g.id * MAX_SIBLINGS + s), (*seed, place)) for g, place, s in members
        ]
        played = await asyncio.gather(*coroutines)
        for (group, _, _), trajectory in zip(members, played, strict=True):
            group.trajectories.append(trajectory)
        return groups

    async def play(self, trajectory: Trajectory, seed: tuple[int | str, ...]) -> Trajectory:
        """Play one episode, twice where it is faulty. `trajectory` says which; `seed`: (purpose, run seed, step, place of the task in its step)."""
        try:
            return await self._play(trajectory, seed)
        finally:
            self.held.pop((*seed, trajectory.sibling), None)

    async def _play(self, trajectory: Trajectory, seed: tuple[int | str, ...]) -> Trajectory:
        faults = 0
        while True:
            trajectory = Trajectory(trajectory.task, trajectory.group, trajectory.sibling, trajectory.id)
            try:
                await self._attempt(trajectory, seed)
            except SlotLost:  # its worker fell to another episode; the pool's budget bounds how often
                continue
            except EngineError:
                trajectory.status, trajectory.error = Status.ENGINE_ERROR, traceback.format_exc()
            except EnvironmentFault:
                trajectory.status, trajectory.error = Status.ENV_ERROR, traceback.format_exc()
            except (ContractError, ConfigError, WorkerError):
                raise
            except Exception:  # whatever an environment raises costs its own episode only
                trajectory.status, trajectory.error = Status.ENV_ERROR, traceback.format_exc()
            faults += trajectory.status.is_error
            if not trajectory.status.is_error or faults == ATTEMPTS:
                return trajectory

    async def _attempt(self, trajectory: Trajectory, seed: tuple[int | str, ...]) -> None:
        """Play the episode in a slot of the pool; a slot whose environment failed, or that was left in the middle of a call, is not used again."""
        slot = self.pool.acquire()
        sound = False
        try:
            await self._episode(trajectory, slot, seed)
            sound = True
        except EngineError:
            sound = True
            raise
        finally:
            if sound:
                self.pool.release(slot)
            else:
                self._discard(slot)

    async def _episode(self, trajectory: Trajectory, slot: PooledSlot, seed: tuple[int | str, ...]) -> None:
        start = await self._timed(self.pool.start(slot, trajectory.task, derive("env", *seed)))
        episode = _Episode(
            trajectory, slot, (*seed, trajectory.sibling), start.observation, start.messages, start.tools
        )
        trajectory.status = Status.TURN_LIMIT
        for number in range(self.max_turns):
            ended = await self._turn(episode, number)
            if ended is not None:
                trajectory.status = ended
                if ended not in CUT:
                    return
                break
        if trajectory.turns:
            trajectory.turns[-1].reward += self.environment.cut_reward

    async def _turn(self, episode: _Episode, number: int) -> Status | None:
        """One prompt, reply and step; the status where the episode ended."""
        trajectory, observation = episode.trajectory, episode.observation
        prompt = self._prompt(episode)
        room = self.context_tokens - len(prompt)
        left = self.max_response_tokens - episode.said if self.max_response_tokens else room
        if room < 1:
            return Status.CONTEXT_LIMIT
        if left < 1:
            return Status.OVERLONG
        allowed = (
            None
            if observation.allowed_ids is None
            else tuple(sorted({*observation.allowed_ids, *self.encoder.stop_ids}))
        )
        sampling = Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=min(self.max_reply_tokens, room, left),
            stop_ids=self.encoder.stop_ids,
            allowed_ids=allowed,
            seed=derive(*episode.sampling_seed, number),
        )
        request_id = (trajectory.group, trajectory.sibling, number)
        self.held[episode.sampling_seed] = len(prompt)
        images = self._images(episode)
        completion = await self.engine.generate(
            Request(request_id, prompt, images, sampling, deadline_s=self.reply_deadline_s)
        )
        self.held[episode.sampling_seed] += len(completion.token_ids)
        self.measures["sampled_tokens"] += len(completion.token_ids)
        self.measures["cached_tokens"] += completion.cached_tokens
        self.measures["prefilled_tokens"] += len(prompt) - completion.cached_tokens
        text = self.encoder.decode(completion.token_ids)
        reply = Reply(text, completion.token_ids, completion.finish_reason)
        played = await self._timed(self.pool.act(episode.slot, reply, number + 1 == self.max_turns))
        outcome = played.outcome
        episode.said += len(completion.token_ids)
        turn = Turn(
            prompt,
            completion.token_ids,
            completion.logprobs,
            completion.finish_reason,
            text,
            observation.text,
            observation.anchor,
            played.action,
        )
        turn.min_version, turn.max_version, turn.images = completion.min_version, completion.max_version, images
        turn.allowed_ids = allowed
        trajectory.turns.append(turn)
        turn.reward = float(outcome.reward)
        trajectory.info = dict(outcome.info)
        trajectory.faults += bool(outcome.info.get("fault"))
        episode.conversation.append(self.encoder.reply_message(text))
        episode.observation, episode.messages = outcome.observation, played.messages
        if outcome.terminated:
            return Status.SUCCESS if outcome.info.get("success") else Status.FAILURE
        return Status.TURN_LIMIT if outcome.truncated else None

    def _prompt(self, episode: _Episode) -> tuple[int, ...]:
        turns, new = episode.trajectory.turns, episode.messages
        if self.style == "windowed":
            return self._start(new, episode.tools)
        episode.conversation.extend(new)
        if not turns:
            return self._start(new, episode.tools)
        if self.encoder.rewrites_history:
            prompt = self._start(episode.conversation, episode.tools)
            known = turns[-1].prompt_ids + turns[-1].token_ids
            episode.trajectory.rewrites += prompt[: len(known)] != known
            return prompt
        return self.encoder.extend(turns[-1].prompt_ids, turns[-1].token_ids, new)

    def _images(self, episode: _Episode) -> tuple[Image, ...]:
        """All pictures of the prompt, in order."""
        return tuple(
            image
            for m in (episode.messages if self.style == "windowed" else episode.conversation)
            for image in m.images
        )

    def _start(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """A whole conversation's ids. A template that leaves the function schemas out would have the policy guess them."""
        prompt = self.encoder.start(messages, tools)
        if tools and not self._shown_tools:
            if prompt == self.encoder.start(messages):
                hint = 'use env.options.describe="prompt" (a ToolEnvironment then says itself what its tools are), or a model whose template shows tools'
                raise ConfigError(
                    "the chat template does not show the environment's tools", where="model.path", hint=hint
                )
            self._shown_tools = True
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
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
