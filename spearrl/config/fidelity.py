"""algo.fidelity: whose reading of SPEAR a run follows, switch by switch (arXiv 2509.22601 and its two released trees).

"default": this project's; "paper": what the paper's text says, and the default where it says nothing; "release_agent",
"release_math": what the released agent and math code do. A column only sets fields of the algo section (and, for some
environments, options: fidelity.toml names them); what a run sets itself wins over it. Three rules depend on the
algorithm's name too: `column` has them.
"""

from __future__ import annotations

from typing import Any

from spearrl.config.grammar import Fields, words_of
from spearrl.config.tables import UNSET, flat, table

COLUMNS = ("default", "paper", "release_agent", "release_math")
FILTERS = ("overlong", "void_turn", "repetitive", "unreadable")
AGE_CAP = 10  # the released buffers use no larger max_age, whatever is set
AS_SET = "as set"  # stands in the table where a column leaves a field alone

_TABLE = table(__file__, "fidelity.toml")
FIELDS: dict[str, list[Any]] = flat(_TABLE["algo"], "algo.")  # dotted key -> what each column has for it


def column(fidelity: str, name: str) -> Fields:
    """The fields that a fidelity sets for an algorithm's name, by dotted key.

    Example:
        column("release_agent", "grpo+spear")["algo.sil.unit"] == "row"

    Raises ValueError for an unknown fidelity, GrammarError for a wrong name.
    """
    base, words = words_of(name)
    fields = _values(FIELDS, fidelity)
    # The releases' covariance clipping has no dual clip.
    if fidelity.startswith("release") and {"clip_cov", "spear"} & set(words):
        fields["algo.policy.dual_clip"] = None
    if fidelity == "release_agent" and "drbot" in words:
        if not {"sil", "spear"} & set(words):  # its trainer without replay has no code for them
            fields |= {f"algo.filters.{flag}": False for flag in FILTERS}
        if base == "gigpo":  # as its scripts have it
            fields["algo.groups.normalize_std"] = True
    return fields


def environment_options(fidelity: str, environment: object) -> Fields:
    """The options that a fidelity sets for an environment, by dotted key; {} for most."""
    return _values(flat(_TABLE["environment"].get(environment, {}), "env.options."), fidelity)


def _values(columns: dict[str, list[Any]], fidelity: str) -> Fields:
    if fidelity not in COLUMNS:
        raise ValueError(f"fidelity {fidelity!r} does not exist; use one of {', '.join(COLUMNS)}")
    values = {key: of_columns[COLUMNS.index(fidelity)] for key, of_columns in columns.items()}
    return {key: None if value == UNSET else value for key, value in values.items() if value != AS_SET}
