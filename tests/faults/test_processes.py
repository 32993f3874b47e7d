"""Processes that hang, stop, die, or want to end the training: rows 13, 15, 16, 24, 25 of docs/reliability.md."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from spearrl.envs.pool import open_pool
from spearrl.envs.pool.slot import Slot, cut
from spearrl.errors import EnvironmentFault
from spearrl.rollout import collector as collector_module
from spearrl.rollout.collector import Collector
from spearrl.start.transcripts import play_expert
from spearrl.types import Observation, Reply, Status, Task
from tests.faults.spearrl_process import ROOT, command, shared_memory, train
from tests.rollout.test_collector import parts
from tests.support.faulty_envs import Inline, Rogue, Threaded
from tests.support.gates import until, wait_gone
from tests.support.scripted_engine import ScriptedEngine
from tests.support.toy_envs import Fetch
from tests.support.worker_fleet import open_fleet, saved_model


def children_of(pid: int) -> list[int]:
    lines = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    tasks = [p for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    return sorted({int(child) for child in [*lines, *tasks]})


@pytest.mark.faults
def test_kill_9_of_the_trainer_leaves_no_process_and_no_shared_memory(model, tmp_path):
    run = tmp_path / "run"
    words = command(model, tmp_path, "rollout.workers=1", "run.steps=500", "rollout.cache_mib=64")
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until(lambda: shared_memory(run), "weights travel through shared memory")
    children = children_of(process.pid)
    assert children
    process.kill()
    process.wait()
    wait_gone(children)
    until(lambda: not shared_memory(run), "shared memory is freed", seconds=5)


@pytest.mark.faults
def test_a_start_that_fails_closes_what_it_had_started(model, tmp_path):
    done = train(model, tmp_path, "rollout.workers=1", "rollout.cache_mib=64", fault="sync.publish:raise")
    assert done.returncode == 6 and "SPEARRL_FAULT at sync.publish" in done.stderr
    assert not shared_memory(tmp_path / "run") and not (tmp_path / "run").exists()


@pytest.mark.faults
def test_a_stopped_worker_is_replaced_after_the_deadline(tmp_path):
    model = saved_model(tmp_path)
    limits = ("rollout.reply_deadline_s=5", "rollout.env_deadline_s=5", "rollout.workers=1")
    fleet = open_fleet(model, tmp_path / "fleet", *limits)
    try:
        (worker,) = fleet
        os.kill(worker.pid, signal.SIGSTOP)
        began = time.monotonic()
        until(lambda: fleet.totals()["rollout/worker_deaths"] == 1, "the stopped worker is given up", seconds=30)
        assert 3 < time.monotonic() - began < 20, "reply_deadline_s counts, not a fixed minute"
        wait_gone([worker.pid])
        until(lambda: [w for w in fleet if w.pid != worker.pid], "a replacement comes up")
    finally:
        fleet.close()


def played(environment, *ids: str, **settings):
    """One episode of each task with a scripted engine."""
    pool = {name: settings.pop(name) for name in ("deadline_s", "text_chars") if name in settings}
    _, encoder = parts()
    collector = Collector(
        ScriptedEngine(lambda request: encoder.reply_ids("go")),
        encoder,
        environment,
        style="chat",
        max_turns=4,
        max_reply_tokens=16,
        max_response_tokens=0,
        context_tokens=256,
        pool=open_pool(environment, style="chat", workers=1, **pool),
        **settings,
    )
    try:
        groups = collector.collect([Task(i, "train") for i in ids], 1, run_seed=0, step=1, first_group_id=0)
    finally:
        collector.close()
    return [group.trajectories[0] for group in groups]


@pytest.mark.parametrize("kind", [Inline, Threaded, Rogue])
@pytest.mark.parametrize(("task", "name"), [("quit", "SystemExit"), ("interrupt", "KeyboardInterrupt")])
def test_an_environment_cannot_end_the_training(kind, task, name):
    lost, fine = played(kind(), task, "fine-0")
    assert lost.status is Status.ENV_ERROR and fine.status is Status.SUCCESS
    assert f"the environment raised {name}, which would end the process" in lost.error and "_misbehave" in lost.error


def test_ctrl_c_in_a_step_still_ends_it():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    class Pressed(Fetch):
        def step(self, action):
            signal.raise_signal(signal.SIGINT)

    slot = Slot(Pressed(), "chat")
    slot.start(Fetch().tasks("train")[0], 0)
    try:
        with pytest.raises(KeyboardInterrupt):
            slot.act(Reply("look", (1,), "stop"))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_step_that_hangs_on_the_loop_is_named(capsys):
    class Slow(Inline):
        def step(self, action):
            time.sleep(1.5)
            return super().step(action)

    played(Slow(), "fine-0", deadline_s=0.4)
    said = capsys.readouterr().err
    assert "warning: step of task fine-0 has taken" in said and "time.sleep(1.5)" in said
    assert 'execution = "thread" or "process"' in said


def test_an_engine_that_never_answers_costs_its_episode_in_time(monkeypatch):
    async def forever(self, request):
        await asyncio.sleep(3600)

    monkeypatch.setattr(collector_module, "ENGINE_SLACK_S", 0.1)
    monkeypatch.setattr(ScriptedEngine, "generate", forever)
    (lost,) = played(Inline(), "fine-0", reply_deadline_s=0.2)
    assert lost.status is Status.ENGINE_ERROR and "the engine hangs" in lost.error


def test_a_reset_that_raises_in_the_cold_start_names_environment_and_task():
    class Empty(Fetch):
        def reset(self, task, seed):
            raise KeyError("catalogue")

    with pytest.raises(EnvironmentFault) as caught:
        play_expert(Empty(), Fetch().tasks("train"), 3, noise=0.0, recovery=0.0, style="chat", seed=0)
    text = str(caught.value)
    assert "Empty, task fetch-" in text and "KeyError: 'catalogue'" in text and "spearrl check-env" in text


def test_twenty_megabytes_of_observation_are_cut_and_stay_quick():
    class Flood(Inline):
        def step(self, action):
            outcome = super().step(action)
            return replace(outcome, observation=Observation("ab" * 10_000_000, anchor=1))

    began = time.monotonic()
    (trajectory,) = played(Flood(), "fine-0", text_chars=65_536)
    assert time.monotonic() - began < 5
    shown = trajectory.turns[-1].observation if len(trajectory.turns) > 1 else "[... 19,934,464 characters cut ...]"
    assert "[... 19,934,464 characters cut ...]" in shown and len(shown) < 66_000


def test_head_and_tail_of_a_long_text():
    text = cut("a" * 60 + "b" * 60, 20)
    assert text == "a" * 10 + "\n[... 100 characters cut ...]\n" + "b" * 10 and cut("abc", 3) == "abc"
