"""One training step, in order: tasks → rollout → rows → shaping → old log-probabilities → advantages → update → buffers → publish."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spearrl import algorithm
from spearrl.algorithm import Memory, Shaped
from spearrl.algorithm.curriculum import Curriculum
from spearrl.batching import Batch, rows_from_groups
from spearrl.config import RunConfig, check, load_config
from spearrl.envs import Environment
from spearrl.errors import ConfigError
from spearrl.evaluation import EvalResult, choose_panel, run_panel, some_tasks
from spearrl.launch.assembly import START, Parts, assemble, check_extras
from spearrl.launch.build import make_environment
from spearrl.models import prepare_torch
from spearrl.rollout.episodes import Episodes
from spearrl.run import Run
from spearrl.run.checkpoint import clean, load_state, newest_checkpoint, save_checkpoint, save_state
from spearrl.run.health import Health
from spearrl.run.metrics import Clock, bonus_of, first_fault, sampler_gap, staleness, states_met
from spearrl.seeds import derive
from spearrl.start.origin import Origin, Report, silent, starting_model
from spearrl.types import Group

REFERENCE = "reference"  # folder of a run directory: the model it began with, where divergences from it or adapters to it are trained
COUNTERS = ("step", "policy_version")


class Trainer:
    """Trains one run. `Trainer(config).train()` starts it; `Trainer.resume(path)` continues from the newest valid checkpoint.

    Args:
        config: everything that defines the run.
        report: called with (kind, values) for every event: "expert", "sft", "eval", "step", "checkpoint", "warning".
    """

    def __init__(self, config: RunConfig, *, report: Report = silent, _run: Run | None = None):
        check(config)
        check_extras(config)
        self.config = config
        self.stop_requested = False
        self._report = report
        self.step = 0
        self.policy_version = 0
        self.states_met: list[int] = []
        self.objectives = algorithm.objectives(config.algo)
        algorithm.check_advantage(config.algo)
        environment = make_environment(config)
        self.tasks = some_tasks(environment, config.rollout.train_split, "rollout.train_split")
        self.panel = choose_panel(environment, config.eval)
        self.run = _run or Run.create(config)
        try:
            self._begin(environment, resumed=_run is not None)
        except BaseException:
            self.run.close(discard=_run is None)
            raise

    def _begin(self, environment: Environment, *, resumed: bool) -> None:
        """Model, parts, buffers; a resumed run's come from its newest valid checkpoint. A new run has one to resume from afterwards."""
        config, device = self.config, prepare_torch(self.config)
        if resumed:
            checkpoint, warnings = newest_checkpoint(self.run.checkpoints)
            for warning in warnings:
                self._log("warning", {"text": f"checkpoint skipped: {warning}"})
            origin = Origin.of(self._kept() if config.learner.lora.rank else checkpoint)
        else:
            origin = starting_model(config, environment, device, self.run.path / START, self._log)
        reference = (
            self._reference(origin, resumed=resumed)
            if algorithm.needs_reference(config.algo) or config.learner.lora.rank
            else None
        )
        self.parts: Parts = assemble(
            config, origin, environment, device, reference=reference, run_folder=self.run.path, report=self._log
        )
        self.episodes = Episodes(config, self.parts.collector, self.tasks)
        self.memory = Memory(config.algo.sil, config.run.seed)
        self.curriculum = Curriculum(config.algo.sil.gamma, config.algo.intrinsic.mu)
        self.health = Health()
        if resumed:
            self._load(checkpoint)
        else:
            self.episodes.begin()
            self.parts.publish(self.policy_version)
            self.save()

    @classmethod
    def resume(cls, path: str | Path, *, report: Report = silent, overrides: Sequence[str] = ()) -> Trainer:
        """Continue a run from its newest valid checkpoint, with its own resolved config."""
        folder = Path(path)
        config = load_config(folder / "config.toml", overrides)
        run = Run(folder, tensorboard=config.run.tensorboard)
        clean(run.checkpoints)
        trainer = cls(config, report=report, _run=run)
        if overrides:  # only now: settings the run cannot go on with must not stay in its directory
            run.rewrite_config(config, overrides)
        return trainer

    def train(self) -> EvalResult | None:
        """Train to the last step; returns the last evaluation. A requested stop ends after the running step, saved."""
        result = self.evaluate() if self._evaluation_due() and self.step not in self.run.steps_of("eval") else None
        while self.step < self.config.run.steps and not self.stop_requested:
            self.step += 1
            self._log("step", self.train_step(self.step))
            last = self.step == self.config.run.steps
            if (
                last
                or self.stop_requested
                or (self.config.run.checkpoint_every and self.step % self.config.run.checkpoint_every == 0)
            ):
                self.save()
            if self._evaluation_due() and not self.stop_requested:
                result = self.evaluate()
        return result

    def _evaluation_due(self) -> bool:
        every = self.config.eval.every
        return self.step in (0, self.config.run.steps) or bool(every and self.step % every == 0)

    def train_step(self, step: int) -> dict[str, float]:
        """One step of design section 2; returns its metrics."""
        clock = Clock()
        groups, played = self.play(step)
        clock.lap("rollout")
        if self.config.run.trajectories_every and step % self.config.run.trajectories_every == 0:
            self.run.trajectories(step, groups)
        metrics = {**played, **self.learn(step, groups, clock), **clock.metrics(played["rollout/tokens"])}
        self.observe(metrics)
        for alarm in self.health.observe(step, metrics):
            self._log("warning", {"flag": alarm.flag, "text": f"step {step}: {alarm.text}"})
        return metrics

    def play(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """The step's groups, and what their episodes were like."""
        groups, metrics = self.episodes.play(step, self.policy_version)
        self.states_met = states_met(groups) if self.curriculum.needs_anchors else []
        return groups, metrics

    def learn(self, step: int, groups: list[Group], clock: Clock) -> dict[str, float]:
        """Rows, shaping, advantages, update, buffers, publish; the step's metrics."""
        config, algo, learner = self.config, self.config.algo, self.parts.learner
        gamma = self.curriculum.gamma(step) if algo.sil.enabled else 0.0
        mu = self.curriculum.mu(step) if algo.intrinsic.enabled else 0.0
        metrics = {"gamma": gamma, "mu": mu, **self.curriculum.metrics()}
        size, limit = config.rollout.group_size, config.rollout.max_reply_tokens
        kept = algorithm.trainable(groups, size)
        if not any(t.turns for g in kept for t in g.trajectories):
            self._log(
                "warning",
                {"text": f"step {step}: no group has two sound siblings; nothing was trained{first_fault(groups)}"},
            )
            return metrics

        self.parts.hand_over()
        seed = derive(config.run.seed, "shape", step)
        shaped = algorithm.shape(
            rows_from_groups(kept), kept, algo, mu=mu, max_reply_tokens=limit, group_size=size, seed=seed
        )
        on_policy, credit = self._on_policy(shaped)
        clock.lap("prepare")

        replay = self.memory.due(step) if gamma > 0 else None
        result = learner.update(
            on_policy, replay, gamma=gamma, objectives=self.objectives, seed=derive(config.run.seed, "update", step)
        )
        clock.lap("update")

        self.memory.remember(step, kept, shaped, credit, on_policy.old_logprobs)
        metrics |= staleness(on_policy.rows, self.policy_version)
        self.policy_version += 1
        metrics |= self.parts.publish(self.policy_version)
        clock.lap("sync")
        metrics |= {
            "replay/rows": float(len(replay.rows)) if replay is not None else 0.0,
            "policy/skipped": float(result.skipped),
        }
        return {**metrics, **shaped.metrics, **sampler_gap(on_policy), **result.metrics, **self.memory.metrics()}

    def observe(self, metrics: dict[str, float]) -> None:
        """What a step was like: adaptive γ and μ of the next one follow it."""
        self.curriculum.observe(
            success=metrics.get("rollout/success"),
            entropy=metrics.get("policy/entropy"),
            anchors=self.states_met or None,
        )

    def _on_policy(self, shaped: Shaped) -> tuple[Batch, algorithm.Credit]:
        """The step's batch: log-probabilities before the update, what the algorithm needs beside them, and advantages."""
        rows, algo, learner = shaped.rows, self.config.algo, self.parts.learner
        old_logprobs = learner.logprobs(rows)
        ref_logprobs = learner.logprobs(rows, reference=True) if algorithm.needs_reference(algo) else None
        values = learner.values(rows.with_action_mask(rows.turn_index >= 0)) if algorithm.needs_critic(algo) else None
        credit = algorithm.assign_credit(
            shaped, algo, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, values=values
        )
        batch = Batch(
            rows, credit.tokens, old_logprobs, ref_logprobs, values, credit.returns, rows.pad(rows.rollout_logprobs)
        )
        return batch, credit

    def evaluate(self) -> EvalResult:
        """Play the fixed panel with the current weights."""
        start = time.monotonic()
        result, groups = run_panel(self.parts.evaluator, self.panel, self.config)
        self.run.trajectories(self.step, groups, name=f"eval-{self.config.eval.split}")
        flat = {
            "success": result.success.rate,
            "low": result.success.low,
            "high": result.success.high,
            "reward": result.reward,
            **result.measures,
        }
        if self.config.algo.intrinsic.in_evaluation:
            flat["reward_with_bonus"] = result.reward + self.curriculum.mu(max(1, self.step)) * bonus_of(
                groups, self.config.algo
            )
        flat |= {f"success {name}": rate.rate for name, rate in result.strata.items()}
        told = {
            "turns": result.turns,
            "tasks": result.success.tasks,
            "errors": result.errors,
            **result.notes,
            "panel": result.panel,
        }
        self._log("eval", {**flat, **told, "seconds": time.monotonic() - start})
        return result

    def save(self) -> Path:
        """Write a checkpoint: weights, tokenizer, optimiser, buffers, counters."""
        path = save_checkpoint(self.run.checkpoints, self.step, self._write, keep=self.config.run.keep)
        self._log("checkpoint", {"path": str(path)})
        return path

    def close(self) -> None:
        """Release environments, engines, learner processes and the run directory."""
        self.episodes.close()
        self.parts.close()
        self.run.close()

    def _reference(self, origin: Origin, *, resumed: bool) -> Path:
        """The starting model, kept in the run directory: KL divergences are measured from it, adapters are of no use without it."""
        if resumed:
            return self._kept()
        origin.keep(self.run.path / REFERENCE)
        return self.run.path / REFERENCE

    def _kept(self) -> Path:
        """The reference model of a resumed run. Raises ConfigError where none was kept."""
        folder = self.run.path / REFERENCE
        if not folder.is_dir():
            hint = "start a new run, or leave algo.kl.loss_coef, algo.kl.reward_coef and learner.lora.rank at 0"
            raise ConfigError(
                "the run began without a KL divergence or adapters and kept no reference model",
                where=str(folder),
                hint=hint,
            )
        return folder

    def _write(self, folder: Path) -> None:
        self.parts.learner.save(folder)
        self.parts.tokenizer.save_pretrained(folder)
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        counters = {name: getattr(self, name) for name in COUNTERS}
        save_state(folder / "training", "state", {**counters, "episodes": self.episodes.state_dict(), **state})

    def _load(self, checkpoint: Path) -> None:
        state = load_state(checkpoint / "training", "state")
        for name in COUNTERS:
            setattr(self, name, state[name])
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.episodes.load_state_dict(state["episodes"], step=self.step)
        self.parts.learner.load(checkpoint)
        self.parts.publish(self.policy_version)
        self._log(
            "resume",
            {"from": str(checkpoint), "replay_stored": len(self.memory.replay), "baselines": len(self.memory.baseline)},
        )

    def _stateful(self) -> dict[str, Any]:
        return {"memory": self.memory, "curriculum": self.curriculum, "health": self.health}

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        self.run.event(kind, self.step, values)
        self._report(kind, {"step": self.step, "steps": self.config.run.steps, **values})
