"""What a pretrained model gets on processors: a type to sample in, measured, and steps of a bounded size."""

from __future__ import annotations

import pytest
import torch

from spearrl.config import load_config
from spearrl.launch import processors
from spearrl.models import copy_of, load_model
from spearrl.models.cpu_dtype import DtypeSpeed
from spearrl.rollout.local import LocalEngine
from tests.support.short_runs import assert_sound, events, from_model, resumed, run, stopped
from tests.support.small_run import fingerprint

FAST, SLOW = DtypeSpeed(torch.bfloat16, 50.0, 200.0), DtypeSpeed(torch.float32, 50.0, 9.0)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch):
    """Every model counts as large, on a processor with bfloat16."""
    monkeypatch.setattr(processors, "SMALL", 0)
    monkeypatch.setattr(processors, "_measured", lambda shapes: FAST)


def silent(*_) -> None: ...


def test_small_models_stay_as_they_are(model, tmp_path, monkeypatch):
    monkeypatch.setattr(processors, "_measured", lambda shapes: FAST)
    config = from_model(model, tmp_path)
    assert processors.with_sampling_dtype(config, silent) == config and config.rollout.dtype == "auto"
    assert processors.sizes(config, {"rollout.slots"}) == {}
    assert processors.sizes(load_config(preset="tiny"), {"rollout.slots"}) == {}


@pytest.mark.parametrize(("speed", "dtype"), [(FAST, "bf16"), (SLOW, "fp32")])
def test_the_type_is_what_was_measured_faster_and_is_said_with_figures(
    model, tmp_path, large, monkeypatch, speed, dtype
):
    monkeypatch.setattr(processors, "_measured", lambda shapes: speed)
    said = []
    config = processors.with_sampling_dtype(from_model(model, tmp_path), lambda kind, values: said.append(values))
    assert config.rollout.dtype == dtype
    assert "50 GFLOP/s in float32" in said[0]["text"] and len(said) == 1
    assert processors.with_sampling_dtype(config, silent) is config
    fixed = from_model(model, tmp_path, "rollout.dtype=fp32")
    assert processors.with_sampling_dtype(fixed, silent) is fixed


@pytest.mark.parametrize(
    ("held", "settings", "expected"),
    [
        ("bfloat16", [], "float32"),
        ("float32", [], "auto"),  # nothing to decide: the directory's
        ("bfloat16", ["learner.precision=bf16"], "auto"),
        ("bfloat16", ["vllm.dtype=bfloat16"], "bfloat16"),
    ],
)
def test_vllm_keeps_half_precision_only_where_the_processor_is_fast_in_it(
    model, tmp_path, large, monkeypatch, held, settings, expected
):
    monkeypatch.setattr(processors, "_measured", lambda shapes: SLOW)
    monkeypatch.setattr(processors, "model_dtype", lambda folder: held)
    said = []
    config = from_model(model, tmp_path, "rollout.engine=vllm", "learner.precision=auto", *settings)
    config = processors.with_sampling_dtype(config, lambda kind, values: said.append(values["text"]))
    assert config.vllm.dtype == expected and config.rollout.dtype == "auto"
    figures = "50 GFLOP/s in float32, 9 in bfloat16); vllm.dtype=float32 or bfloat16 fixes it"
    assert [figures in text for text in said] == [True] * (expected == "float32")


def test_sizes_follow_speed_and_parameters_and_only_where_nobody_set_them(model, tmp_path, large, monkeypatch):
    config = from_model(model, tmp_path, "learner.precision=bf16", "run.threads=2")
    monkeypatch.setattr(processors, "parameters_of", lambda folder: 135_000_000)
    values = processors.sizes(config, {"rollout.context_tokens", "rollout.max_reply_tokens", "eval.every"})
    # 100 s x 2 cores x 200 GFLOP/s x 0.25 / (8 x 135 M) = 9259 tokens, 1157 for each of 8 episodes
    assert values == {"rollout.context_tokens": 1024, "rollout.max_reply_tokens": 48, "eval.every": 0}
    monkeypatch.setattr(processors, "_measured", lambda shapes: DtypeSpeed(torch.bfloat16, 50.0, 400.0))
    assert processors.sizes(config, {"rollout.context_tokens"}) == {"rollout.context_tokens": 2048}


def test_a_copy_in_another_type_keeps_buffers_and_ties(model):
    original = load_model(str(model))
    copied = copy_of(original, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in copied.parameters())
    assert all(buffer.dtype != torch.bfloat16 for buffer in copied.buffers())
    assert len(list(copied.parameters())) == len(list(original.parameters()))
    assert all(parameter.dtype == torch.float32 for parameter in original.parameters())


def test_a_run_samples_in_bf16_from_the_learners_weights_and_goes_on_so(model, tmp_path, large):
    """Recomputed log-probabilities carry the ratio; TIS corrects for the rest."""

    def config(name: str):
        return from_model(model, tmp_path, name=name, algo="grpo+spear+tis")

    whole = run(config("whole"))
    assert whole.config.rollout.dtype == "bf16" and 'dtype = "bf16"' in (whole.run.path / "config.toml").read_text()
    engine = whole.parts.players.engine
    assert isinstance(engine, LocalEngine) and engine.model is not whole.parts.model
    trained = dict(whole.parts.model.named_parameters())
    for name, parameter in engine.model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, trained[name].bfloat16()), name
    assert_sound(whole)
    gaps = [step["policy/sampler_gap"] for step in events(whole, "step")]
    assert all(0 < gap < 0.05 for gap in gaps), gaps
    again = resumed(stopped(config("halves"), after=1))
    assert again.config.rollout.dtype == "bf16"
    assert fingerprint(again.parts.model) == fingerprint(whole.parts.model)


def test_an_engine_refuses_weights_of_another_model(model, tmp_path):
    from spearrl.errors import EngineError

    engine = LocalEngine(load_model(str(model)), slots=1, cache_mib=8, context_tokens=64)
    with pytest.raises(EngineError, match="does not belong"):
        engine.load([("model.norm.weight", torch.zeros(3))])
