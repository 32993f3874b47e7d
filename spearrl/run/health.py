"""Alarms over a run's metrics: what looks wrong, in plain words, and which setting to try (docs/health.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

WINDOW = 10  # steps that one mean is taken over
NORMS = 100  # gradient norms remembered for the median
CALM = 3  # steps without its condition until an alarm has cleared: one that flaps around its limit is given once
QUIET = 20  # steps in a row without an optimiser step
ENTROPY_STEPS = 50  # a fall of the entropy counts as a collapse up to this step


@dataclass(frozen=True)
class Alarm:
    """A condition that has just begun. `text`: what was seen, and at its end the setting to try."""

    flag: str
    text: str


@dataclass
class Health:
    """Watches the metrics of each step.

    A metric that is missing or not finite proves nothing: in that step alarms that need it are neither raised nor
    cleared.

    Args:
        entropy_start: the first policy entropy above 0.
        replies: [tokens per reply, reward] of the last 2 WINDOW steps.
        tools: [tool calls per episode, success] of the last WINDOW steps.
        best: the means of `tools` over the WINDOW steps of highest success.
        quiet: steps in a row without an optimiser step.
        norms: gradient norms of the last NORMS steps that learnt.
        active: flag -> steps for which its condition has been away.
    """

    entropy_start: float | None = None
    replies: list[list[float]] = field(default_factory=list)
    tools: list[list[float]] = field(default_factory=list)
    best: list[float] | None = None
    quiet: int = 0
    norms: list[float] = field(default_factory=list)
    active: dict[str, int] = field(default_factory=dict)

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Alarms that begin with this step; a flag comes again only after its condition was away for CALM steps.

        Args:
            step: 1-based training step.
            metrics: what the step logged (docs/metrics.md).
        """
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        alarms = []
        for flag, check in CHECKS.items():
            text = check(self, step, finite)
            if text:
                if flag not in self.active:
                    alarms.append(Alarm(flag, text))
                self.active[flag] = 0
            elif text is not None and flag in self.active:
                self.active[flag] += 1
                if self.active[flag] == CALM:
                    del self.active[flag]
        return alarms

    def state_dict(self) -> dict[str, Any]:
        """JSON values; `load_state_dict` restores them exactly."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name, value in state.items():
            setattr(self, name, deepcopy(value))


# A check returns the alarm's text, "" where all is well, None where this step cannot tell.
Check = Callable[[Health, int, Mapping[str, float]], str | None]


def above(metric: str, limit: float, text: str) -> Check:
    """A check of one metric against a limit; `text` is formatted with its value."""

    def check(health: Health, step: int, metrics: Mapping[str, float]) -> str | None:
        value = metrics.get(metric)
        return None if value is None else text.format(value) if value > limit else ""

    return check


def entropy_collapse(health: Health, step: int, metrics: Mapping[str, float]) -> str | None:
    entropy = metrics.get("policy/entropy")
    if health.entropy_start is None and entropy is not None and entropy > 0:
        health.entropy_start = entropy
    start = health.entropy_start
    if entropy is None or start is None:
        return None
    if step > ENTROPY_STEPS or entropy >= 0.3 * start:
        return ""
    return (
        f"policy entropy fell to {entropy:.3g}, {entropy / start:.0%} of what it was at the start ({start:.3g}): "
        "the policy stops exploring; lower learner.lr, or try algo.policy.entropy_coef = 0.001"
    )


def equal_groups(health: Health, step: int, metrics: Mapping[str, float]) -> str | None:
    mixed, success = metrics.get("rollout/mixed_groups"), metrics.get("rollout/success")
    if mixed is None:
        return None
    if 1 - mixed <= 0.6:
        return ""
    if success is None:
        why = "the tasks are too easy or too hard; play more siblings per task, try a larger rollout.group_size"
    elif success >= 0.5:
        why = f"the tasks are too easy ({success:.0%} succeed); use harder ones, or try algo.dynamic.enabled = true"
    else:
        why = (
            f"the tasks are too hard ({success:.0%} succeed); use easier ones, a larger rollout.group_size, "
            "or try a (longer) cold start, sft.enabled = true"
        )
    return f"in {1 - mixed:.0%} of the groups all siblings earned the same, so they teach nothing: {why}"


def sampler_gap(health: Health, step: int, metrics: Mapping[str, float]) -> str | None:
    gap, stale = metrics.get("policy/sampler_gap"), metrics.get("policy/staleness", 0.0)
    if gap is None:
        return None
    if gap <= 0.05 or (stale > 0 and "policy/token_weight" in metrics):  # what a correction is for
        return ""
    why = "engine and learner differ"
    cure = 'the update trusts the wrong probabilities; try learner.precision = "fp32", or correct for the gap with '
    if stale > 0:
        why = f"weights {stale:.1f} versions old sampled the tokens: they and the learner's differ"
        cure = "lower rollout.max_staleness, or correct for it with "
    seen = f"{why} by {gap:.3g} in the log-probability of a sampled token, on average"
    return f'{seen}: {cure}algo.correction.mode = "tis"'


def no_signal(health: Health, step: int, metrics: Mapping[str, float]) -> str | None:
    if "policy/updates" not in metrics and "rollout/groups_lost" not in metrics:
        return None
    trained = metrics.get("policy/updates", 0.0) + metrics.get("policy/skipped", 0.0) > 0
    health.quiet = 0 if trained else health.quiet + 1
    if health.quiet < QUIET:
        return ""
    mixed, success = metrics.get("rollout/mixed_groups", 0.0), metrics.get("rollout/success")
    why = "every episode failed or was filtered out; see trajectories/"
    if success is not None and mixed == 0:
        ends = "succeed" if success >= 0.5 else "fail"
        why = f"all siblings earn the same ({success:.0%} succeed): "
        why += f"tasks on which all {ends}, a reward that is constant, or a rollout.temperature close to 0"
    return f"no optimiser step in {health.quiet} steps: {why}; try harder or easier tasks, or rollout.group_size"


def length_growth(health: Health, step: int, metrics: Mapping[str, float]) -> str | None:
    if "rollout/reply_tokens" not in metrics or "rollout/reward" not in metrics:
        return None
    health.replies = [*health.replies, [metrics["rollout/reply_tokens"], metrics["rollout/reward"]]][-2 * WINDOW :]
    if len(health.replies) < 2 * WINDOW:
        return None
    (length, reward), (long, later) = _means(health.replies[:WINDOW]), _means(health.replies[WINDOW:])
    flat = later <= reward or later - reward < 0.02 * abs(reward)
    if long <= 1.25 * length or not flat:
        return ""
    return (
        f"replies grew from {length:.0f} to {long:.0f} tokens (means of {WINDOW} steps) while the reward stayed flat "
        f"({reward:.3g} to {later:.3g}): the words earn nothing; "
        'try algo.policy.aggregation = "seq-mean-token-sum-norm"'
    )


def truncation(health: Health, step: int, metrics: Mapping[str, float]) -> str | None:
    episodes = sum(value for name, value in metrics.items() if name.startswith("status/"))
    if episodes <= 0:
        return None
    context, overlong = metrics.get("status/context_limit", 0.0), metrics.get("status/overlong", 0.0)
    share = (context + overlong) / episodes
    if share <= 0.1:
        return ""
    why = (
        "most did not fit into the context; try a larger rollout.context_tokens"
        if context >= overlong
        else "most used up their reply tokens; try a larger rollout.max_response_tokens"
    )
    return f"{share:.0%} of the episodes were cut off before they could end: {why}"


def grad_norm(health: Health, step: int, metrics: Mapping[str, float]) -> str | None:
    norm = metrics.get("policy/grad_norm")
    if norm is None or norm <= 0:  # nothing was learnt: no measure of what is usual
        return None
    before, health.norms = health.norms, [*health.norms, norm][-NORMS:]
    if len(before) < WINDOW:
        return None
    usual = median(before)
    if norm <= 10 * usual:
        return ""
    return (
        f"the gradient norm is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}: one step may undo many; "
        "lower learner.grad_clip, or lower learner.lr"
    )


def tool_bonus_farmed(health: Health, step: int, metrics: Mapping[str, float]) -> str | None:
    if "rollout/tool_calls" not in metrics or "rollout/success" not in metrics:
        return None
    health.tools = [*health.tools, [metrics["rollout/tool_calls"], metrics["rollout/success"]]][-WINDOW:]
    if len(health.tools) < WINDOW:
        return None
    calls, success = _means(health.tools)
    if health.best is None or success > health.best[1]:
        health.best = [calls, success]
    calls_before, best = health.best
    if calls <= 1.5 * calls_before or success >= 0.5 * best:
        return ""
    cure = (
        "no bonus is paid any more; lower learner.lr"
        if metrics.get("mu") == 0
        else 'lower algo.intrinsic.per_call, or try algo.intrinsic.condition = "correct_only"'
    )
    return (
        f"tool calls per episode rose from {calls_before:.2g} to {calls:.2g} while success fell from {best:.0%} to "
        f"{success:.0%} (means of {WINDOW} steps): the tools are called for their own sake, not for the task; {cure}"
    )


def _means(pairs: list[list[float]]) -> tuple[float, float]:
    return fmean(first for first, _ in pairs), fmean(second for _, second in pairs)


CHECKS: dict[str, Check] = {
    "sampler_gap": sampler_gap,
    "no_signal": no_signal,
    "clipping": above(
        "policy/clip_fraction",
        0.2,
        "{:.0%} of the tokens hit the clip of the probability ratio: a step moves the policy too far; "
        "use fewer learner.mini_batches, or lower learner.lr",
    ),
    "invalid_actions": above(
        "rollout/invalid",
        0.3,
        "{:.0%} of the turns held no well-formed action or tool call: the model does not know the format; "
        "raise algo.invalid_penalty, or teach the format first: sft.enabled = true, a larger sft.episodes",
    ),
    "outage": above(
        "rollout/faults",
        0.1,
        "in {:.0%} of the episodes a tool, sandbox or server did not work, through no fault of the policy "
        "(trajectories/ has its words, spearrl doctor tries the sandbox): it learns from failures that are not its "
        "own; mend it, or see to env.options",
    ),
    "skipped_updates": above(
        "policy/skipped",
        0.0,
        "optimiser steps skipped because their loss or gradient was not finite: {:.0f}; "
        'lower learner.lr, or try learner.precision = "fp32"',
    ),
    "nonfinite_rollout": above(
        "guard/nonfinite_rollout_logprobs",
        0.0,
        "sampled tokens whose log-probability the engine reported as not finite, left out of the loss: {:.0f}; "
        'lower learner.lr, or try learner.precision = "fp32"',
    ),
    "entropy_collapse": entropy_collapse,
    "equal_groups": equal_groups,
    "length_growth": length_growth,
    "truncation": truncation,
    "grad_norm": grad_norm,
    "tool_bonus_farmed": tool_bonus_farmed,
}
FLAGS = tuple(CHECKS)
