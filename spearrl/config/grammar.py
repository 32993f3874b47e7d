"""The --algo grammar: base[+module...]. A name only sets fields of the algo section; there is one table entry per name.

A base says what every algorithm differs in (advantage, loss, no module on) and its own clip range and aggregation where its paper has
one; all else is a hyper-parameter and stays as preset and file have it. Modules set fields of their own, so their order does not matter.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

Fields = dict[str, object]

PLAIN: Fields = {
    "algo.advantage": "grpo",
    "algo.loss": "clip",
    "algo.sil.enabled": False,
    "algo.intrinsic.enabled": False,
    "algo.clip_cov.enabled": False,
    "algo.dynamic.enabled": False,
    "algo.correction.mode": "none",
}
BASES: dict[str, Fields] = {
    "grpo": PLAIN,
    "gigpo": {**PLAIN, "algo.advantage": "gigpo"},
    "rloo": {**PLAIN, "algo.advantage": "rloo"},
    "reinforce++": {**PLAIN, "algo.advantage": "reinforce++"},
    "reinforce++_baseline": {**PLAIN, "algo.advantage": "reinforce++_baseline"},
    "ppo": {**PLAIN, "algo.advantage": "gae"},
    "dapo": {
        **PLAIN,
        "algo.dynamic.enabled": True,
        "algo.policy.clip_low": 0.2,
        "algo.policy.clip_high": 0.28,
        "algo.policy.aggregation": "token-mean",
    },
    "dr_grpo": {**PLAIN, "algo.groups.normalize_std": False, "algo.policy.aggregation": "seq-mean-token-sum-norm"},
    "gspo": {
        **PLAIN,
        "algo.loss": "gspo",
        "algo.policy.clip_low": 3e-4,
        "algo.policy.clip_high": 4e-4,
        "algo.policy.dual_clip": None,
        "algo.policy.aggregation": "seq-mean-token-mean",
    },
    "cispo": {**PLAIN, "algo.loss": "cispo", "algo.policy.clip_low": 1.0, "algo.policy.clip_high": 0.28, "algo.policy.dual_clip": None},
}
PARTS: dict[str, Fields] = {
    "sil": {"algo.sil.enabled": True},
    "intrinsic": {"algo.intrinsic.enabled": True},
    "clip_cov": {"algo.clip_cov.enabled": True},
}
MODULES: dict[str, Fields] = {
    **PARTS,
    "kl_cov": {"algo.loss": "kl_cov"},
    "tis": {"algo.correction.mode": "tis"},
    "mis": {"algo.correction.mode": "mis"},
    "drbot": {
        "algo.groups.normalize_std": False,
        "algo.policy.clip_low": 0.2,
        "algo.policy.clip_high": 0.28,
        "algo.policy.aggregation": "seq-mean-token-sum-norm",
        "algo.filters.overlong": True,
        "algo.filters.void_turn": True,
        "algo.filters.repetitive": True,
        "algo.filters.unreadable": True,
        "algo.filters.group_keep": 0.75,
        "algo.kl.loss_coef": 0.0,
        "algo.kl.reward_coef": 0.0,
    },
    "spear": {**PARTS["sil"], **PARTS["intrinsic"], **PARTS["clip_cov"]},
}
DESCRIPTIONS = {
    "grpo": "group-relative policy gradient, all modules off (arXiv 2402.03300)",
    "gigpo": "GRPO plus a step part: turns that saw the same state are compared too (arXiv 2505.10978)",
    "rloo": "the mean of the siblings as baseline, leaving oneself out (arXiv 2402.14740)",
    "reinforce++": "no groups: rewards whitened over the whole step (arXiv 2501.03262)",
    "reinforce++_baseline": "the group's mean as baseline, then whitened over the whole step (arXiv 2501.03262)",
    "ppo": "advantages by a critic, generalised advantage estimation (arXiv 1707.06347)",
    "dapo": "GRPO with a higher upper clip, token mean and dynamic sampling (arXiv 2503.14476)",
    "dr_grpo": "GRPO without division by the group's deviation or by lengths (arXiv 2503.20783)",
    "gspo": "GRPO with one ratio per sequence, clipped tightly (arXiv 2507.18071)",
    "cispo": "GRPO with clipped importance weights, so that every token keeps its gradient (arXiv 2506.13585)",
    "sil": "self-imitation: replay of the agent's own good trajectories",
    "intrinsic": "intrinsic reward for tool calls, fading out",
    "clip_cov": "covariance clipping against entropy collapse",
    "kl_cov": "a covariance penalty instead: the loss kl_cov",
    "tis": "importance weights learner/engine, truncated",
    "mis": "importance weights learner/engine, 0 outside a band",
    "drbot": "the bag of tricks: higher upper clip, no deviation, no length bias, quality and group filters, no KL",
    "spear": "sil + intrinsic + clip_cov",
}
_OTHER_NAMES = {"reinforce_plus_plus": "reinforce++", "reinforce_plus_plus_baseline": "reinforce++_baseline", "reinforce": "reinforce++", "gae": "ppo"}
# A base whose loss has a clip range of its own keeps it under modules that set the clip of "clip".
_CLIP = ("algo.policy.clip_low", "algo.policy.clip_high")


class Conflict(NamedTuple):
    """Words that make no sense together. `fix` takes {without}, the name less `drop`, and {split}, spear spelt out less clip_cov."""

    one: str
    others: tuple[str, ...]
    reason: str
    fix: str
    drop: str


CONFLICTS = (
    *(Conflict("spear", (part,), f"spear holds {part} already", "use {without}", part) for part in PARTS),
    Conflict("kl_cov", ("gspo", "cispo"), "kl_cov is a loss of its own, and so is {other}", "use {without}, or kl_cov on another base", "kl_cov"),
    Conflict("kl_cov", ("clip_cov",), "both are rules for the tokens of highest covariance", "use one of them: {without}", "clip_cov"),
    Conflict("kl_cov", ("spear",), "spear brings clip_cov, and both are rules for the tokens of highest covariance", "use {split}", "spear"),
    Conflict("tis", ("mis",), "both weigh the same ratio learner/engine", "use one of them: {without}", "mis"),
    Conflict(
        "drbot",
        ("gspo",),
        "its clip range of 0.28 and its sums over tokens contradict a sequence ratio clipped at 4e-4",
        "use {without} and the filters by themselves, e.g. algo.filters.void_turn=true algo.filters.group_keep=0.75",
        "drbot",
    ),
)


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
    raise GrammarError(f"module {word[:60]!r} in {name[:60]!r} does not exist", _suggestion(word, "module", tuple(MODULES)))


def _suggestion(word: str, role: str, known: tuple[str, ...]) -> str:
    plain = word[:60].lower().replace("-", "_")
    near = [_OTHER_NAMES[plain]] if _OTHER_NAMES.get(plain) in known else difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
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
    split = [part for part in PARTS if part not in ("clip_cov", *kept)]
    reason = conflict.reason.format(other=other)
    fix = conflict.fix.format(without="+".join((base, *kept)), split="+".join((base, *split, *kept)))
    raise GrammarError(f"{conflict.one} with {other} in {name[:60]!r}: {reason}", fix)
