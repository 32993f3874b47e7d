"""Runs that would go on to no purpose end, say why, and keep what shows it."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spearrl.cli.main import main
from spearrl.errors import ConfigError, ContractError, NumericsError, WorkerError
from spearrl.run import bad_batch
from spearrl.trainer import Trainer
from tests.support.short_runs import change_logprobs, events, from_model
from tests.support.small_run import fingerprint
from tests.support.toy_envs import Fetch

NOT_FINITE = "algo.loss=tests.support.user_functions:not_finite"


def ended(config, error: type[Exception], prepare=lambda trainer: None) -> tuple[Trainer, str]:
    """The run, which must end with this error, and its text."""
    trainer = Trainer(config)
    with trainer, pytest.raises(error) as caught:
        prepare(trainer)
        trainer.train()
    assert type(caught.value) is error
    return trainer, str(caught.value)


def test_three_steps_that_are_not_finite_stop_the_run_unchanged_and_are_replayed(model, tmp_path, capsys):
    before = {}

    def note(trainer):
        before.update(weights=fingerprint(trainer.parts.model), optimiser=trainer.parts.learner.optimizer.state_dict())

    config = from_model(model, tmp_path, NOT_FINITE, "run.steps=9", "learner.weight_decay=0.1", algo="grpo")
    trainer, text = ended(config, NumericsError, note)
    assert trainer.step == 3 and "3 training steps in a row" in text
    assert fingerprint(trainer.parts.model) == before["weights"] and trainer.parts.learner.steps == 0
    assert not before["optimiser"]["state"] and not trainer.parts.learner.optimizer.state
    folder = trainer.run.path / "bad_batch"
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        f"step-00000{i}.safetensors" for i in (1, 2, 3)
    ]
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    command = text.partition("spearrl ")[2].splitlines()[0].split()
    assert command[:4] == ["replay", str(trainer.run.path), "--batch", str(folder / "step-000003.safetensors")]
    assert NOT_FINITE in " ".join(command).replace('"', "").replace("'", "")
    command[4:] = shlex.split(" ".join(command[4:]))
    capsys.readouterr()
    assert main(command) == 7
    said = capsys.readouterr().out
    assert "weights of " + str(trainer.run.checkpoints / "step-000003") in said, "the last sound weights were saved"
    assert "not finite: policy/loss is nan" in said and "gradient of" in said and "row 0 (trajectory" in said


def test_one_row_is_named_and_its_step_alone_is_left_out(model, tmp_path, capsys):
    """An advantage that is not a number, in one of two mini-batches of one step."""
    places = []

    def spoil(trainer):
        update = trainer.parts.learner.update

        def spoilt(on_policy, replay, **rest):
            if trainer.step == 2:
                row = int((on_policy.advantages != 0).any(1).nonzero()[0, 0])
                on_policy.advantages[row][on_policy.action_mask[row]] = math.nan
                places.append(int(on_policy.rows.trajectory[row]))
            return update(on_policy, replay, **rest)

        trainer.parts.learner.update = spoilt

    trainer = Trainer(from_model(model, tmp_path, algo="grpo"))
    with trainer:
        spoil(trainer)
        trainer.train()
    assert [line["policy/skipped"] for line in events(trainer, "step")] == [0, 1, 0]
    (file,) = (trainer.run.path / "bad_batch").glob("*.safetensors")
    step, (share,) = bad_batch.load(file)
    assert step == 2 and share.batch.advantages.isnan().any()
    (warning,) = [w["text"] for w in events(trainer, "warning") if "spearrl replay" in w["text"]]
    assert str(file) in warning
    capsys.readouterr()
    assert main(["replay", str(trainer.run.path), "--batch", str(file.with_suffix(".json"))]) == 7
    said = capsys.readouterr().out
    assert f"(trajectory {places[0]}, " in said and "policy: advantages: " in said and "1 of " in said


def test_a_batch_that_is_finite_is_said_to_be(model, tmp_path, monkeypatch, capsys):
    """The fault was none of the batch's: replay says so and ends with 0."""
    monkeypatch.setattr("spearrl.learner.passes.strike", lambda point: True)
    trainer, _ = ended(from_model(model, tmp_path, algo="grpo"), NumericsError)
    monkeypatch.undo()
    file = next((trainer.run.path / "bad_batch").glob("*.safetensors"))
    capsys.readouterr()
    assert main(["replay", str(trainer.run.path), "--batch", str(file)]) == 0
    assert "everything is finite with these weights" in capsys.readouterr().out


