"""Rollout workers as Ray actors, on a cluster of two nodes in this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("ray")

from spearrl.errors import ConfigError  # noqa: E402
from spearrl.launch import ray as launching  # noqa: E402
from spearrl.rollout.workers.fleet import Fleet  # noqa: E402
from spearrl.rollout.workers.messages import Start  # noqa: E402
from tests.rollout.test_fleet import episodes, in_process, play, send_weights  # noqa: E402
from tests.support.gates import Gate, killed_in_mid_episode, until, wait_gone  # noqa: E402
from tests.support.worker_fleet import config_of, saved_model  # noqa: E402

ROGUE = ("env.name=tests.support.faulty_envs:Threaded", "run.deterministic=false", "rollout.launcher=ray")
NAMES = ["fine-0", "fine-1", "fine-2"]
NODE = {"num_cpus": 2, "object_store_memory": 80_000_000}


@pytest.fixture(scope="module")
def cluster():
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    nodes.add_node(**NODE)
    os.environ["RAY_ADDRESS"] = nodes.address
    yield nodes
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("ray"))


def test_an_address_without_a_cluster_is_an_error_at_once(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ray itself, which tries for minutes and then ends the process, is not even asked."""
    import ray

    monkeypatch.setattr(ray, "init", lambda **settings: pytest.fail("Ray was asked"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="no Ray cluster answers at 127.0.0.1:1"):
        launching.actors(Start(config_of(tmp_path, *ROGUE), model), tmp_path)


def raylets(fleet: Fleet) -> set[str]:
    """The node processes whose children the workers are."""
    return {Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[1] for worker in fleet}


def test_what_the_cluster_lacks_is_named(cluster, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launching, "RESOURCES_S", 0.5)
    with pytest.raises(
        ConfigError, match=r"rollout.workers=2 needs 4 GPU \(it has 0\) of a Ray cluster of \d machines"
    ):
        launching.actors(Start(config_of(tmp_path, *ROGUE), model), tmp_path, gpus=2)


def test_a_worker_that_cannot_be_built_says_why(cluster, model: str, tmp_path: Path):
    config = config_of(tmp_path, "rollout.workers=1", "rollout.cache_mib=1", "rollout.context_tokens=4000")
    with pytest.raises(ConfigError, match="rollout.cache_mib is 1"):
        Fleet(config, launching.actors(Start(config, model), tmp_path))


def test_workers_land_on_different_nodes_and_a_dead_nodes_episodes_are_played_again(
    cluster, model: str, tmp_path: Path
):
    gate = Gate(tmp_path / "gate")
    config = config_of(tmp_path, *ROGUE, f"env.options.gate={gate.folder}")
    gate.folder.mkdir()
    wanted = episodes(play(in_process(model, tmp_path, *ROGUE[:1]), NAMES))
    fleet = Fleet(
        config,
        launching.actors(Start(config, model), tmp_path),
        on_start=lambda receiver: send_weights(receiver, model, fleet.version, tmp_path),
    )
    try:
        fleet.announce(1)
        collector = fleet.collector(1.0, 1.0)
        assert episodes(play(collector, NAMES)) == wanted
        assert len(raylets(fleet)) == 2 and (tmp_path / "worker-0.log").is_file()
        (victim,) = cluster.worker_nodes
        with killed_in_mid_episode(fleet, gate, lambda: cluster.remove_node(victim, allow_graceful=False), deaths=1):
            groups = play(collector, NAMES)
        assert episodes(groups) == wanted, "none lost, none twice, and the same seeds"
        assert collector.measures["rollout/worker_deaths"] == 1 and collector.measures["rollout/reissued"] >= 1
        assert {turn.min_version for g in groups for t in g.trajectories for turn in t.turns} == {1}
        until(lambda: len(list(fleet)) == 2, "the replacement is up, on the node that is left")
        assert len(raylets(fleet)) == 1
        pids = [worker.pid for worker in fleet]
    finally:
        fleet.close()
    wait_gone(pids)
