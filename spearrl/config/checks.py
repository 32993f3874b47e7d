"""Settings that contradict each other (refused) or will probably disappoint (advice): when a check fires stands here, what it then says in checks.toml."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from spearrl.config.algo import AlgoSection, CriticSection, GigpoSection, KlCovSection, PolicySection
from spearrl.config.fidelity import AGE_CAP
from spearrl.config.grammar import GrammarError, algo_settings
from spearrl.config.problems import Problem, given, raise_all
from spearrl.config.sections import RunConfig
from spearrl.config.tables import table
from spearrl.schedules import ADAPTIVE

COMPARES_SIBLINGS = (
    "grpo",
    "gigpo",
    "rloo",
    "reinforce++_baseline",
)  # advantages that are 0 without another member of the group
_TEXTS = table(__file__, "checks.toml")


def check(config: RunConfig) -> None:
    """Raise ConfigError listing every contradiction; `load_config` does this itself."""
    raise_all(problems(config))


def problems(config: RunConfig) -> list[Problem]:
    """Contradictions, each with the keys involved."""
    parts = (
        _model,
        _rollout,
        _batches,
        _ahead,
        _engines,
        _learner,
        _name,
        _lone,
        _covariance,
        _credit,
        _bands,
        _replay,
    )
    return [problem for part in parts for problem in part(config)]


def advice(config: RunConfig, sources: Mapping[str, str] | None = None) -> list[Problem]:
    """What can run but will probably not do what was wanted; with `sources` (of `Resolved`), also settings given by somebody that have no effect."""
    parts = (_steps, _replay_never_due, _long_schedules, _unused, _unused_replay, _odd)
    return [*(problem for part in parts for problem in part(config)), *_idle(config, sources or {})]


def _told(config: RunConfig, cases: Mapping[str, Any], values: Mapping[str, Any] | None = None) -> Iterator[Problem]:
    """A problem for each case that holds, with its text from the table."""
    known = {**{section: getattr(config, section) for section in RunConfig.model_fields}, **(values or {})}
    for name in (name for name, holds in cases.items() if holds):
        text = _TEXTS[name]
        yield Problem(
            text["message"].format_map(known),
            text["fix"].format_map(known),
            keys=tuple(key.format_map(known) for key in text["keys"]),
        )


def _model(config: RunConfig) -> Iterator[Problem]:
    tiny, built = config.model.tiny, config.model.path == "tiny"
    uneven, step = tiny.hidden_size % tiny.heads, 2 * tiny.heads
    values = {"wanted": max(1, -(-tiny.hidden_size // step)) * step, "size": tiny.hidden_size // tiny.heads}
    yield from _told(
        config, {"heads": built and uneven, "odd heads": built and not uneven and values["size"] % 2}, values
    )


def _rollout(config: RunConfig) -> Iterator[Problem]:
    rollout = config.rollout
    reply = rollout.max_reply_tokens
    cases = {
        "no room for a prompt": rollout.context_tokens <= reply,
        "episode shorter than a reply": 0 < rollout.max_response_tokens < reply,
    }
    yield from _told(config, cases, {"tokens": 8 * reply})


def _batches(config: RunConfig) -> Iterator[Problem]:
    groups, learner = _groups(config), config.learner
    episodes = groups * config.rollout.group_size
    cases = {
        "no group kept": not groups,
        "more batches than episodes": groups and learner.mini_batch_rows == 0 and learner.mini_batches > episodes,
    }
    yield from _told(
        config, cases, {"least": 1 / config.rollout.groups_per_step, "episodes": episodes, "batches": min(2, episodes)}
    )


def _groups(config: RunConfig) -> int:
    """Groups of a step that are trained on."""
    return int(config.algo.filters.group_keep * config.rollout.groups_per_step + 1e-9)


def _ahead(config: RunConfig) -> Iterator[Problem]:
    ahead = config.rollout.max_staleness
    cases = {"ahead in one process": not config.rollout.workers, "ahead and dynamic": config.algo.dynamic.enabled}
    cases["ahead and colocated"] = config.placement.mode == "colocated"
    yield from _told(config, cases if ahead else {})


def _engines(config: RunConfig) -> Iterator[Problem]:
    rollout, addresses = config.rollout, config.vllm.addresses
    yield from _told(config, {"nothing to launch": rollout.launcher == "ray" and not rollout.workers})
    for address in addresses:
        yield from _told(config, {"no address": not address.startswith(("http://", "https://"))}, {"address": address})
    servers, local = len(addresses), rollout.engine == "local"
    fault = (
        "some would get the weights more than once" if rollout.workers > servers else "some would have nothing to do"
    )
    cases = {
        "workers and servers": servers and max(1, rollout.workers) != servers,
        "servers of no engine": local and config.vllm.servers,
    }
    cases["transport of another engine"] = local and config.sync.transport in ("nccl", "ipc")
    yield from _told(config, cases, {"servers": servers, "fault": fault})


def _learner(config: RunConfig) -> Iterator[Problem]:
    learner, local = config.learner, config.learner.backend == "local"
    for key, value, quiet in (("processes", learner.processes, 1), ("offload", learner.offload, "none")):
        yield from _told(config, {"local learner": local and value != quiet}, {"key": key, "value": value})
    least = {"none": 0, "optimizer": 1, "all": 3}[learner.offload]
    yield from _told(config, {"nothing to offload": not local and learner.zero_stage < least}, {"least": least})


def _name(config: RunConfig) -> Iterator[Problem]:
    try:
        algo_settings(config.algo.name)
    except GrammarError as error:
        yield from _told(config, {"wrong name": True}, {"error": error})


def _lone(config: RunConfig) -> Iterator[Problem]:
    """What a group of one cannot give."""
    algo = config.algo
    cases = {
        "no siblings": algo.advantage in COMPARES_SIBLINGS and algo.groups.singleton == "zero",
        "no siblings and dynamic": algo.dynamic.enabled,
    }
    cases["no siblings and a filter"] = algo.filters.group_keep < 1
    yield from _told(config, cases if config.rollout.group_size == 1 else {})


def _covariance(config: RunConfig) -> Iterator[Problem]:
    cov = config.algo.clip_cov
    for prefix, lower, upper in (("", cov.lower, cov.upper), ("replay_", cov.replay_lower, cov.replay_upper)):
        values = {
            "low": f"algo.clip_cov.{prefix}lower",
            "high": f"algo.clip_cov.{prefix}upper",
            "lower": _shown(lower),
            "upper": _shown(upper),
        }
        empty = isinstance(lower, str) == isinstance(upper, str) and _level(lower) >= _level(upper)
        yield from _told(config, {"empty band of covariances": empty}, values)
    yield from _told(config, {"two rules of covariance": config.algo.loss == "kl_cov" and cov.enabled})


def _level(threshold: float | str) -> float:
    return float(threshold.removeprefix("quantile:")) if isinstance(threshold, str) else threshold


def _shown(threshold: float | str) -> str:
    return f'"{threshold}"' if isinstance(threshold, str) else f"{threshold:g}"


def _credit(config: RunConfig) -> Iterator[Problem]:
    bonus, filters = config.algo.intrinsic, config.algo.filters
    cases = {"bonus above its cap": bonus.enabled and bonus.per_call > bonus.cap}
    cases["subsample"] = (
        filters.group_keep < 1 and filters.subsample != "none" and config.algo.advantage in ("gae", "reinforce++")
    )
    yield from _told(config, cases, {"cap": 10 * bonus.per_call})


def _schedules(algo: AlgoSection) -> tuple[Any, ...]:
    return ("algo.sil.gamma", algo.sil.enabled, algo.sil.gamma), (
        "algo.intrinsic.mu",
        algo.intrinsic.enabled,
        algo.intrinsic.mu,
    )


def _bands(config: RunConfig) -> Iterator[Problem]:
    for name, _, schedule in _schedules(config.algo):
        fix = f"{name}.low={schedule.high / 4:g}, or a larger high" if schedule.high > 0 else f"{name}.high=0.8"
        empty = schedule.kind in ADAPTIVE and schedule.low >= schedule.high
        yield from _told(config, {"empty band": empty}, {"name": name, "schedule": schedule, "fix": fix})


def _replay(config: RunConfig) -> Iterator[Problem]:
    sil, groups = config.algo.sil, config.rollout.groups_per_step
    cases = {"too old at once": sil.max_age == 0 and sil.age_reference == "current"}
    cases["age over the release's"] = sil.max_age > AGE_CAP and config.algo.fidelity.startswith("release_")
    cases["few baselines"] = sil.baseline_capacity < groups
    cases["rows over capacity"] = sil.unit == "row" and sil.min_rows > sil.capacity
    yield from _told(config, cases if sil.enabled else {}, {"cap": AGE_CAP, "capacity": 40 * groups})


def _steps(config: RunConfig) -> Iterator[Problem]:
    """Learning rates, warm-ups and evaluation."""
    learner, evaluation, sft = config.learner, config.eval, config.sft
    planned, updates = config.run.steps * learner.mini_batches, sft.epochs * -(-sft.episodes // sft.batch_episodes)
    cases = {"small learning rate": config.model.path == "tiny" and learner.lr < 1e-5}
    cases["long warm-up"] = learner.mini_batch_rows == 0 and learner.warmup_steps >= planned > 0
    cases["evaluated on what is trained on"] = evaluation.split == config.rollout.train_split
    cases["greedy attempts"] = evaluation.attempts > 1 and evaluation.temperature == 0
    cases["conversations not read"] = sft.data != "" and not sft.enabled
    yield from _told(config, cases, {"planned": planned, "tenth": planned // 10})
    cold = sft.enabled and not sft.data and sft.warmup_steps >= updates
    yield from _told(config, {"long warm-up of the cold start": cold}, {"updates": updates, "tenth": updates // 10})
    yield from _told(config, {"uncorrected": config.rollout.max_staleness and config.algo.correction.mode == "none"})


def _replay_never_due(config: RunConfig) -> Iterator[Problem]:
    """Stored units are bounded by what max_age steps can bring; a fill level above that is never reached."""
    sil, episodes = config.algo.sil, _groups(config) * config.rollout.group_size
    due, most = sil.fill_factor * sil.capacity, episodes * (sil.max_age + 2)
    never = sil.enabled and sil.unit == "trajectory" and due >= most
    yield from _told(config, {"replay never due": never}, {"due": due, "most": most, "wanted": max(1, episodes // 4)})


def _long_schedules(config: RunConfig) -> Iterator[Problem]:
    steps = config.run.steps
    for name, enabled, schedule in _schedules(config.algo):
        long = enabled and schedule.kind in ("cosine", "linear") and schedule.steps > steps > 0
        yield from _told(
            config, {"long schedule": long}, {"name": name, "schedule": schedule, "third": max(1, steps // 3)}
        )


def _unused(config: RunConfig) -> Iterator[Problem]:
    """Settings of a part that the algorithm does not have."""
    algo = config.algo
    critic = (
        CriticSection(discount=algo.critic.discount) if algo.advantage == "reinforce++" else CriticSection()
    )  # which uses the discount
    for name, changed, by, value, used in (
        ("algo.critic", algo.critic != critic, "algo.advantage", algo.advantage, ("gae", "ppo")),
        ("learner.critic_lr", config.learner.critic_lr is not None, "algo.advantage", algo.advantage, ("gae", "ppo")),
        ("algo.gigpo", algo.gigpo != GigpoSection(), "algo.advantage", algo.advantage, ("gigpo", "gigpo")),
        ("algo.kl_cov", algo.kl_cov != KlCovSection(), "algo.loss", algo.loss, ("kl_cov", "kl_cov")),
    ):
        fix = f"use {'algo.name' if by == 'algo.advantage' else by}={used[1]}, or "
        unused = changed and value != used[0] and ":" not in value
        yield from _told(config, {"unused": unused}, {"name": name, "by": by, "value": value, "fix": fix})


def _idle(config: RunConfig, sources: Mapping[str, str]) -> Iterator[Problem]:
    """Settings that somebody gave and that the loss or the advantage in force does not use; presets set them for other algorithms too."""
    algo = config.algo
    for name, by, value, without in (
        ("algo.policy.clip_low", "algo.loss", algo.loss, ("kl_cov",)),
        ("algo.policy.clip_high", "algo.loss", algo.loss, ("kl_cov",)),
        ("algo.clip_cov.log_ratio_clamp", "algo.loss", algo.loss, ("gspo", "cispo", "kl_cov")),
        (
            "algo.groups.normalize_std",
            "algo.advantage",
            algo.advantage,
            ("rloo", "gae", "reinforce++", "reinforce++_baseline"),
        ),
    ):
        source = sources.get(name, "default")
        for problem in _told(
            config, {"unused": value in without and given(source)}, {"name": name, "by": by, "value": value, "fix": ""}
        ):
            yield replace(problem, where=source)


def _unused_replay(config: RunConfig) -> Iterator[Problem]:
    sil = config.algo.sil
    scaled, decayed = sil.normalize_std or sil.recalibration == "decay", sil.recalibration == "decay"
    cases = {
        "scaled twice": sil.enabled and scaled and sil.reward_scale != 1,
        "decay without decay": sil.enabled and not decayed and sil.decay != 1,
    }
    yield from _told(config, cases, {"by": "algo.sil.normalize_std" if sil.normalize_std else "algo.sil.recalibration"})
    for key, changed in (("token_weight", sil.token_weight != "none"), ("min_wins", sil.min_wins > 1)):
        yield from _told(
            config, {"about replay": changed and not sil.enabled}, {"key": key, "value": getattr(sil, key)}
        )


def _odd(config: RunConfig) -> Iterator[Problem]:
    """Clips, divergences and rounds that do little, or nothing."""
    algo = config.algo
    dual = algo.policy.dual_clip not in (None, PolicySection().dual_clip)
    cases = {"clip of a sequence": algo.loss == "gspo" and algo.policy.clip_high > 0.1}
    cases["dual clip"] = dual and algo.loss in ("gspo", "cispo", "kl_cov")
    cases["divergence twice"] = algo.kl.loss_coef > 0 and algo.kl.reward_coef > 0
    cases["one round"] = algo.dynamic.enabled and algo.dynamic.rounds == 1
    yield from _told(config, cases)
