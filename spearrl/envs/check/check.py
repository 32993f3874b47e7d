"""Proves that an environment keeps its contract; says in words what is wrong, where, and what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from spearrl.envs.check.guards import TooSlow
from spearrl.envs.check.rules import RULES, Advice, NotApplicable, tasks
from spearrl.envs.check.subject import BrokenRule, Subject, place_of
from spearrl.errors import SpearError

SPLITS = ("train", "val")
SEED = 7


@dataclass(frozen=True)
class Finding:
    """What one rule found. `where` and `fix` are set where something is wrong."""

    rule: str
    level: Literal["ok", "warn", "fail", "skip"]
    seen: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"[{self.level}]".ljust(7) + f"{self.rule:<14} {self.seen}"]
        return "\n".join(
            [*lines, *(f"       {name}: {text}" for name, text in (("where", self.where), ("fix", self.fix)) if text)]
        )

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def check_environment(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    max_turns: int = 0,
    splits: Sequence[str] | None = None,
    deadline_s: float = 10.0,
    seed: int = SEED,
) -> list[Finding]:
    """Examine the environment `name` (built-in, or "my_pkg.mod:Class") by every rule of `spearrl.envs.check.rules`.

    Args:
        max_turns: the turn limit; 0: the environment's own.
        splits: whose tasks are looked at; each must be there. None: "train", and "val" where there is one.
        deadline_s: seconds a single call may take. Outside the main thread it cannot be held to.
    Raises:
        ConfigError: the environment cannot be imported, or refuses its options.

    Example:
        assert not failures(check_environment("my_pkg.env:MyEnvironment"))
    """
    try:
        subject = Subject(
            name,
            options or {},
            max_turns=max_turns,
            splits=splits or SPLITS,
            deadline_s=deadline_s,
            seed=seed,
            demanded=bool(splits),
        )
    except SpearError:
        raise
    except (Exception, TooSlow) as error:
        return [_raised("build", "__init__", error, deadline_s)]
    findings = []
    for rule in RULES:
        if rule is not tasks and not subject.played:
            break  # without tasks nothing can be played
        if rule.__name__ == "speed" and not subject.step_seconds:
            break
        findings.append(_examine(rule, subject))
    return findings


def failures(findings: Sequence[Finding]) -> list[Finding]:
    """Those that break the contract."""
    return [finding for finding in findings if finding.level == "fail"]


def _examine(rule: Callable[[Subject], str], subject: Subject) -> Finding:
    name = rule.__name__.replace("_", " ")
    try:
        return Finding(name, "ok", rule(subject))
    except NotApplicable as reason:
        return Finding(name, "skip", str(reason))
    except BrokenRule as found:
        return Finding(name, "warn" if isinstance(found, Advice) else "fail", found.seen, subject.at, found.fix)
    except (Exception, TooSlow) as error:
        return _raised(name, subject.at, error, subject.deadline_s)


def _raised(rule: str, at: str, error: BaseException, deadline_s: float) -> Finding:
    where = f"{at} ({place_of(error)})"
    if isinstance(error, TooSlow):
        return Finding(
            rule,
            "fail",
            f"no answer within {deadline_s:g} s",
            where,
            'bound the work; execution="process" lets a run survive what hangs',
        )
    text = str(error).partition("\n")[0]
    return Finding(
        rule,
        "fail",
        f"it raised {type(error).__name__}: {text}",
        where,
        "answer with an Outcome that says what is wrong; the model reads it",
    )


def print_traces() -> None:
    """What `rules.processes` runs in a fresh process: the request on standard input, tasks and episodes as one line of JSON on standard output."""
    ask = json.load(sys.stdin)
    result, sys.stdout = sys.stdout, sys.stderr
    subject = Subject(ask.pop("name"), ask.pop("options"), **ask)
    with suppress(BrokenRule):  # the rule `tasks` has said it already
        tasks(subject)
    listed = [
        [task.id for task in subject.root.tasks(split)][:1000] for split in {task.split: 0 for task in subject.played}
    ]
    traces = [[list(moment) for moment in subject.play(subject.spawn(), task, subject.seed)] for task in subject.played]
    result.write(json.dumps({"tasks": listed, "ids": [task.id for task in subject.played], "traces": traces}) + "\n")
