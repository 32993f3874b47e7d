"""Settings that contradict each other: refused before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

from spearrl.config.algo import AlgoSection, ScheduleSection
from spearrl.config.fidelity import AGE_CAP
from spearrl.config.grammar import GrammarError, algo_settings
from spearrl.config.problems import Problem, raise_all
from spearrl.config.sections import RunConfig
from spearrl.schedules import ADAPTIVE

COMPARES_SIBLINGS = ("grpo", "gigpo", "rloo", "reinforce++_baseline")  # advantages that are 0 in a group of one


def check(config: RunConfig) -> None:
    """Raise ConfigError listing every contradiction; `load_config` does this itself."""
    raise_all(problems(config))


def problems(config: RunConfig) -> list[Problem]:
    """Contradictions, each with the settings involved."""
    groups = (
        _model,
        _batches,
        _ahead,
        _engines,
        _learner,
        _name,
        _lone_siblings,
        _covariance,
        _credit,
        _bands,
        _replay,
    )
    return [problem for group in groups for problem in group(config)]


def trained_groups(config: RunConfig) -> int:
    """Groups of a step that are trained on."""
    return int(config.algo.filters.group_keep * config.rollout.groups_per_step + 1e-9)


def schedules(algo: AlgoSection) -> tuple[tuple[str, bool, ScheduleSection], ...]:
    """Of γ and μ: the section's name, whether the part it belongs to is on, the section."""
    return (
        ("algo.sil.gamma", algo.sil.enabled, algo.sil.gamma),
        ("algo.intrinsic.mu", algo.intrinsic.enabled, algo.intrinsic.mu),
    )


def _model(config: RunConfig) -> Iterator[Problem]:
    hidden, heads = config.model.tiny.hidden_size, config.model.tiny.heads
    if config.model.path != "tiny" or hidden % (2 * heads) == 0:
        return
    fault = "leaves a rest" if hidden % heads else "is odd; rotary positions pair the values of a head"
    yield Problem(
        f"model.tiny.hidden_size={hidden} divided by model.tiny.heads={heads} {fault}",
        f"use model.tiny.hidden_size={max(1, -(-hidden // (2 * heads))) * 2 * heads}",
    )


def _batches(config: RunConfig) -> Iterator[Problem]:
    rollout, learner, groups = config.rollout, config.learner, trained_groups(config)
    reply, episodes, keep = rollout.max_reply_tokens, groups * rollout.group_size, config.algo.filters.group_keep
    if rollout.context_tokens <= reply:
        yield Problem(
            f"rollout.context_tokens={rollout.context_tokens} leaves no room for a prompt beside "
            f"rollout.max_reply_tokens={reply}",
            f"use rollout.context_tokens={8 * reply}, or fewer reply tokens",
        )
    if 0 < rollout.max_response_tokens < reply:
        yield Problem(
            f"rollout.max_response_tokens={rollout.max_response_tokens} for a whole episode is less than "
            f"rollout.max_reply_tokens={reply} for one reply",
            f"use rollout.max_response_tokens={8 * reply}, or 0 for no limit",
        )
    if not groups:
        yield Problem(
            f"algo.filters.group_keep={keep:g} of rollout.groups_per_step={rollout.groups_per_step} groups keeps none",
            f"use algo.filters.group_keep={1 / rollout.groups_per_step:g} or more",
        )
    elif learner.mini_batch_rows == 0 and learner.mini_batches > episodes:
        yield Problem(
            f"learner.mini_batches={learner.mini_batches}, but a step trains on {episodes} episodes "
            "(algo.filters.group_keep of rollout.groups_per_step, times rollout.group_size)",
            f"use learner.mini_batches={min(2, episodes)}, or more groups or siblings",
        )


