"""Settings that contradict each other (refused) or that will probably disappoint (advice). All cross-field knowledge is here."""

from __future__ import annotations

from collections.abc import Iterator

from spearrl.config.grammar import GrammarError, algo_settings
from spearrl.config.problems import Problem, raise_all
from spearrl.config.sections import RunConfig


def check(config: RunConfig) -> None:
    """Raise ConfigError listing every contradiction; `load_config` does this itself."""
    raise_all(problems(config))


def problems(config: RunConfig) -> list[Problem]:
    """Contradictions, each with the keys involved."""
    return [*_model(config), *_rollout(config), *_advantage(config), *_batches(config), *_algo(config), *_replay(config)]


def advice(config: RunConfig) -> list[Problem]:
    """What can run but will probably not do what was wanted."""
    return [*_replay_never_due(config), *_schedules(config), *_learning_rate(config), *_evaluation(config), *_cold_start(config)]


def _model(config: RunConfig) -> Iterator[Problem]:
    tiny = config.model.tiny
    if config.model.path != "tiny":
        return
    keys = ("model.tiny.hidden_size", "model.tiny.heads")
    if tiny.hidden_size % tiny.heads:
        fix = f"use model.tiny.hidden_size={_next_multiple(tiny.hidden_size, 2 * tiny.heads)}"
        yield Problem(f"model.tiny.hidden_size={tiny.hidden_size} does not divide by model.tiny.heads={tiny.heads}", fix, keys=keys)
    elif (tiny.hidden_size // tiny.heads) % 2:
        fix = f"use model.tiny.hidden_size={_next_multiple(tiny.hidden_size, 2 * tiny.heads)}"
        size = tiny.hidden_size // tiny.heads
        yield Problem(f"model.tiny.hidden_size / model.tiny.heads = {size} is odd; rotary positions pair the values of a head", fix, keys=keys)


def _rollout(config: RunConfig) -> Iterator[Problem]:
    rollout = config.rollout
    reply, context, total = rollout.max_reply_tokens, rollout.context_tokens, rollout.max_response_tokens
    if context <= reply:
        message = f"rollout.context_tokens={context} leaves no room for a prompt beside rollout.max_reply_tokens={reply}"
        yield Problem(message, f"use rollout.context_tokens={8 * reply}, or fewer reply tokens", keys=("rollout.context_tokens", "rollout.max_reply_tokens"))
    if 0 < total < reply:
        message = f"rollout.max_response_tokens={total} for a whole episode is less than rollout.max_reply_tokens={reply} for one reply"
        yield Problem(
            message, f"use rollout.max_response_tokens={8 * reply}, or 0 for no limit", keys=("rollout.max_response_tokens", "rollout.max_reply_tokens")
        )


def _advantage(config: RunConfig) -> Iterator[Problem]:
    if config.rollout.group_size == 1 and config.algo.groups.singleton == "zero":
        yield Problem(
            "rollout.group_size=1: grpo compares the siblings of a group, so with one every advantage is 0 and nothing is learnt",
            'use rollout.group_size=8 (at least 2), or algo.groups.singleton="raw"',
            keys=("rollout.group_size", "algo.groups.singleton"),
        )


def _batches(config: RunConfig) -> Iterator[Problem]:
    rollout, filters, learner = config.rollout, config.algo.filters, config.learner
    groups = int(filters.group_keep * rollout.groups_per_step + 1e-9)
    if groups == 0:
        least = 1 / rollout.groups_per_step
        message = f"algo.filters.group_keep={filters.group_keep:g} of rollout.groups_per_step={rollout.groups_per_step} groups keeps none"
        yield Problem(message, f"use algo.filters.group_keep={least:g} or more", keys=("algo.filters.group_keep", "rollout.groups_per_step"))
        return
    episodes = groups * rollout.group_size
    if learner.mini_batch_rows == 0 and learner.mini_batches > episodes:
        message = f"learner.mini_batches={learner.mini_batches}, but a step trains on {episodes} episodes"
        fix = f"use learner.mini_batches={min(2, episodes)}, or more groups or siblings"
        yield Problem(message, fix, keys=("learner.mini_batches", "rollout.groups_per_step", "rollout.group_size", "algo.filters.group_keep"))


def _algo(config: RunConfig) -> Iterator[Problem]:
    algo, cov, bonus = config.algo, config.algo.clip_cov, config.algo.intrinsic
    try:
        algo_settings(algo.name)
    except GrammarError as error:
        yield Problem(f"algo.name: {error}", error.fix, keys=("algo.name",))
    for prefix, lower, upper in (("", cov.lower, cov.upper), ("replay_", cov.replay_lower, cov.replay_upper)):
        if lower >= upper:
            low, high = f"algo.clip_cov.{prefix}lower", f"algo.clip_cov.{prefix}upper"
            yield Problem(f"{low}={lower:g} is not below {high}={upper:g}: no token lies between", f"use {low} < {high}", keys=(low, high))
    if bonus.enabled and bonus.per_call > bonus.cap:
        yield Problem(
            f"algo.intrinsic.per_call={bonus.per_call:g} is above algo.intrinsic.cap={bonus.cap:g}, so that a call is never paid in full",
            f"use algo.intrinsic.cap={10 * bonus.per_call:g}, or algo.intrinsic.enabled=false for no bonus",
            keys=("algo.intrinsic.per_call", "algo.intrinsic.cap"),
        )


def _replay(config: RunConfig) -> Iterator[Problem]:
    sil, groups = config.algo.sil, config.rollout.groups_per_step
    if not sil.enabled:
        return
    if sil.max_age == 0 and sil.age_reference == "current":
        message = "algo.sil.max_age=0: nothing is replayed in its own step, and by the next one it is too old"
        yield Problem(message, "use algo.sil.max_age=5", keys=("algo.sil.max_age", "algo.sil.age_reference"))
    if sil.baseline_capacity < groups:
        message = f"algo.sil.baseline_capacity={sil.baseline_capacity} cannot hold one step's rollout.groups_per_step={groups} baselines"
        yield Problem(message, f"use algo.sil.baseline_capacity={40 * groups}", keys=("algo.sil.baseline_capacity", "rollout.groups_per_step"))
    if sil.unit == "row" and sil.min_rows > sil.capacity:
        message = f"algo.sil.min_rows={sil.min_rows} is above algo.sil.capacity={sil.capacity}: no replay is ever large enough"
        yield Problem(message, "use algo.sil.min_rows=1", keys=("algo.sil.min_rows", "algo.sil.capacity"))


def _replay_never_due(config: RunConfig) -> Iterator[Problem]:
    """Stored units are bounded by what max_age steps can bring; a fill level above that is never reached."""
    sil, rollout = config.algo.sil, config.rollout
    if not sil.enabled or sil.unit != "trajectory":
        return
    groups = int(config.algo.filters.group_keep * rollout.groups_per_step + 1e-9)
    most = groups * rollout.group_size * (sil.max_age + 2)
    if sil.fill_factor * sil.capacity >= most:
        yield Problem(
            f"algo.sil.capacity={sil.capacity}: replay starts above {sil.fill_factor * sil.capacity:g} stored trajectories, but within "
            f"algo.sil.max_age={sil.max_age} steps fewer than {most} are played, so nothing is ever replayed",
            f"use algo.sil.capacity={max(1, groups * rollout.group_size // 4)}",
            keys=("algo.sil.capacity", "algo.sil.max_age"),
        )


def _schedules(config: RunConfig) -> Iterator[Problem]:
    algo, steps = config.algo, config.run.steps
    pairs = (("algo.sil.gamma", algo.sil.enabled, algo.sil.gamma), ("algo.intrinsic.mu", algo.intrinsic.enabled, algo.intrinsic.mu))
    for name, enabled, schedule in pairs:
        if enabled and schedule.kind != "constant" and schedule.steps > steps > 0:
            message = f"{name}.steps={schedule.steps} is longer than the run (run.steps={steps}), so that the schedule does not finish"
            yield Problem(message, f"use {name}.steps={max(1, steps // 3)}", keys=(f"{name}.steps", "run.steps"))


def _learning_rate(config: RunConfig) -> Iterator[Problem]:
    learner = config.learner
    if config.model.path == "tiny" and learner.lr < 1e-5:
        message = f"learner.lr={learner.lr:g} is a large model's; one built from scratch does not learn with it"
        yield Problem(message, "use learner.lr=3e-4", keys=("learner.lr", "model.path"))
    planned = config.run.steps * learner.mini_batches
    if learner.mini_batch_rows == 0 and learner.warmup_steps >= planned > 0:
        message = f"learner.warmup_steps={learner.warmup_steps} takes longer than the run's {planned} optimiser steps"
        yield Problem(message, f"use learner.warmup_steps={planned // 10}", keys=("learner.warmup_steps", "run.steps"))


def _evaluation(config: RunConfig) -> Iterator[Problem]:
    evaluation = config.eval
    if evaluation.split == config.rollout.train_split:
        message = f'eval.split="{evaluation.split}" is the split that is trained on'
        yield Problem(message, "use another eval.split for an honest success rate", keys=("eval.split", "rollout.train_split"))
    if evaluation.attempts > 1 and evaluation.temperature == 0:
        message = f"eval.attempts={evaluation.attempts} at eval.temperature=0 plays the same greedy replies again"
        yield Problem(message, "use eval.attempts=1, or a temperature above 0", keys=("eval.attempts", "eval.temperature"))


def _cold_start(config: RunConfig) -> Iterator[Problem]:
    sft = config.sft
    updates = sft.epochs * -(-sft.episodes // sft.batch_episodes)
    if sft.enabled and sft.warmup_steps >= updates:
        message = f"sft.warmup_steps={sft.warmup_steps} takes longer than the cold start's {updates} optimiser steps"
        yield Problem(message, f"use sft.warmup_steps={updates // 10}", keys=("sft.warmup_steps", "sft.episodes"))


def _next_multiple(value: int, step: int) -> int:
    return max(1, -(-value // step)) * step
