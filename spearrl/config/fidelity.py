"""algo.fidelity: whose reading of SPEAR a run follows, switch by switch (arXiv 2509.22601 and its two released trees).

"default": this project's; "paper": what the paper's text says, and the default where it says nothing; "release_agent", "release_math": what
the released agent and math code do. A column only sets fields of the algo section; what a run sets itself wins over it. Three rules depend on
the algorithm's name too: `column` has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spearrl.config.grammar import Fields, words_of

COLUMNS = ("default", "paper", "release_agent", "release_math")
FILTERS = ("overlong", "void_turn", "repetitive", "unreadable")
AGE_CAP = 10  # the released buffers use no larger max_age, whatever is asked for


class Unset:
    """Stands in the table where a column gives no value; `words` says what decides instead."""

    def __init__(self, words: str):
        self.words = words


OPEN = Unset("as set")  # preset, file and command line
BY_NAME = Unset("by name")  # the algorithm's name: `column`
Values = tuple[object, object, object, object]  # one per column


@dataclass(frozen=True)
class Row:
    """One switch of the fidelity table.

    Example:
        Row("storage unit of the replay buffer", {"algo.sil.unit": ("trajectory", "trajectory", "row", "trajectory")})
    """

    switch: str
    fields: dict[str, Values] = field(default_factory=dict)  # dotted key -> its value in each column; OPEN, BY_NAME: none
    note: str = ""  # what the documentation says beside the values, or instead of them where there is no field


ROWS: tuple[Row, ...] = (
    Row("statistics of a group are over", {"algo.groups.statistics": ("trajectory", "trajectory", "turn", "trajectory")}),
    Row("advantage of a group of one", {"algo.groups.singleton": ("zero", "zero", "raw", "raw")}, "the paper does not say"),
    Row(
        "quality filters of drbot",
        {f"algo.filters.{flag}": (OPEN, OPEN, BY_NAME, OPEN) for flag in FILTERS},
        "release_agent: off where the name has drbot and no sil, since that trainer has no code for them",
    ),
    Row(
        "deviation in drbot on gigpo",
        {"algo.groups.normalize_std": (OPEN, OPEN, BY_NAME, OPEN)},
        "drbot leaves it out; release_agent: kept where the name is gigpo with drbot, as its scripts have it",
    ),
    Row("void filter fires", {"algo.filters.void_rule": ("no_action", "no_action", "no_action", "never")}),
    Row("tokens in the loss", {"algo.policy.mask": ("action", "action", "attention", "action")}),
    Row("group filter and baselines go by", {"algo.groups.blocks": ("group", "group", "group", "consecutive")}),
    Row("the group filter keeps", {"algo.filters.subsample": ("none", "none", "power_of_two", "none")}, "all rows of the kept groups, or a random part"),
    Row("storage unit of the replay buffer", {"algo.sil.unit": ("trajectory", "trajectory", "row", "trajectory")}),
    Row("stored trajectories need a tool call", {"algo.sil.require_tool_call": (False, False, False, True)}),
    Row("recalibrated advantage of exactly 0", {"algo.sil.keep_zero": (False, False, True, False)}, "kept or not"),
    Row("units replayed", {"algo.sil.subset": ("all", "all", "power_of_two", "power_of_two")}),
    Row("GiGPO's step part on replay", {"algo.sil.keep_step_part": (True, True, False, False)}),
    # Two switches without a field: where the release differs, it stops with an error.
    Row("rewards filtered with their rows at a flush", note="always; the agent release stops with an IndexError once a row is dropped"),
    Row("baselines evicted while their rows are still stored", note="tolerated; the releases stop with a KeyError"),
    Row("age is counted from", {"algo.sil.age_reference": ("current", "current", "newest", "newest")}, f"releases: algo.sil.max_age at most {AGE_CAP}"),
    Row("warm-up of γ", {"algo.sil.gamma.kind": (OPEN, OPEN, "cosine", "cosine"), "algo.sil.gamma.steps": (OPEN, OPEN, 200, 300)}),
    Row("replay is an update", {"algo.sil.update": ("alternating", "joint", "alternating", "alternating")}),
    Row(
        "covariance clipping of replayed tokens",
        {
            "algo.clip_cov.replay_ratio": (OPEN, OPEN, 0.02, 2e-4),
            "algo.clip_cov.replay_lower": (OPEN, OPEN, 2.0, 1.0),
            "algo.clip_cov.replay_upper": (OPEN, OPEN, 60.0, 5.0),
        },
        "release_math ignores those for replay and takes the on-policy ones",
    ),
    Row("scope of covariance clipping", {"algo.clip_cov.scope": ("mini_batch", "mini_batch", "micro_batch", "micro_batch")}),
    Row("bound on the log ratio under it", {"algo.clip_cov.log_ratio_clamp": (20.0, 20.0, None, None)}, "the paper does not say"),
    Row(
        "dual clip under covariance clipping",
        {"algo.policy.dual_clip": (OPEN, OPEN, BY_NAME, BY_NAME)},
        "the releases' covariance clipping has none; elsewhere as set",
    ),
    Row("losses are divided by the rows of the", {"algo.policy.divisor": ("mini_batch", "mini_batch", "micro_batch", "micro_batch")}),
    Row("the tool bonus counts", {"algo.intrinsic.count": ("tool_calls", "tool_calls", "turns", "tool_calls")}),
    Row("the tool bonus in evaluation", {"algo.intrinsic.in_evaluation": (False, False, True, True)}),
    Row("entropy bonus", {"algo.policy.entropy_coef": (0.0, 0.0, 0.001, 0.0)}),
    Row("penalty of an invalid action", {"algo.invalid_penalty": (OPEN, OPEN, OPEN, 0.0)}),
    # The third switch without a field: a run that cannot be repeated is nothing to choose.
    Row("random draws", note="from seeds derived from run.seed; the releases draw from global, unseeded generators"),
)


def column(fidelity: str, name: str) -> Fields:
    """The fields that a fidelity sets for an algorithm's name, by dotted key.

    Example:
        column("release_agent", "grpo+spear")["algo.sil.unit"] == "row"

    Raises ValueError for an unknown fidelity, GrammarError for a wrong name.
    """
    if fidelity not in COLUMNS:
        raise ValueError(f"fidelity {fidelity!r} does not exist; use one of {', '.join(COLUMNS)}")
    place = COLUMNS.index(fidelity)
    base, words = words_of(name)
    fields = {key: values[place] for row in ROWS for key, values in row.fields.items() if not isinstance(values[place], Unset)}
    if fidelity.startswith("release") and {"clip_cov", "spear"} & set(words):
        fields["algo.policy.dual_clip"] = None
    if fidelity == "release_agent" and "drbot" in words:
        if not {"sil", "spear"} & set(words):
            fields |= {f"algo.filters.{flag}": False for flag in FILTERS}
        if base == "gigpo":
            fields["algo.groups.normalize_std"] = True
    return fields
