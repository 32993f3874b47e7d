"""What users rely on, through the real trainer: learning, determinism, resume, self-imitation, faults."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from spearrl.errors import ContractError, EngineError, RefusedError, SpearError
from spearrl.launch.assembly import Assembly
from spearrl.rollout.tasks_of_step import Episodes
from spearrl.run import Run
from spearrl.sync import Bridge
from spearrl.trainer import Trainer
from tests.support.short_runs import events, from_model, resumed, run, stopped
from tests.support.small_run import QUICK_START, fingerprint, small_config


def test_two_runs_of_one_seed_have_identical_parameters(tmp_path):
    first, second = (run(small_config(tmp_path, *QUICK_START, name=name)) for name in ("a", "b"))
    assert fingerprint(first.parts.model) == fingerprint(second.parts.model)
    other = run(small_config(tmp_path, *QUICK_START, "run.seed=1", name="c"))
    assert fingerprint(other.parts.model) != fingerprint(first.parts.model)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = run(small_config(tmp_path, name="whole"))
    parts = resumed(stopped(small_config(tmp_path, name="parts"), after=3))
    assert fingerprint(parts.parts.model) == fingerprint(whole.parts.model)
    assert len(parts.memory.replay) == len(whole.memory.replay)
    assert parts.policy_version == whole.policy_version


def test_self_imitation_goes_through_the_trainer(model, tmp_path):
    """What lies in the buffer is exactly the step's winning trajectories, with the old_logprobs of their own step; it
    is replayed once, later."""
    trainer = Trainer(from_model(model, tmp_path, "run.steps=6", algo="grpo+spear"))
    reports = {}
    add, drain = trainer.memory.replay.add, trainer.memory.replay.drain

    def spy_add(step, rows, rewards, advantages, old_logprobs, **options):
        won = {int(t) for t, a in zip(rows.turns.trajectory_ids, advantages, strict=True) if a > 0}
        for row in range(len(rows)):
            trajectory = int(rows.trajectory[row])
            if trajectory in won:
                mask = rows.padded_mask[row]
                reports[trajectory] = (
                    step,
                    old_logprobs[row][mask].clone(),
                    rows.pad(rows.token_ids)[row][mask].clone(),
                )
        return add(step, rows, rewards, advantages, old_logprobs, **options)

    replayed = []

    def spy_drain(step, baseline, generator):
        batch = drain(step, baseline, generator)
        if batch is not None:
            replayed.append((step, batch))
        return batch

    trainer.memory.replay.add, trainer.memory.replay.drain = spy_add, spy_drain
    trainer.train()
    trainer.close()
    assert replayed, "no flush happened: the test would prove nothing"
    used = []
    for step, batch in replayed:
        mask = batch.action_mask
        assert (batch.advantages[~mask] == 0).all()
        for row in range(len(batch.rows)):
            trajectory = int(batch.rows.trajectory[row])
            assert batch.advantages[row][mask[row]].max() > 0
            stored_step, old, ids = reports[trajectory]
            assert stored_step < step
            assert torch.equal(batch.old_logprobs[row][mask[row]], old)
            assert torch.equal(batch.rows.pad(batch.rows.token_ids)[row][mask[row]], ids)
            used.append(trajectory)
    assert len(used) == len(set(used))
    lines = events(trainer, "step")
    assert any(line["replay/rows"] > 0 for line in lines)
    assert all("sil/loss" in line for line in lines if line["replay/rows"] > 0)


def test_the_three_algorithms_differ_only_in_config(model, tmp_path):
    runs = (
        run(from_model(model, tmp_path, "run.steps=4", algo=algo, name=algo.replace("+", "-")))
        for algo in ("grpo", "grpo+sil", "grpo+spear")
    )
    assert len({fingerprint(trainer.parts.model) for trainer in runs}) == 3


def test_only_sampled_tokens_train(model, tmp_path):
    """In every batch the learner gets, the masked tokens of a trajectory are exactly the tokens the engine sampled for
    it, with its log-probabilities."""
    trainer = Trainer(from_model(model, tmp_path, algo="grpo+spear"))
    update, collect, sampled, checked = trainer.parts.learner.update, trainer.parts.players.collector.collect, {}, []

    def spy_collect(*tasks, **settings):
        groups = collect(*tasks, **settings)
        for trajectory in (t for g in groups for t in g.trajectories):
            sampled[trajectory.id] = (
                [i for turn in trajectory.turns for i in turn.token_ids],
                [p for turn in trajectory.turns for p in turn.logprobs],
            )
        return groups

    def spy_update(on_policy, replay, **settings):
        result = update(on_policy, replay, **settings)
        assert on_policy.old_logprobs is None, "they are those of the update's own passes"
        for batch in (b for b in (replace(on_policy, old_logprobs=result.old_logprobs), replay) if b is not None):
            ids, mask = batch.rows.pad(batch.rows.token_ids), batch.action_mask
            assert (batch.advantages[~mask] == 0).all()
            for row, trajectory in enumerate(batch.rows.trajectory.tolist()):
                wanted_ids, wanted_logprobs = sampled[trajectory]
                assert ids[row][mask[row]].tolist() == wanted_ids
                old = batch.old_logprobs[row][mask[row]]
                if batch.advantages[row].any() or not old.isnan().all():  # a row of nothing but zeros may have no pass
                    assert old.tolist() == pytest.approx(wanted_logprobs, abs=2e-3)
                    checked.append(trajectory)
        return result

    trainer.parts.players.collector.collect, trainer.parts.learner.update = spy_collect, spy_update
    trainer.train()
    trainer.close()
    assert len(checked) > 32


def test_training_learns_the_toy(tmp_path):
    config = small_config(
        tmp_path,
        "run.steps=30",
        "eval.every=30",
        "eval.tasks=24",
        "rollout.group_size=8",
        "sft.noise=0.6",
        "run.seed=5",
    )
    trainer = Trainer(config)
    trainer.train()
    trainer.close()
    curve = [e["success"] for e in events(trainer, "eval")]
    assert curve[0] <= 0.75 and curve[-1] >= 0.9, curve


@pytest.mark.parametrize("style", ["chat", "windowed"])
def test_both_prompt_styles_train(model, tmp_path, style):
    """A growing chat is one row an episode; windowed prompts are one row a turn."""
    trainer = Trainer(from_model(model, tmp_path, f"env.style={style}", "run.steps=2"))
    update, calls = trainer.parts.learner.update, []

    def spy(on_policy, replay, **settings):
        rows = on_policy.rows
        calls.append((len(rows), len(rows.trajectory.unique()), len(rows.turns)))
        return update(on_policy, replay, **settings)

    trainer.parts.learner.update = spy
    trainer.train()
    trainer.close()
    assert len(calls) == 2 and all(turns > episodes for _, episodes, turns in calls)
    assert all(rows == (episodes if style == "chat" else turns) for rows, episodes, turns in calls)


def test_a_broken_environment_costs_its_episodes_only(tmp_path):
    trainer = run(small_config(tmp_path, "env.options.broken=3", "run.steps=6", "sft.enabled=false"))
    lost = [e for e in events(trainer, "step") if e.get("rollout/errors", 0) > 0]
    assert lost and all(e["rollout/groups_lost"] == 1 for e in lost)
    record = [
        json.loads(line)
        for e in lost
        for line in (trainer.run.path / f"trajectories/step-{e['step']:06d}.jsonl").read_text().splitlines()
    ]
    assert any("the shelf fell down" in (t["error"] or "") for t in record)


def test_a_nan_reward_names_the_environment_and_the_task(model, tmp_path):
    trainer = Trainer(from_model(model, tmp_path, "env.options.nan=1", "run.steps=6"))
    with pytest.raises(ContractError, match="fetch-1"):
        trainer.train()
    trainer.close()


def test_the_resolved_config_starts_the_same_run_again(model, tmp_path):
    from spearrl.config import load_config

    first = run(from_model(model, tmp_path, name="first"))
    again = load_config(first.run.path / "config.toml", ["run.name=again"])
    assert fingerprint(run(again).parts.model) == fingerprint(first.parts.model)


def test_a_run_directory_is_not_overwritten_or_shared(tmp_path):
    trainer = Trainer(small_config(tmp_path))
    with pytest.raises(RefusedError, match="in use"):
        Trainer.resume(trainer.run.path)
    trainer.close()
    with pytest.raises(RefusedError, match="exists"):
        Trainer(small_config(tmp_path))


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama"])
def test_any_causal_model_directory_trains(tmp_path, architecture):
    """--model PATH: a directory with random weights of each family goes through cold start, rollout, update, checkpoint
    and resume."""
    import transformers

    from spearrl.config.sections import TinySection
    from spearrl.models import build_tiny, save_model

    _, tokenizer = build_tiny(
        ["want: look or say", " look", "it is red", " say red", " say blue"] * 20, TinySection(vocab_size=400), seed=0
    )
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape
    )
    save_model(getattr(transformers, f"{architecture}ForCausalLM")(config), tokenizer, tmp_path / "model")

    settings = (
        f"model.path={tmp_path / 'model'}",
        "sft.episodes=24",
        "sft.epochs=1",
        "sft.warmup_steps=0",
        "run.steps=2",
        "eval.tasks=4",
    )
    trainer = run(small_config(tmp_path, *settings))
    assert all(e["policy/updates"] + e["policy/without_signal"] >= 1 for e in events(trainer, "step"))
    reloaded = Trainer.resume(trainer.run.path)
    assert fingerprint(reloaded.parts.model) == fingerprint(trainer.parts.model)
    reloaded.close()


@pytest.mark.parametrize(("every", "at"), [(0, [3]), (2, [0, 2, 3]), (9, [0, 3])])
def test_evaluations_are_where_the_config_says(model, tmp_path, every, at):
    trainer = run(from_model(model, tmp_path, f"eval.every={every}", "run.steps=3"))
    assert [line["step"] for line in events(trainer, "eval")] == at


def test_a_run_that_never_began_leaves_nothing(tmp_path):
    """A wrong setting costs neither minutes nor the run's name."""
    for change in ("model.path=/no/such/model", "eval.split=nowhere", "env.options.tasks=x"):
        with pytest.raises(SpearError):
            Trainer(small_config(tmp_path, change))
        assert not (tmp_path / "small").exists()
    run(small_config(tmp_path, "run.steps=0"))


