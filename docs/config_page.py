"""Writes docs/config.md, the configuration reference, from the descriptions of the settings and the tables of names.

    python docs/config_page.py > docs/config.md

A test compares the two.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from spearrl.config import fidelity, grammar, presets
from spearrl.config.dump import toml_value
from spearrl.config.fields import OPTIONS, Key, constraint, default_of, dotted, leaves, sections
from spearrl.config.tables import UNSET

INTRODUCTION = """\
# Configuration reference

<!-- Generated: `python docs/config_page.py > docs/config.md`; do not edit. -->

A run is defined by settings in sections. They come from a TOML file, from a preset, and from the command line:

```toml
preset = "tiny"          # optional: where to start from

[rollout]
group_size = 16

[algo.sil.gamma]
steps = 30
```

```
spearrl train shop.toml --algo grpo+spear run.seed=3 algo.sil.gamma.steps=50
```

What is said later wins: defaults, preset, file, command line. An algorithm name sets its fields just below the place
that gives it, so that `--algo grpo` switches SPEAR off in any file, and a file that names `grpo+spear` may still say
`enabled = false` for one part. Where two places give a name, what the lower one stood for is taken back, also where a
saved config writes the same values out; `algo.fidelity` works alike. A layer that names another environment starts
without the options and the turn limit of the one before. With neither a file nor a preset nor a model, `train` uses the
preset `tiny`.

`spearrl config show --why` prints every value with its source; `spearrl config diff A B` compares files, run
directories or presets. All errors are listed at once, with file and line, and nothing is started (exit code 2)."""
NAMES = (
    "`base[+module...]`, for example `grpo+spear`; the order of modules does not matter. Every base also sets {plain}. "
    "A base with a clip range of its own keeps it under `drbot`. Clip ranges and aggregations that a base does not set "
    "are hyper-parameters."
)
FIDELITY = (
    "`algo.fidelity` says whose reading of SPEAR (arXiv 2509.22601) is followed where the paper, its released agent "
    "code and its released math code differ; [the paper's page](paper.md) explains each switch, and what the releases "
    "do that no setting repeats. A column sets the fields below, under the settings of the layer that gives it. *as "
    "set*: left to the algorithm's name, preset, file and command line. Some depend on the name too. `release_agent` "
    "with `drbot`: the quality filters (`filters.overlong`, `void_turn`, `repetitive`, `unreadable`) are off where "
    "neither `sil` nor `spear` is on, since that trainer has no code for them, and on `gigpo` `groups.normalize_std` "
    "stays on, as its scripts have it. Both releases with `clip_cov` or `spear`: no `policy.dual_clip`. They take no "
    "`sil.max_age` above 10. The releases' columns also set `env.options.grader` of the math environment."
)


def page() -> str:
    """The reference page."""
    rows = [(f"`{name}`", presets.DESCRIPTIONS[name]) for name in presets.PRESETS]
    parts = [INTRODUCTION, "## Presets", _table(("preset", "what it is"), rows), *_names(), *_fidelity()]
    for key, section in sections().items():
        if not key:
            continue
        parts.append(f"## `[{dotted(key)}]`\n\n{sections()[key[:-1]].model_fields[key[-1]].description}")
        if settings := [_row((*key, name)) for name in section.model_fields if (*key, name) in leaves()]:
            parts.append(_table(("key", "value", "default", "meaning"), settings))
    return "\n\n".join(parts) + "\n"


def _names() -> Iterable[str]:
    """The words of the grammar, and the pairs that are refused."""
    yield "## Algorithm names"
    yield textwrap.fill(NAMES.format(plain=_assignments(grammar.PLAIN)), 120, break_on_hyphens=False)
    rows = []
    for name, fields in grammar.BASES.items():
        own = {key: value for key, value in fields.items() if grammar.PLAIN.get(key, ...) != value}
        rows.append((f"`{name}`", "base", grammar.DESCRIPTIONS[name], _assignments(own)))
    rows += [(f"`{n}`", "module", grammar.DESCRIPTIONS[n], _assignments(f)) for n, f in grammar.MODULES.items()]
    yield _table(("name", "role", "what it does", "sets, below `algo`"), rows)
    yield "Refused:"
    refused = {}
    for conflict in grammar.CONFLICTS:
        others = " or ".join(f"`{other}`" for other in conflict.others)
        refused[f"`{conflict.one}` with {others}"] = conflict.reason.replace("{other}", "the other")
    yield _table(("words", "because"), list(refused.items()))


def _assignments(fields: dict[str, object]) -> str:
    return ", ".join(f"`{key.removeprefix('algo.')}={toml_value(value)}`" for key, value in fields.items())


def _fidelity() -> Iterable[str]:
    rows = []
    for key, values in fidelity.FIELDS.items():
        cells = (f"*{value}*" if value == fidelity.AS_SET else f"`{toml_value(value)}`" for value in values)
        rows.append((f"`{key}`", *(cell.replace(UNSET, "none") for cell in cells)))
    head = ("setting", *(f"`{name}`" for name in fidelity.COLUMNS))
    return ["## Fidelity", textwrap.fill(FIDELITY, 120, break_on_hyphens=False), _table(head, rows)]


def _row(key: Key) -> tuple[str, ...]:
    info = leaves()[key]
    kind = "any keys, as the environment defines them" if key == OPTIONS else constraint(info)
    return f"`{key[-1]}`", kind, f"`{toml_value(default_of(info))}`", str(info.description)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
