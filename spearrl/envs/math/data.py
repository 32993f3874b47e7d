"""Problems from files: folders with the usual names, or any JSONL or parquet file of problems and answers. Training never sees a test problem."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from spearrl.config.tables import table
from spearrl.envs.text.records import read_records
from spearrl.errors import ConfigError
from spearrl.types import Task

_TABLE = table(__file__, "math.toml")
TRAIN: dict[str, dict[str, Any]] = _TABLE["train"]
TEST: dict[str, str] = _TABLE["test"]
SUFFIXES = (".jsonl", ".json", ".parquet")
PROBLEMS, ANSWERS = (
    ("problem", "question", "prompt", "Problem"),
    ("answer", "ground_truth", "expected_answer", "Answer"),
)
# DAPO's problems come wrapped in an instruction that asks for another form of answer than \boxed{}.
WRAPPED = re.compile(
    r"\ASolve the following math problem step by step\..*?\n\n(.*?)(?:\n\nRemember to put your answer on its own line.*)?\Z",
    re.DOTALL,
)
STEP = re.compile(r"<<([0-9.+*/()\s-]{1,200})=[^<>]*>>")  # GSM8K's calculator notes
MARKUP = re.compile(r"[\s$~,:;?]|\.(?!\d)|\\(?:left|right|displaystyle|[!,;: ])|(?<=\\)[dt](?=frac)")
HELD_OUT = 20  # one problem in so many, where a single file has no test file beside it
WHERE = "env.options.data"
LAYOUT = "one JSON object a line, with problem and answer"


@dataclass(frozen=True)
class Problems:
    """What a path holds. Counts are of training rows left out: the same problem again, and problems of a test file."""

    splits: Mapping[str, tuple[Task, ...]]
    duplicates: int
    contaminated: int


@lru_cache(maxsize=8)
def open_problems(data: str, train: str) -> Problems:
    """Read a folder, or a file and the test files beside it, once per process.

    Args:
        train: comma-separated sources of the training split in a folder: names of math.toml, or stems of files.
    Raises:
        ConfigError: no such file, no problems in it, a row that cannot be read.
    """
    path = Path(data).expanduser()
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist",
            where=WHERE,
            hint="give a folder or a .jsonl or .parquet file, or leave it out for generated problems",
        )
    folder = path if path.is_dir() else path.parent
    sources = (
        [(path, False)]
        if path.is_file()
        else [_source(folder, name.strip()) for name in train.split(",") if name.strip()]
    )
    splits = {
        name: tuple(_tasks(file, name))
        for name, stem in TEST.items()
        if (file := _file(folder, stem)) is not None and file != path
    }
    seen = {_hash(task.data["problem"]) for tasks in splits.values() for task in tasks}
    known, kept, duplicates, contaminated = set(seen), [], 0, 0
    for file, integers in sources:
        for task in _tasks(file, "train", integers=integers):
            mark = _hash(task.data["problem"])
            contaminated += mark in seen
            duplicates += mark in known and mark not in seen
            if mark not in known:
                kept.append(task)
            known.add(mark)
    if contaminated:
        warnings.warn(
            f"{contaminated} training problems of {data} are also in a test file there; they were left out",
            stacklevel=2,
        )
    if not (kept or splits):
        raise ConfigError(f"there are no problems in {data}", where=WHERE, hint=f"expected {LAYOUT}")
    if not splits:
        # Where chance holds none of a small file out, one is.
        held = {task.id for task in kept if _held_out(task)} or {
            min(kept, key=lambda task: _hash(task.data["problem"])).id
        }
        splits["val"] = tuple(Task(task.id, "val", task.data) for task in kept if task.id in held)
        kept = [task for task in kept if task.id not in held]
    return Problems({"train": tuple(kept), **splits}, duplicates, contaminated)


def _source(folder: Path, name: str) -> tuple[Path, bool]:
    known = TRAIN.get(name, {"file": name})
    file = _file(folder, known["file"])
    if file is None:
        there = ", ".join(sorted(path.stem for path in folder.iterdir() if path.suffix in SUFFIXES))
        hint = f"use some of {', '.join(TRAIN)}, or the name of a file there without its ending ({there or 'there is none'}); empty: no training, tests alone"
        raise ConfigError(
            f"no {known['file']}.jsonl (or .parquet) in {folder}", where=f"env.options.train={name}", hint=hint
        )
    return file, known.get("integers", False)


def _file(folder: Path, stem: str) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()), None)


def _tasks(file: Path, split: str, *, integers: bool = False) -> Iterator[Task]:
    for number, row in enumerate(row for _, row in read_records(file, layout=LAYOUT)):
        where = f"{file}, row {number + 1}"
        problem, answer = _text(row, PROBLEMS, where), _text(row, ANSWERS, where)
        solution = row.get("solution", answer)
        answer = answer.rpartition("####")[2].strip()  # GSM8K's own files have the solution there too
        if not (problem and answer) or (integers and not answer.lstrip("-").isdecimal()):
            continue
        wrapped = WRAPPED.match(problem)
        data: dict[str, Any] = {"problem": wrapped[1] if wrapped else problem, "answer": answer}
        if isinstance(row.get("type"), str):
            data["stratum"] = row["type"]
        if isinstance(solution, str) and "####" in solution:
            data["steps"] = tuple(f"print( {_spaced(step)} )" for step in STEP.findall(solution))
        yield Task(f"{file.stem}-{number}", split, data)


def _text(row: Any, names: tuple[str, ...], where: str) -> str:
    """The first of the fields that a row has, as text; a chat's last user message; verl's reward_model.ground_truth."""
    if not isinstance(row, Mapping):
        raise ConfigError("a row is no JSON object", where=where, hint=f"expected {LAYOUT}")
    nested = row.get("reward_model")
    fields = {**(nested if isinstance(nested, Mapping) else {}), **row}
    value = next((fields[name] for name in names if name in fields), ...)
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise ConfigError(
            f"there is no text under any of {', '.join(names)}", where=where, hint="rename the fields of the file"
        )
    return "" if value is None else str(value).strip()


def _spaced(code: str) -> str:
    """Numbers and signs apart, so that a number is the same token everywhere."""
    return " ".join(re.findall(r"\d*\.?\d+|\d+\.?|\S", code))


def _hash(text: str) -> bytes:
    """Spacing, case, dollar signs and the size of brackets and fractions do not make a problem another one; signs do."""
    return hashlib.blake2b(MARKUP.sub("", text.lower()).encode(), digest_size=16).digest()


def _held_out(task: Task) -> bool:
    return _hash(task.data["problem"])[0] % HELD_OUT == 0
