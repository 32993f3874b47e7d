"""Fixed panels of tasks, success rates with intervals. The same collector as training; no bonus, no filters, no penalties."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from spearrl.config import EvalSection, RunConfig
from spearrl.envs import Environment
from spearrl.errors import ConfigError
from spearrl.rollout import Player
from spearrl.types import Group, Task, Trajectory

Z95 = 1.959963984540054


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
    """What a panel gave. `panel` identifies split, tasks, attempts, sampling and seed: only equal panels compare."""

    split: str
    panel: str
    attempts: int
    temperature: float
    success: Rate
    reward: float
    turns: float
    pass_at: dict[str, float] = field(
        default_factory=dict
    )  # k -> chance that one of k attempts wins, for k = 1, 2, 4, ... attempts
    strata: dict[str, Rate] = field(default_factory=dict)  # by the environment's `stratum` of a task
    measures: dict[str, float] = field(default_factory=dict)  # means of the environment's numeric measures
    notes: dict[str, str] = field(
        default_factory=dict
    )  # the environment's textual measures, e.g. which noun tagger judged
    statuses: dict[str, int] = field(default_factory=dict)
    errors: int = 0  # episodes lost to faults; not in any rate

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def some_tasks(environment: Environment, split: str, where: str) -> Sequence[Task]:
    """The tasks of a split. Raises ConfigError where there are none."""
    tasks = environment.tasks(split)
    if not tasks:
        raise ConfigError(f"split {split!r} has no tasks", where=where, hint="name a split the environment has")
    return tasks


def choose_panel(environment: Environment, settings: EvalSection) -> list[Task]:
    """The first `settings.tasks` tasks of the split."""
    return list(some_tasks(environment, settings.split, "eval.split")[: settings.tasks])


def panel_id(tasks: Sequence[Task], config: RunConfig) -> str:
    """Hash of everything that defines the panel: environment, prompts, limits, sampling, seed, tasks."""
    settings, limits = config.eval, config.rollout
    options = json.dumps(config.env.model_dump(), sort_keys=True, default=str)
    lengths = (limits.max_reply_tokens, limits.max_response_tokens, limits.context_tokens)
    parts = [
        options,
        str(lengths),
        settings.split,
        str(settings.attempts),
        repr(settings.temperature),
        repr(settings.top_p),
        str(settings.seed),
    ]
    parts += [t.id for t in tasks]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=6).hexdigest()


def run_panel(collector: Player, tasks: Sequence[Task], config: RunConfig) -> tuple[EvalResult, list[Group]]:
    """Play the panel. Seeds come from `eval.seed` and the task's place, so a panel is the same for every run and step."""
    settings = config.eval
    groups = collector.collect(
        tasks, settings.attempts, run_seed=settings.seed, step=0, first_group_id=0, purpose="eval"
    )
    return summarise(groups, settings, panel_id(tasks, config)), groups


def summarise(groups: Sequence[Group], settings: EvalSection, panel: str) -> EvalResult:
    """Rates, means and counts of played groups."""
    played = [t for g in groups for t in g.valid]
    strata = sorted({str(g.task.data["stratum"]) for g in groups if "stratum" in g.task.data})
    strata = strata if len(strata) > 1 else []
    statuses: dict[str, int] = {}
    for trajectory in (t for g in groups for t in g.trajectories):
        statuses[trajectory.status.value] = statuses.get(trajectory.status.value, 0) + 1
    return EvalResult(
        split=settings.split,
        panel=panel,
        attempts=settings.attempts,
        temperature=settings.temperature,
        success=success_rate(groups),
        reward=_mean([t.reward for t in played]),
        turns=_mean([len(t.turns) for t in played]),
        pass_at=pass_rates(groups, settings.attempts),
        strata={name: success_rate([g for g in groups if str(g.task.data.get("stratum")) == name]) for name in strata},
        measures=numeric_means(played) | pictures_shown(played),
        notes={key: value for t in played for key, value in t.info.items() if isinstance(value, str)},
        statuses=statuses,
        errors=sum(len(g.trajectories) - len(g.valid) for g in groups),
    )


def success_rate(groups: Sequence[Group]) -> Rate:
    """Mean over tasks of the share of attempts won. Interval: Wilson for one attempt a task, else normal over task means."""
    shares = [_mean([float(t.success) for t in g.valid]) for g in groups if g.valid]
    count = len(shares)
    if count == 0:
        return Rate(0.0, 0.0, 1.0, 0)
    rate = _mean(shares)
    if all(len(g.valid) <= 1 for g in groups):
        return Rate(rate, *wilson(rate, count), count)
    if len(set(shares)) == 1:  # no spread to estimate an interval from
        return Rate(rate, *wilson(rate, count), count)
    spread = math.sqrt(sum((s - rate) ** 2 for s in shares) / max(1, count - 1) / count)
    return Rate(rate, max(0.0, rate - Z95 * spread), min(1.0, rate + Z95 * spread), count)


def pass_rates(groups: Sequence[Group], attempts: int) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, … and `attempts`, unbiased: mean over tasks of 1 − C(n − c, k) / C(n, k) with c of n attempts won (arXiv 2107.03374 eq. 1).

    Tasks that lost more attempts to faults than a k leaves are not in its mean; empty for one attempt a task.
    """
    counts = [(len(g.valid), sum(t.success for t in g.valid)) for g in groups]
    found: dict[str, float] = {}
    for k in sorted({attempts, *(2**i for i in range(attempts.bit_length()))}) if attempts > 1 else ():
        chances = [1 - math.comb(n - c, k) / math.comb(n, k) for n, c in counts if n >= k]
        found |= {str(k): _mean(chances)} if chances else {}
    return found


def wilson(rate: float, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (doi:10.1080/01621459.1927.10502953)."""
    centre = (rate + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(rate * (1 - rate) / count + Z95**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def numeric_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean of every numeric measure in the trajectories' info; an episode without the measure counts 0."""
    keys = sorted(
        {k for t in trajectories for k, v in t.info.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    )
    return {key: _mean([float(t.info.get(key, 0.0)) for t in trajectories]) for key in keys}


def pictures_shown(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean number of pictures in a prompt; nothing where there were none."""
    counts = [len(turn.images) for t in trajectories for turn in t.turns]
    return {"pictures": _mean(counts)} if any(counts) else {}


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
