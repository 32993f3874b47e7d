"""What ends a run that would go on to no purpose, and what is kept for finding out why: docs/reliability.md."""

from __future__ import annotations

import shlex
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from spearrl.batching import Batch
from spearrl.config import RunConfig
from spearrl.config.foreign import to_repeat
from spearrl.errors import ConfigError, NumericsError, SpearError, WorkerError
from spearrl.learner.protocol import UpdateResult
from spearrl.run import bad_batch
from spearrl.types import Group, Status

SKIPPED = 3  # training steps in a row whose every optimiser step was left out
BARREN = 3  # training steps in a row without an episode that could be played
EPISODES = 50  # the least that a rate of errors is taken over
GAP_LIMIT = 1.0  # mean |learner − engine| in nats at one and the same weights: they are of two models


class Guards:
    """Watches a run's episodes and updates; `stop` raises what it must end with, once the running step is over.

    Args:
        folder: the run directory.
        report: told of what is noteworthy.
    """

    def __init__(self, config: RunConfig, folder: Path, report: Callable[[str, dict[str, Any]], None]):
        self.config, self.folder, self._report = config, folder, report
        self.error: SpearError | None = None
        self._skipped = self._barren = 0
        self._learnt = False
        self._errors: deque[tuple[int, list[str]]] = deque()  # of each step: episodes, tracebacks of env_errors

    def stop(self) -> None:
        """Raise what the run must end with, if there is anything."""
        if self.error is not None:
            raise self.error

    def played(self, step: int, groups: Sequence[Group]) -> None:
        """A step's episodes: their rate of environment errors over EPISODES or more, and steps of nothing else."""
        episodes = [t for group in groups for t in group.trajectories]
        errors = [t.error or "" for t in episodes if t.status is Status.ENV_ERROR]
        self._errors.append((len(episodes), errors))
        while sum(count for count, _ in self._errors) - self._errors[0][0] >= EPISODES:
            self._errors.popleft()
        total, tracebacks = sum(count for count, _ in self._errors), [e for _, own in self._errors for e in own]
        limit = self.config.rollout.max_env_errors
        barren = all(t.status.is_error or not t.turns for t in episodes)
        self._barren = self._barren + 1 if barren else 0
        nothing = self._barren >= BARREN or (barren and step == self.config.run.steps)
        unfit = [t.error or "" for t in episodes if t.status is Status.CONTEXT_LIMIT and not t.turns]
        if nothing and len(unfit) > len(episodes) / 2:
            text = f"no prompt fits into the context, in {self._barren} steps of {len(episodes)} episodes: {min(unfit)}"
            hint = "raise rollout.context_tokens (the model must have been made for as many), or use shorter prompts"
            self.error = ConfigError(text, where="rollout.context_tokens", hint=hint)
        elif tracebacks and (nothing or (total >= EPISODES and len(tracebacks) > limit * total)):
            top, count = Counter(tracebacks).most_common(1)[0]
            text = f"{len(tracebacks)} of {total} episodes ended in an error of the environment (limit {limit:.0%} of "
            text += f"{EPISODES}, rollout.max_env_errors); {count} of them in this one:\n{top.rstrip()}"
            hint = f"mend it (spearrl check-env {self.config.env.name} finds most faults), then resume the run"
            self.error = WorkerError(text, where=f"env {self.config.env.name}", hint=hint)
        elif nothing:
            fault = next((t.error for t in episodes if t.error), "no episode has a turn").strip().splitlines()[-1]
            text = f"no episode could be played in {self._barren} steps of {len(episodes)}: {fault}"
            self.error = WorkerError(text, where="rollout", hint="mend what it names, then resume the run")

    def updated(self, step: int, result: UpdateResult, batch: Batch, version: int) -> None:
        """An update: what it left out is kept, and engine and learner must be of one model.

        Args:
            batch: its on-policy batch, with old_logprobs.
            version: of the weights that it began with.
        Raises:
            NumericsError: the engine's log-probabilities are those of another model.
        """
        if result.metrics["policy/updates"]:
            self._skipped, self._learnt = 0, True
        elif result.skipped:
            self._skipped += 1
        if result.offending:
            replay = self._kept(step, result)
            last = step == self.config.run.steps and not self._learnt
            if self._skipped >= SKIPPED or (self._skipped and last):
                text = f"no optimiser step of {self._skipped} training steps in a row has a finite loss and gradient"
                hint = f"see what is not finite and where: {replay}\n  then lower learner.lr, or mend algo.loss"
                self.error = NumericsError(text, where=f"step {step}", hint=hint)
        gap = fresh_gap(batch, version)
        if gap > GAP_LIMIT:
            text = f"engine and learner differ by {gap:.3g} nats on average in the log-probability of a sampled token "
            text += f"at the same weights (limit {GAP_LIMIT:g})"
            hint = "they hold different models or sample otherwise than they say: see vllm.servers, rollout.dtype=fp32"
            raise NumericsError(text, where=f"step {step}", hint=hint)

    def _kept(self, step: int, result: UpdateResult) -> str:
        """The command that makes the left-out step again; its batch is written."""
        try:
            path = bad_batch.keep(self.folder, step, result.offending)
        except (OSError, SafetensorError) as error:
            self._report("warning", {"text": f"step {step}: the batch that is not finite was not kept: {error}"})
            return "(the batch could not be kept)"
        command = f"spearrl replay {shlex.quote(str(self.folder))} --batch {shlex.quote(str(path))}"
        command += to_repeat(self.config)
        text = f"step {step}: {result.skipped} optimiser steps left out; the first batch is in {path}"
        self._report("warning", {"text": f"{text}\n    {command}"})
        return command


def fresh_gap(batch: Batch, version: int) -> float:
    """Mean |learner − engine| log-probability over tokens that these very weights sampled; 0 where there are none."""
    if batch.rollout_logprobs is None or batch.old_logprobs is None:
        return 0.0
    same = batch.rows.pad(batch.rows.policy_version, -1) == version
    mask = batch.action_mask & same & ~batch.old_logprobs.isnan()
    gap = (batch.old_logprobs.double() - batch.rollout_logprobs.double()).abs()[mask]
    return float(gap.mean()) if len(gap) else 0.0
