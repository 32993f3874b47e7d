"""A training run with everything that reached the learner, the optimiser and the buffers written down."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from spearrl.batching import Batch
from spearrl.config import RunConfig
from spearrl.learner.loss_inputs import Share
from spearrl.losses import Objective
from spearrl.trainer import Trainer
from spearrl.types import Action, Group, Outcome, Reply
from tests.support.short_runs import change_logprobs, run
from tests.support.toy_envs import Fetch

Weights = dict[str, torch.Tensor]
ENGINE_OFFSET = (
    -0.25
)  # what the engine reports is off by this, so that its log-probabilities cannot be taken for the learner's


class Graded(Fetch):
    """Fetch whose rewards have ties and whose machinery fails: two tasks in three pay 5 for any word, the third 10, 5
    or 0.

    A wrong "gray" breaks it; a wrong "pink" is a fault that it survives.
    """

    def step(self, action: Action) -> Outcome:
        outcome = super().step(action)
        word = action.text.removeprefix("say ")
        if not outcome.terminated or word == action.text:
            return outcome
        right = bool(outcome.info["success"])
        if word == "gray" and not right:
            raise RuntimeError("the shelf fell down")
        consolation = 5.0 * (self._looked and (self._index % 3 != 0 or word in ("red", "pink", "gold")))
        reward = 10.0 if right and self._index % 3 == 0 else consolation
        return Outcome(outcome.observation, reward, True, info={**outcome.info, "fault": word == "pink" and not right})


class Costly(Graded):
    """Looking, which nobody can win without, counts as invalid: each winner has a turn with the penalty."""

    def parse(self, reply: Reply) -> Action:
        action = super().parse(reply)
        return replace(action, valid=action.valid and action.text != "look")


@dataclass
class Pass:
    """One optimiser step."""

    losses: list[tuple[str, tuple[int, ...]]]  # kind and row uids of each loss in it
    mini_batches: list[tuple[str, tuple[int, ...]]]  # the same with rows that were left out for want of a signal
    weights: Weights  # before it
    gradient: Weights


@dataclass
class Step:
    """One training step."""

    number: int
    groups: list[Group]
    weights: Weights  # that played it
    on_policy: Batch | None = None
    replay: Batch | None = None
    gamma: float = 0.0
    passes: list[Pass] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)  # trajectories in the buffer afterwards
    level: float = 0.0  # P50 of the baselines afterwards


@dataclass
class Recording:
    config: RunConfig
    model: torch.nn.Module
    steps: list[Step]


def record(config: RunConfig) -> Recording:
    """Train to the end."""
    steps: list[Step] = []
    mini_batches: list[tuple[str, tuple[int, ...]]] = []
    with_signal = Share.with_signal

    def spy_with_signal(share: Share) -> Share:
        kept = with_signal(share)
        if len(kept.batch):
            mini_batches.extend((o.kind, tuple(share.batch.rows.uid.tolist())) for o, _ in share.objectives)
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Share, "with_signal", spy_with_signal)
        trainer = run(config, lambda trainer: _watch(trainer, steps, mini_batches))
    return Recording(config, trainer.parts.model, steps)


class _Watched:
    """An objective that notes which rows its loss was asked for."""

    def __init__(self, objective: Objective, calls: list[tuple[str, tuple[int, ...]]]):
        self._objective, self._calls = objective, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def loss(self, batch: Any, logprobs: torch.Tensor, **options: Any) -> Any:
        self._calls.append((self._objective.kind, tuple(batch.uid.tolist())))
        return self._objective.loss(batch, logprobs, **options)


def _watch(trainer: Trainer, steps: list[Step], mini_batches: list[tuple[str, tuple[int, ...]]]) -> None:
    learner, model, calls = trainer.parts.learner, trainer.parts.model, []
    learn, update = trainer.learn, learner.update

    def spy_learn(number, groups, clock):
        steps.append(Step(number, groups, _copy(model.state_dict())))
        metrics = learn(number, groups, clock)
        steps[-1].stored = sorted({i for _, rows in trainer.memory.replay.entries for i in rows.trajectory.tolist()})
        steps[-1].level = trainer.memory.baseline.percentile(50)
        return metrics

    def spy_update(on_policy, replay, *, gamma, objectives, seed):
        steps[-1].on_policy, steps[-1].replay, steps[-1].gamma = on_policy, replay, gamma
        watched = [_Watched(objective, calls) for objective in objectives]
        result = update(on_policy, replay, gamma=gamma, objectives=watched, seed=seed)
        steps[-1].on_policy = replace(on_policy, old_logprobs=result.old_logprobs)
        return result

    def before_optimiser_step(*_):
        gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        steps[-1].passes.append(Pass(list(calls), list(mini_batches), _copy(model.state_dict()), _copy(gradient)))
        calls.clear()
        mini_batches.clear()

    change_logprobs(trainer, lambda _, values: tuple(value + ENGINE_OFFSET for value in values))
    trainer.learn, learner.update = spy_learn, spy_update
    learner.optimizer.register_step_pre_hook(before_optimiser_step)


def _copy(tensors: Weights) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
