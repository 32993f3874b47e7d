"""One training step, in order: tasks → rollout → rows → shaping → old log-probabilities → advantages → update → buffers → publish."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spearrl import algorithm
from spearrl.algorithm import Shaped
from spearrl.assembly import Parts, Report, assemble, make_environment, prepare_torch, starting_model
from spearrl.batching import Batch, rows_from_groups
from spearrl.buffers import BaselineBuffer, ReplayBuffer
from spearrl.checkpoint import clean, load_state, newest_checkpoint, save_checkpoint, save_state
from spearrl.config import RunConfig, check, load_config
from spearrl.envs import Environment
from spearrl.evaluation import EvalResult, choose_panel, run_panel, some_tasks
from spearrl.metrics import Clock, rollout_metrics
from spearrl.models import load_model, load_tokenizer
from spearrl.run import Run
from spearrl.seeds import derive
from spearrl.tasks import tasks_of_step


def _silent(kind: str, values: dict[str, Any]) -> None:
    """Progress nobody asked for."""


class Trainer:
    """Trains one run. `Trainer(config).train()` starts it; `Trainer.resume(path)` continues from the newest valid checkpoint.

    Args:
        config: everything that defines the run.
        report: called with (kind, values) for every event: "expert", "sft", "eval", "step", "checkpoint", "warning".
    """

    def __init__(self, config: RunConfig, *, report: Report = _silent, _run: Run | None = None):
        check(config)
        self.config = config
        self.stop_requested = False
        self._report = report
        self.step = 0
        self.policy_version = 0
        self.objectives = algorithm.objectives(config.algo)
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
            model, tokenizer = load_model(str(checkpoint)), load_tokenizer(str(checkpoint))
        else:
            model, tokenizer = starting_model(config, environment, device, self._log)
        self.parts: Parts = assemble(config, model, tokenizer, environment, device)
        sil = config.algo.sil
        self.baseline = BaselineBuffer(sil.baseline_capacity)
        self.replay = ReplayBuffer(
            sil.capacity,
            max_age=sil.max_age,
            fill_factor=sil.fill_factor,
            recalibration=sil.recalibration,
            decay=sil.decay,
            normalize_std=sil.normalize_std,
            keep_zero=sil.keep_zero,
            age_reference=sil.age_reference,
            subset=sil.subset,
            min_rows=sil.min_rows,
            unit=sil.unit,
        )
        if resumed:
            self._load(checkpoint)
        else:
            self.save()

    @classmethod
    def resume(cls, path: str | Path, *, report: Report = _silent, overrides: Sequence[str] = ()) -> Trainer:
        """Continue a run from its newest valid checkpoint, with its own resolved config."""
        folder = Path(path)
        config = load_config(folder / "config.toml", overrides)
        run = Run(folder, tensorboard=config.run.tensorboard)
        if overrides:
            run.rewrite_config(config, overrides)
        clean(run.checkpoints)
        return cls(config, report=report, _run=run)

    def train(self) -> EvalResult | None:
        """Train to the last step; returns the last evaluation. A requested stop ends after the running step, saved."""
        every, result = self.config.eval.every, None
        if self.step == 0:
            result = self.evaluate()
        while self.step < self.config.run.steps and not self.stop_requested:
            self.step += 1
            self._log("step", self.train_step(self.step))
            last = self.step == self.config.run.steps
            if last or self.stop_requested or (self.config.run.checkpoint_every and self.step % self.config.run.checkpoint_every == 0):
                self.save()
            if (last or (every and self.step % every == 0)) and not self.stop_requested:
                result = self.evaluate()
        return result

    def train_step(self, step: int) -> dict[str, float]:
        """One step of design section 2; returns its metrics."""
        config, algo, parts, clock = self.config, self.config.algo, self.parts, Clock()
        size, count = config.rollout.group_size, config.rollout.groups_per_step
        gamma, mu = algorithm.gamma(algo, step), algorithm.mu(algo, step)

        tasks = tasks_of_step(self.tasks, step, count, config.run.seed)
        groups = parts.collector.collect(tasks, size, run_seed=config.run.seed, step=step, first_group_id=step * count)
        clock.lap("rollout")
        kept = algorithm.trainable(groups, size)
        measured = {f"time/{name.removesuffix('_seconds')}": parts.collector.measures[name] for name in ("engine_seconds", "env_seconds")}
        metrics = {**rollout_metrics(groups, kept), **measured, "gamma": gamma, "mu": mu}
        if config.run.trajectories_every and step % config.run.trajectories_every == 0:
            self.run.trajectories(step, groups)
        if not any(t.turns for g in kept for t in g.trajectories):
            faults = [t.error.strip().splitlines()[-1] for g in groups for t in g.trajectories if t.error]
            cause = f" (first fault: {faults[0]})" if faults else ""
            self._log("warning", {"text": f"step {step}: no group has two sound siblings; nothing was trained{cause}"})
            return {**metrics, **clock.metrics()}

        rows = rows_from_groups(kept)
        shaped = algorithm.shape(rows, kept, algo, mu=mu, max_reply_tokens=config.rollout.max_reply_tokens)
        old_logprobs = parts.learner.logprobs(shaped.rows)
        advantages = algorithm.turn_advantages(shaped, algo)
        clock.lap("prepare")

        on_policy = algorithm.on_policy_batch(shaped, advantages, old_logprobs)
        replay = self._due_replay(step) if gamma > 0 else None
        result = parts.learner.update(on_policy, replay, gamma=gamma, objectives=self.objectives, seed=derive(config.run.seed, "update", step))
        clock.lap("update")

        if algo.sil.enabled:
            self._remember(step, shaped, advantages, old_logprobs)
        self.policy_version += 1
        parts.engine.publish(self.policy_version)
        replayed = float(len(replay.rows)) if replay is not None else 0.0
        buffer = {"replay/rows": replayed, "replay/stored": float(len(self.replay)), "replay/p50": self._p50(), "policy/skipped": float(result.skipped)}
        return {**metrics, **shaped.metrics, **result.metrics, **buffer, **clock.metrics(tokens=metrics["rollout/tokens"])}

    def evaluate(self) -> EvalResult:
        """Play the fixed panel with the current weights."""
        start = time.monotonic()
        result, groups = run_panel(self.parts.evaluator, self.panel, self.config)
        self.run.trajectories(self.step, groups, name=f"eval-{self.config.eval.split}")
        flat = {"success": result.success.rate, "low": result.success.low, "high": result.success.high, "reward": result.reward, **result.measures}
        flat |= {f"success {name}": rate.rate for name, rate in result.strata.items()}
        self._log(
            "eval",
            {
                **flat,
                "turns": result.turns,
                "tasks": result.success.tasks,
                "errors": result.errors,
                **result.notes,
                "panel": result.panel,
                "seconds": time.monotonic() - start,
            },
        )
        return result

    def save(self) -> Path:
        """Write a checkpoint: weights, tokenizer, optimiser, buffers, counters."""
        path = save_checkpoint(self.run.checkpoints, self.step, self._write, keep=self.config.run.keep)
        self._log("checkpoint", {"path": str(path)})
        return path

    def close(self) -> None:
        """Release environments and the run directory."""
        self.parts.close()
        self.run.close()

    def _due_replay(self, step: int) -> Batch | None:
        """The flushed buffer if it is due: tested before this step's rows go in, so nothing is replayed in its own step."""
        if not self.replay.ready(self.baseline):
            return None
        generator = torch.Generator().manual_seed(derive(self.config.run.seed, "replay", step))
        batch = self.replay.drain(step, self.baseline, generator)
        if batch is not None:
            batch.advantages = batch.advantages / self.config.algo.sil.reward_scale
        return batch

    def _remember(self, step: int, shaped: Shaped, advantages: torch.Tensor, old_logprobs: torch.Tensor) -> None:
        self.replay.add(step, shaped.rows, shaped.rewards, advantages, old_logprobs)
        self.baseline.add(step, *algorithm.baselines(shaped))

    def _p50(self) -> float:
        return self.baseline.percentile(50) if len(self.baseline) else 0.0

    def _write(self, folder: Path) -> None:
        self.parts.learner.save(folder)
        self.parts.tokenizer.save_pretrained(folder)
        state = {"step": self.step, "policy_version": self.policy_version, "replay": self.replay.state_dict(), "baseline": self.baseline.state_dict()}
        save_state(folder, "state", state)

    def _load(self, checkpoint: Path) -> None:
        state = load_state(checkpoint, "state")
        self.step, self.policy_version = state["step"], state["policy_version"]
        self.replay.load_state_dict(state["replay"])
        self.baseline.load_state_dict(state["baseline"])
        self.parts.learner.load(checkpoint)
        self.parts.engine.publish(self.policy_version)
        self._log("resume", {"from": str(checkpoint), "replay_stored": len(self.replay), "baselines": len(self.baseline)})

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        self.run.event(kind, self.step, values)
        self._report(kind, {"step": self.step, "steps": self.config.run.steps, **values})
