"""A whole run over a Ray cluster of two nodes, with a learner of two processes: what the two-machine example does, on
one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytest.importorskip("deepspeed")

ROOT = Path(__file__).resolve().parents[2]
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}  # a worker takes a CPU: two of them need both nodes
SETTINGS = [
    "rollout.launcher=ray",
    "rollout.workers=2",
    "learner.backend=deepspeed",
    "learner.processes=2",
    "learner.precision=fp32",
    "run.steps=2",
]
SHORT = [
    "sft.episodes=100",
    "sft.epochs=1",
    "eval.tasks=4",
    "eval.every=0",
    "rollout.groups_per_step=4",
    "rollout.group_size=4",
    "run.threads=1",
]


def test_ray_places_the_workers_and_two_ranks_learn(tmp_path: Path):
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        nodes.add_node(**NODE)
        command = [
            sys.executable,
            "-m",
            "spearrl",
            "train",
            "--env",
            "webshop",
            "--algo",
            "grpo+spear",
            f"run.output_dir={tmp_path}",
            "run.name=two",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": nodes.address}
        done = subprocess.run(
            [*command, *SHORT, *SETTINGS], cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment
        )
    finally:
        nodes.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    logged = [json.loads(line) for line in (tmp_path / "two" / "events.jsonl").read_text().splitlines()]
    steps = [event for event in logged if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2]
    for event in steps:
        assert (
            event["policy/updates"] + event["policy/without_signal"] >= 1
            and event["policy/sampler_gap_max"] <= 1e-4
            and event["sync/probe_gap"] <= 1e-4
        )
