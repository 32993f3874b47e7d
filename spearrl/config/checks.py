"""Settings that contradict each other: refused before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

from spearrl.config.algo import AlgoSection, ScheduleSection
from spearrl.config.fidelity import AGE_CAP
from spearrl.config.grammar import GrammarError, algo_settings
from spearrl.config.problems import Finding, Problem, problem_of, raise_all
from spearrl.config.sections import RunConfig
from spearrl.schedules import ADAPTIVE

COMPARES_SIBLINGS = ("grpo", "gigpo", "rloo", "reinforce++_baseline")  # advantages that are 0 in a group of one
MORE_SIBLINGS = "use rollout.group_size=8 (at least 2)"


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
    return [problem_of(finding, config) for group in groups for finding in group(config)]


def trained_groups(config: RunConfig) -> int:
    """Groups of a step that are trained on."""
    return int(config.algo.filters.group_keep * config.rollout.groups_per_step + 1e-9)


def schedules(algo: AlgoSection) -> tuple[tuple[str, bool, ScheduleSection], ...]:
    """Of γ and μ: the section's name, whether the part it belongs to is on, the section."""
    gamma, mu = ("algo.sil.gamma", algo.sil.enabled, algo.sil.gamma), algo.intrinsic.mu
    return gamma, ("algo.intrinsic.mu", algo.intrinsic.enabled, mu)


def _model(config: RunConfig) -> Iterator[Finding]:
    hidden, heads = config.model.tiny.hidden_size, config.model.tiny.heads
    if config.model.path == "tiny" and hidden % (2 * heads):
        fault = "leaves a rest" if hidden % heads else "is odd; rotary positions pair the values of a head"
        fix = f"use model.tiny.hidden_size={max(1, -(-hidden // (2 * heads))) * 2 * heads}"
        yield f"[model.tiny.hidden_size] divided by [model.tiny.heads] {fault}", fix


def _batches(config: RunConfig) -> Iterator[Finding]:
    rollout, learner, groups = config.rollout, config.learner, trained_groups(config)
    reply, episodes = rollout.max_reply_tokens, groups * rollout.group_size
    if rollout.context_tokens <= reply:
        fix = f"use rollout.context_tokens={8 * reply}, or fewer reply tokens"
        yield "[rollout.context_tokens] leaves no room for a prompt beside [rollout.max_reply_tokens]", fix
    if 0 < rollout.max_response_tokens < reply:
        fix = f"use rollout.max_response_tokens={8 * reply}, or 0 for no limit"
        yield "[rollout.max_response_tokens] for an episode is less than [rollout.max_reply_tokens] for one reply", fix
    if not groups:
        fix = f"use algo.filters.group_keep={1 / rollout.groups_per_step:g} or more"
        yield "[algo.filters.group_keep] of [rollout.groups_per_step] groups keeps none", fix
    elif learner.mini_batch_rows == 0 and learner.mini_batches > episodes:
        yield (
            "[learner.mini_batches], but [rollout.groups_per_step], [rollout.group_size] and [algo.filters.group_keep] "
            f"make {episodes} episodes to train on",
            f"use learner.mini_batches={min(2, episodes)}, or more groups or siblings",
        )


def _ahead(config: RunConfig) -> Iterator[Finding]:
    """What generation that runs ahead of the learner cannot be combined with."""
    if not config.rollout.max_staleness:
        return
    if not config.rollout.workers:
        message = (
            "[rollout.max_staleness], but [rollout.workers]: nothing can generate while the trainer's process learns"
        )
        yield message, "use rollout.workers=1 or more"
    if config.algo.dynamic.enabled:
        yield (
            "[algo.dynamic.enabled] plays further tasks until enough groups differ; with [rollout.max_staleness] "
            "groups are begun before that is known",
            "use rollout.max_staleness=0, or algo.dynamic.enabled=false",
        )
    if config.placement.mode == "colocated":
        yield (
            "[placement.mode] lets engines and learner take turns; [rollout.max_staleness] has both work at once",
            "use placement.mode=disaggregated, or rollout.max_staleness=0",
        )


def _engines(config: RunConfig) -> Iterator[Finding]:
    rollout, addresses = config.rollout, config.vllm.addresses
    local, servers = rollout.engine == "local", len(addresses)
    if rollout.launcher == "ray" and not rollout.workers:
        message = "[rollout.launcher], but [rollout.workers]: there is nothing to launch"
        yield message, "use rollout.workers=2 or more"
    for address in addresses:
        if not address.startswith(("http://", "https://")):
            fix = f'use vllm.servers="http://{address}:8000"'
            yield f"[vllm.servers]: {address!r} is no address", fix
    if servers and max(1, rollout.workers) != servers:
        more = rollout.workers > servers
        fault = "some would get the weights more than once" if more else "some would have nothing to do"
        fix = f"use rollout.workers={servers}, or as many servers"
        yield f"[rollout.workers], but [vllm.servers] are {servers}: {fault}", fix
    if local and config.vllm.servers:
        yield "[vllm.servers] is given, but [rollout.engine]", "use rollout.engine=vllm"
    if local and config.sync.transport in ("nccl", "ipc"):
        fix = "use sync.transport=auto, or rollout.engine=vllm"
        yield "[sync.transport] is vLLM's, but [rollout.engine]", fix


