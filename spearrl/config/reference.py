"""The configuration reference, generated from the field descriptions: as a page and as JSON schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from spearrl.config import fidelity, grammar, presets
from spearrl.config.dump import toml_value
from spearrl.config.fields import FREE, Key, constraint, default_of, dotted, leaves, sections
from spearrl.config.sections import RunConfig


def markdown() -> str:
    """The reference page."""
    introduction = Path(__file__).with_name("reference.md").read_text(encoding="utf-8").rstrip()
    parts = [
        introduction,
        "## Presets",
        _table(("preset", "what it is"), [(f"`{n}`", presets.DESCRIPTIONS[n]) for n in presets.PRESETS]),
    ]
    parts += [*_grammar(), *_fidelity()]
    for key, model in sections().items():
        if not key:
            continue
        rows = [_row((*key, name)) for name in model.model_fields if (*key, name) in leaves()]
        parts.append(f"## `[{dotted(key)}]`\n\n{_section_text(key)}")
        if rows:
            parts.append(_table(("key", "value", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _paragraph(text: str) -> str:
    return fill(text, 120, break_long_words=False, break_on_hyphens=False)


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file (editors complete and check with it); `preset` may stand beside the sections."""
    schema = RunConfig.model_json_schema()
    preset = {"enum": list(presets.PRESETS), "type": "string", "description": "Preset the file starts from."}
    schema["properties"] = {"preset": preset, **schema["properties"]}
    return schema


def _grammar() -> list[str]:
    rows = []
    for name, fields in (*grammar.BASES.items(), *grammar.MODULES.items()):
        own = {
            key: value
            for key, value in fields.items()
            if name in grammar.MODULES or grammar.PLAIN.get(key, ...) != value
        }
        rows.append(
            (f"`{name}`", "base" if name in grammar.BASES else "module", grammar.DESCRIPTIONS[name], _assignments(own))
        )
    refused = {
        " ".join((f"`{c.one}` with", " or ".join(f"`{other}`" for other in c.others))): c.reason.replace(
            "{other}", "the other"
        )
        for c in grammar.CONFLICTS
    }
    words = (
        "`base[+module...]`, for example `grpo+spear`; the order of modules does not matter. Every base also sets "
        + _assignments(grammar.PLAIN)
    )
    words += (
        ". A base with a clip range of its own keeps it under `drbot`. "
        "Clip ranges and aggregations that a base does not set are hyper-parameters."
    )
    return [
        "## Algorithm names",
        _paragraph(words),
        _table(("name", "role", "what it does", "sets, below `algo`"), rows),
        "Refused:",
        _table(("words", "because"), list(refused.items())),
    ]


def _assignments(fields: dict[str, object]) -> str:
    return ", ".join(f"`{key.removeprefix('algo.')}={toml_value(value)}`" for key, value in fields.items())


def _fidelity() -> list[str]:
    """The table of algo.fidelity."""
    rows = []
    for row in fidelity.ROWS:
        cells = [_column_cell(row, place) for place in range(len(fidelity.COLUMNS))]
        keys = ", ".join(f"`{key}`" for key in row.fields) or "–"
        rows.append((row.switch, keys, *cells, row.note))
    words = (
        "`algo.fidelity` says whose reading of SPEAR (arXiv 2509.22601) is followed where the paper, its released "
        "agent code and its released math code differ. A column sets the fields below, under the settings of the place "
        "that gives it. *as set*: left to the algorithm's name, preset, file and command line. *by name*: see the "
        "remark. A row without a setting is no choice here: the release fails there, or cannot be repeated."
    )
    head = ("switch", "setting", *(f"`{name}`" for name in fidelity.COLUMNS), "remark")
    return ["## Fidelity", _paragraph(words), _table(head, rows)]


def _column_cell(row: fidelity.Row, place: int) -> str:
    values = [of_columns[place] for of_columns in row.fields.values()]
    if values and all(isinstance(value, fidelity.Unset) for value in values):
        values = values[:1]
    return (
        ", ".join(f"*{value}*" if isinstance(value, fidelity.Unset) else f"`{toml_value(value)}`" for value in values)
        or "–"
    )


def _section_text(key: Key) -> str:
    return str(sections()[key[:-1]].model_fields[key[-1]].description)


def _row(key: Key) -> tuple[str, ...]:
    info = leaves()[key]
    kind = "any keys, as the environment defines them" if key == FREE else constraint(info)
    return f"`{key[-1]}`", kind, f"`{toml_value(default_of(info))}`", str(info.description)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