def test_a_trainer_closes_what_it_began(tmp_path, monkeypatch):
    """At the end of its `with`, twice over, or where a part fails after others were made; a new run then leaves
    nothing."""
    closed: list[str] = []

    def watched(name: str, method):
        def close(*args, **settings):
            closed.append(name)
            return method(*args, **settings)

        return close

    monkeypatch.setattr(Assembly, "close", watched("parts", Assembly.close))
    monkeypatch.setattr(Episodes, "close", watched("episodes", Episodes.close))
    monkeypatch.setattr(Run, "close", watched("run", Run.close))
    with Trainer(small_config(tmp_path, "run.steps=0", "sft.epochs=1")) as trainer:
        trainer.train()
        assert closed == []
    trainer.close()
    assert closed == ["episodes", "parts", "run"]
    closed.clear()
    monkeypatch.setattr(Trainer, "save", lambda self: 1 / 0)  # the last thing that happens before a run has begun
    with pytest.raises(ZeroDivisionError):
        Trainer(small_config(tmp_path, "run.steps=0", "sft.epochs=1", name="failing"))
    assert closed == ["episodes", "parts", "run"] and not (tmp_path / "failing").exists()


def test_a_failing_start_leaves_no_shared_memory(tmp_path, monkeypatch):
    """Workers are ended and bucket files removed where the first sync fails."""
    begun: list[Path] = []

    def failing(self, version):
        begun.extend([self.folder, *(Path(f"/proc/{member.pid}") for member in self.receivers)])
        assert all(path.exists() for path in begun)
        raise EngineError("the weights did not arrive", where="weight sync")

    monkeypatch.setattr(Bridge, "publish", failing)
    with pytest.raises(EngineError, match="did not arrive"):
        Trainer(small_config(tmp_path, "rollout.workers=1", "sft.epochs=1", "run.steps=1"))
    assert len(begun) == 2 and not any(path.exists() for path in [*begun, tmp_path / "small"])


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        (["rollout.engine=vllm"], "vllm"),
        (["learner.backend=deepspeed"], "deepspeed"),
        (["learner.lora.rank=2"], "lora"),
        (["rollout.launcher=ray", "rollout.workers=1"], "ray"),
    ],
)
def test_a_missing_extra_is_named_before_anything_is_made(tmp_path, monkeypatch, changes, extra):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("spearrl.rollout.vllm.arguments.metadata.version", absent)
    for module in ("spearrl.launch.assembly", "spearrl.learner.deepspeed.zero"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    with pytest.raises(SpearError, match=rf"not installed\n  fix: pip install 'spearrl\[{extra}\]'"):
        Trainer(small_config(tmp_path, *changes))
    assert not list(tmp_path.iterdir())
