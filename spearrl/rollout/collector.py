"""Plays episodes: all of a step at once over one engine, each going on as soon as its own reply is there."""

from __future__ import annotations

import asyncio
import math
import numbers
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from spearrl.envs import Environment
from spearrl.errors import ConfigError, ContractError, EngineError
from spearrl.rollout.chat import ChatEncoder
from spearrl.rollout.engine import Engine, Request, Sampling
from spearrl.seeds import derive
from spearrl.types import Action, Group, Message, Observation, Outcome, Reply, Status, Task, Trajectory, Turn

MAX_SIBLINGS = 4096  # trajectory id = group id * this + sibling
ATTEMPTS = 2  # a faulty episode is played once more with the same seeds
T = TypeVar("T")


@dataclass
class _Episode:
    """The running state of one episode."""

    trajectory: Trajectory
    slot: Environment
    seed: int
    sampling_seed: tuple[int | str, ...]
    observation: Observation
    history: list[tuple[Observation, Action]] = field(default_factory=list)
    conversation: list[Message] = field(default_factory=list)
    said: int = 0  # reply tokens so far


class Collector:
    """Plays tasks with an engine.

    Args:
        style: "chat" (one growing conversation) or "windowed" (a fresh prompt every turn).
        max_response_tokens: reply tokens of an episode; 0: no limit.
        context_tokens: prompt plus reply tokens of one request.
    Raises:
        ConfigError: style "windowed" with an environment that offers no windowed prompts (at the first episode).
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
    ):
        self.engine, self.encoder, self.environment = engine, encoder, environment
        self.style, self.max_turns = style, max_turns
        self.max_reply_tokens, self.max_response_tokens, self.context_tokens = max_reply_tokens, max_response_tokens, context_tokens
        self.temperature, self.top_p = temperature, top_p
        self.measures: dict[str, float] = {}  # of the last collect(): seconds, env_seconds, engine_seconds, sampled/prefilled/cached tokens
        self._slots: list[Environment] = []
        self._threads = ThreadPoolExecutor(32, "env") if environment.execution == "thread" else None
        if environment.execution not in ("inline", "thread"):
            raise ConfigError(f"execution={environment.execution!r} is not known", where=type(environment).__name__, hint='use "inline" or "thread"')

    def collect(self, tasks: Sequence[Task], group_size: int, *, run_seed: int, step: int, first_group_id: int, purpose: str = "rollout") -> list[Group]:
        """Play each task `group_size` times. Every random draw derives from (run_seed, step, group, sibling, turn).

        Siblings share the environment's seed and differ in the sampling seed.

        Raises:
            ContractError: the environment paid a reward that is not a finite number.
        """
        start, busy = time.monotonic(), self.engine.counters.get("seconds", 0.0)
        self.measures = dict.fromkeys(("env_seconds", "sampled_tokens", "prefilled_tokens", "cached_tokens"), 0.0)
        groups = _run(self._collect(tasks, group_size, (purpose, run_seed, step), first_group_id))
        self.measures["seconds"] = time.monotonic() - start
        self.measures["engine_seconds"] = self.engine.counters.get("seconds", 0.0) - busy
        return groups

    def close(self) -> None:
        """Close every environment slot."""
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _collect(self, tasks: Sequence[Task], group_size: int, seed: tuple[int | str, ...], first_group_id: int) -> list[Group]:
        groups = [Group(first_group_id + place, task) for place, task in enumerate(tasks)]
        members = [(g, place, sibling) for place, g in enumerate(groups) for sibling in range(group_size)]
        coroutines = [self._play(Trajectory(g.task, g.id, s, g.id * MAX_SIBLINGS + s), (*seed, place)) for g, place, s in members]
        played = await asyncio.gather(*coroutines)
        for (group, _, _), trajectory in zip(members, played, strict=True):
            group.trajectories.append(trajectory)
        return groups

    async def _play(self, trajectory: Trajectory, seed: tuple[int | str, ...]) -> Trajectory:
        for _ in range(ATTEMPTS):
            trajectory = Trajectory(trajectory.task, trajectory.group, trajectory.sibling, trajectory.id)
            slot: Environment | None = None
            try:
                slot = self._slots.pop() if self._slots else self.environment.spawn()
                await self._episode(trajectory, slot, seed)
            except EngineError:
                trajectory.status, trajectory.error = Status.ENGINE_ERROR, traceback.format_exc()
            except (ContractError, ConfigError):
                self._discard(slot)
                raise
            except Exception:  # whatever an environment raises costs its own episode only
                trajectory.status, trajectory.error = Status.ENV_ERROR, traceback.format_exc()
                self._discard(slot)
                continue
            if slot is not None:
                self._slots.append(slot)
            if not trajectory.status.is_error:
                break
        return trajectory

    async def _episode(self, trajectory: Trajectory, slot: Environment, seed: tuple[int | str, ...]) -> None:
        reset_seed = derive("env", *seed)
        observation = await self._in_env(lambda: slot.reset(trajectory.task, reset_seed))
        episode = _Episode(trajectory, slot, reset_seed, (*seed, trajectory.sibling), observation)
        trajectory.status = Status.TURN_LIMIT
        for number in range(self.max_turns):
            ended = await self._turn(episode, number)
            if ended is not None:
                trajectory.status = ended
                return

    async def _turn(self, episode: _Episode, number: int) -> Status | None:
        """One prompt, reply and step; the status where the episode ended."""
        trajectory, observation = episode.trajectory, episode.observation
        prompt = self._prompt(episode, number)
        room = self.context_tokens - len(prompt)
        left = self.max_response_tokens - episode.said if self.max_response_tokens else room
        if room < 1:
            return Status.CONTEXT_LIMIT
        if left < 1:
            return Status.OVERLONG
        sampling = Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=min(self.max_reply_tokens, room, left),
            stop_ids=self.encoder.stop_ids,
            seed=derive(*episode.sampling_seed, number),
        )
        request_id = (trajectory.group, trajectory.sibling, number)
        completion = await self.engine.generate(Request(request_id, prompt, observation.images, sampling))
        self.measures["sampled_tokens"] += len(completion.token_ids)
        self.measures["cached_tokens"] += completion.cached_tokens
        self.measures["prefilled_tokens"] += len(prompt) - completion.cached_tokens
        text = self.encoder.decode(completion.token_ids)
        reply = Reply(text, completion.token_ids, completion.finish_reason)
        action, outcome = await self._in_env(lambda: _act(episode.slot, reply))
        episode.said += len(completion.token_ids)
        turn = Turn(prompt, completion.token_ids, completion.logprobs, completion.finish_reason, text, observation.text, observation.anchor, action)
        turn.min_version, turn.max_version, turn.images = completion.min_version, completion.max_version, observation.images
        trajectory.turns.append(turn)
        self._check(outcome, episode, number)
        turn.reward = float(outcome.reward)
        trajectory.info = dict(outcome.info)
        trajectory.faults += bool(outcome.info.get("fault"))
        episode.history.append((observation, action))
        episode.conversation.append(self.encoder.reply_message(text))
        episode.observation = outcome.observation
        if outcome.terminated:
            return Status.SUCCESS if outcome.info.get("success") else Status.FAILURE
        return Status.TURN_LIMIT if outcome.truncated else None

    def _prompt(self, episode: _Episode, number: int) -> tuple[int, ...]:
        slot, turns = episode.slot, episode.trajectory.turns
        if self.style == "windowed":
            messages = slot.window(episode.history, episode.observation, episode.trajectory.task)
            if messages is None:
                raise ConfigError(f"{type(slot).__name__} offers no windowed prompts", where="env.style", hint='use env.style="chat"')
            return self.encoder.start(messages, slot.tools())
        new = slot.messages(episode.observation, number)
        episode.conversation.extend(new)
        if not turns:
            return self.encoder.start(new, slot.tools())
        if self.encoder.rewrites_history:
            prompt = self.encoder.start(episode.conversation, slot.tools())
            known = turns[-1].prompt_ids + turns[-1].token_ids
            episode.trajectory.rewrites += prompt[: len(known)] != known
            return prompt
        return self.encoder.extend(turns[-1].prompt_ids, turns[-1].token_ids, new)

    async def _in_env(self, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        try:
            if self._threads is None:
                return call()
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        finally:
            self.measures["env_seconds"] += time.perf_counter() - start

    def _check(self, outcome: Outcome, episode: _Episode, number: int) -> None:
        where = f"{type(episode.slot).__name__}, task {episode.trajectory.task.id}, seed {episode.seed}, turn {number}"
        if not isinstance(outcome, Outcome):
            raise ContractError(f"step() returned {type(outcome).__name__}, expected Outcome", where=where, hint="return spearrl.types.Outcome")
        if not isinstance(outcome.reward, numbers.Real) or not math.isfinite(outcome.reward):
            raise ContractError(f"reward {outcome.reward!r} is not a finite number", where=where, hint="step() must return a finite float")

    @staticmethod
    def _discard(slot: Environment | None) -> None:
        """A slot that raised is not trusted again."""
        try:
            if slot is not None:
                slot.close()
        except Exception:
            traceback.print_exc()


def _act(slot: Environment, reply: Reply) -> tuple[Action, Outcome]:
    action = slot.parse(reply)
    return action, slot.step(action)


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, also from inside a running loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
