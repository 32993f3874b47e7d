"""Adapters: what they train, what they leave alone, and that a run with them can be saved, resumed, exported and
sampled from.
"""

from __future__ import annotations

import json
import math
import sys
import warnings

import pytest
import torch

from spearrl.batching import Batch
from spearrl.config.sections import LoraSection
from spearrl.errors import CheckpointError, ConfigError
from spearrl.learner import LocalLearner
from spearrl.losses import Objective
from spearrl.models import load_model
from spearrl.trainer import Trainer
from tests.batching.test_rows import make_rows
from tests.learner.test_learner import RUNS, batch_of, settings, tiny
from tests.learner.test_packing import model_of
from tests.support.families import FAMILIES, build_family, family_directory
from tests.support.short_runs import from_model, run, stopped_and_resumed
from tests.support.small_run import fingerprint

peft = pytest.importorskip("peft")

POLICY = [Objective("policy")]
LINEAR = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def adapted(
    model: torch.nn.Module | None = None, *, rank: int = 4, targets: str = "", seed: int = 7, **changes
) -> LocalLearner:
    options = settings(**{"lr": 0.03, "lora": LoraSection(rank=rank, alpha=8.0, targets=targets), **changes})
    return LocalLearner(tiny() if model is None else model, options, temperature=0.7, seed=seed)


def updated(learner: LocalLearner, times: int = 3, objectives=POLICY) -> LocalLearner:
    batch = anchored(learner)
    for seed in range(times):
        learner.update(batch, None, gamma=0.0, objectives=objectives, seed=seed)
    return learner


def anchored(learner: LocalLearner) -> Batch:
    """A batch with the reference's log-probabilities."""
    batch = batch_of(make_rows(RUNS), learner, shift=0.2)
    batch.ref_logprobs = learner.logprobs(batch.rows, reference=True)
    return batch


def adapters(learner: LocalLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.adapter_parameters()}


def test_adapters_change_nothing_until_they_are_trained():
    rows = make_rows(RUNS)
    plain = LocalLearner(tiny(), settings(), temperature=0.7)
    learner = adapted()
    assert type(learner.model) is type(plain.model)
    assert torch.equal(learner.logprobs(rows), plain.logprobs(rows))
    names = {name.split(".")[-3] for name, _ in learner.adapter_parameters()}
    assert names == set(LINEAR) and not any(
        "lm_head" in name or "embed" in name for name, _ in learner.adapter_parameters()
    )


def test_only_adapters_are_trained():
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    learner = updated(adapted(model))
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if ".lora_" not in name}
    assert set(after) == set(before) and all(torch.equal(before[name], after[name]) for name in before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    held = sum(p.numel() for group in learner.optimizer.param_groups for p in group["params"])
    assert held == sum(tensor.numel() for tensor in adapters(learner).values())
    assert all(float(tensor.abs().max()) > 0 for tensor in adapters(learner).values()), "B stayed 0 somewhere"


def test_the_first_weights_follow_the_seed_alone():
    torch.manual_seed(1)
    one = adapters(adapted(seed=5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = adapters(adapted(seed=5)), adapters(adapted(seed=6))
    torch.random.set_rng_state(state)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) == ("lora_B" in name) for name in one)


def test_loss_falls():
    learner = adapted(rank=2, lr=0.05)
    batch = batch_of(make_rows(RUNS), learner)
    losses = [
        learner.update(batch, None, gamma=0.0, objectives=[Objective("sft")], seed=seed).metrics["sft/loss"]
        for seed in range(10)
    ]
    assert losses[-1] < losses[0] - 0.1 and all(math.isfinite(loss) for loss in losses)


def test_the_model_without_adapters_is_the_reference():
    rows = make_rows(RUNS)
    start = LocalLearner(tiny(), settings(), temperature=0.7).logprobs(rows)
    learner = updated(adapted())
    trained = learner.logprobs(rows)
    assert torch.equal(learner.logprobs(rows, reference=True), start)
    assert torch.equal(learner.logprobs(rows), trained) and not torch.allclose(trained, start, atol=1e-3)
    updated(learner, 1, [Objective("policy"), Objective("kl", weight=0.1)])
    assert not torch.equal(learner.logprobs(rows), trained), "adapters are trained again after the reference was asked"


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_the_adapted_model(tied, tmp_path):
    rows = make_rows(RUNS)
    learner = updated(adapted(tiny(tied=tied)))
    frozen = {name: p.clone() for name, p in learner.model.named_parameters()}
    plain = tiny(tied=tied, seed=3)
    merged = dict(learner.full_parameters())
    assert set(merged) == {name for name, _ in plain.named_parameters()}
    plain.load_state_dict(merged, strict=tied is False)
    plain.tie_weights()
    difference = LocalLearner(plain, settings(), temperature=0.7).logprobs(rows) - learner.logprobs(rows)
    assert 0 < float(difference.abs().max()) <= 1e-5
    assert all(torch.equal(frozen[name], p) for name, p in learner.model.named_parameters()), (
        "merging changed the model"
    )
    learner.save(tmp_path)
    saved = load_model(str(tmp_path))
    assert type(saved) is type(plain) and not any("lora" in name for name, _ in saved.named_parameters())
    assert all(torch.equal(p, merged[name]) for name, p in saved.named_parameters())


def test_bf16_weights_are_merged_in_float32():
    learner = updated(adapted(tiny().bfloat16(), targets="q_proj"))
    name = "model.layers.0.self_attn.q_proj.weight"
    layer = learner.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = layer.base_layer.weight.double() + 2.0 * (b.double() @ a.double())  # alpha / rank
    merged = dict(learner.full_parameters())[name]
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.float().bfloat16())


