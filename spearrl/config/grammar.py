"""The --algo grammar: base[+module...]. A name only sets fields of the algo section; there is one table entry per name."""

from __future__ import annotations

import difflib

BASES: dict[str, dict[str, object]] = {
    "grpo": {"algo.sil.enabled": False, "algo.intrinsic.enabled": False, "algo.clip_cov.enabled": False},
}
PARTS: dict[str, dict[str, object]] = {
    "sil": {"algo.sil.enabled": True},
    "intrinsic": {"algo.intrinsic.enabled": True},
    "clip_cov": {"algo.clip_cov.enabled": True},
}
MODULES = {**PARTS, "spear": {**PARTS["sil"], **PARTS["intrinsic"], **PARTS["clip_cov"]}}

DESCRIPTIONS = {
    "grpo": "group-relative policy gradient, all modules off",
    "sil": "self-imitation: replay of the agent's own good trajectories",
    "intrinsic": "intrinsic reward for tool calls, fading out",
    "clip_cov": "covariance clipping against entropy collapse",
    "spear": "sil + intrinsic + clip_cov",
}
# Known words whose entries above are still to be written.
PLANNED_BASES = ("gigpo", "rloo", "reinforce++", "ppo", "dapo", "dr_grpo", "gspo", "cispo")
PLANNED_MODULES = ("drbot", "kl_cov", "tis", "mis")


class GrammarError(ValueError):
    """An algorithm name that sets nothing. `fix` says what to write instead."""

    def __init__(self, message: str, fix: str):
        super().__init__(message)
        self.fix = fix


def algo_settings(name: str) -> dict[str, object]:
    """The fields that base[+module...] sets, by dotted key.

    Example:
        algo_settings("grpo+sil")["algo.sil.enabled"] is True

    Raises GrammarError for an unknown, repeated, misplaced or not yet available word.
    """
    base, words = _split(name)
    _look_up(name, base, BASES, PLANNED_BASES, "base")
    settings = dict(BASES[base])
    for position, word in enumerate(words):
        if not word:
            raise GrammarError(f"{name!r} has an empty module name", "use base+module, e.g. grpo+spear")
        if word in words[:position]:
            raise GrammarError(f"module {word!r} is named twice in {name!r}", f"use {word!r} once")
        _look_up(name, word, MODULES, PLANNED_MODULES, "module")
        settings.update(MODULES[word])
    return settings


def _split(name: str) -> tuple[str, list[str]]:
    """Base and modules; "reinforce++" is one word although it holds the separator."""
    for base in PLANNED_BASES:
        if base.endswith("++") and (name == base or name.startswith(base + "+")):
            return base, name[len(base) + 1 :].split("+") if len(name) > len(base) else []
    base, *words = name.split("+")
    return base, words


def _look_up(name: str, word: str, table: dict[str, dict[str, object]], planned: tuple[str, ...], role: str) -> None:
    if word in table:
        return
    known = ", ".join(table)
    if word in planned:
        raise GrammarError(f"{role} {word!r} in {name!r} is not available yet", f"use one of: {known}")
    if role == "base" and word in MODULES:
        raise GrammarError(f"{name!r} does not begin with a base; {word!r} is a module", f"use grpo+{name}")
    if role == "module" and word in BASES:
        raise GrammarError(f"{name!r} has a second base, {word!r}", f"use one base and then modules ({', '.join(MODULES)})")
    near = difflib.get_close_matches(word, table, n=1, cutoff=0.5)
    fix = f"did you mean {near[0]!r}? ({role}s: {known})" if near else f"use one of: {known}"
    raise GrammarError(f"{role} {word[:60]!r} in {name[:60]!r} does not exist", fix)
