"""Training, a step in order: tasks → rollout → rows → shaping → advantages → update → buffers → publish."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from spearrl import algorithm
from spearrl.algorithm import Shaped
from spearrl.batching import Batch, rows_from_groups
from spearrl.config import RunConfig, check
from spearrl.envs import Environment, tasks_of
from spearrl.evaluation import EvalResult, play_panel, tasks_of_panel
from spearrl.launch.assembly import Assembly, assemble, check_extras
from spearrl.launch.factories import make_environment
from spearrl.launch.processors import with_sampling_dtype
from spearrl.models import prepare_torch, tokenizer_hash
from spearrl.rollout.tasks_of_step import Episodes
from spearrl.run import Run
from spearrl.run.checkpoint import save_state
from spearrl.run.metrics import Clock, bonus_of, nothing_trained, rollout_metrics, sampler_gap, staleness, states_met
from spearrl.run.resume import Resumption, Stateful
from spearrl.run.safeguards import Guards
from spearrl.seeds import derive
from spearrl.start.origin import Report, models_of_run, silent, with_pinned_model
from spearrl.types import Group


class Trainer:
    """Trains one run and owns its resources: `with Trainer(config) as trainer: trainer.train()`.

    `Trainer.resume(path)` continues one from its newest valid checkpoint. unsandboxed_tools: as docs/sandbox.md has it.

    Args:
        config: everything that defines the run.
        report: called with (kind, values) for every event: "format", "engine", "sft", "sync", "eval", "step", …
    Raises:
        SpearError: the run cannot begin. Whatever was started by then is closed, and a new run leaves no directory.
    """

    def __init__(self, config: RunConfig, *, report: Report = silent, unsandboxed_tools=False, _run: Run | None = None):
        check(config)
        check_extras(config, unsandboxed_tools=unsandboxed_tools)
        algorithm.check_advantage(config.algo)
        self._report, self.stop_requested, self.evaluating, self.step, self.policy_version = report, False, False, 0, 0
        self.states_met: list[int] = []
        self.objectives = algorithm.objectives(config.algo)
        environment = make_environment(config)
        self.tasks = tasks_of(environment, config.rollout.train_split, setting="rollout.train_split")
        self.panel = tasks_of_panel(environment, config.eval)
        self.config = config if _run else with_sampling_dtype(with_pinned_model(config, environment), report)
        with ExitStack() as stack:
            self.run = _run or Run.create(self.config)
            stack.push(lambda kind, *_: self.run.close(discard=kind is not None and _run is None))
            self.run.warn = lambda text: report("warning", {"text": text})
            self._begin(environment, stack, self.run.past)
            self._resources = stack.pop_all()

    def _begin(self, environment: Environment, resources: ExitStack, past: Resumption | None) -> None:
        """Model, parts, buffers, as the newest valid checkpoint has them; a new run writes its first one."""
        config, device = self.config, prepare_torch(self.config)
        checkpoint = past.checkpoint if past else None
        for event in past.events() if past else ():
            self._log(*event)
        origin, reference = models_of_run(config, environment, device, self.run.path, self._log, checkpoint=checkpoint)
        self.saver = self.run.saver(config, tokenizer_hash(origin.tokenizer), self._log)
        resources.callback(self.saver.close)
        self.parts: Assembly = assemble(
            config, origin, environment, device, reference=reference, run_folder=self.run.path, report=self._log
        )
        resources.callback(self.parts.close)
        self.episodes = Episodes(config, self.parts.players.collector, self.tasks)
        resources.callback(self.episodes.close)
        self.guards = Guards(config, self.run.path, self._log)
        self.stateful = past.parts if past else Stateful.begun(config)
        self.memory, self.curriculum, self.health = self.stateful
        if past:
            self.step, self.policy_version = past.state["step"], past.state["policy_version"]
            self.episodes.load_state_dict(past.state["episodes"], step=self.step)
            self.parts.learner.load(past.checkpoint)
            self._log("resume", past.summary())
        else:
            self.episodes.begin()
        if measured := self.parts.publish(self.policy_version):
            self._log("sync", measured)
        if not past:
            self.save()

    @classmethod
    def resume(
        cls, path: str | Path, *, report: Report = silent, overrides: Sequence[str] = (), unsandboxed_tools=False
    ) -> Trainer:
        """Continue a run from its newest valid checkpoint, with its own resolved config and these `overrides`.

        Its directory changes with the first new step. Raises RefusedError for settings that make another run of it.
        """
        with ExitStack() as opened:
            run, past = Run.reopen(Path(path), overrides, opened)
            trainer = cls(past.config, report=report, unsandboxed_tools=unsandboxed_tools, _run=run)
            opened.pop_all()
        return trainer

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release environments, engines, learner processes and the run directory. May be called again."""
        self._resources.close()

    def train(self) -> EvalResult | None:
        """Train to the last step; returns the last evaluation. A requested stop ends after the running step, saved."""
        run, every = self.config.run, self.config.eval.every
        due = self.step not in self.saver.score(self.run.evaluations()) and self._due(every) and not self.stop_requested
        result = self._evaluate() if due else None
        while self.step < run.steps and not self.stop_requested:
            self.step += 1
            self._log("step", self.train_step(self.step))
            self.saver.settle(wait=False)
            last = self.stop_requested or self.guards.error or self.step == run.steps
            if last or self._due(run.checkpoint_every):
                later = None if last else min(run.steps, self.step + run.checkpoint_every)
                self.saver.save(self.step, self._write, next_try=later)
            self.guards.stop()
            if self._due(every) and not self.stop_requested:
                result = self._evaluate()
        self.saver.settle()
        if self.saver.step != self.step:
            self.save()
        return result

    def _due(self, every: int) -> bool:
        return self.step == self.config.run.steps or bool(every and self.step % every == 0)

    def train_step(self, step: int) -> dict[str, float]:
        """One step of training; returns its metrics (docs/metrics.md)."""
        self.run.go_on()
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
        """The step's groups, and metrics of their episodes."""
        episodes = self.episodes.play(step, self.policy_version)
        self.states_met = states_met(episodes.groups) if self.curriculum.needs_anchors else []
        self.guards.played(step, episodes.played)
        trained = algorithm.trainable(episodes.played, self.config.rollout.group_size)
        return episodes.groups, {**rollout_metrics(episodes.played, trained), **episodes.measures}

    def learn(self, step: int, groups: list[Group], clock: Clock) -> dict[str, float]:
        """Rows, shaping, advantages, update, buffers, publish; returns the step's metrics."""
        config, algo = self.config, self.config.algo
        gamma = self.curriculum.gamma(step) if algo.sil.enabled else 0.0
        mu = self.curriculum.mu(step) if algo.intrinsic.enabled else 0.0
        metrics = {"gamma": gamma, "mu": mu, **self.curriculum.metrics()}
        size, limit = config.rollout.group_size, config.rollout.max_reply_tokens
        sound = algorithm.trainable(groups, size)
        if not any(t.turns for g in sound for t in g.trajectories):
            self._log("warning", {"text": nothing_trained(step, groups)})
            return metrics
        self.parts.sleep_engines()
        rows, seed = rows_from_groups(sound), derive(config.run.seed, "shape", step)
        shaped = algorithm.shape(rows, sound, algo, mu=mu, max_reply_tokens=limit, group_size=size, seed=seed)
        on_policy, credit = self._on_policy(shaped)
        clock.lap("prepare")
        replay, seed = self.memory.due(step) if gamma > 0 else None, derive(config.run.seed, "update", step)
        result = self.parts.learner.update(on_policy, replay, gamma=gamma, objectives=self.objectives, seed=seed)
        clock.lap("update")
        on_policy = replace(on_policy, old_logprobs=result.old_logprobs)
        self.guards.updated(step, result, on_policy, self.policy_version)
        self.memory.remember(step, sound, shaped, credit, result.old_logprobs)
        metrics |= staleness(on_policy.rows, self.policy_version)
        self.policy_version += 1
        metrics |= self.parts.publish(self.policy_version)
        clock.lap("sync")
        metrics |= {"replay/rows": float(len(replay or ())), "policy/skipped": float(result.skipped)}
        return {**metrics, **shaped.metrics, **sampler_gap(on_policy), **result.metrics, **self.memory.metrics()}

    def observe(self, metrics: dict[str, float]) -> None:
        """Tell the curriculum how a step went: adaptive γ and μ of the next one follow it."""
        success, entropy = metrics.get("rollout/success"), metrics.get("policy/entropy")
        self.curriculum.observe(success=success, entropy=entropy, anchors=self.states_met or None)

    def _on_policy(self, shaped: Shaped) -> tuple[Batch, algorithm.Credit]:
        """The step's batch: what advantages need before the update, which finds old_logprobs itself, and advantages."""
        rows, algo, learner = shaped.rows, self.config.algo, self.parts.learner
        old = learner.logprobs(rows) if algo.kl.reward_coef else None
        reference = learner.logprobs(rows, reference=True) if algorithm.needs_reference(algo) else None
        values = learner.values(rows.with_action_mask(rows.turn_index >= 0)) if algorithm.needs_critic(algo) else None
        credit = algorithm.assign_credit(shaped, algo, old_logprobs=old, ref_logprobs=reference, values=values)
        batch = Batch(rows, credit.tokens, old, reference, values, credit.returns, rows.pad(rows.rollout_logprobs))
        return batch, credit

    def _evaluate(self) -> EvalResult | None:
        """The evaluation that is due; None where a stop interrupts it: a resumed run makes it up."""
        self.evaluating = True
        try:
            return self.evaluate_policy()
        except KeyboardInterrupt:
            if not self.stop_requested:
                raise
        finally:
            self.evaluating = False
        self.save()
        return None

    def evaluate_policy(self) -> EvalResult:
        """Play the run's panel with the current weights; the result goes into the event log too."""
        self.run.go_on()
        start = time.monotonic()
        result, groups = play_panel(self.parts.players.evaluator, self.panel, self.config)
        self.run.trajectories(self.step, groups, name=f"eval-{self.config.eval.split}")
        values = result.values()
        if self.config.algo.intrinsic.in_evaluation:
            bonus = self.curriculum.mu(max(1, self.step)) * bonus_of(groups, self.config.algo)
            values["reward_with_bonus"] = result.reward + bonus
        self._log("eval", {**values, "seconds": time.monotonic() - start})
        self.saver.score([{"step": self.step, **values}])
        return result

    def save(self) -> Path:
        """Write a checkpoint: weights, tokenizer, optimiser, buffers, counters. Raises StorageError."""
        self.run.go_on()
        self.saver.save(self.step, self._write)
        return self.run.checkpoints / f"step-{self.step:06d}"

    def _write(self, folder: Path) -> None:
        self.parts.learner.save(folder)
        self.parts.tokenizer.save_pretrained(folder)
        parts = {
            name: part.state_dict() for name, part in {**self.stateful._asdict(), "episodes": self.episodes}.items()
        }
        save_state(folder / "training", "state", {"step": self.step, "policy_version": self.policy_version, **parts})

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        self.run.event(kind, step := values.pop("step", self.step), values)  # a checkpoint is complete in a later one
        self._report(kind, {"step": step, "steps": self.config.run.steps, **values})
