"""Proves that an environment keeps its contract; says in words what is wrong, where, and what to do."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spearrl.envs.check import interface, isolation
from spearrl.envs.check.checked_environment import BrokenRule, CheckedEnvironment, Level
from spearrl.envs.check.guards import TooSlow
from spearrl.errors import SpearError

Rule = Callable[[CheckedEnvironment], str]

# In the order in which they are tried and reported.
RULES: tuple[Rule, ...] = (interface.tasks, interface.unknown_split, interface.max_turns, interface.episode)
RULES += (isolation.determinism, isolation.processes, isolation.task_data)
RULES += (interface.after_end, interface.hostile, interface.parse_format)
RULES += (isolation.spawn, isolation.close, isolation.global_random, isolation.network)
RULES += (interface.expert, interface.anchors, isolation.off_loop, isolation.speed)
SPLITS = ("train", "val")
SEED = 7


@dataclass(frozen=True)
class RuleFinding:
    """What one rule found; `where` and `fix` are set where something is wrong.

    `level` is "fail" where the contract is broken, "warn" where the environment runs and may disappoint, "skip" where
    the rule had nothing to look at.
    """

    rule: str
    level: Level
    seen: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"[{self.level}]".ljust(7) + f"{self.rule:<14} {self.seen}"]
        lines += [f"       {name}: {text}" for name, text in (("where", self.where), ("fix", self.fix)) if text]
        return "\n".join(lines)

    def as_json(self) -> dict[str, str]:
        """The fields by name."""
        return asdict(self)


def check_environment(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    max_turns: int = 0,
    splits: Sequence[str] | None = None,
    deadline_s: float = 10.0,
    seed: int = SEED,
) -> list[RuleFinding]:
    """Examine the environment `name` (built-in, or "my_pkg.mod:Class") by every rule of the contract.

    The rules are the functions of `spearrl.envs.check.interface` and `spearrl.envs.check.isolation`.

    Args:
        options: the environment's own (`env.options`).
        max_turns: the turn limit; 0: the environment's own.
        splits: whose tasks are looked at; each must be there. None: "train", and "val" where there is one.
        deadline_s: seconds a single call may take. Outside the main thread it cannot be held to.
        seed: of the episodes that are played.
    Raises:
        ConfigError: the environment cannot be imported, or refuses its options.

    Example:
        assert not failures(check_environment("my_pkg.env:MyEnvironment"))
    """
    try:
        checked = CheckedEnvironment(
            name,
            dict(options or {}),
            max_turns,
            splits or SPLITS,
            deadline_s=deadline_s,
            seed=seed,
            all_splits=bool(splits),
        )
    except SpearError:
        raise
    except (Exception, TooSlow) as error:
        return [_raised("build", "__init__", error, deadline_s)]
    findings = []
    for rule in RULES:
        if rule is not interface.tasks and not checked.played:
            break  # without tasks nothing can be played
        if rule is isolation.speed and not checked.seconds["step"]:
            break
        findings.append(_examine(rule, checked))
    return findings


def failures(findings: Sequence[RuleFinding]) -> list[RuleFinding]:
    """Those that break the contract."""
    return [finding for finding in findings if finding.level == "fail"]


def _examine(rule: Rule, checked: CheckedEnvironment) -> RuleFinding:
    name = rule.__name__.replace("_", " ")
    try:
        return RuleFinding(name, "ok", rule(checked))
    except BrokenRule as broken:
        where = "" if broken.level == "skip" else checked.last_call
        return RuleFinding(name, broken.level, broken.seen, where, broken.fix)
    except (Exception, TooSlow) as error:
        return _raised(name, checked.last_call, error, checked.deadline_s)


def _raised(rule: str, last_call: str, error: BaseException, deadline_s: float) -> RuleFinding:
    here = str(Path(__file__).parent)  # the line of the environment is named, not the line of the rule that called it
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(here)]
    where = f"{last_call} ({f'{frames[-1].filename}:{frames[-1].lineno}' if frames else ''})"
    if isinstance(error, TooSlow):
        seen, fix = f"no answer within {deadline_s:g} s", "bound the work; "
        fix += 'execution="process" lets a run survive what hangs'
    else:
        seen = f"it raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        fix = "answer with an Outcome that says what is wrong; the model reads it"
    return RuleFinding(rule, "fail", seen, where, fix)