def _ahead(config: RunConfig) -> Iterator[Problem]:
    """What generation that runs ahead of the learner cannot be combined with."""
    staleness = config.rollout.max_staleness
    if staleness and not config.rollout.workers:
        yield Problem(
            f"rollout.max_staleness={staleness}, but rollout.workers=0: nothing can generate while the trainer's "
            "process learns",
            "use rollout.workers=1 or more",
        )
    if staleness and config.algo.dynamic.enabled:
        yield Problem(
            "algo.dynamic.enabled=true plays further tasks until enough groups differ; with rollout.max_staleness "
            "groups are begun before that is known",
            "use rollout.max_staleness=0, or algo.dynamic.enabled=false",
        )
    if staleness and config.placement.mode == "colocated":
        yield Problem(
            f"placement.mode=colocated lets engines and learner take turns; rollout.max_staleness={staleness} has them "
            "work at the same time",
            "use placement.mode=disaggregated, or rollout.max_staleness=0",
        )


def _engines(config: RunConfig) -> Iterator[Problem]:
    rollout, addresses = config.rollout, config.vllm.addresses
    local, servers = rollout.engine == "local", len(addresses)
    if rollout.launcher == "ray" and not rollout.workers:
        yield Problem(
            "rollout.launcher=ray, but rollout.workers=0: there is nothing to launch", "use rollout.workers=2 or more"
        )
    for address in addresses:
        if not address.startswith(("http://", "https://")):
            yield Problem(
                f"vllm.servers names {address!r}, which is no address", f'use vllm.servers="http://{address}:8000"'
            )
    if servers and max(1, rollout.workers) != servers:
        more = rollout.workers > servers
        fault = "some would get the weights more than once" if more else "some would have nothing to do"
        yield Problem(
            f"rollout.workers={rollout.workers}, but there are {servers} vllm.servers: {fault}",
            f"use rollout.workers={servers}, or as many servers",
        )
    if local and config.vllm.servers:
        yield Problem("vllm.servers is given, but rollout.engine=local", "use rollout.engine=vllm")
    if local and config.sync.transport in ("nccl", "ipc"):
        message = f"sync.transport={config.sync.transport} is vLLM's, but rollout.engine=local"
        yield Problem(message, "use sync.transport=auto, or rollout.engine=vllm")


def _learner(config: RunConfig) -> Iterator[Problem]:
    learner, local = config.learner, config.learner.backend == "local"
    for key, value, without in (("processes", learner.processes, 1), ("offload", learner.offload, "none")):
        if local and value != without:
            yield Problem(
                f"learner.{key}={value}, but learner.backend=local is one process that keeps everything on its device",
                "use learner.backend=deepspeed",
            )
    least = {"none": 0, "optimizer": 1, "all": 3}[learner.offload]
    if not local and learner.zero_stage < least:
        yield Problem(
            f"learner.offload={learner.offload} needs what learner.zero_stage={learner.zero_stage} does not shard",
            f"use learner.zero_stage={least}",
        )


def _name(config: RunConfig) -> Iterator[Problem]:
    try:
        algo_settings(config.algo.name)
    except GrammarError as error:
        yield Problem(f"algo.name: {error}", error.fix)


def _lone_siblings(config: RunConfig) -> Iterator[Problem]:
    """What a group of one cannot give."""
    algo, keep = config.algo, config.algo.filters.group_keep
    if config.rollout.group_size > 1:
        return
    if algo.advantage in COMPARES_SIBLINGS and algo.groups.singleton == "zero":
        yield Problem(
            f'rollout.group_size=1: algo.advantage="{algo.advantage}" compares the siblings of a group, so with '
            'algo.groups.singleton="zero" every advantage is 0 and nothing is learnt',
            'use rollout.group_size=8 (at least 2), algo.name="ppo" or "reinforce++", or algo.groups.singleton="raw"',
        )
    if algo.dynamic.enabled:
        yield Problem(
            "algo.dynamic.enabled=true keeps groups whose rewards differ, and with rollout.group_size=1 there is none",
            "use rollout.group_size=8 (at least 2), or algo.dynamic.enabled=false",
        )
    if keep < 1:
        yield Problem(
            f"algo.filters.group_keep={keep:g} ranks groups by their reward deviation, which is 0 with "
            "rollout.group_size=1",
            "use rollout.group_size=8 (at least 2), or algo.filters.group_keep=1",
        )


