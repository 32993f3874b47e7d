"""The --algo grammar: base[+module...]. A name only sets fields of the algo section; grammar.toml has one entry per name.

A base says what every algorithm differs in (advantage, loss, no module on) and its own clip range and aggregation where its paper has
one; all else is a hyper-parameter and stays as preset and file have it. Modules set fields of their own, so their order does not matter.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from spearrl.config.tables import flat, table

Fields = dict[str, object]


class Conflict(NamedTuple):
    """Words that make no sense together. `fix` takes {without}, the name less `drop`, and {split}, spear spelt out less clip_cov."""

    one: str
    others: list[str]
    reason: str
    fix: str
    drop: str


def _fields(entry: dict[str, Any]) -> Fields:
    return flat({key: value for key, value in entry.items() if key != "about"}, "algo.")


_TABLE = table(__file__, "grammar.toml")
PLAIN: Fields = _fields(_TABLE["plain"])
BASES: dict[str, Fields] = {name: PLAIN | _fields(entry) for name, entry in _TABLE["base"].items()}
MODULES: dict[str, Fields] = {name: _fields(entry) for name, entry in _TABLE["module"].items()}
DESCRIPTIONS: dict[str, str] = {name: entry["about"] for name, entry in {**_TABLE["base"], **_TABLE["module"]}.items()}
CONFLICTS = tuple(Conflict(**entry) for entry in _TABLE["conflict"])
_PARTS = ("sil", "intrinsic", "clip_cov")  # of spear
# A base whose loss has a clip range of its own keeps it under modules that set the clip of "clip".
_CLIP = ("algo.policy.clip_low", "algo.policy.clip_high")


class GrammarError(ValueError):
    """An algorithm name that sets nothing. `fix` says what to write instead."""

    def __init__(self, message: str, fix: str):
        super().__init__(message)
        self.fix = fix


def words_of(name: str) -> tuple[str, tuple[str, ...]]:
    """Base and modules of a name, as written: "reinforce+++sil" is ("reinforce++", ("sil",)).

    Raises GrammarError for an unknown, repeated or misplaced word, and for words that make no sense together.
    """
    base, words = _split(name)
    _check_base(name, base)
    for position, word in enumerate(words):
        if not word:
            raise GrammarError(f"{name[:60]!r} has an empty module name", "use base+module, e.g. grpo+spear")
        _check_module(name, base, word)
        if word in words[:position]:
            raise GrammarError(f"module {word!r} is named twice in {name[:60]!r}", f"use {word!r} once")
    for conflict in CONFLICTS:
        other = next((word for word in (base, *words) if word in conflict.others), None)
        if conflict.one in words and other is not None:
            _refuse(name, conflict, other)
    return base, tuple(words)


def algo_settings(name: str) -> Fields:
    """The fields that base[+module...] sets, by dotted key.

    Example:
        algo_settings("grpo+sil")["algo.sil.enabled"] is True

    Raises GrammarError as `words_of` does.
    """
    base, words = words_of(name)
    settings = dict(BASES[base])
    for word in words:
        settings |= {key: value for key, value in MODULES[word].items() if not (key in _CLIP and key in BASES[base])}
    return settings


def _split(name: str) -> tuple[str, list[str]]:
    """Base and modules; "reinforce++" is one word although it holds the separator."""
    for base in sorted(BASES, key=len, reverse=True):
        if name == base:
            return base, []
        if name.startswith(f"{base}+"):
            return base, name[len(base) + 1 :].split("+")
    base, *words = name.split("+")
    return base, words


def _check_base(name: str, word: str) -> None:
    if word in BASES:
        return
    if (plain := word[:60].lower().replace("-", "_")) in MODULES:
        rest = [w for w in name[len(word) + 1 : 60].split("+") if w]
        base = next((w for w in rest if w in BASES), "grpo")
        words = "+".join([base, plain, *(w for w in rest if w != base)])
        raise GrammarError(f"{name[:60]!r} does not begin with a base; {plain!r} is a module", f"use {words}")
    raise GrammarError(f"base {word[:60]!r} in {name[:60]!r} does not exist", _suggestion(word, "base", tuple(BASES)))


def _check_module(name: str, base: str, word: str) -> None:
    if word in MODULES:
        return
    if word in BASES:
        raise GrammarError(f"{name[:60]!r} has a second base, {word!r}", _one_base(base, word))
    raise GrammarError(
        f"module {word[:60]!r} in {name[:60]!r} does not exist", _suggestion(word, "module", tuple(MODULES))
    )


def _suggestion(word: str, role: str, known: tuple[str, ...]) -> str:
    plain = word[:60].lower().replace("-", "_")
    near = (
        [_TABLE["other_names"][plain]]
        if _TABLE["other_names"].get(plain) in known
        else difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    )
    listed = ", ".join(known)
    return f"did you mean {near[0]!r}? ({role}s: {listed})" if near else f"use one of: {listed}"


def _one_base(base: str, second: str) -> str:
    """How to have what both stand for, where that exists."""
    for one, other in ((base, second), (second, base)):
        if BASES[other]["algo.loss"] != "clip" and BASES[one]["algo.loss"] == "clip":
            return f'use {one} with algo.loss="{BASES[other]["algo.loss"]}" and the clip range of {other}, or one of the two alone'
    return f"use one base and then modules ({', '.join(MODULES)})"


def _refuse(name: str, conflict: Conflict, other: str) -> None:
    base, words = _split(name)
    kept = [word for word in words if word != conflict.drop]
    split = [part for part in _PARTS if part not in ("clip_cov", *kept)]
    reason = conflict.reason.format(other=other)
    fix = conflict.fix.format(without="+".join((base, *kept)), split="+".join((base, *split, *kept)))
    raise GrammarError(f"{conflict.one} with {other} in {name[:60]!r}: {reason}", fix)