def test_saved_adapters_are_pefts(tmp_path):
    rows = make_rows(RUNS)
    learner = updated(adapted(targets="q_proj, v_proj"))
    learner.save(tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"], sorted(config["target_modules"])) == (
        4,
        8.0,
        "LORA",
        ["q_proj", "v_proj"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    logprobs = LocalLearner(loaded.merge_and_unload().requires_grad_(True), settings(), temperature=0.7).logprobs(rows)
    assert float((logprobs - learner.logprobs(rows)).abs().max()) <= 1e-5


def test_save_and_resume_are_bit_exact(tmp_path):
    rows, kinds = make_rows(RUNS), [Objective("policy"), Objective("kl", weight=0.1)]
    learner = updated(adapted(), objectives=kinds)
    learner.save(tmp_path)
    other = adapted(seed=99)
    other.load(tmp_path)
    assert other.steps == learner.steps
    batch = anchored(learner)
    for each in (learner, other):
        each.update(batch, None, gamma=0.0, objectives=kinds, seed=11)
    assert all(
        torch.equal(one, two) for one, two in zip(adapters(learner).values(), adapters(other).values(), strict=True)
    )
    for reference in (False, True):
        assert torch.equal(learner.logprobs(rows, reference=reference), other.logprobs(rows, reference=reference))


def test_resuming_with_something_else_is_refused(tmp_path):
    learner = updated(adapted(lr=1e-6), 1)  # a step so small that merged weights look like the base
    learner.save(tmp_path)
    with pytest.raises(CheckpointError, match="trained on another model"):
        adapted(load_model(str(tmp_path))).load(tmp_path)
    with pytest.raises(CheckpointError, match="trained on another model"):
        adapted(tiny(seed=4)).load(tmp_path)
    for changes in ({"rank": 8}, {"targets": "q_proj"}):
        with pytest.raises(CheckpointError, match="weights of another model"):
            adapted(**changes).load(tmp_path)
    LocalLearner(tiny(), settings()).save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="adapter_model"):
        adapted().load(tmp_path / "plain")


@pytest.mark.parametrize("targets", ["c_attn", "q_proj, lm_head", "embed_tokens"])
def test_targets_that_are_no_linear_layers_are_refused(targets):
    with pytest.raises(ConfigError, match="no linear layer") as raised:
        adapted(targets=targets)
    assert all(name in str(raised.value) for name in LINEAR) and raised.value.where == "learner.lora.targets"


def test_peft_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="needs peft") as raised:
        adapted()
    assert "spearrl[lora]" in raised.value.hint


def test_packing_and_checkpointing_leave_the_gradient_as_it_is():
    gradients = []
    for changes in ({}, {"packing": "tree", "micro_batch_tokens": 30}, {"gradient_checkpointing": True}):
        # Norms in float64, not float32: a shared token's gradient is summed before them, not behind.
        learner = adapted(model_of("Starcoder2").double(), grad_clip=1e9, **changes)
        with torch.no_grad():
            for layer in learner.model.modules():
                if hasattr(layer, "lora_B") and "default" in layer.lora_B:
                    layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(3))
        updated(learner, 1)
        gradients.append(torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.requires_grad]))
    for other in gradients[1:]:
        assert float((other - gradients[0]).norm()) <= 1e-9 * float(gradients[0].norm()) > 0


