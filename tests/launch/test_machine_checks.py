"""Settings of engines, workers and learner processes that contradict each other are refused; the named fix helps."""

from __future__ import annotations

import re

import pytest

from spearrl.config import advice, load_config, resolve
from spearrl.errors import ConfigError

WRONG = {
    "ahead in one process": ["rollout.max_staleness=1"],
    "ahead and dynamic": ["rollout.max_staleness=1", "rollout.workers=1", "algo.dynamic.enabled=true"],
    "ahead and taking turns": ["rollout.max_staleness=1", "rollout.workers=1", "placement.mode=colocated"],
    "ray without workers": ["rollout.launcher=ray"],
    "more workers than servers": ["rollout.engine=vllm", "rollout.workers=2", "vllm.servers=http://a:8000"],
    "fewer workers than servers": ["rollout.engine=vllm", "vllm.servers=http://a:8000,http://b:8000"],
    "servers of no engine": ["vllm.servers=http://a:8000"],
    "a transport of another engine": ["sync.transport=nccl"],
    "processes of the local learner": ["learner.processes=2"],
    "offload of the local learner": ["learner.offload=optimizer"],
    "offload of what is not sharded": ["learner.backend=deepspeed", "learner.zero_stage=1", "learner.offload=all"],
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_contradictions_are_refused_and_the_fix_helps(changes):
    with pytest.raises(ConfigError) as caught:
        load_config(None, changes, preset="tiny")
    fixes = re.findall(r"fix: use ([a-z_.]+=[a-z0-9_]+)", str(caught.value))
    assert fixes, caught.value
    key = fixes[0].partition("=")[0]
    load_config(None, [c for c in changes if not c.startswith(key)] + [fixes[0]], preset="tiny")


def test_a_server_is_named_by_its_address():
    with pytest.raises(ConfigError, match="'foo' is no address"):
        load_config(None, ["rollout.engine=vllm", "vllm.servers=foo"], preset="tiny")


def test_generation_ahead_is_corrected_for_unless_told_otherwise():
    ahead = ["rollout.max_staleness=2", "rollout.workers=1"]
    resolved = resolve(None, ahead, preset="tiny")
    assert resolved.config.algo.correction.mode == "tis"
    assert resolved.sources["algo.correction.mode"] == "rollout.max_staleness=2"
    assert load_config(None, ahead, preset="tiny", algo="grpo+spear+mis").algo.correction.mode == "mis"
    uncorrected = load_config(None, [*ahead, "algo.correction.mode=none"], preset="tiny")
    assert uncorrected.algo.correction.mode == "none"
    assert any("old samples count as fresh" in str(problem) for problem in advice(uncorrected))
    assert load_config(None, [], preset="tiny").algo.correction.mode == "none"


def test_a_number_that_is_no_choice_is_refused_in_words():
    with pytest.raises(
        ConfigError,
        match=r"learner.zero_stage = 4 does not fit; expected one of 0, 1, 2, 3\n  fix: use one of 0, 1, 2, 3",
    ):
        load_config(None, ["learner.zero_stage=4"], preset="tiny")