def test_replay_refuses_what_no_run_kept(model, tmp_path, capsys):
    file = tmp_path / "step-000001.json"
    file.write_text(json.dumps({"format": 1}))
    assert main(["replay", str(tmp_path), "--batch", str(file)]) == 3
    assert "no batch that a run kept" in capsys.readouterr().err


def test_ids_outside_the_vocabulary_are_refused(model, tmp_path):
    def foreign(trainer):
        engine = trainer.parts.players.engine
        generate, size = engine.generate, trainer.parts.model.config.vocab_size

        async def changed(request):
            completion = await generate(request)
            wrong = (*completion.token_ids[:-1], size + 7)
            return replace(completion, token_ids=wrong) if request.id[2] else completion

        engine.generate = changed

    trainer, text = ended(from_model(model, tmp_path, algo="ppo"), ContractError, foreign)
    assert f"token id {trainer.parts.model.config.vocab_size + 7} in trajectory" in text


def test_a_run_without_a_prompt_that_fits_ends_with_the_reason(model, tmp_path):
    config = from_model(
        model, tmp_path, "env.name=tests.run.test_safeguards:Wordy", "rollout.context_tokens=16", "run.steps=9"
    )
    trainer, text = ended(config, ConfigError)
    assert trainer.step == 3 and "no prompt fits into the context" in text and "rollout.context_tokens" in text
    assert "a first prompt of " in text


class Wordy(Fetch):
    def messages(self, observation, turn):
        return [replace(m, content=m.text + " red blue green" * 20) for m in super().messages(observation, turn)]


class Broken(Fetch):
    """Every episode of tasks from `options.broken` on fails."""

    def step(self, action):
        if self._index >= self.options.broken:
            raise RuntimeError(f"shelf {self._index % 2} fell down")
        return super().step(action)


@pytest.mark.parametrize(("steps", "size"), [(9, 4), (1, 2)])
def test_an_environment_that_always_fails_ends_the_run_with_its_traceback(model, tmp_path, steps, size):
    changes = (f"run.steps={steps}", f"rollout.group_size={size}", "env.options.broken=0")
    config = from_model(model, tmp_path, "env.name=tests.run.test_safeguards:Broken", *changes)
    trainer, text = ended(config, WorkerError)
    assert trainer.step == (3 if steps > 3 else 1)
    assert "RuntimeError: shelf" in text and "Traceback" in text and "rollout.max_env_errors" in text


def test_more_errors_of_the_environment_than_allowed(model, tmp_path):
    """A third of the tasks fails: over 20 % of 50 episodes; 40 % are allowed in the second run."""
    changes = ("env.name=tests.run.test_safeguards:Broken", "run.steps=6", "env.options.broken=8")
    trainer, text = ended(from_model(model, tmp_path, *changes), WorkerError)
    assert trainer.step == 4 and "of 64 episodes ended in an error of the environment" in text
    config = from_model(model, tmp_path, *changes, "rollout.max_env_errors=1", name="patient")
    with Trainer(config) as patient:
        patient.train()
    assert patient.step == 6


def test_an_engine_of_another_model_stops_the_run(model, tmp_path):
    trainer, text = ended(
        from_model(model, tmp_path, algo="ppo"),
        NumericsError,
        lambda t: change_logprobs(t, lambda request, values: tuple(v - 3.0 for v in values)),
    )
    assert trainer.step == 1 and "differ by 3" in text and trainer.policy_version == 0
    assert not list(Path(trainer.run.checkpoints).glob("step-000001"))


def test_a_constant_reward_moves_no_weight(model, tmp_path):
    """Nor does weight decay: there is no optimiser step at all."""
    config = from_model(
        model,
        tmp_path,
        "env.name=tests.run.test_safeguards:Constant",
        "learner.weight_decay=0.5",
        "algo.invalid_penalty=0",
    )
    with Trainer(config) as trainer:
        before = [p.detach().clone() for p in trainer.parts.model.parameters()]
        trainer.train()
    assert trainer.parts.learner.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parts.model.parameters(), strict=True))


class Constant(Fetch):
    def step(self, action):
        outcome = super().step(action)
        return replace(outcome, reward=1.0, terminated=True, info={"success": True})
