"""algo.fidelity: whose reading of SPEAR a run follows, switch by switch (arXiv 2509.22601 and its two released trees).

"default": this project's; "paper": what the paper's text says, and the default where it says nothing; "release_agent",
"release_math": what the released agent and math code do. A column only sets fields of the algo section (and, for some
environments, options: fidelity.toml names them); what a run sets itself wins over it. Three rules depend on the
algorithm's name too: `column` has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from spearrl.config.grammar import Fields, words_of
from spearrl.config.tables import UNSET, flat, table

COLUMNS = ("default", "paper", "release_agent", "release_math")
FILTERS = ("overlong", "void_turn", "repetitive", "unreadable")
AGE_CAP = 10  # the released buffers use no larger max_age, whatever is set


class Unset(str):
    """Stands in the table where a column gives no value; it says what decides instead."""


_WORDS = {"as set": Unset("as set"), "by name": Unset("by name"), UNSET: None}


@dataclass(frozen=True)
class Row:
    """One switch of the fidelity table."""

    switch: str
    fields: dict[str, tuple[object, ...]]  # dotted key -> its value in each column; an `Unset` where there is none
    note: str  # what the documentation says beside the values, or instead of them where there is no field


def _row(switch: str, fields: dict[str, object] | None = None, note: str = "") -> Row:
    columns = flat(fields or {}, "algo.").items()
    return Row(switch, {key: tuple(_WORDS.get(value, value) for value in values) for key, values in columns}, note)


_TABLE = table(__file__, "fidelity.toml")
ROWS = tuple(_row(**row) for row in _TABLE["row"])


def column(fidelity: str, name: str) -> Fields:
    """The fields that a fidelity sets for an algorithm's name, by dotted key.

    Example:
        column("release_agent", "grpo+spear")["algo.sil.unit"] == "row"

    Raises ValueError for an unknown fidelity, GrammarError for a wrong name.
    """
    if fidelity not in COLUMNS:
        raise ValueError(f"fidelity {fidelity!r} does not exist; use one of {', '.join(COLUMNS)}")
    number = COLUMNS.index(fidelity)
    base, words = words_of(name)
    values = {key: columns[number] for row in ROWS for key, columns in row.fields.items()}
    fields = {key: value for key, value in values.items() if not isinstance(value, Unset)}
    if fidelity.startswith("release") and {"clip_cov", "spear"} & set(words):
        fields["algo.policy.dual_clip"] = None
    if fidelity == "release_agent" and "drbot" in words:
        if not {"sil", "spear"} & set(words):
            fields |= {f"algo.filters.{flag}": False for flag in FILTERS}
        if base == "gigpo":
            fields["algo.groups.normalize_std"] = True
    return fields


def environment_options(fidelity: str, environment: object) -> Fields:
    """The options that a fidelity sets for an environment, by dotted key; {} for most."""
    options = _TABLE["environment"].get(environment, {}).get(fidelity, {})
    return flat(options, "env.options.")