def test_the_local_engine_samples_with_the_adapters():
    """It shares the model: what it samples after an update has the learner's log-probabilities, as the reference has
    not.
    """
    import asyncio

    from spearrl.rollout import LocalEngine
    from spearrl.rollout.protocol import Request, Sampling

    model = tiny()
    engine = LocalEngine(model, slots=4, cache_mib=8, context_tokens=64)
    learner = updated(adapted(model))
    engine.publish(1)
    request = Request(
        (0, 0, 0), (3, 4, 5), sampling=Sampling(temperature=0.7, top_p=1.0, max_tokens=6, stop_ids=(), seed=1)
    )
    reply = asyncio.run(engine.generate(request))
    ids = torch.tensor([[3, 4, 5, *reply.token_ids]])
    with torch.no_grad():
        exact = (model(input_ids=ids).logits[0].double() / 0.7).log_softmax(-1)
    wanted = [float(exact[2 + i, token]) for i, token in enumerate(reply.token_ids)]
    assert reply.logprobs == pytest.approx(wanted, abs=1e-4)
    assert learner.steps == 3


def test_a_resumed_run_is_the_run(model, tmp_path):
    """With the base as KL reference too; and a checkpoint is a plain model directory."""
    changes = (
        "learner.lora.rank=4",
        "learner.lr=1e-2",
        "algo.kl.loss_coef=0.01",
        "run.steps=3",
        "run.checkpoint_every=1",
    )
    whole = run(from_model(model, tmp_path, *changes, name="whole"))
    parts = stopped_and_resumed(from_model(model, tmp_path, *changes, name="parts"), after=2)
    assert fingerprint(whole.parts.model) == fingerprint(parts.parts.model)
    last = sorted(parts.run.checkpoints.glob("step-*"))[-1]
    merged = dict(parts.parts.learner.full_parameters())
    assert all(torch.equal(tensor, merged[name]) for name, tensor in load_model(str(last)).named_parameters())


def test_a_run_with_adapters_learns(model, tmp_path):
    """The Fetch toy from an imperfect cold start: success rises (0.5 → 0.75 here and with every weight trained), the
    base stays.
    """
    changes = (
        "learner.lora.rank=8",
        "learner.lr=3e-3",
        "rollout.temperature=1",
        "rollout.groups_per_step=8",
        "run.steps=20",
        "run.checkpoint_every=0",
    )
    trainer = Trainer(from_model(model, tmp_path, *changes, "eval.tasks=24", name="lora"))
    before = trainer.evaluate_policy()
    after = trainer.train()
    trainer.close()
    assert after.success.rate > before.success.rate + 0.1
    exported = {name: tensor for name, tensor in load_model(str(model)).named_parameters()}
    before = {
        name.replace(".base_layer", ""): p for name, p in trainer.parts.model.named_parameters() if ".lora_" not in name
    }
    assert all(torch.equal(before[name], tensor) for name, tensor in exported.items())


@pytest.mark.parametrize("name", [name for name in FAMILIES if "moe" in name or name in ("phi3", "gpt_oss", "qwen3_5")])
def test_adapters_of_other_families_are_saved_resumed_and_merged(name: str, tmp_path):
    """In a mixture of experts they go beside the experts, which are no linear layers."""
    folder = str(family_directory(name, tmp_path / "model"))
    learner = updated(adapted(load_model(folder), lr=1e-3))
    layers = {name.rsplit(".", 3)[0] for name, _ in learner.adapter_parameters()}
    assert layers and not any(layer.endswith(("experts", "mlp.gate")) for layer in layers)
    learner.save(tmp_path / "saved")
    again, merged = (
        adapted(load_model(folder), seed=8, lr=1e-3),
        LocalLearner(load_model(str(tmp_path / "saved")), settings(), temperature=0.7),
    )
    again.load(tmp_path / "saved")
    rows = make_rows(RUNS)
    assert torch.equal(again.logprobs(rows), learner.logprobs(rows))
    torch.testing.assert_close(merged.logprobs(rows), learner.logprobs(rows), atol=1e-4, rtol=0)


def test_layers_named_like_those_of_fused_experts_get_no_adapters():
    with pytest.raises(ConfigError, match="no linear layer of Glm4MoeForCausalLM is called down_proj"):
        adapted(build_family("glm4_moe")[0], targets="q_proj,down_proj")
