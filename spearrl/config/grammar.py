"""The --algo grammar: base[+module...]. A name only sets fields of the algo section; grammar.toml has its words.

A base says what every algorithm differs in (advantage, loss, no module on) and its own clip range and aggregation where
its paper has one; all else is a hyper-parameter and stays as preset and file have it. Modules set fields of their own,
so their order does not matter.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

from spearrl.config.tables import flat, table

Fields = dict[str, object]


class Conflict(NamedTuple):
    """Words that make no sense together: `one` with one of the `others`.

    `reason` and `fix` are templates: {other} is the word of `others` in the name, {without} the name less `drop` ("":
    less {other}), {split} the name with spear spelt out less clip_cov.
    """

    one: str
    others: tuple[str, ...]
    reason: str
    fix: str = "use {without}"
    drop: str = ""


def _fields(entry: dict[str, Any]) -> Fields:
    return flat({key: value for key, value in entry.items() if key != "about"}, "algo.")


_TABLE = table(__file__, "grammar.toml")
PLAIN: Fields = _fields(_TABLE["plain"])
BASES: dict[str, Fields] = {name: PLAIN | _fields(entry) for name, entry in _TABLE["base"].items()}
MODULES: dict[str, Fields] = {name: _fields(entry) for name, entry in _TABLE["module"].items()}
DESCRIPTIONS: dict[str, str] = {name: entry["about"] for name, entry in {**_TABLE["base"], **_TABLE["module"]}.items()}
_PARTS = ("sil", "intrinsic", "clip_cov")  # of spear
_HIGHEST = "rules for the tokens of highest covariance"
CONFLICTS = (
    Conflict("spear", _PARTS, "spear holds {other} already"),
    Conflict("kl_cov", ("clip_cov",), f"both are {_HIGHEST}", "use one of them: {without}"),
    Conflict("kl_cov", ("spear",), f"spear brings clip_cov, and both are {_HIGHEST}", "use {split}"),
    Conflict("tis", ("mis",), "both weigh the same ratio learner/engine", "use one of them: {without}"),
    Conflict(
        "kl_cov",
        ("gspo", "cispo"),
        "kl_cov is a loss of its own, and so is {other}",
        "use {without}, or kl_cov on another base",
        drop="kl_cov",
    ),
    Conflict(
        "drbot",
        ("gspo",),
        "its clip range of 0.28 and its sums over tokens contradict a sequence ratio clipped at 4e-4",
        "use {without} and the filters by themselves, e.g. algo.filters.void_turn=true algo.filters.group_keep=0.75",
        drop="drbot",
    ),
)
# Bases as other trainers spell them.
_OTHER_NAMES = {"reinforce": "reinforce++", "reinforce_plus_plus": "reinforce++", "gae": "ppo"}
_OTHER_NAMES["reinforce_plus_plus_baseline"] = "reinforce++_baseline"
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
    if base not in BASES:
        raise _wrong_base(name, base)
    for position, word in enumerate(words):
        if not word:
            raise GrammarError(f"{name[:60]!r} has an empty module name", "use base+module, e.g. grpo+spear")
        if word not in MODULES:
            raise _wrong_module(name, base, word)
        if word in words[:position]:
            raise GrammarError(f"module {word!r} is named twice in {name[:60]!r}", f"use {word!r} once")
    for conflict in CONFLICTS:
        other = next((word for word in (base, *words) if word in conflict.others), None)
        if conflict.one in words and other is not None:
            raise _refusal(name, conflict, other)
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
        if name == base or name.startswith(f"{base}+"):
            return base, name[len(base) + 1 :].split("+") if name != base else []
    base, *words = name.split("+")
    return base, words


def _wrong_base(name: str, word: str) -> GrammarError:
    if (module := _plain(word)) in MODULES:
        words = [w for w in name[len(word) + 1 : 60].split("+") if w]
        base = next((w for w in words if w in BASES), "grpo")
        fix = f"use {'+'.join([base, module, *(w for w in words if w != base)])}"
        return GrammarError(f"{name[:60]!r} does not begin with a base; {module!r} is a module", fix)
    return GrammarError(f"base {word[:60]!r} in {name[:60]!r} does not exist", _suggestion(word, "base", BASES))


def _wrong_module(name: str, base: str, word: str) -> GrammarError:
    if word not in BASES:
        return GrammarError(
            f"module {word[:60]!r} in {name[:60]!r} does not exist", _suggestion(word, "module", MODULES)
        )
    fix = f"use one base and then modules ({', '.join(MODULES)})"
    for one, other in ((base, word), (word, base)):  # what both stand for may be had otherwise
        if BASES[other]["algo.loss"] != "clip" and BASES[one]["algo.loss"] == "clip":
            own_loss = f'algo.loss="{BASES[other]["algo.loss"]}" and the clip range of {other}'
            fix = f"use {one} with {own_loss}, or one of the two alone"
    return GrammarError(f"{name[:60]!r} has a second base, {word!r}", fix)


def _plain(word: str) -> str:
    return word[:60].lower().replace("-", "_")


def _suggestion(word: str, role: str, known: Iterable[str]) -> str:
    known, other_name = tuple(known), _OTHER_NAMES.get(_plain(word))
    near = [other_name] if other_name in known else difflib.get_close_matches(_plain(word), known, n=1, cutoff=0.5)
    listed = ", ".join(known)
    return f"did you mean {near[0]!r}? ({role}s: {listed})" if near else f"use one of: {listed}"


def _refusal(name: str, conflict: Conflict, other: str) -> GrammarError:
    base, words = _split(name)
    without = [word for word in words if word != (conflict.drop or other)]
    parts = [part for part in _PARTS if part not in ("clip_cov", *without)]
    reason = conflict.reason.format(other=other)
    fix = conflict.fix.format(without="+".join((base, *without)), split="+".join((base, *parts, *without)))
    return GrammarError(f"{conflict.one} with {other} in {name[:60]!r}: {reason}", fix)
