"""Models of every family through the whole path: trained, saved, resumed, sent to engines; or refused at the start."""

from __future__ import annotations

import pytest
import torch

from spearrl.config.sections import LearnerSection, SyncSection
from spearrl.errors import ConfigError
from spearrl.learner import LocalLearner
from spearrl.losses import Objective
from spearrl.models import load_model
from spearrl.rollout.local.receiver import LocalWeights
from spearrl.sync import Bridge
from spearrl.sync import bridge as bridge_module
from tests.batching.test_rows import make_rows
from tests.learner.test_learner import RUNS, batch_of
from tests.learner.test_learner import settings as learner_settings
from tests.rollout.test_local_engine import assert_matches, engine_of
from tests.support.engine_requests import requests, serve
from tests.support.families import FAMILIES, LINEAR_FAMILIES, build_family, family_directory
from tests.support.short_runs import assert_sound, events, from_model, run, stopped_and_resumed, whole_fingerprint
from tests.support.small_run import fingerprint

PLAYED = [name for name in FAMILIES if name not in LINEAR_FAMILIES]
# The entropy term gives every row a gradient: groups of an untrained model all earn the same.
SIGNAL = "algo.policy.entropy_coef=0.01"
SHORT = ("run.steps=2", "run.checkpoint_every=1", "rollout.groups_per_step=2", "eval.tasks=1", SIGNAL)


@pytest.mark.parametrize("name", PLAYED)
def test_a_run_stopped_and_resumed_ends_as_one_that_was_not(name: str, tmp_path):
    folder = family_directory(name, tmp_path / "model")
    whole = run(from_model(folder, tmp_path, *SHORT, name="whole"))
    assert_sound(whole)
    assert all(event["policy/sampler_gap_max"] <= 1e-4 for event in events(whole, "step"))
    again = stopped_and_resumed(from_model(folder, tmp_path, *SHORT, name="parts"), 1)
    assert whole_fingerprint(again) == whole_fingerprint(whole)
    exported = load_model(str(next(again.run.checkpoints.glob("step-000002"))))
    assert fingerprint(exported) == fingerprint(whole.parts.model) != fingerprint(load_model(str(folder)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_learner_saved_and_loaded_goes_on_alike(name: str, tmp_path):
    first, other = (LocalLearner(build_family(name, seed)[0], learner_settings()) for seed in (0, 1))
    batch = batch_of(make_rows(RUNS), first, shift=0.2)
    first.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=0)
    first.save(tmp_path)
    other.load(tmp_path)
    assert fingerprint(other.model) == fingerprint(first.model) == fingerprint(load_model(str(tmp_path)))
    for learner in (first, other):
        learner.update(batch, None, gamma=0.0, objectives=[Objective("policy")], seed=1)
    assert fingerprint(other.model) == fingerprint(first.model) and first.steps == other.steps == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_has_the_log_probabilities_of_a_plain_forward_whatever_it_is_padded_with(name: str):
    model, rows = build_family(name)[0], make_rows(RUNS)
    found = LocalLearner(model, learner_settings()).logprobs(rows)
    for index in range(len(rows)):
        row = rows.select(torch.tensor([index]))
        with torch.no_grad():
            expected = model(input_ids=row.token_ids[None]).logits[0, :-1].log_softmax(-1)
        expected = expected.gather(1, row.token_ids[1:, None])[:, 0]
        mask = row.action_mask[1:]
        torch.testing.assert_close(found[index, 1 : len(row.token_ids)][mask], expected[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PLAYED)
def test_the_engine_samples_what_the_model_says(name: str):
    """Requests that share beginnings, longer than a sliding window, turns that go on from a cache."""
    model = build_family(name)[0]
    sampled = requests(temperature=0.7)
    for request, completion in zip(sampled, serve(engine_of(model), *sampled), strict=True):
        assert_matches(model, request, completion)


@pytest.mark.parametrize("name", PLAYED)
def test_engines_with_models_of_their_own_get_the_learners_weights(name: str, tmp_path, monkeypatch):
    """Buckets so small that the experts of a layer come in several."""
    monkeypatch.setattr(bridge_module, "MIB", 1 << 12)
    folder = family_directory(name, tmp_path / "model")
    learner = LocalLearner(load_model(str(folder)), LearnerSection(precision="fp32"))
    receivers = [LocalWeights(engine_of(load_model(str(folder))), f"worker {i}") for i in range(2)]
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    settings = SyncSection(timeout_s=20, bucket_mib=1)
    bridge = Bridge(learner, receivers, settings=settings, probe_ids=list(range(1, 40)), run_folder=tmp_path / "run")
    try:
        metrics = bridge.publish(1)
    finally:
        bridge.close()
    assert metrics["sync/buckets"] > 3 and metrics["sync/resent"] == 0 and metrics["sync/probe_gap"] <= 1e-5
    assert all(fingerprint(receiver.engine.model) == fingerprint(learner.model) for receiver in receivers)


@pytest.mark.parametrize("name", LINEAR_FAMILIES)
def test_layers_that_the_engine_does_not_run_are_refused_before_anything_is_written(name: str, tmp_path):
    folder = family_directory(name, tmp_path / "model")
    (folder / "model.safetensors").unlink()  # so that loading the weights would say something else
    with pytest.raises(ConfigError, match="linear_attention, which the local engine does not run") as refusal:
        run(from_model(folder, tmp_path / "runs"))
    assert "rollout.engine=vllm" in refusal.value.hint and not (tmp_path / "runs").exists()
