"""The pool: environments that hang, die or raise cost their own episode; order, isolation, thousands of slots."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import pytest

from spearrl.envs import Environment, import_path, make
from spearrl.envs.pool import open_pool
from spearrl.envs.pool import supervision as workers
from spearrl.errors import ConfigError, ContractError, EnvironmentFault, WorkerError
from spearrl.rollout import Collector, LocalEngine
from spearrl.types import Reply, Status, Task
from tests.rollout.test_collector import parts, say
from tests.support.faulty_envs import Threaded
from tests.support.gates import LIMIT_S, wait_gone
from tests.support.scripted_engine import ScriptedEngine

DEADLINE = 2.0
REPLY = Reply("go", (1,), "stop")


def ids(*names: str) -> list[Task]:
    return [Task(name, "train") for name in names]


def collector_of(environment: str = "Rogue", *, style: str = "chat", engine=None, **changes) -> Collector:
    options = changes.pop("options", {})
    env = make(f"tests.support.faulty_envs:{environment}", **options)
    pool = open_pool(env, style=style, **{"workers": 2, "deadline_s": DEADLINE, "deterministic": True, **changes})
    limits = {"max_turns": 5, "max_reply_tokens": 8, "max_response_tokens": 0, "context_tokens": 256}
    return Collector(engine or ScriptedEngine(say("go")), parts()[1], env, style=style, pool=pool, **limits)


def play(collector: Collector, tasks: list[Task], size: int = 2, step: int = 0):
    try:
        return collector.collect(tasks, size, run_seed=1, step=step, first_group_id=0)
    finally:
        collector.close()


def outcomes(groups) -> dict[str, list[Status]]:
    return {g.task.id: [t.status for t in g.trajectories] for g in groups}


WON = [Status.SUCCESS] * 2
LOST = [Status.ENV_ERROR] * 2


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    "kind, word",
    [("hang", "no answer within 2 s"), ("sleep", "no answer"), ("exit", "exit code 3"), ("crash", "SIGSEGV")],
)
def test_a_worker_that_hangs_or_dies_costs_one_episode(kind: str, word: str, deterministic: bool):
    collector = collector_of(deterministic=deterministic)
    tasks = ids("fine-0", "fine-1", kind, "fine-2", "fine-3")
    groups = play(collector, tasks, size=1)
    assert outcomes(groups) == {task.id: [Status.ENV_ERROR if task.id == kind else Status.SUCCESS] for task in tasks}
    lost = next(g.trajectories[0] for g in groups if g.task.id == kind)
    assert word in lost.error and f"step of task {kind}" in lost.error and "EnvironmentFault" in lost.error
    assert all(t.reward == 3.0 and len(t.turns) == 3 for g in groups for t in g.trajectories if t is not lost)
    assert collector.measures["env/restarts"] >= 1  # the second fault may be the last call of all
    assert collector.measures["env/deadline"] == (2.0 if kind in ("hang", "sleep") else 0.0)


def test_what_an_environment_raises_needs_no_new_worker():
    collector = collector_of()
    groups = play(collector, ids("fine-0", "raise", "fine-1"))
    assert outcomes(groups) == {"fine-0": WON, "raise": LOST, "fine-1": WON}
    assert groups[1].trajectories[0].error.strip().splitlines()[-1] == "RuntimeError: the shelf fell down"
    assert collector.measures["env/restarts"] == 0.0


def test_a_broken_contract_stops_the_run_from_a_worker_too():
    with pytest.raises(ContractError, match="the rule was broken") as caught:
        play(collector_of(), ids("fine-0", "contract"))
    assert (caught.value.where, caught.value.hint) == ("Rogue", "mend it")
    with pytest.raises(ContractError, match="cannot travel between processes"):
        play(collector_of("Unsendable"), ids("fine-0"))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", ["Rogue", "Threaded"])
def test_a_pool_is_usable_after_a_rollout_was_broken_off(kind: str, deterministic: bool):
    collector = collector_of(kind, deterministic=deterministic, deadline_s=30)
    tasks = ids("fine-0", "contract", *(f"fine-{i}" for i in range(1, 9)))
    with pytest.raises(ContractError):
        collector.collect(tasks, 2, run_seed=1, step=0, first_group_id=0)
    assert outcomes(play(collector, ids("fine-0", "fine-1"))) == {"fine-0": WON, "fine-1": WON}


def test_a_fault_that_does_not_come_back_leaves_no_trace(tmp_path):
    names = [f"{kind}-once-{i}" for kind in ("exit", "hang") for i in range(2)]
    collector = collector_of(options={"marks": str(tmp_path)})
    groups = play(collector, ids("fine-0", *names, "fine-1"), size=1)
    assert all(
        t.status is Status.SUCCESS and t.error is None and t.reward == 3.0 for g in groups for t in g.trajectories
    )
    assert 2 <= collector.measures["env/restarts"] <= 4 and collector.measures["env/deadline"] == 2.0
    calm = play(collector_of(options={"marks": str(tmp_path)}), ids("fine-0", *names, "fine-1"), size=1)
    assert [[turn.observation for turn in g.trajectories[0].turns] for g in groups] == [
        [turn.observation for turn in g.trajectories[0].turns] for g in calm
    ]


def test_the_restart_budget_ends_the_run_and_is_new_for_every_rollout(tmp_path):
    tasks = ids(*(f"exit-{i}" for i in range(6)))
    with pytest.raises(
        WorkerError, match="replaced 2 times in one rollout; the last reason: step of task exit-.* \\(exit code 3\\)"
    ) as caught:
        play(collector_of(restarts=2), tasks, size=1)
    assert type(caught.value) is WorkerError and "rollout.env_restarts" in caught.value.hint
    collector = collector_of(restarts=2, workers=1, options={"marks": str(tmp_path)})
    for step in range(3):
        groups = collector.collect(
            ids(f"exit-once-{step}", f"exit-once-x{step}"), 1, run_seed=1, step=step, first_group_id=0
        )
        assert all(t.success for g in groups for t in g.trajectories) and collector.measures["env/restarts"] == 2.0
    collector.close()


def test_restarts_wait_longer_each_time():
    pool = open_pool(make("tests.support.faulty_envs:Rogue"), style="chat", workers=1, deadline_s=5, restarts=9)

    async def die() -> float:
        slot = pool.acquire()
        start = time.monotonic()
        await pool.start(slot, Task("exit", "train"), 0)
        waited = time.monotonic() - start
        await pool.act(slot, REPLY, False)
        with pytest.raises(EnvironmentFault, match="exit code 3"):
            await pool.act(slot, REPLY, False)
        return waited

    waits: list[float] = []
    event_wait = workers.threading.Event.wait

    def noted(self, seconds=None):
        waits.append(seconds)
        return event_wait(self, 0.05 if seconds == 5.0 else seconds)

    workers.threading.Event.wait = noted
    try:
        for _ in range(3):
            asyncio.run(die())
        worker = pool.workers[0]
        worker._restarts_in_a_row = 20
        asyncio.run(die())
    finally:
        workers.threading.Event.wait = event_wait
        pool.close()
    assert [w for w in waits if w in (0.05, 5.0)] == [
        0.05,
        0.05,
        5.0,
    ]  # sound calls in between set it back; five seconds at most


@pytest.mark.parametrize("style", ["chat", "windowed"])
@pytest.mark.parametrize("kind", ["Rogue", "Threaded"])
def test_pooled_episodes_equal_those_on_the_loop_and_are_bit_identical(
    style: str, kind: str, monkeypatch: pytest.MonkeyPatch
):
    def run(environment: str):
        engine = LocalEngine(parts()[0], slots=16, cache_mib=64, context_tokens=256)
        collector = collector_of(environment, style=style, engine=engine, options={"pause_s": 0.01}, deadline_s=30)
        groups = play(collector, ids("fine-0", "fine-1", "fine-2"), size=3)
        return [
            (t.status, [(turn.prompt_ids, turn.token_ids, turn.logprobs, turn.reward) for turn in t.turns])
            for g in groups
            for t in g.trajectories
        ]

    first = run(kind)
    assert first == run(kind) and len(first) == 9
    monkeypatch.setattr(Threaded, "execution", "inline")
    assert [(s, [turn[:2] for turn in turns]) for s, turns in first] == [
        (s, [turn[:2] for turn in turns]) for s, turns in run("Threaded")
    ]


def test_thousands_of_slots_live_in_two_processes():
    collector = collector_of(deadline_s=30)
    groups = play(collector, ids(*(f"fine-{i}" for i in range(300))), size=8)
    played = [t for g in groups for t in g.trajectories]
    assert len(played) == 2400 and all(t.success for t in played)
    pids = [t.info["pid"] for t in played]
    assert len(set(pids)) == 2 and os.getpid() not in pids and min(map(pids.count, set(pids))) > 1000


def test_threads_have_a_deadline_too():
    collector = collector_of("Threaded", workers=3)
    groups = play(collector, ids("fine-0", "sleep", "fine-1", "raise"))
    assert outcomes(groups) == {"fine-0": WON, "sleep": LOST, "fine-1": WON, "raise": LOST}
    assert "no answer within 2 s" in groups[1].trajectories[0].error
    assert collector.measures["env/deadline"] == 4.0 and collector.measures["env/restarts"] >= 2


def test_threads_really_run_side_by_side():
    collector = collector_of("Meeting", workers=16, deadline_s=LIMIT_S)
    groups = play(collector, ids(*(f"fine-{i}" for i in range(4))), size=4)
    assert all(t.success for g in groups for t in g.trajectories)


def test_closing_ends_the_workers_and_may_come_twice():
    collector = collector_of()
    groups = collector.collect(ids("fine-0", "fine-1"), 2, run_seed=0, step=0, first_group_id=0)
    pids = {t.info["pid"] for g in groups for t in g.trajectories}
    collector.close()
    collector.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    groups = play(collector, ids("fine-0"))  # a closed pool opens again when it is used
    assert outcomes(groups) == {"fine-0": WON}


ORPHAN = """
import asyncio, os, signal, sys
from spearrl.envs import make
from spearrl.envs.pool import open_pool
from spearrl.types import Reply, Task
pool = open_pool(make("tests.support.faulty_envs:Rogue"), style="chat", workers=1, deadline_s=60)
async def main():
    slot = pool.acquire()
    await pool.start(slot, Task(sys.argv[1], "train"), 0)
    played = await pool.act(slot, Reply("go", (1,), "stop"), False)
    print(played.outcome.info["pid"], flush=True)
    asyncio.get_running_loop().call_later(0.3, os.kill, os.getpid(), signal.SIGKILL)
    await pool.act(slot, Reply("go", (1,), "stop"), False)
asyncio.run(main())
"""


@pytest.mark.parametrize("task", ["hang", "stuck"])  # asleep, and in C code that lets no other thread run
def test_a_worker_does_not_outlive_a_killed_trainer(task):
    run = subprocess.run([sys.executable, "-c", ORPHAN, task], capture_output=True, text=True, timeout=LIMIT_S)
    pid = int(run.stdout)
    wait_gone([pid])


def test_what_a_process_pool_asks_of_a_class():
    class Local(Environment):
        execution = "process"

    with pytest.raises(ConfigError, match="another process cannot import this environment"):
        open_pool(Local(), style="chat")
    assert import_path(type(make("webshop"))) == "spearrl.envs.webshop.env:WebShop"
    environment = Environment()
    environment.execution = "fork"
    with pytest.raises(ConfigError, match="execution='fork' is not known"):
        open_pool(environment, style="chat")
