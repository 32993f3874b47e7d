"""Evaluation: fixed panels of tasks, success rates with intervals.

`evaluate(config)` plays the panel with the model directory that a config names, `Trainer.evaluate_policy` with a run's
current weights; both through `play_panel`, with the same collector as training and no bonus, filters or penalties.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from spearrl.config.foreign import warn_unsandboxed
from spearrl.config.sections import EvalSection, RunConfig
from spearrl.envs import Environment, tasks_of
from spearrl.launch.assembly import players_of
from spearrl.launch.factories import make_environment
from spearrl.launch.processors import with_sampling_dtype
from spearrl.models import prepare_torch
from spearrl.rollout import Player
from spearrl.run.metrics import mean, numeric_means
from spearrl.start.origin import Report, silent, with_pinned_model
from spearrl.types import Group, Task, Trajectory

Z95 = 1.959963984540054
# What an evaluation says itself: an environment's measure of such a name is told as env/<name>.
OWN = {"success", "low", "high", "reward", "reward_with_bonus", "turns", "tasks", "errors", "panel", "seconds"}
OWN |= {"event", "step", "steps", "time"}


@dataclass(frozen=True)
class Rate:
    """A success rate with its 95 % interval over `tasks` tasks."""

    rate: float
    low: float
    high: float
    tasks: int

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}] (n={self.tasks})"


@dataclass(frozen=True)
class EvalResult:
    """The result of a panel.

    Args:
        panel: identifies split, tasks, attempts, sampling and seed: only equal panels compare.
        success, reward, turns: means over sound episodes.
        pass_at: k -> chance that one of k attempts succeeds, for k = 1, 2, 4, ... attempts.
        strata: success by the environment's `stratum` of a task.
        measures: means of the environment's numeric measures.
        notes: the environment's textual measures, e.g. which noun tagger judged.
        statuses: number of episodes by status.
        errors: episodes lost to faults; not in any rate.
    """

    split: str
    panel: str
    attempts: int
    temperature: float
    success: Rate
    reward: float
    turns: float
    pass_at: dict[str, float] = field(default_factory=dict)
    strata: dict[str, Rate] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    errors: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def values(self) -> dict[str, Any]:
        """What the event log says of it."""
        return {
            "success": self.success.rate,
            "low": self.success.low,
            "high": self.success.high,
            "reward": self.reward,
            **self.measures,
            **{f"success {name}": rate.rate for name, rate in self.strata.items()},
            "turns": self.turns,
            "tasks": self.success.tasks,
            "errors": self.errors,
            **self.notes,
            "panel": self.panel,
        }


def evaluate(config: RunConfig, *, unsandboxed_tools: bool = False) -> EvalResult:
    """Play the configured panel with the model of `config.model.path`; nothing is trained or written.

    Args:
        unsandboxed_tools: the config may switch the sandbox off.
    Raises:
        SpearError: the model cannot be loaded, or nothing plays its episodes.
    """
    return evaluate_with_groups(config, unsandboxed_tools=unsandboxed_tools)[0]


def evaluate_with_groups(
    config: RunConfig, *, report: Report = silent, unsandboxed_tools: bool = False
) -> tuple[EvalResult, list[Group]]:
    """`evaluate`, with the episodes that were played."""
    warn_unsandboxed(config.env.options, unsandboxed_tools)
    device, environment = prepare_torch(config), make_environment(config)
    config = with_sampling_dtype(with_pinned_model(config, environment), report)
    with ExitStack() as stack:
        players = players_of(config, environment, device, stack)
        return play_panel(players.evaluator, tasks_of_panel(environment, config.eval), config)


def play_panel(player: Player, tasks: Sequence[Task], config: RunConfig) -> tuple[EvalResult, list[Group]]:
    """Play a panel's tasks; the result and the episodes.

    Seeds come from `eval.seed` and a task's index in the panel, so a panel is the same for every run and step.
    """
    settings = config.eval
    groups = player.collect(tasks, settings.attempts, run_seed=settings.seed, step=0, first_group_id=0, purpose="eval")
    return summarise(groups, settings, panel_id(tasks, config)), groups


def tasks_of_panel(environment: Environment, settings: EvalSection) -> list[Task]:
    """The first `settings.tasks` tasks of the split. Raises ConfigError where it has none."""
    return list(tasks_of(environment, settings.split, setting="eval.split")[: settings.tasks])


def panel_id(tasks: Sequence[Task], config: RunConfig) -> str:
    """Hash of everything that defines the panel: environment, prompts, limits, sampling, seed, tasks."""
    settings, limits = config.eval, config.rollout
    parts = [
        json.dumps(config.env.model_dump(), sort_keys=True, default=str),
        str((limits.max_reply_tokens, limits.max_response_tokens, limits.context_tokens)),
        settings.split,
        str(settings.attempts),
        repr(settings.temperature),
        repr(settings.top_p),
        str(settings.seed),
        *(task.id for task in tasks),
    ]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=6).hexdigest()


def summarise(groups: Sequence[Group], settings: EvalSection, panel: str) -> EvalResult:
    """Rates, means and counts of played groups."""
    sound = [t for g in groups for t in g.valid]
    strata = sorted({str(g.task.data["stratum"]) for g in groups if "stratum" in g.task.data})
    return EvalResult(
        split=settings.split,
        panel=panel,
        attempts=settings.attempts,
        temperature=settings.temperature,
        success=success_rate(groups),
        reward=mean([t.reward for t in sound]),
        turns=mean([len(t.turns) for t in sound]),
        pass_at=pass_rates(groups, settings.attempts),
        strata={
            name: success_rate([g for g in groups if str(g.task.data.get("stratum")) == name])
            for name in (strata if len(strata) > 1 else ())
        },
        measures={_measure(key): value for key, value in numeric_means(sound).items()} | images_shown(sound),
        notes={_measure(key): value for t in sound for key, value in t.info.items() if isinstance(value, str)},
        statuses=dict(Counter(t.status.value for g in groups for t in g.trajectories)),
        errors=sum(len(g.trajectories) - len(g.valid) for g in groups),
    )


def _measure(name: str) -> str:
    """What an environment's measure is called beside the evaluation's own numbers."""
    return f"env/{name}" if name in OWN or "/" in name or name.startswith("success ") else name


def success_rate(groups: Sequence[Group]) -> Rate:
    """Mean over tasks of the share of successful attempts.

    Interval: Wilson's for one attempt a task or equal shares (no spread to estimate it from), else normal over shares.
    """
    shares = [mean([float(t.success) for t in g.valid]) for g in groups if g.valid]
    count = len(shares)
    if count == 0:
        return Rate(0.0, 0.0, 1.0, 0)
    rate = mean(shares)
    if all(len(g.valid) <= 1 for g in groups) or len(set(shares)) == 1:
        return Rate(rate, *wilson(rate, count), count)
    spread = math.sqrt(sum((s - rate) ** 2 for s in shares) / max(1, count - 1) / count)
    return Rate(rate, max(0.0, rate - Z95 * spread), min(1.0, rate + Z95 * spread), count)


def pass_rates(groups: Sequence[Group], attempts: int) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, … and `attempts`; {} for one attempt a task.

    Unbiased (arXiv 2107.03374 eq. 1): mean over tasks of 1 − C(n − c, k) / C(n, k), where c of n attempts succeeded.
    Tasks that lost more attempts to faults than a k leaves are not in its mean.
    """
    counts = [(len(g.valid), sum(t.success for t in g.valid)) for g in groups]
    rates: dict[str, float] = {}
    for k in sorted({attempts, *(2**i for i in range(attempts.bit_length()))}) if attempts > 1 else ():
        chances = [1 - math.comb(n - c, k) / math.comb(n, k) for n, c in counts if n >= k]
        rates |= {str(k): mean(chances)} if chances else {}
    return rates


def wilson(rate: float, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (doi:10.1080/01621459.1927.10502953)."""
    centre = (rate + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(rate * (1 - rate) / count + Z95**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def images_shown(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean number of images in a prompt, as the measure "pictures"; nothing where there were none."""
    counts = [len(turn.images) for t in trajectories for turn in t.turns]
    return {"pictures": mean(counts)} if any(counts) else {}
