"""Problems from files: a folder with the usual names, or any JSONL or parquet file. None for training is a test's."""

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
PROBLEM_FIELDS = ("problem", "question", "prompt", "Problem")
ANSWER_FIELDS = ("answer", "ground_truth", "expected_answer", "Answer")
# DAPO's problems come wrapped in an instruction that asks for another form of answer than \boxed{}.
WRAPPED = re.compile(
    r"\ASolve the following math problem step by step\..*?\n\n(.*?)"
    r"(?:\n\nRemember to put your answer on its own line.*)?\Z",
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
        hint = "give a folder or a .jsonl or .parquet file, or leave it out for generated problems"
        raise ConfigError(f"{path} does not exist", where=WHERE, hint=hint)
    folder = path if path.is_dir() else path.parent
    names = [name.strip() for name in train.split(",") if name.strip()]
    sources = [(path, False)] if path.is_file() else [_training_file(folder, name) for name in names]
    tests = {split: _file(folder, stem) for split, stem in TEST.items()}
    splits = {split: tuple(_tasks(file, split)) for split, file in tests.items() if file and file != path}
    test_marks = {_mark(task) for tasks in splits.values() for task in tasks}
    problems: dict[bytes, Task] = {}
    duplicates = contaminated = 0
    for file, integers in sources:
        for task in _tasks(file, "train", integers=integers):
            mark = _mark(task)
            contaminated += mark in test_marks
            duplicates += mark in problems
            if mark not in test_marks:
                problems.setdefault(mark, task)
    if contaminated:
        reason = f"{contaminated} training problems of {data} are also in a test file there; they were left out"
        warnings.warn(reason, stacklevel=2)
    if not (problems or splits):
        raise ConfigError(f"there are no problems in {data}", where=WHERE, hint=f"expected {LAYOUT}")
    if not splits:
        # where chance holds none of a small file out, one is
        held_out = {mark for mark in problems if mark[0] % HELD_OUT == 0} or {min(problems)}
        splits["val"] = tuple(
            Task(problems[mark].id, "val", problems[mark].data) for mark in problems if mark in held_out
        )
        problems = {mark: task for mark, task in problems.items() if mark not in held_out}
    return Problems({"train": tuple(problems.values()), **splits}, duplicates, contaminated)


def _training_file(folder: Path, name: str) -> tuple[Path, bool]:
    """The file of a training source, and whether only its integer answers count."""
    source = TRAIN.get(name, {"file": name})
    file = _file(folder, source["file"])
    if file is None:
        there = ", ".join(sorted(path.stem for path in folder.iterdir() if path.suffix in SUFFIXES)) or "there is none"
        known = f"use some of {', '.join(TRAIN)}, or the name of a file there without its ending ({there})"
        reason = f"no {source['file']}.jsonl (or .parquet) in {folder}"
        where = f"env.options.train={name}"
        raise ConfigError(reason, where=where, hint=f"{known}; empty: no training, tests alone")
    return file, source.get("integers", False)


def _file(folder: Path, stem: str) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()), None)


def _tasks(file: Path, split: str, *, integers: bool = False) -> Iterator[Task]:
    for number, (_, row) in enumerate(read_records(file, layout=LAYOUT)):
        where = f"{file}, row {number + 1}"
        problem, answer = _text(row, PROBLEM_FIELDS, where), _text(row, ANSWER_FIELDS, where)
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
        reason = f"there is no text under any of {', '.join(names)}"
        raise ConfigError(reason, where=where, hint="rename the fields of the file")
    return "" if value is None else str(value).strip()


def _spaced(code: str) -> str:
    """Numbers and signs apart, so that a number is the same token everywhere."""
    return " ".join(re.findall(r"\d*\.?\d+|\d+\.?|\S", code))


def _mark(task: Task) -> bytes:
    """Equal for the same problem: spacing, case, dollars and the size of brackets and fractions do not count."""
    text = MARKUP.sub("", task.data["problem"].lower())
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
