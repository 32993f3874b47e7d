"""Short runs from one cold-started model: seconds for the first, tenths of a second for the others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from spearrl.trainer import Trainer
from tests.support.small_run import fingerprint, small_config

NOT_MEASURES = ("event", "path", "panel", "from", "text", "flag")


def cold_started(folder: Path) -> Path:
    """A model directory: the small model after its cold start, so that runs need none of their own."""
    trainer = Trainer(small_config(folder, "run.steps=0", "sft.noise=0.6", algo="grpo", name="cold"))
    trainer.train()
    trainer.close()
    return next(trainer.run.checkpoints.glob("step-*"))


def from_model(model: Path, folder: Path, *changes: str, algo: str = "grpo", name: str = "run"):
    """The small run's config, begun from a model directory; hot enough that replies differ in length and some are no
    action.
    """
    settings = (
        f"model.path={model}",
        "sft.enabled=false",
        "eval.tasks=2",
        "eval.every=0",
        "run.steps=3",
        "rollout.temperature=1.5",
    )
    return small_config(folder, *settings, *changes, algo=algo, name=name)


Prepare = Callable[[Trainer], object]


def run(config, prepare: Prepare | None = None) -> Trainer:
    """Train to the end; `prepare` may wrap the trainer's parts before it starts."""
    trainer = Trainer(config)
    return _train(trainer, prepare)


def stopped(config, after: int, prepare: Prepare | None = None) -> Trainer:
    """The run, stopped after a step."""

    def stop(kind: str, values: dict) -> None:
        if kind == "step" and values["step"] == after:
            trainer.stop_requested = True

    trainer = Trainer(config, report=stop)
    _train(trainer, prepare)
    assert trainer.step == after
    return trainer


def resumed(stopped_run: Trainer, prepare: Prepare | None = None) -> Trainer:
    """The run, continued from its directory by a new trainer."""
    trainer = Trainer.resume(stopped_run.run.path)
    assert trainer.step == stopped_run.step
    return _train(trainer, prepare)


def stopped_and_resumed(config, after: int, prepare: Prepare | None = None) -> Trainer:
    return resumed(stopped(config, after, prepare), prepare)


def _train(trainer: Trainer, prepare: Prepare | None) -> Trainer:
    with trainer:
        if prepare is not None:
            prepare(trainer)
        trainer.train()
    return trainer


def events(trainer: Trainer, kind: str) -> list[dict]:
    lines = (trainer.run.path / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def assert_sound(trainer: Trainer, *, updates: bool = True) -> None:
    """Every number of every step is finite, so is every parameter, and (unless nothing could be learnt) every step made
    updates.
    """
    steps = events(trainer, "step")
    assert steps
    for line in steps:
        broken = {
            k: v
            for k, v in line.items()
            if k not in NOT_MEASURES and not (isinstance(v, (int, float)) and math.isfinite(v))
        }
        assert not broken, broken
        assert line.get("policy/skipped", 0) == 0
        assert not updates or line["policy/updates"] + line["policy/without_signal"] >= 1
    parameters = [
        *trainer.parts.model.parameters(),
        *(trainer.parts.learner.critic.parameters() if trainer.parts.learner.critic else ()),
    ]
    assert all(bool(torch.isfinite(p).all()) for p in parameters)


def whole_fingerprint(trainer: Trainer) -> str:
    """Of model and critic."""
    critic = trainer.parts.learner.critic
    return fingerprint(trainer.parts.model) + (fingerprint(critic) if critic is not None else "")


def change_logprobs(
    trainer: Trainer, change: Callable[[tuple[int, ...], tuple[float, ...]], tuple[float, ...]]
) -> None:
    """From now on the engine reports change(request id, log-probabilities) in place of what it sampled with; evaluation
    included.
    """
    engine = trainer.parts.players.engine
    generate = engine.generate

    async def changed(request):
        completion = await generate(request)
        return replace(completion, logprobs=change(request.id, completion.logprobs))

    engine.generate = changed


def spy_on_updates(trainer: Trainer) -> list[tuple]:
    """The list that fills with (on_policy, replay, gamma) of every update."""
    learner, updates = trainer.parts.learner, []
    update = learner.update

    def spy(on_policy, replay, *, gamma, objectives, seed):
        updates.append((on_policy, replay, gamma))
        return update(on_policy, replay, gamma=gamma, objectives=objectives, seed=seed)

    learner.update = spy
    return updates