def _learner(config: RunConfig) -> Iterator[Finding]:
    learner, local = config.learner, config.learner.backend == "local"
    for key, value, without in (("processes", learner.processes, 1), ("offload", learner.offload, "none")):
        if local and value != without:
            message = f"[learner.{key}], but [learner.backend] is one process that keeps everything on its device"
            yield message, "use learner.backend=deepspeed"
    least = {"none": 0, "optimizer": 1, "all": 3}[learner.offload]
    if not local and learner.zero_stage < least:
        yield "[learner.offload] needs what [learner.zero_stage] does not shard", f"use learner.zero_stage={least}"


def _name(config: RunConfig) -> Iterator[Finding]:
    try:
        algo_settings(config.algo.name)
    except GrammarError as error:
        yield f"algo.name: {error}", error.fix


def _lone_siblings(config: RunConfig) -> Iterator[Finding]:
    """What a group of one cannot give."""
    algo = config.algo
    if config.rollout.group_size > 1:
        return
    if algo.advantage in COMPARES_SIBLINGS and algo.groups.singleton == "zero":
        yield (
            "[rollout.group_size]: [algo.advantage] compares the siblings of a group, so with [algo.groups.singleton] "
            "every advantage is 0 and nothing is learnt",
            f'{MORE_SIBLINGS}, algo.name="ppo" or "reinforce++", or algo.groups.singleton="raw"',
        )
    if algo.dynamic.enabled:
        message = (
            "[algo.dynamic.enabled] keeps groups whose rewards differ, and with [rollout.group_size] there is none"
        )
        yield message, f"{MORE_SIBLINGS}, or algo.dynamic.enabled=false"
    if algo.filters.group_keep < 1:
        message = (
            "[algo.filters.group_keep] ranks groups by their reward deviation, which is 0 with [rollout.group_size]"
        )
        yield message, f"{MORE_SIBLINGS}, or algo.filters.group_keep=1"


def _covariance(config: RunConfig) -> Iterator[Finding]:
    cov = config.algo.clip_cov
    for prefix, lower, upper in (("", cov.lower, cov.upper), ("replay_", cov.replay_lower, cov.replay_upper)):
        low, high = f"algo.clip_cov.{prefix}lower", f"algo.clip_cov.{prefix}upper"
        bounds = [float(str(bound).removeprefix("quantile:")) for bound in (lower, upper)]
        if isinstance(lower, str) == isinstance(upper, str) and bounds[0] >= bounds[1]:
            yield f"[{low}] is not below [{high}]: no token lies between", f"use {low} < {high}"
    if config.algo.loss == "kl_cov" and cov.enabled:
        fix = 'use algo.clip_cov.enabled=false, or algo.loss="clip"'
        yield "[algo.loss] and [algo.clip_cov.enabled]: two rules for the tokens of highest covariance", fix


def _credit(config: RunConfig) -> Iterator[Finding]:
    bonus, filters, advantage = config.algo.intrinsic, config.algo.filters, config.algo.advantage
    if bonus.enabled and bonus.per_call > bonus.cap:
        fix = f"use algo.intrinsic.cap={10 * bonus.per_call:g}, or algo.intrinsic.enabled=false for no bonus"
        yield "[algo.intrinsic.per_call] is above [algo.intrinsic.cap], so that a call is never paid in full", fix
    if filters.group_keep < 1 and filters.subsample != "none" and advantage in ("gae", "reinforce++"):
        message = "[algo.filters.subsample] takes trajectories apart, along which [algo.advantage] gives credit"
        yield message, "use algo.filters.subsample=none"


def _bands(config: RunConfig) -> Iterator[Finding]:
    for name, _, band in schedules(config.algo):
        if band.kind in ADAPTIVE and band.low >= band.high:
            fix = f"use {name}.low={band.high / 4:g}, or a larger high" if band.high > 0 else f"use {name}.high=0.8"
            yield f"[{name}.low] is not below [{name}.high], the band of [{name}.kind]", fix


def _replay(config: RunConfig) -> Iterator[Finding]:
    sil, groups = config.algo.sil, config.rollout.groups_per_step
    if not sil.enabled:
        return
    if sil.max_age == 0 and sil.age_reference == "current":
        message = "[algo.sil.max_age]: nothing is replayed in its own step, and by the next one it is too old"
        yield message, "use algo.sil.max_age=5"
    if sil.max_age > AGE_CAP and config.algo.fidelity.startswith("release_"):
        fix = f"use algo.sil.max_age={AGE_CAP}, or another fidelity"
        yield f"[algo.sil.max_age] under [algo.fidelity], whose buffer caps it at {AGE_CAP}", fix
    if sil.baseline_capacity < groups:
        fix = f"use algo.sil.baseline_capacity={40 * groups}"
        yield "[algo.sil.baseline_capacity] cannot hold the baselines of one step: [rollout.groups_per_step]", fix
    if sil.unit == "row" and sil.min_rows > sil.capacity:
        message = "[algo.sil.min_rows] is above [algo.sil.capacity]: no replay is ever large enough"
        yield message, "use algo.sil.min_rows=1"