def _covariance(config: RunConfig) -> Iterator[Problem]:
    cov = config.algo.clip_cov
    for prefix, lower, upper in (("", cov.lower, cov.upper), ("replay_", cov.replay_lower, cov.replay_upper)):
        low, high = f"algo.clip_cov.{prefix}lower", f"algo.clip_cov.{prefix}upper"
        bounds = [float(str(bound).removeprefix("quantile:")) for bound in (lower, upper)]
        if isinstance(lower, str) == isinstance(upper, str) and bounds[0] >= bounds[1]:
            shown = [f'"{bound}"' if isinstance(bound, str) else f"{bound:g}" for bound in (lower, upper)]
            yield Problem(
                f"{low}={shown[0]} is not below {high}={shown[1]}: no token lies between", f"use {low} < {high}"
            )
    if config.algo.loss == "kl_cov" and cov.enabled:
        yield Problem(
            'algo.loss="kl_cov" and algo.clip_cov.enabled=true: two rules for the tokens of highest covariance',
            'use algo.clip_cov.enabled=false, or algo.loss="clip"',
        )


def _credit(config: RunConfig) -> Iterator[Problem]:
    bonus, filters, advantage = config.algo.intrinsic, config.algo.filters, config.algo.advantage
    if bonus.enabled and bonus.per_call > bonus.cap:
        yield Problem(
            f"algo.intrinsic.per_call={bonus.per_call:g} is above algo.intrinsic.cap={bonus.cap:g}, so that a call is "
            "never paid in full",
            f"use algo.intrinsic.cap={10 * bonus.per_call:g}, or algo.intrinsic.enabled=false for no bonus",
        )
    if filters.group_keep < 1 and filters.subsample != "none" and advantage in ("gae", "reinforce++"):
        yield Problem(
            f'algo.filters.subsample="{filters.subsample}" takes trajectories apart, along which '
            f'algo.advantage="{advantage}" gives credit',
            "use algo.filters.subsample=none",
        )


def _bands(config: RunConfig) -> Iterator[Problem]:
    for name, _, band in schedules(config.algo):
        if band.kind in ADAPTIVE and band.low >= band.high:
            yield Problem(
                f"{name}.low={band.low:g} is not below {name}.high={band.high:g}, the band of "
                f'{name}.kind="{band.kind}"',
                f"use {name}.low={band.high / 4:g}, or a larger high" if band.high > 0 else f"use {name}.high=0.8",
            )


def _replay(config: RunConfig) -> Iterator[Problem]:
    sil, groups, fidelity = config.algo.sil, config.rollout.groups_per_step, config.algo.fidelity
    if not sil.enabled:
        return
    if sil.max_age == 0 and sil.age_reference == "current":
        yield Problem(
            "algo.sil.max_age=0: nothing is replayed in its own step, and by the next one it is too old",
            "use algo.sil.max_age=5",
        )
    if sil.max_age > AGE_CAP and fidelity.startswith("release_"):
        yield Problem(
            f'algo.sil.max_age={sil.max_age} under algo.fidelity="{fidelity}", whose buffer caps it at {AGE_CAP}',
            f"use algo.sil.max_age={AGE_CAP}, or another fidelity",
        )
    if sil.baseline_capacity < groups:
        yield Problem(
            f"algo.sil.baseline_capacity={sil.baseline_capacity} cannot hold one step's "
            f"rollout.groups_per_step={groups} baselines",
            f"use algo.sil.baseline_capacity={40 * groups}",
        )
    if sil.unit == "row" and sil.min_rows > sil.capacity:
        yield Problem(
            f"algo.sil.min_rows={sil.min_rows} is above algo.sil.capacity={sil.capacity}: no replay is ever large "
            "enough",
            "use algo.sil.min_rows=1",
        )
