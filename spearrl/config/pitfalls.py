"""Settings that can run but will probably not do what was intended: advice, printed as warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from spearrl.config.algo import CriticSection, GigpoSection, KlCovSection, PolicySection
from spearrl.config.checks import schedules, trained_groups
from spearrl.config.problems import Finding, Problem, problem_of, written
from spearrl.config.sections import RunConfig


def advice(config: RunConfig, sources: Mapping[str, str] | None = None) -> list[Problem]:
    """What can run but will probably disappoint.

    Args:
        sources: where each value came from (of `Resolved`); given, settings that somebody wrote and that have no effect
            are told too.
    """
    groups = (_cold_start_and_evaluation, _replay_never_due, _long_schedules, _unused_parts, _unused_replay, _odd)
    problems = [problem_of(finding, config) for group in groups for finding in group(config)]
    return [*problems, *_unused_by_loss(config, sources or {})]


def _cold_start_and_evaluation(config: RunConfig) -> Iterator[Finding]:
    learner, panel, sft, staleness = config.learner, config.eval, config.sft, config.rollout.max_staleness
    if config.model.path == "tiny" and learner.lr < 1e-5:
        yield "[learner.lr] is a large model's; one built from scratch does not learn with it", "use learner.lr=3e-4"
    planned = config.run.steps * learner.mini_batches
    if learner.mini_batch_rows == 0 and learner.warmup_steps >= planned > 0:
        fix = f"use learner.warmup_steps={planned // 10}"
        yield f"[learner.warmup_steps] takes longer than the run's {planned} optimiser steps", fix
    if panel.split == config.rollout.train_split:
        yield "[eval.split] is the split that is trained on", "use another eval.split for an honest success rate"
    if panel.attempts > 1 and panel.temperature == 0:
        fix = "use eval.attempts=1, or a temperature above 0"
        yield "[eval.attempts] at [eval.temperature] plays the same greedy replies again", fix
    if sft.data and not sft.enabled:
        yield "[sft.data] is not read: [sft.enabled]", "use sft.enabled=true, or leave sft.data out"
    updates = sft.epochs * -(-sft.episodes // sft.batch_episodes)
    if sft.enabled and not sft.data and sft.warmup_steps >= updates:
        fix = f"use sft.warmup_steps={updates // 10}"
        yield f"[sft.warmup_steps] takes longer than the cold start's {updates} optimiser steps", fix
    if staleness and config.algo.correction.mode == "none":
        message = "[rollout.max_staleness] with [algo.correction.mode]: old samples count as fresh ones"
        yield message, "use algo.correction.mode=tis"


def _replay_never_due(config: RunConfig) -> Iterator[Finding]:
    """Stored units are bounded by what max_age steps can bring; a fill level above that is never reached."""
    sil, episodes = config.algo.sil, trained_groups(config) * config.rollout.group_size
    due, most = sil.fill_factor * sil.capacity, episodes * (sil.max_age + 2)
    if sil.enabled and sil.unit == "trajectory" and due >= most:
        yield (
            f"[algo.sil.capacity]: replay starts above {due:g} stored trajectories, but within [algo.sil.max_age] "
            f"steps fewer than {most} are played, so nothing is ever replayed",
            f"use algo.sil.capacity={max(1, episodes // 4)}",
        )


def _long_schedules(config: RunConfig) -> Iterator[Finding]:
    steps = config.run.steps
    for name, enabled, schedule in schedules(config.algo):
        if enabled and schedule.kind in ("cosine", "linear") and schedule.steps > steps > 0:
            message = f"[{name}.steps] is longer than the run ([run.steps]), so that the schedule does not finish"
            yield message, f"use {name}.steps={max(1, steps // 3)}"


def _unused_parts(config: RunConfig) -> Iterator[Finding]:
    """Changed settings of a part that the algorithm does not have."""
    algo = config.algo
    # reinforce++ uses the critic's discount.
    critic = CriticSection(discount=algo.critic.discount) if algo.advantage == "reinforce++" else CriticSection()
    for name, changed, used_by, by in (
        ("algo.critic", algo.critic != critic, "gae", "advantage"),
        ("learner.critic_lr", config.learner.critic_lr is not None, "gae", "advantage"),
        ("algo.gigpo", algo.gigpo != GigpoSection(), "gigpo", "advantage"),
        ("algo.kl_cov", algo.kl_cov != KlCovSection(), "kl_cov", "loss"),
    ):
        value = getattr(algo, by)
        if changed and value != used_by and ":" not in value:
            fix = {"gae": "algo.name=ppo", "gigpo": "algo.name=gigpo", "kl_cov": "algo.loss=kl_cov"}[used_by]
            yield f"{name} is set, but [algo.{by}] does not use it", f"use {fix}, or leave it out"


def _unused_by_loss(config: RunConfig, sources: Mapping[str, str]) -> Iterator[Problem]:
    """Settings that somebody wrote and that the loss or the advantage in force does not use; presets set them too."""
    of_its_own = ("rloo", "gae", "reinforce++", "reinforce++_baseline")
    for name, by, without in (
        ("algo.policy.clip_low", "loss", ("kl_cov",)),
        ("algo.policy.clip_high", "loss", ("kl_cov",)),
        ("algo.clip_cov.log_ratio_clamp", "loss", ("gspo", "cispo", "kl_cov")),
        ("algo.groups.normalize_std", "advantage", of_its_own),
    ):
        source = sources.get(name, "default")
        if getattr(config.algo, by) in without and written(source):
            finding = f"{name} is set, but [algo.{by}] does not use it", "leave it out"
            yield replace(problem_of(finding, config), where=source)


def _unused_replay(config: RunConfig) -> Iterator[Finding]:
    sil, decays = config.algo.sil, config.algo.sil.recalibration == "decay"
    if sil.enabled and (sil.normalize_std or decays) and sil.reward_scale != 1:
        by = "algo.sil.normalize_std" if sil.normalize_std else "algo.sil.recalibration"
        message = f"[algo.sil.reward_scale] divides rewards that [{by}] already gives another scale"
        yield message, "use algo.sil.reward_scale=1"
    if sil.enabled and not decays and sil.decay != 1:
        yield '[algo.sil.decay] belongs to algo.sil.recalibration="decay"', "use algo.sil.decay=1"
    for key, without in (("token_weight", "none"), ("min_wins", 1)):
        if not sil.enabled and getattr(sil, key) != without:
            message = f"[algo.sil.{key}] is about replay, which [algo.sil.enabled] leaves out"
            yield message, "use algo.sil.enabled=true, or leave it out"


def _odd(config: RunConfig) -> Iterator[Finding]:
    """Clips, divergences and rounds that do little, or nothing."""
    algo, policy = config.algo, config.algo.policy
    if algo.loss == "gspo" and policy.clip_high > 0.1:
        yield (
            "[algo.policy.clip_high] is a token ratio's; gspo clips a ratio per sequence, which hardly ever gets there",
            "use algo.policy.clip_high=4e-4 and algo.policy.clip_low=3e-4",
        )
    if policy.dual_clip not in (None, PolicySection().dual_clip) and algo.loss in ("gspo", "cispo", "kl_cov"):
        message = '[algo.policy.dual_clip] belongs to algo.loss="clip"; [algo.loss] does not use it'
        yield message, "use algo.policy.dual_clip=none"
    if algo.kl.loss_coef > 0 and algo.kl.reward_coef > 0:
        message = "[algo.kl.loss_coef] and [algo.kl.reward_coef]: the same divergence is charged twice"
        yield message, "use one of them, the other 0"
    if algo.dynamic.enabled and algo.dynamic.rounds == 1:
        message = "[algo.dynamic.rounds]: the last round's groups are all kept, so nothing is sampled again"
        yield message, "use algo.dynamic.rounds=10, or algo.dynamic.enabled=false"
