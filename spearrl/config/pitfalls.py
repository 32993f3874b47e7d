"""Settings that can run but will probably not do what was intended: advice, printed as warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from spearrl.config.algo import CriticSection, GigpoSection, KlCovSection, PolicySection
from spearrl.config.checks import schedules, trained_groups
from spearrl.config.problems import Problem, written
from spearrl.config.sections import RunConfig


def advice(config: RunConfig, sources: Mapping[str, str] | None = None) -> list[Problem]:
    """What can run but will probably disappoint.

    Args:
        sources: where each value came from (of `Resolved`); given, settings that somebody wrote and that have no effect
            are told too.
    """
    groups = (_cold_start_and_evaluation, _replay_never_due, _long_schedules, _unused_parts, _unused_replay, _odd)
    return [*(problem for group in groups for problem in group(config)), *_unused_by_loss(config, sources or {})]


def _cold_start_and_evaluation(config: RunConfig) -> Iterator[Problem]:
    learner, panel, sft, staleness = config.learner, config.eval, config.sft, config.rollout.max_staleness
    if config.model.path == "tiny" and learner.lr < 1e-5:
        message = f"learner.lr={learner.lr:g} is a large model's; one built from scratch does not learn with it"
        yield Problem(message, "use learner.lr=3e-4")
    planned = config.run.steps * learner.mini_batches
    if learner.mini_batch_rows == 0 and learner.warmup_steps >= planned > 0:
        message = f"learner.warmup_steps={learner.warmup_steps} takes longer than the run's {planned} optimiser steps"
        yield Problem(message, f"use learner.warmup_steps={planned // 10}")
    if panel.split == config.rollout.train_split:
        message = f'eval.split="{panel.split}" is the split that is trained on'
        yield Problem(message, "use another eval.split for an honest success rate")
    if panel.attempts > 1 and panel.temperature == 0:
        message = f"eval.attempts={panel.attempts} at eval.temperature=0 plays the same greedy replies again"
        yield Problem(message, "use eval.attempts=1, or a temperature above 0")
    if sft.data and not sft.enabled:
        yield Problem(
            f"sft.data={sft.data} is not read: sft.enabled is false", "use sft.enabled=true, or leave sft.data out"
        )
    updates = sft.epochs * -(-sft.episodes // sft.batch_episodes)
    if sft.enabled and not sft.data and sft.warmup_steps >= updates:
        message = f"sft.warmup_steps={sft.warmup_steps} takes longer than the cold start's {updates} optimiser steps"
        yield Problem(message, f"use sft.warmup_steps={updates // 10}")
    if staleness and config.algo.correction.mode == "none":
        message = f"rollout.max_staleness={staleness} with algo.correction.mode=none: old samples count as fresh ones"
        yield Problem(message, "use algo.correction.mode=tis")


def _replay_never_due(config: RunConfig) -> Iterator[Problem]:
    """Stored units are bounded by what max_age steps can bring; a fill level above that is never reached."""
    sil, episodes = config.algo.sil, trained_groups(config) * config.rollout.group_size
    due, most = sil.fill_factor * sil.capacity, episodes * (sil.max_age + 2)
    if sil.enabled and sil.unit == "trajectory" and due >= most:
        yield Problem(
            f"algo.sil.capacity={sil.capacity}: replay starts above {due:g} stored trajectories, but within "
            f"algo.sil.max_age={sil.max_age} steps fewer than {most} are played, so nothing is ever replayed",
            f"use algo.sil.capacity={max(1, episodes // 4)}",
        )


def _long_schedules(config: RunConfig) -> Iterator[Problem]:
    steps = config.run.steps
    for name, enabled, schedule in schedules(config.algo):
        if enabled and schedule.kind in ("cosine", "linear") and schedule.steps > steps > 0:
            yield Problem(
                f"{name}.steps={schedule.steps} is longer than the run (run.steps={steps}), so that the schedule does "
                "not finish",
                f"use {name}.steps={max(1, steps // 3)}",
            )


def _unused_parts(config: RunConfig) -> Iterator[Problem]:
    """Changed settings of a part that the algorithm does not have."""
    algo = config.algo
    # reinforce++ uses the critic's discount.
    critic = CriticSection(discount=algo.critic.discount) if algo.advantage == "reinforce++" else CriticSection()
    for name, changed, used_by, fix in (
        ("algo.critic", algo.critic != critic, "gae", "algo.name=ppo"),
        ("learner.critic_lr", config.learner.critic_lr is not None, "gae", "algo.name=ppo"),
        ("algo.gigpo", algo.gigpo != GigpoSection(), "gigpo", "algo.name=gigpo"),
    ):
        if changed and algo.advantage != used_by and ":" not in algo.advantage:
            yield _unused(name, "algo.advantage", algo.advantage, f"use {fix}, or leave it out")
    if algo.kl_cov != KlCovSection() and algo.loss != "kl_cov" and ":" not in algo.loss:
        yield _unused("algo.kl_cov", "algo.loss", algo.loss, "use algo.loss=kl_cov, or leave it out")


def _unused_by_loss(config: RunConfig, sources: Mapping[str, str]) -> Iterator[Problem]:
    """Settings that somebody wrote and that the loss or the advantage in force does not use; presets set them too."""
    loss, advantage = config.algo.loss, config.algo.advantage
    for name, by, value, without in (
        ("algo.policy.clip_low", "algo.loss", loss, ("kl_cov",)),
        ("algo.policy.clip_high", "algo.loss", loss, ("kl_cov",)),
        ("algo.clip_cov.log_ratio_clamp", "algo.loss", loss, ("gspo", "cispo", "kl_cov")),
        (
            "algo.groups.normalize_std",
            "algo.advantage",
            advantage,
            ("rloo", "gae", "reinforce++", "reinforce++_baseline"),
        ),
    ):
        source = sources.get(name, "default")
        if value in without and written(source):
            yield _unused(name, by, value, "leave it out", source)


def _unused(name: str, by: str, value: str, fix: str, where: str = "") -> Problem:
    return Problem(f'{name} is set, but {by}="{value}" does not use it', fix, where)


def _unused_replay(config: RunConfig) -> Iterator[Problem]:
    sil, decays = config.algo.sil, config.algo.sil.recalibration == "decay"
    if sil.enabled and (sil.normalize_std or decays) and sil.reward_scale != 1:
        by = "algo.sil.normalize_std" if sil.normalize_std else "algo.sil.recalibration"
        message = f"algo.sil.reward_scale={sil.reward_scale:g} divides rewards that {by} already gives another scale"
        yield Problem(message, "use algo.sil.reward_scale=1")
    if sil.enabled and not decays and sil.decay != 1:
        yield Problem(f'algo.sil.decay={sil.decay:g} belongs to algo.sil.recalibration="decay"', "use algo.sil.decay=1")
    for key, without in (("token_weight", "none"), ("min_wins", 1)):
        if not sil.enabled and (value := getattr(sil, key)) != without:
            message = f"algo.sil.{key}={value} is about replay, which algo.sil.enabled=false leaves out"
            yield Problem(message, "use algo.sil.enabled=true, or leave it out")


def _odd(config: RunConfig) -> Iterator[Problem]:
    """Clips, divergences and rounds that do little, or nothing."""
    algo, policy = config.algo, config.algo.policy
    if algo.loss == "gspo" and policy.clip_high > 0.1:
        yield Problem(
            f"algo.policy.clip_high={policy.clip_high:g} is a token ratio's; gspo clips a ratio per sequence, which "
            "hardly ever gets there",
            "use algo.policy.clip_high=4e-4 and algo.policy.clip_low=3e-4",
        )
    if policy.dual_clip not in (None, PolicySection().dual_clip) and algo.loss in ("gspo", "cispo", "kl_cov"):
        yield Problem(
            f'algo.policy.dual_clip={policy.dual_clip:g} belongs to algo.loss="clip"; "{algo.loss}" does not use it',
            "use algo.policy.dual_clip=none",
        )
    if algo.kl.loss_coef > 0 and algo.kl.reward_coef > 0:
        yield Problem(
            f"algo.kl.loss_coef={algo.kl.loss_coef:g} and algo.kl.reward_coef={algo.kl.reward_coef:g}: the same "
            "divergence is charged twice",
            "use one of them, the other 0",
        )
    if algo.dynamic.enabled and algo.dynamic.rounds == 1:
        yield Problem(
            "algo.dynamic.rounds=1: the last round's groups are all kept, so nothing is sampled again",
            "use algo.dynamic.rounds=10, or algo.dynamic.enabled=false",
        )
