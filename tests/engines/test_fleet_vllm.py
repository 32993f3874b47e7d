"""Rollout workers that own a vLLM engine: dealt to, synced by the bridge, killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from spearrl.config.sections import LearnerSection  # noqa: E402
from spearrl.learner import LocalLearner  # noqa: E402
from spearrl.models import load_model  # noqa: E402
from spearrl.rollout.workers.fleet import Fleet  # noqa: E402
from spearrl.sync import Bridge  # noqa: E402
from tests.rollout.test_fleet import episodes, in_process, play  # noqa: E402
from tests.support.gates import Gate, killed_in_mid_episode, until, wait_gone  # noqa: E402
from tests.support.worker_fleet import open_fleet, saved_model  # noqa: E402

FIXED = ("rollout.engine=vllm", "env.name=tests.support.faulty_envs:Threaded", "run.deterministic=false")
TASKS = ["fine-0", "fine-1", "fine-2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    return Gate(tmp_path_factory.mktemp("gate"))


bridges: list[Bridge] = []  # made after the fleet that it sends to


@pytest.fixture(scope="module")
def fleet(model: str, gate: Gate, tmp_path_factory: pytest.TempPathFactory):
    changes = (*FIXED, f"env.options.gate={gate.folder}")
    opened = open_fleet(
        model, tmp_path_factory.mktemp("run"), *changes, on_start=lambda receiver: bridges[0].catch_up(receiver)
    )
    yield opened
    pids = [pid for worker in opened for pid in processes_of(worker.pid)]
    assert len(pids) >= 4, "a worker and an engine's core each"
    opened.close()
    wait_gone(pids)


@pytest.fixture(scope="module")
def bridge(fleet: Fleet, model: str, tmp_path_factory: pytest.TempPathFactory):
    learner = LocalLearner(load_model(model), LearnerSection(precision="fp32"))
    made = Bridge(
        learner,
        fleet,
        settings=fleet.config.sync,
        probe_ids=list(range(24)),
        run_folder=tmp_path_factory.mktemp("sync"),
    )
    bridges.append(made)
    yield made
    made.close()


def processes_of(pid: int) -> list[int]:
    """A process and what it started, and so on."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    pids = [pid]
    for one in pids:
        pids += [child for child, parent in parents.items() if parent == one]
    return pids


def publish(fleet: Fleet, bridge: Bridge, version: int) -> dict[str, float]:
    fleet.announce(version)
    return bridge.publish(version)


def core_of(worker) -> int:
    """The process of a worker's engine."""
    own = processes_of(worker.pid)[1:]
    return next(
        pid
        for pid in own
        if "EngineCore" in Path(f"/proc/{pid}/comm").read_text() + Path(f"/proc/{pid}/cmdline").read_text()
    )


def test_the_fleet_plays_what_the_local_engine_plays_when_greedy(fleet: Fleet, model: str, tmp_path: Path):
    here = in_process(model, tmp_path, "env.name=tests.support.faulty_envs:Threaded")
    here.temperature = 0.0
    assert episodes(play(fleet.collector(0.0, 1.0), TASKS)) == episodes(play(here, TASKS))


def test_workers_and_engines_that_die_come_back_with_the_synced_weights(fleet: Fleet, bridge: Bridge, gate: Gate):
    collector = fleet.collector(1.0, 1.0)
    assert publish(fleet, bridge, 1)["sync/probe_gap"] <= 1e-3 and [worker.version for worker in fleet] == [1, 1]
    before = play(collector, TASKS)
    next(bridge.learner.model.parameters()).data.mul_(-1.0)
    publish(fleet, bridge, 2)
    wanted = play(collector, TASKS)
    assert episodes(wanted) != episodes(before), "the new weights are live"
    first, second = fleet
    pids = [*processes_of(first.pid), *processes_of(second.pid)]
    victims = first.pid, core_of(second)  # a worker, and the engine of the other
    with killed_in_mid_episode(fleet, gate, lambda: [os.kill(pid, signal.SIGKILL) for pid in victims], deaths=2):
        groups = play(collector, TASKS)
    measures = collector.measures
    assert (
        measures["rollout/worker_deaths"] == 2 and measures["rollout/reissued"] >= 12 and measures["rollout/stale"] == 0
    )
    assert [key for key in episodes(groups)] == [key for key in episodes(wanted)] and not any(
        t.status.is_error for g in groups for t in g.trajectories
    )
    assert {turn.min_version for g in groups for t in g.trajectories for turn in t.turns} == {2}
    wait_gone(pids)
    until(lambda: len(list(fleet)) == 2, "both replacements are up", seconds=300)
    assert publish(fleet, bridge, 3)["sync/lost"] == 0
