"""The DeepSpeed learner on 1 and 2 processes against the local one, which the gradient tests of
tests/learner/test_learner.py hold to plain autograd.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from spearrl.batching import Batch
from spearrl.config.sections import LearnerSection
from spearrl.errors import CheckpointError, ContractError
from spearrl.learner import DeepSpeedLearner, LocalLearner, ValueHead
from spearrl.learner.deepspeed.ranks import Ranks
from spearrl.learner.deepspeed.shard import CommandRunner
from spearrl.learner.optimizer import make_optimizer
from spearrl.losses import ClipCov, Correction, Objective
from spearrl.models import load_model, save_weights
from tests.batching.test_allowed import restricted
from tests.learner.test_learner import RUNS, full_batch, make_rows, one_thread, tiny  # noqa: F401

SHAPE = {"aggregation": "seq-mean-token-sum", "horizon": 20}
RULE = ClipCov(0.2, -60.0, 60.0)
EVERYTHING = [
    Objective("policy", clip_cov=RULE, correction=Correction("tis"), **SHAPE),
    Objective("sil", clip_cov=RULE, token_weight="unsure", **SHAPE),
    Objective("entropy", weight=0.01, **SHAPE),
    Objective("kl", weight=0.1, **SHAPE),
    Objective("value", weight=0.5, **SHAPE),
]
PLAIN = [Objective("policy")]
LIMIT_S = 120.0


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def ranks(request):
    """The processes that learners of this module are built on, one after the other."""
    held = Ranks(CommandRunner(), request.param, device="cpu", timeout_s=LIMIT_S)
    yield held
    held.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tiny(), tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    return saved(tiny(seed=3), tmp_path_factory.mktemp("reference"))


def saved(model: torch.nn.Module, path: Path) -> Path:
    save_weights(model, path)
    return path


def settings(stage: int = 3, **changes) -> LearnerSection:
    plain = {
        "lr": 1e-3,
        "precision": "fp32",
        "mini_batches": 1,
        "lm_head_chunk": 8,
        "grad_clip": 1e9,
        "micro_batch_tokens": 20,
    }
    return LearnerSection(**{**plain, "backend": "deepspeed", "zero_stage": stage, "timeout_s": LIMIT_S, **changes})


def head() -> ValueHead:
    critic = ValueHead(16, 3)
    torch.nn.init.normal_(critic.outer.weight, generator=torch.Generator().manual_seed(1))
    return critic


def both(
    ranks: Ranks,
    folder: Path,
    options: LearnerSection,
    *,
    kind: str = "sgd",
    reference: Path | None = None,
    critic: ValueHead | None = None,
    **more,
):
    """A local learner and a DeepSpeed one that begin alike."""
    starting = None if reference is None else load_model(str(reference))
    local = LocalLearner(
        load_model(str(folder)), options, reference=starting, critic=copy.deepcopy(critic), temperature=0.7, **more
    )
    local.optimizer = make_optimizer(local.model.named_parameters(), options, critic=local.critic, kind=kind)
    other = DeepSpeedLearner(
        folder, options, reference=reference, critic=critic, temperature=0.7, _optimizer=kind, _ranks=ranks, **more
    )
    return local, other


def weights(learner) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for _, tensor in learner.full_parameters()])


def gap(one, two) -> float:
    return float((weights(one) - weights(two)).abs().max())


def batches(learner: LocalLearner) -> tuple[Batch, Batch]:
    return full_batch(make_rows(RUNS), learner), full_batch(
        make_rows(RUNS[:4], first_trajectory=100, seed=5), learner, seed=4
    )


@pytest.mark.parametrize(("stage", "joint"), [(0, False), (1, True), (2, False), (3, False), (3, True)])
def test_gradients_are_those_of_the_local_learner(ranks, folder, reference, stage, joint):
    """One SGD step at rate 1 moves the weights by the gradient.

    All objectives, replay, covariance selection over the mini-batch, several passes.
    """
    local, other = both(ranks, folder, settings(stage, lr=1.0), reference=reference, critic=head(), joint=joint)
    on_policy, replay = batches(local)
    before = weights(local)
    for learner in (local, other):
        learner.update(on_policy, replay, gamma=0.3, objectives=EVERYTHING, seed=1)
        assert learner.steps == (1 if joint else 2)
    moved, wanted = weights(other) - before, weights(local) - before
    if not joint:  # the second step starts where the first ended
        assert float((moved - wanted).norm()) <= 1e-4 * float(wanted.norm())
    else:
        assert float((moved - wanted).norm()) <= 1e-5 * float(wanted.norm())
    assert float(wanted.norm()) > 0.1
    critics = [
        torch.cat([p.detach().flatten() for p in critic.parameters()]) for critic in (local.critic, other.shard.critic)
    ]
    torch.testing.assert_close(critics[0], critics[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["policy", "entropy", "kl"])
def test_the_gradient_of_each_objective(ranks, folder, reference, stage, kind):
    local, other = both(ranks, folder, settings(stage, lr=1.0), reference=reference, critic=head())
    on_policy, _ = batches(local)
    before = weights(local)
    for learner in (local, other):
        learner.update(
            on_policy,
            None,
            gamma=0.0,
            objectives=[Objective(kind, clip_cov=RULE if kind == "policy" else None, weight=0.5)],
            seed=1,
        )
    moved, wanted = weights(other) - before, weights(local) - before
    assert float((moved - wanted).norm()) <= 1e-5 * float(wanted.norm()) and float(wanted.norm()) > 1e-2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_five_steps_end_at_the_same_weights(ranks, folder, reference, stage):
    local, other = both(
        ranks, folder, settings(stage, lr=0.1, grad_clip=0.3, mini_batches=2), reference=reference, critic=head()
    )
    on_policy, replay = batches(local)
    metrics = []
    for learner in (local, other):
        for number in range(2):
            result = learner.update(
                on_policy, replay if number else None, gamma=0.3, objectives=EVERYTHING, seed=number
            )
        assert learner.steps >= 5
        metrics.append(result.metrics)
    assert gap(local, other) <= 1e-5
    assert set(metrics[0]) == set(metrics[1])
    for name in set(metrics[0]) - {"update/seconds"}:
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-3, abs=1e-4), name


def test_predictions_are_those_of_the_local_learner(ranks, folder, reference):
    local, other = both(ranks, folder, settings(), reference=reference, critic=head())
    rows = make_rows(RUNS)
    assert float((local.logprobs(rows) - other.logprobs(rows)).abs().max()) <= 1e-5
    assert float((local.logprobs(rows, reference=True) - other.logprobs(rows, reference=True)).abs().max()) <= 1e-5
    assert float((local.values(rows) - other.values(rows)).abs().max()) <= 1e-5
    assert other.probe([3, 1, 4, 1, 5]) == pytest.approx(local.probe([3, 1, 4, 1, 5]), abs=1e-5)
    assert len(other.logprobs(rows.select([]))) == 0
    plain = DeepSpeedLearner(folder, settings(), _ranks=ranks)
    with pytest.raises(ContractError, match="reference"):
        plain.logprobs(rows, reference=True)
    with pytest.raises(ContractError, match="critic"):
        plain.values(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"packing": "tree"},
        {"offload": "optimizer"},
        {"offload": "all"},
    ],
    ids=str,
)
def test_what_saves_memory_changes_nothing(ranks, folder, changes):
    local, other = both(ranks, folder, settings(3, lr=0.1, grad_clip=0.3, **changes))
    on_policy, replay = batches_without_critic(local)
    for learner in (local, other):
        for number in range(2):
            assert (
                learner.update(
                    on_policy, replay, gamma=0.3, objectives=[PLAIN[0], Objective("sil")], seed=number
                ).skipped
                == 0
            )
    assert gap(local, other) <= 1e-5 and gap(local, LocalLearner(load_model(str(folder)), settings())) > 1e-3


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("packing", ["padded", "tree"])
def test_replies_restricted_to_allowed_ids(ranks, folder, stage, packing):
    local, other = both(ranks, folder, settings(stage, lr=1.0, packing=packing, lm_head_chunk=3), critic=head())
    rows = restricted(make_rows(RUNS))
    assert float((local.logprobs(rows) - other.logprobs(rows)).abs().max()) <= 1e-5
    assert float((local.logprobs(make_rows(RUNS)) - other.logprobs(rows)).abs().max()) > 0.1
    batch, before = full_batch(rows, local), weights(local)
    for learner in (local, other):
        learner.update(batch, None, gamma=0.0, objectives=[EVERYTHING[0], EVERYTHING[2]], seed=1)
    moved, wanted = weights(other) - before, weights(local) - before
    assert float((moved - wanted).norm()) <= 1e-5 * float(wanted.norm()) and float(wanted.norm()) > 0.1


def batches_without_critic(learner: LocalLearner) -> tuple[Batch, Batch]:
    built = []
    for rows in (make_rows(RUNS), make_rows(RUNS[:3], first_trajectory=100, seed=5)):
        draw = torch.Generator().manual_seed(len(rows))
        advantages = rows.scatter(torch.randn(len(rows.turns), generator=draw, dtype=torch.float64))
        built.append(Batch(rows, advantages, learner.logprobs(rows)))
    return built[0], built[1]


@pytest.mark.parametrize("stage", [2, 3])
def test_more_processes_than_rows(ranks, folder, stage):
    local, other = both(ranks, folder, settings(stage, lr=0.1))
    batch = batches_without_critic(local)[0].select([1])
    for learner in (local, other):
        learner.update(batch, None, gamma=0.0, objectives=PLAIN, seed=0)
    assert gap(local, other) <= 1e-6 and learner.steps == 1
    assert float((local.logprobs(batch.rows) - other.logprobs(batch.rows)).abs().max()) <= 1e-5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("where", ["advantages", "returns"])
def test_a_number_that_is_not_finite_skips_the_step_everywhere(ranks, folder, stage, where):
    """In one row of one mini-batch, so that only one process sees it; the policy's loss or the critic's."""
    objectives = [Objective("policy"), Objective("value")]
    local, other = both(ranks, folder, settings(stage, lr=0.01, mini_batches=2), critic=head())
    batch, _ = batches(local)
    bad = copy.deepcopy(batch)
    getattr(bad, where)[2][bad.action_mask[2]] = math.nan
    results = [learner.update(bad, None, gamma=0.0, objectives=objectives, seed=0) for learner in (local, other)]
    assert [r.skipped for r in results] == [1, 1] and other.steps == 1
    assert gap(local, other) <= 1e-6
    for learner in (local, other):  # nothing of the step that was left out is still there
        assert learner.update(batch, None, gamma=0.0, objectives=objectives, seed=1).skipped == 0
    assert gap(local, other) <= 1e-5


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_resume_is_exact(ranks, folder, tmp_path, stage, precision):
    options = settings(stage, precision=precision, mini_batches=2, warmup_steps=5, grad_clip=1.0)
    learner = DeepSpeedLearner(folder, options, critic=head(), _ranks=ranks)
    batch = full_batch(make_rows(RUNS), learner)
    objectives = [Objective("policy"), Objective("value")]
    for seed in range(2):
        learner.update(batch, None, gamma=0.0, objectives=objectives, seed=seed)
    learner.save(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"config.json", "model.safetensors", "training"}
    # vLLM loads every safetensors file that lies beside the weights
    assert {name for name in written - {"training"} if not name.endswith(".json")} == {"model.safetensors"}
    learner.update(batch, None, gamma=0.0, objectives=objectives, seed=9)
    ends = weights(learner), learner.logprobs(batch.rows), learner.values(batch.rows)
    other = DeepSpeedLearner(folder, options, critic=ValueHead(16, 8), _ranks=ranks)
    other.load(tmp_path)
    assert other.steps == 4
    other.update(batch, None, gamma=0.0, objectives=objectives, seed=9)
    for one, two in zip(ends, (weights(other), other.logprobs(batch.rows), other.values(batch.rows)), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_is_for_any_learner(ranks, folder, tmp_path):
    """From 3 to 1 and to the local learner, and back."""
    options = settings(3, grad_clip=1.0)
    learner = DeepSpeedLearner(folder, options, critic=head(), _ranks=ranks)
    local = LocalLearner(load_model(str(folder)), options, critic=ValueHead(16, 4))
    batch = full_batch(make_rows(RUNS), learner)
    step = {"gamma": 0.0, "objectives": [Objective("policy"), Objective("value")]}
    learner.update(batch, None, **step, seed=0)
    learner.save(tmp_path)
    local.load(tmp_path)
    assert torch.equal(weights(local), weights(learner)) and local.steps == 1
    for each in (learner, local):
        each.update(batch, None, **step, seed=1)
    assert gap(learner, local) <= 1e-5
    local.save(tmp_path)
    for each in (learner := DeepSpeedLearner(folder, settings(1, grad_clip=1.0), critic=head(), _ranks=ranks), local):
        each.load(tmp_path)
        each.update(batch, None, **step, seed=2)
    assert gap(learner, local) <= 1e-5 and learner.steps == local.steps == 3


def test_an_empty_folder_is_no_checkpoint(ranks, folder, tmp_path):
    learner = DeepSpeedLearner(folder, settings(), _ranks=ranks)
    with pytest.raises(CheckpointError, match="no weights"):
        learner.load(tmp_path)
    assert len(learner.probe([1, 2])) == 1, "and the learner goes on"


@pytest.mark.parametrize(("stage", "tied"), [(1, True), (3, True), (3, False)])
def test_an_export_is_a_model_directory(ranks, tmp_path, stage, tied, monkeypatch):
    from spearrl.models import weights as files

    monkeypatch.setattr(files, "FILE_BYTES", 4096)  # so that there are several files
    path = saved(tiny(tied=tied), tmp_path / "start")
    learner = DeepSpeedLearner(path, settings(stage, precision="bf16" if tied else "fp32"), _ranks=ranks)
    batch, _ = batches_without_critic(learner)
    learner.update(batch, None, gamma=0.0, objectives=PLAIN, seed=0)
    (tmp_path / "out").mkdir()
    learner.export(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    model = load_model(str(tmp_path / "out"))
    assert model.config.tie_word_embeddings is tied
    ids = [5, 9, 2, 6, 5, 3]
    assert LocalLearner(model, settings(precision="fp32")).probe(ids) == pytest.approx(
        learner.probe(ids), abs=0.05 if learner.shard.native else 1e-5
    )
    names = [name for name, _ in learner.full_parameters()]
    assert len(names) == len(set(names)) and ("lm_head.weight" in names) is not tied


def test_memory_that_is_not_in_use_is_given_back(ranks, folder, monkeypatch):
    freed: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
    for learner in both(ranks, folder, settings(3)):
        learner.release()
    assert len(freed) == 2


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bf16_trains(ranks, folder, stage):
    learner = DeepSpeedLearner(folder, settings(stage, precision="bf16", lr=3e-3), _ranks=ranks)
    batch, _ = batches_without_critic(learner)
    batch = Batch(batch.rows, torch.where(batch.action_mask, 1.0, 0.0), batch.old_logprobs)
    losses = [
        learner.update(batch, None, gamma=0.0, objectives=[Objective("sft")], seed=s).metrics["sft/loss"]
        for s in range(12)
    ]
    assert losses[-1] < 0.8 * losses[0]
    assert next(iter(learner.full_parameters()))[1].dtype == (torch.float32 if stage == 0 else torch.bfloat16)


def test_adapters(ranks, folder, tmp_path):
    pytest.importorskip("peft")
    options = settings(3, lr=0.02, grad_clip=1.0, lora={"rank": 2})
    learner = DeepSpeedLearner(folder, options, seed=5, _ranks=ranks)
    local = LocalLearner(load_model(str(folder)), options, seed=5)
    batch, _ = batches_without_critic(local)
    before = weights(learner)
    for each in (learner, local):
        for seed in range(3):
            each.update(batch, None, gamma=0.0, objectives=PLAIN, seed=seed)
    assert gap(learner, local) <= 1e-4 and float((weights(learner) - before).abs().max()) > 1e-3
    assert [name for name, _ in learner.adapter_parameters()] == [name for name, _ in local.adapter_parameters()]
    assert float((learner.logprobs(batch.rows, reference=True) - batch.old_logprobs).abs().max()) <= 1e-5
    learner.save(tmp_path)
    learner.update(batch, None, gamma=0.0, objectives=PLAIN, seed=7)
    end = weights(learner)
    other = DeepSpeedLearner(folder, options, seed=6, _ranks=ranks)
    other.load(tmp_path)
    other.update(batch, None, gamma=0.0, objectives=PLAIN, seed=7)
    assert torch.equal(weights(other), end)
