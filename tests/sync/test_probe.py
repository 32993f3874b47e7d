"""The probe against a real model in half precision: its rounding passes, and every planted fault is caught although all
bytes arrived."""

from __future__ import annotations

import copy

import pytest
import torch

from spearrl.config.sections import LearnerSection, SyncSection, TinySection
from spearrl.errors import EngineError
from spearrl.learner import LocalLearner
from spearrl.models import build_tiny
from spearrl.sync import Bridge
from spearrl.sync import buckets as weights
from spearrl.sync.probe import LOW

SHAPE = TinySection(layers=4, hidden_size=64, heads=2, feed_forward=96, vocab_size=360)
CORPUS = ["find a soft red lamp , under $60", "search [ red lamp ]", "click [ buy now ]"] * 5


class Engine:
    """A copy of the model in bfloat16. `fault` changes it after a load, when all digests are right."""

    name, transports, shards = "engine", ("shared_memory",), 1

    def __init__(self, model):
        self.model, self.fault = copy.deepcopy(model).bfloat16(), lambda engine, before: None

    def pause(self, timeout_s): ...

    def begin(self, plan, timeout_s):
        self.before = copy.deepcopy(self.model.state_dict())

    def take(self, bucket, timeout_s):
        tensors = weights.read_bucket(bucket["path"])
        self.model.load_state_dict(tensors, strict=False)
        return {name: weights.digest(tensor) for name, tensor in tensors.items()}

    def finish(self, version, timeout_s):
        self.fault(self, self.before)
        return []

    def resume(self, timeout_s): ...

    def probe(self, token_ids, timeout_s):
        ids = torch.tensor([token_ids])
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()


def nothing_loaded(engine, before):
    engine.model.load_state_dict(before)


def layers_swapped(engine, before):
    layers = engine.model.model.layers
    layers[1], layers[2] = layers[2], layers[1]


def stale_head(engine, before):
    head = engine.model.lm_head
    head.weight = torch.nn.Parameter(before["lm_head.weight"].clone())


def half_an_update(engine, before):
    first_layers = {name: tensor for name, tensor in before.items() if "layers.0" in name or "layers.1" in name}
    engine.model.load_state_dict(first_layers, strict=False)


def grow(model, factor):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else factor)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A learner whose rounding in bfloat16 is larger than what is never a fault, its engine and their bridge."""
    monkeypatch.setattr(weights, "SHARED_MEMORY", tmp_path)
    model, tokenizer = build_tiny(CORPUS, SHAPE, seed=1)
    grow(model, 6)
    learner, engine = LocalLearner(model, LearnerSection(precision="fp32")), Engine(model)
    ids = tokenizer.encode(" ".join(CORPUS[:3]))[:32]
    bridge = Bridge(
        learner,
        [engine],
        settings=SyncSection(),
        probe_ids=ids,
        run_folder=tmp_path,
        dtype=torch.bfloat16,
        float32=False,
        report=lambda text: None,
    )
    yield learner, engine, bridge
    bridge.close()


def update(learner, size=0.4):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(size * parameter.abs().mean() * torch.randn_like(parameter))


def test_rounding_is_measured_on_the_learner_and_passes(parts):
    learner, _, bridge = parts
    metrics = bridge.publish(0)
    assert LOW < metrics["sync/probe_gap"] <= metrics["sync/probe_bound"]
    assert metrics["sync/probe_bound"] == pytest.approx(4 * metrics["sync/probe_rounding"])
    update(learner)
    assert bridge.publish(1)["sync/resent"] == 0


@pytest.mark.parametrize("fault", [nothing_loaded, layers_swapped, stale_head, half_an_update])
def test_planted_faults_are_caught(parts, fault):
    learner, engine, bridge = parts
    bridge.publish(0)
    engine.fault = fault
    update(learner)
    with pytest.raises(EngineError, match="the probe's log-probabilities differ|answers the probe as before"):
        bridge.publish(1)


def test_the_bound_follows_a_learner_that_rounds_more(parts):
    learner, _, bridge = parts
    grow(learner.model, 1 / 6)
    first = bridge.publish(0)
    assert first["sync/probe_bound"] == LOW
    grow(learner.model, 6)
    later = bridge.publish(1)
    assert LOW < later["sync/probe_gap"] <= later["sync/probe_bound"] and later["sync/resent"] == 0
