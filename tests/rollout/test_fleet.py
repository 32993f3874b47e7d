"""Rollout workers as processes: what they play, and what happens to a run when they are killed, hang or raise."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from spearrl.errors import ConfigError, ContractError, WorkerError
from spearrl.launch.factories import make_collector, make_engine, make_environment, make_pool
from spearrl.models import load_model, load_tokenizer
from spearrl.processes import child_environment
from spearrl.rollout import ChatEncoder
from spearrl.rollout.workers.fleet import Fleet
from spearrl.types import Group, Status, Task
from tests.support.gates import LIMIT_S, Gate, gone, killed_in_mid_episode, until, wait_gone
from tests.support.worker_fleet import config_of, open_fleet, saved_model

ROGUE = ("env.name=tests.support.faulty_envs:Threaded", "run.deterministic=false")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def fleet_of(model: str, tmp_path: Path):
    opened: list[Fleet] = []

    def open_(*changes: str, name: str = "run", on_start=None) -> Fleet:
        opened.append(open_fleet(model, tmp_path / name, *changes, on_start=on_start))
        return opened[-1]

    yield open_
    for fleet in opened:
        fleet.close()


def play(player, names: list[str], size: int = 4, *, first: int = 10):
    return player.collect(
        [Task(name, "train", {"index": index}) for index, name in enumerate(names)],
        size,
        run_seed=3,
        step=2,
        first_group_id=first,
    )


def episodes(groups: list[Group]) -> dict:
    return {
        (t.group, t.sibling): (t.id, t.status, t.reward, [(turn.prompt_ids, turn.token_ids) for turn in t.turns])
        for g in groups
        for t in g.trajectories
    }


def in_process(model: str, folder: Path, *changes: str):
    """What the fleet must agree with: one engine and collector in this process."""
    config = config_of(folder, *changes)
    encoder = ChatEncoder(load_tokenizer(model))
    encoder.verify()
    return make_collector(
        config,
        make_engine(config, model, device="cpu"),
        encoder,
        make_pool(config, make_environment(config)),
        sampling=(1.0, 1.0),
    )


def test_workers_play_what_one_process_plays_and_repeat_themselves_bit_by_bit(fleet_of, model: str, tmp_path: Path):
    names = [f"fetch-{i}" for i in range(6)]
    here = play(in_process(model, tmp_path), names)
    first = fleet_of(name="a").collector(1.0, 1.0)
    played = play(first, names)
    assert episodes(played) == episodes(here) and [g.id for g in played] == [g.id for g in here]
    for mine, theirs in zip(here, played, strict=True):
        for a, b in zip(mine.trajectories, theirs.trajectories, strict=True):
            for x, y in zip(a.turns, b.turns, strict=True):
                assert x.logprobs == pytest.approx(y.logprobs, abs=1e-5)
    assert play(fleet_of(name="b").collector(1.0, 1.0), names) == played, (
        "log-probabilities are the same to the last bit"
    )
    assert first.measures["sampled_tokens"] == sum(
        len(turn.token_ids) for g in played for t in g.trajectories for turn in t.turns
    )
    assert first.measures["engine_seconds"] > 0 and first.measures["rollout/worker_deaths"] == 0


def send_weights(receiver, source: str, version: int, folder: Path) -> None:
    """What the bridge does, without its checks."""
    path = folder / f"bucket-{receiver.index}.safetensors"
    save_file({name: value.detach().clone() for name, value in load_model(source).named_parameters()}, path)
    receiver.pause(10.0)
    receiver.begin({"version": version, "transport": "shared_memory"}, 10.0)
    assert receiver.take({"path": str(path)}, 10.0)
    receiver.finish(version, 10.0)
    receiver.resume(10.0)


def test_a_worker_killed_in_mid_episode_costs_nothing(
    fleet_of, model: str, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
):
    gate = Gate(tmp_path / "gate")
    gate.shut()
    fleet = fleet_of(
        *ROGUE,
        f"env.options.gate={gate.folder}",
        on_start=lambda receiver: send_weights(receiver, model, fleet.version, tmp_path),
    )
    fleet.announce(1)
    fleet.poll()
    names = ["fine-0", "fine-1", "fine-2"]
    wanted = episodes(play(in_process(model, tmp_path, *ROGUE[:1]), names))
    monkeypatch.setattr(
        socket, "gethostname", lambda: "elsewhere"
    )  # replacements seem to be on another machine: their weights travel with the message
    collector, victim = fleet.collector(1.0, 1.0), next(iter(fleet))
    with killed_in_mid_episode(fleet, gate, lambda: os.kill(victim.pid, signal.SIGKILL), deaths=1):
        groups = play(collector, names)
    measures = collector.measures
    assert (
        measures["rollout/worker_deaths"] == 1
        and 1 <= measures["rollout/reissued"] <= 12
        and measures["rollout/stale"] == 0
    )
    played = episodes(groups)
    assert played.keys() == wanted.keys() and played == wanted, "none lost, none twice, and the same seeds"
    assert {turn.min_version for g in groups for t in g.trajectories for turn in t.turns} == {1}
    assert "signal SIGKILL" in capfd.readouterr().err
    until(lambda: len(list(fleet)) == 2, "the replacement is up")
    fleet.poll()
    pids = [worker.pid for worker in fleet]
    assert victim.pid not in pids
    with killed_in_mid_episode(
        fleet, gate, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids], deaths=2
    ):  # once more, all at once
        again = play(collector, names)
    assert episodes(again) == wanted
    assert collector.measures["rollout/worker_deaths"] == 2 and collector.measures["rollout/stale"] == 0


def test_what_an_environment_does_to_its_worker(fleet_of, tmp_path: Path, capfd):
    deadlines = ("rollout.reply_deadline_s=6", "rollout.env_deadline_s=6", "rollout.worker_restarts=3")
    fleet = fleet_of(
        "env.name=tests.support.faulty_envs:Inline",
        f"env.options.marks={tmp_path}",
        "run.deterministic=false",
        *deadlines,
    )
    collector = fleet.collector(1.0, 1.0)
    with pytest.raises(ContractError, match="the rule was broken") as broken:
        play(collector, ["fine-0", "contract-0"], 1)
    assert broken.value.hint == "mend it"
    groups = play(collector, ["fine-0", "raise-0"], 2)
    assert [t.status for g in groups for t in g.trajectories] == [Status.SUCCESS] * 2 + [Status.ENV_ERROR] * 2
    assert "the shelf fell down" in groups[1].trajectories[0].error
    groups = play(collector, ["fine-0", "hang-once", "exit-once", "crash-once"], 2)
    assert [t.status for g in groups for t in g.trajectories] == [Status.SUCCESS] * 8
    told = capfd.readouterr().err
    assert collector.measures["rollout/worker_deaths"] == 3
    assert all(reason in told for reason in ("its event loop stood still", "exit code 3", "signal SIGSEGV"))
    with pytest.raises(
        WorkerError, match=r"worker_restarts=3 replacements are used up; .*exit code 3; the end of .*worker-\d.log"
    ) as caught:
        play(collector, ["exit-0"], 1)
    assert caught.value.exit_code == 6 and caught.value.where in ("worker 0 (local)", "worker 1 (local)")


def test_a_worker_that_cannot_be_built_says_why(fleet_of):
    with pytest.raises(ConfigError, match="not even one sequence|rollout.cache_mib"):
        fleet_of("rollout.workers=1", "rollout.cache_mib=1", "rollout.context_tokens=4000")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_trainer(model: str, how: signal.Signals):
    gate = Gate(Path(model).parent / "gate")
    gate.shut()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.worker_fleet", str(Path(model).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2 and not any(map(gone, pids))
    gate.reached_by(pids)
    process.send_signal(how)
    _, errors = process.communicate(timeout=LIMIT_S)
    wait_gone(pids)
    assert process.returncode == -how and (how is signal.SIGKILL or "KeyboardInterrupt" in errors)
