"""Math through the real path: cold start from the expert, code in the jail, GRPO+SPEAR with the tool bonus; twice."""

from __future__ import annotations

import json

import pytest

from spearrl.config import load_config
from spearrl.envs.math import Math
from spearrl.envs.pool import open_pool
from spearrl.errors import ConfigError
from spearrl.sandbox import SandboxOptions, open_sandbox
from spearrl.trainer import Trainer
from tests.support.small_run import SETTINGS, fingerprint

CHANGES = (
    "env.name=math",
    "rollout.context_tokens=384",
    "rollout.max_reply_tokens=32",
    "model.tiny.layers=1",
    "sft.episodes=64",
    "sft.epochs=1",
    "run.steps=1",
    "rollout.groups_per_step=2",
    "eval.tasks=4",
    "eval.attempts=4",
    "eval.every=1",
)


def test_no_more_threads_than_the_sandbox_lets_in():
    """Of 32 threads most would wait for a turn in the sandbox, and their steps' deadlines run out.

    Each replaced worker brings the end of the run nearer.
    """
    sandbox = {"kind": "none", "unsandboxed": True, "packages": [], "concurrency": 3}
    environment = Math(grader="plain", sandbox=sandbox)
    for workers, threads in ((0, 3), (5, 5)):
        pool = open_pool(environment.spawn(), style="chat", workers=workers)
        assert pool.count == threads
        pool.close()


def trained(folder, name: str) -> Trainer:
    trainer = Trainer(
        load_config(None, [*SETTINGS, *CHANGES, f"run.output_dir={folder}", f"run.name={name}"], preset="tiny-math")
    )
    try:
        trainer.train()
    finally:
        trainer.close()
    return trainer


def test_a_run_trains_and_repeats_itself(tmp_path):
    try:
        open_sandbox(SandboxOptions(packages=())).close()
    except ConfigError as reason:
        pytest.skip(f"no isolation here: {reason.message}")
    first, again = trained(tmp_path, "first"), trained(tmp_path, "again")
    assert fingerprint(first.parts.model) == fingerprint(again.parts.model)
    lines = [json.loads(line) for line in (first.run.path / "events.jsonl").read_text().splitlines()]
    expert, step, last = ([line for line in lines if line["event"] == kind][-1] for kind in ("expert", "step", "eval"))
    assert expert["success"] > 0.4  # its code ran in the jail, and what it printed was boxed
    assert step["rollout/tool_calls"] > 0 and step["mu"] > 0 and step["env/restarts"] == 0 == step["rollout/errors"]
    assert step["rollout/reward"] == pytest.approx(
        2 * step["rollout/success"] - 1
    )  # right or wrong; the bonus is no part of it
    assert last["reward"] == pytest.approx(2 * last["success"] - 1) and last["errors"] == 0
