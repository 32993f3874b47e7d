"""The collector: every way an episode can end, faults that stay with their episode, seeds, prompts, measures."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pytest

from spearrl.config.sections import TinySection
from spearrl.envs import Environment
from spearrl.errors import ConfigError, ContractError, EngineError
from spearrl.models import build_tiny
from spearrl.rollout import ChatEncoder, Collector, LocalEngine
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Reply, Status, Task, Text
from tests.support.scripted_engine import ScriptedEngine

WORDS = "show turn step win lose long say one two three four"


@lru_cache
def parts():
    model, tokenizer = build_tiny(
        [WORDS, f" {WORDS}"] * 9,
        TinySection(layers=1, hidden_size=32, heads=2, feed_forward=48, vocab_size=330),
        seed=0,
    )
    encoder = ChatEncoder(tokenizer)
    encoder.verify()
    return model, encoder


@dataclass
class Script:
    """What a scripted environment does, shared by its slots."""

    outcome: object = None  # (turn, action) -> Outcome
    on_reset: object = None
    execution: str = "inline"
    resets: list = field(default_factory=list)
    steps: list = field(default_factory=list)
    threads: set = field(default_factory=set)
    spawned: int = 0
    closed: int = 0


class Scripted(Environment):
    def __init__(self, script: Script):
        super().__init__()
        self.script, self.execution = script, script.execution

    def spawn(self) -> Scripted:
        self.script.spawned += 1
        return Scripted(self.script)

    def close(self) -> None:
        self.script.closed += 1

    def reset(self, task: Task, seed: int) -> Observation:
        self.task, self.turn = task, 0
        self.script.resets.append((task.id, seed))
        if self.script.on_reset:
            self.script.on_reset(task, seed)
        return Observation(f"show {task.id}", anchor=("start", task.id))

    def step(self, action: Action) -> Outcome:
        self.script.threads.add(threading.current_thread().name)
        self.script.steps.append((self.task.id, action.text))
        turn, self.turn = self.turn, self.turn + 1
        if self.script.outcome is None:
            return shown(f"turn {turn}")
        return self.script.outcome(turn, action)

    def window(self, history, observation, task):
        past = " ".join(f"{o.text} {a.text}" for o, a in history)
        return [Message("user", (Text(f"{task.id} : {past}"), Text(f" now {observation.text}")))]


def shown(text: str, reward: float = 0.0, **more) -> Outcome:
    return Outcome(Observation(text), reward, **{"terminated": False, **more})


def tasks(count: int = 1) -> list[Task]:
    return [Task(f"t{i}", "train") for i in range(count)]


def say(text: str, *, end: bool = True):
    """A reply function that always says the same."""
    ids = parts()[1].reply_ids(text)
    return lambda request: ids if end else ids[:-1]


def collector_of(engine, script: Script, **changes) -> Collector:
    settings = {
        "style": "chat",
        "max_turns": 4,
        "max_reply_tokens": 16,
        "max_response_tokens": 0,
        "context_tokens": 256,
        **changes,
    }
    return Collector(engine, parts()[1], Scripted(script), **settings)


def play(collector: Collector, count: int = 1, size: int = 1, *, step: int = 0, seed: int = 0, first: int = 0, **more):
    return collector.collect(tasks(count), size, run_seed=seed, step=step, first_group_id=first, **more)


def only(groups):
    assert len(groups) == 1 and len(groups[0].trajectories) == 1
    return groups[0].trajectories[0]


@pytest.mark.parametrize(
    "last, status",
    [
        ({"terminated": True, "info": {"success": True, "score": 0.5}}, Status.SUCCESS),
        ({"terminated": True, "info": {"success": np.bool_(False)}}, Status.FAILURE),
        ({"terminated": True}, Status.FAILURE),
        ({"truncated": True, "info": {"success": True}}, Status.TURN_LIMIT),
    ],
)
def test_how_the_environment_ends_an_episode(last: dict, status: Status):
    script = Script(lambda turn, action: shown("win", np.float32(2.5), **last) if turn == 1 else shown("one", 1))
    episode = only(play(collector_of(ScriptedEngine(say("go")), script)))
    assert (episode.status, episode.reward, len(episode.turns), episode.error) == (status, 3.5, 2, None)
    assert episode.info == dict(last.get("info", {}))
    assert [type(turn.reward) for turn in episode.turns] == [float, float]


def test_a_turn_keeps_everything_the_rest_needs():
    encoder = parts()[1]
    engine = ScriptedEngine(say("say one"))
    engine.publish(7)
    script = Script(lambda turn, action: shown("two", float(turn), terminated=turn == 1, info={"success": True}))
    episode = only(play(collector_of(engine, script), first=40))
    first, second = episode.turns
    assert first.prompt_ids == encoder.start([Message("user", "show t0")])
    assert second.prompt_ids == encoder.extend(first.prompt_ids, first.token_ids, [Message("user", "two")])
    assert (first.reply, first.observation, first.anchor, first.action.text) == (
        "say one",
        "show t0",
        ("start", "t0"),
        "say one",
    )
    assert (first.finish_reason, first.logprobs, first.min_version, first.max_version) == (
        "stop",
        (-1.0,) * len(first.token_ids),
        7,
        7,
    )
    assert (episode.group, episode.sibling, episode.id, episode.rewrites) == (40, 0, 40 * 4096, 0)


def test_turn_limit_is_a_normal_episode():
    episode = only(play(collector_of(ScriptedEngine(say("go")), Script(), max_turns=3)))
    assert (episode.status, len(episode.turns), episode.reward) == (Status.TURN_LIMIT, 3, 0.0)


def test_context_limit_comes_before_the_engine_call():
    engine = ScriptedEngine(say("one two three"))
    script = Script(lambda turn, action: shown("two " * 20))
    episode = only(play(collector_of(engine, script, context_tokens=64)))
    assert episode.status is Status.CONTEXT_LIMIT and 1 <= len(episode.turns) == len(engine.requests)
    assert all(len(r.token_ids) + r.sampling.max_tokens <= 64 for r in engine.requests)
    engine = ScriptedEngine(say("go"))
    episode = only(play(collector_of(engine, Script(), context_tokens=4)))
    assert (episode.status, episode.turns, engine.requests) == (Status.CONTEXT_LIMIT, [], [])


def test_response_budget_ends_as_overlong():
    engine = ScriptedEngine(lambda request: (9,) * 50)
    episode = only(play(collector_of(engine, Script(), max_response_tokens=10, max_reply_tokens=4, max_turns=9)))
    assert episode.status is Status.OVERLONG
    assert [len(turn.token_ids) for turn in episode.turns] == [4, 4, 2]
    assert [turn.finish_reason for turn in episode.turns] == ["length"] * 3


@pytest.mark.parametrize("reply", [(), None], ids=["nothing", "only the end"])
def test_empty_replies_are_turns(reply):
    encoder = parts()[1]
    ids = (encoder.end_id,) if reply is None else reply
    script = Script()
    episode = only(play(collector_of(ScriptedEngine(lambda request: ids), script, max_turns=2)))
    assert [turn.token_ids for turn in episode.turns] == [ids, ids]
    assert [(turn.reply, turn.action.valid) for turn in episode.turns] == [("", False)] * 2
    assert script.steps == [("t0", ""), ("t0", "")] and episode.status is Status.TURN_LIMIT


def test_a_cut_reply_goes_on_as_a_normal_turn():
    encoder = parts()[1]
    engine = ScriptedEngine(say("one two three four one two"))
    first, second = only(play(collector_of(engine, Script(), max_reply_tokens=3, max_turns=2))).turns
    assert (len(first.token_ids), first.finish_reason) == (3, "length")
    assert second.prompt_ids[: len(first.prompt_ids) + 4] == (*first.prompt_ids, *first.token_ids, encoder.end_id)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), "10", None, 1j, np.float64("nan")])
def test_a_reward_that_is_no_finite_number_stops_the_run(reward):
    script = Script(lambda turn, action: shown("two", reward if turn == 1 else 0.0))
    with pytest.raises(ContractError) as caught:
        play(collector_of(ScriptedEngine(say("go")), script), count=3, seed=5)
    text = str(caught.value)
    assert "Scripted, task t0, seed" in text and "turn 1" in text and repr(reward) in text
    assert str(script.resets[0][1]) in text


def test_a_step_that_returns_no_outcome_stops_the_run():
    with pytest.raises(ContractError, match="returned tuple, expected Outcome"):
        play(collector_of(ScriptedEngine(say("go")), Script(lambda turn, action: (1, 2))))


@pytest.mark.parametrize("where", ["reset", "step", "parse", "spawn"])
def test_a_faulty_environment_costs_its_own_episode_and_is_tried_twice(where: str, monkeypatch: pytest.MonkeyPatch):
    script = Script()

    def broken(slot, *_):
        if slot.script.broken:
            raise RuntimeError("the shelf fell down")

    script.broken = where == "spawn"
    original = getattr(Scripted, where)

    def patched(slot, *args):
        task = args[0] if where == "reset" else getattr(slot, "task", None)
        if where == "spawn" or task.id == "t1":
            script.broken = True
            broken(slot)
        return original(slot, *args)

    monkeypatch.setattr(Scripted, where, patched)
    groups = play(
        collector_of(ScriptedEngine(say("go")), script, max_turns=2), count=1 if where == "spawn" else 3, size=2
    )
    statuses = [[t.status for t in g.trajectories] for g in groups]
    fine, lost = [Status.TURN_LIMIT] * 2, [Status.ENV_ERROR] * 2
    assert statuses == ([lost] if where == "spawn" else [fine, lost, fine])
    assert all(
        "RuntimeError: the shelf fell down" in t.error for g in groups for t in g.trajectories if t.status.is_error
    )
    if where == "step":
        seeds = [seed for task, seed in script.resets if task == "t1"]
        assert len(seeds) == 4 and len(set(seeds)) == 1 and script.closed == 4


def test_a_fault_that_goes_away_leaves_a_normal_episode():
    calls = []

    def once(turn, action):
        calls.append(turn)
        if len(calls) == 2:
            raise OSError("disk")
        return shown("one", 1.0)

    engine = ScriptedEngine(say("go"))
    episode = only(play(collector_of(engine, Script(once), max_turns=3)))
    assert (episode.status, episode.error, episode.reward) == (Status.TURN_LIMIT, None, 3.0)
    assert [r.sampling.seed for r in engine.requests[:2]] == [r.sampling.seed for r in engine.requests[2:4]]


def test_engine_errors_cost_their_episode_only():
    ids = parts()[1].reply_ids("go")

    def reply(request):
        if request.id[:2] == (1, 0):
            raise MemoryError("no room")
        return ids

    engine = ScriptedEngine(reply)
    groups = play(collector_of(engine, Script(), max_turns=2), count=2, size=2)
    statuses = [t.status for g in groups for t in g.trajectories]
    assert statuses == [Status.TURN_LIMIT, Status.TURN_LIMIT, Status.ENGINE_ERROR, Status.TURN_LIMIT]
    assert "EngineError" in groups[1].trajectories[0].error and len(groups[1].valid) == 1
    assert sum(r.id == (1, 0, 0) for r in engine.requests) == 2


@pytest.mark.parametrize(("size", "healthy", "stops"), [(2, False, True), (8, True, True), (2, True, False)])
def test_an_engine_that_is_gone_stops_the_rollout(size, healthy, stops):
    def reply(request):
        raise MemoryError("the core has died")

    engine = ScriptedEngine(reply)
    engine.health = lambda: healthy
    collector = collector_of(engine, Script(), max_turns=2)
    if healthy:  # once may be an accident of a machine elsewhere
        assert {t.status for t in play(collector, size=size)[0].trajectories} == {Status.ENGINE_ERROR}
    if stops:
        with pytest.raises(EngineError, match=f"{size} of {size} episodes ended in engine errors: .*the core has died"):
            play(collector, size=size)
    else:
        assert {t.status for t in play(collector, size=size)[0].trajectories} == {Status.ENGINE_ERROR}


def test_ids_seeds_and_pooled_slots():
    engine, script = ScriptedEngine(say("go")), Script()
    collector = collector_of(engine, script, max_turns=2)
    groups = play(collector, count=3, size=4, first=30, step=10)
    assert [g.id for g in groups] == [30, 31, 32] and [g.task.id for g in groups] == ["t0", "t1", "t2"]
    assert [[t.id for t in g.trajectories] for g in groups] == [
        [number * 4096 + i for i in range(4)] for number in (30, 31, 32)
    ]
    by_task = {task: {seed for t, seed in script.resets if t == task} for task in ("t0", "t1", "t2")}
    assert all(len(seeds) == 1 for seeds in by_task.values()) and len(set.union(*by_task.values())) == 3
    seeds = [r.sampling.seed for r in engine.requests]
    assert len(set(seeds)) == len(seeds) == 24
    again = ScriptedEngine(say("go"))
    play(collector_of(again, Script(), max_turns=2), count=3, size=4, first=30, step=10)
    assert {r.id: r.sampling.seed for r in again.requests} == {r.id: r.sampling.seed for r in engine.requests}
    for changes in ({"seed": 1}, {"step": 11}, {"purpose": "eval"}):
        other = ScriptedEngine(say("go"))
        play(collector_of(other, Script(), max_turns=2), count=3, size=4, first=30, **{"step": 10, **changes})
        assert not {r.sampling.seed for r in other.requests} & set(seeds)
    play(collector, count=3, size=4)
    assert script.spawned == 12
    collector.close()
    assert script.closed == 12


def test_an_evaluation_beside_a_rollout_may_use_the_same_numbers():
    """A worker plays an evaluation while episodes of later steps are under way; both count their groups from 0."""

    class Slower(ScriptedEngine):
        async def generate(self, request):
            self.version += 20
            for _ in range(self.version):
                await asyncio.sleep(0)
            return await super().generate(request)

    engine = Slower(say("go"))
    collector = collector_of(engine, Script(), max_turns=1)

    async def both():
        return await asyncio.gather(
            *(collector.play(tasks()[0], 0, 0, seed=(purpose, 0, 1, 0)) for purpose in ("rollout", "eval"))
        )

    for trajectory in asyncio.run(both()):
        assert trajectory.status is Status.TURN_LIMIT, trajectory.error
    assert len(engine.requests) == 2 and not collector.tokens_held


def test_sampling_settings_reach_the_engine():
    engine = ScriptedEngine(say("go"))
    play(collector_of(engine, Script(), temperature=0.4, top_p=0.9, max_turns=1))
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop_ids) == (
        0.4,
        0.9,
        16,
        parts()[1].stop_ids,
    )


def test_windowed_prompts_are_fresh_every_turn():
    encoder = parts()[1]
    engine, script = ScriptedEngine(say("say one")), Script()
    episode = only(play(collector_of(engine, script, style="windowed", max_turns=2)))
    wanted = ["t0 :  now show t0", "t0 : show t0 say one now turn 0"]
    assert [turn.prompt_ids for turn in episode.turns] == [encoder.start([Message("user", text)]) for text in wanted]
    assert episode.rewrites == 0

    class ChatOnly(Scripted):
        window = Environment.window

        def spawn(self):
            return ChatOnly(self.script)

    with pytest.raises(ConfigError, match="ChatOnly offers no windowed prompts"):
        play(
            Collector(
                engine,
                encoder,
                ChatOnly(Script()),
                style="windowed",
                max_turns=2,
                max_reply_tokens=4,
                max_response_tokens=0,
                context_tokens=99,
            )
        )


def test_a_template_that_rewrites_history_is_rendered_anew_and_counted():
    from tests.models.test_chat import encoder_of

    encoder = encoder_of("qwen3")
    ids = encoder.reply_ids("<think>\none\n</think>\n\ntwo")
    settings = {
        "style": "chat",
        "max_turns": 3,
        "max_reply_tokens": 64,
        "max_response_tokens": 0,
        "context_tokens": 999,
    }
    episode = only(play(Collector(ScriptedEngine(lambda request: ids), encoder, Scripted(Script()), **settings)))
    said = Message("assistant", "<think>\none\n</think>\n\ntwo")
    assert episode.turns[1].prompt_ids == encoder.start([Message("user", "show t0"), said, Message("user", "turn 0")])
    assert episode.rewrites == 2


def test_threaded_environments_step_off_the_loop():
    script = Script(lambda turn, action: shown("one", 1.0, terminated=turn == 2), execution="thread")
    collector = collector_of(ScriptedEngine(say("go")), script)
    groups = play(collector, count=3, size=3)
    assert all(t.reward == 3.0 for g in groups for t in g.trajectories)
    assert threading.current_thread().name not in script.threads and all(
        name.startswith("env") for name in script.threads
    )
    collector.close()
    with pytest.raises(ConfigError, match="execution='fork'"):
        collector_of(ScriptedEngine(say("go")), Script(execution="fork"))


def test_it_works_inside_a_running_loop():
    async def notebook():
        return play(collector_of(ScriptedEngine(say("go")), Script(), max_turns=1))

    assert only(asyncio.run(notebook())).status is Status.TURN_LIMIT


class Chatty(Scripted):
    """Ends after a number of turns drawn from its seed; grows the conversation."""

    def reset(self, task, seed):
        observation = super().reset(task, seed)
        self.last = random.Random(seed).randrange(2, 5)
        return observation

    def spawn(self):
        return Chatty(self.script)

    def step(self, action):
        turn, self.turn = self.turn, self.turn + 1
        return shown(f"one two {turn} {len(action.text)}", 1.0, terminated=turn == self.last)


def local_run(style: str, slots: int = 64):
    model, encoder = parts()
    engine = LocalEngine(model, slots=slots, cache_mib=64, context_tokens=160)
    settings = {"max_turns": 6, "max_reply_tokens": 8, "max_response_tokens": 0, "context_tokens": 160}
    collector = Collector(engine, encoder, Chatty(Script()), style=style, **settings)
    groups = collector.collect(tasks(4), 4, run_seed=1, step=2, first_group_id=8)
    turns = [
        (turn.prompt_ids, turn.token_ids, turn.logprobs) for g in groups for t in g.trajectories for turn in t.turns
    ]
    return turns, collector.measures


@pytest.mark.parametrize("style", ["chat", "windowed"])
def test_with_the_local_engine_two_runs_are_bit_identical(style: str):
    first, measures = local_run(style)
    second, _ = local_run(style)
    assert first == second and len(first) > 40
    assert measures["sampled_tokens"] == sum(len(tokens) for _, tokens, _ in first)
    assert measures["prefilled_tokens"] + measures["cached_tokens"] == sum(len(prompt) for prompt, _, _ in first)
    assert measures["cached_tokens"] > measures["prefilled_tokens"] * (style == "chat")
    assert 0 < measures["engine_seconds"] <= measures["seconds"] and 0 < measures["env_seconds"] <= measures["seconds"]
    assert [(prompt, tokens) for prompt, tokens, _ in local_run(style, slots=3)[0]] == [
        (prompt, tokens) for prompt, tokens, _ in first
    ]


def test_a_run_stopped_by_a_bad_reward_leaves_the_engine_usable():
    model, encoder = parts()
    engine = LocalEngine(model, slots=4, cache_mib=64, context_tokens=160)
    bad = Script(lambda turn, action: shown("one", float("nan")))
    settings = {"style": "chat", "max_turns": 3, "max_reply_tokens": 8, "max_response_tokens": 0, "context_tokens": 160}
    with pytest.raises(ContractError):
        play(Collector(engine, encoder, Scripted(bad), **settings), count=3, size=3)
    groups = play(Collector(engine, encoder, Scripted(Script()), **settings), count=2, size=2)
    assert all(t.status is Status.TURN_LIMIT for g in groups for t in g.trajectories)


def test_scripted_engine_errors_and_reply_type():
    with pytest.raises(EngineError, match="ValueError: no"):
        asyncio.run(ScriptedEngine(lambda request: (_ for _ in ()).throw(ValueError("no"))).generate(parts_request()))
    assert Reply("a", (1,), "stop").text == "a" and derive(1) != derive("1")


def parts_request():
    from spearrl.rollout import Request

    return Request((0, 0, 0), (1, 2))
