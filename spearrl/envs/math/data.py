"""Problems from files: a folder with the usual names, or any JSONL or parquet file. None for training is a test's."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from spearrl.config.tables import table
from spearrl.envs.math.answers import boxed
from spearrl.envs.text.records import read_records, tell
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
# An order to give the answer in some form: a sentence that begins so, or the end of one ("…, and put it in \boxed{}").
GIVE = (
    r"(?:(?:put|output|give|write|place|present|provide|enclose|return|end|state|box|wrap|report|format)\s+(?:down\s+)?"
    r"(?:(?:your|the|only|just|final|numeric|numerical|integer|exact)\s+)*(?:answers?|results?|solutions?|responses?|"
    r"reply|output|it|them)\b|end\s+with\b|answer\s+(?:in|with|using|after)\b)"
)
OPENING = (
    r"(?:(?:please|finally|lastly|then|also|and|at\s+the\s+end|you\s+(?:must|should|need\s+to)),?\s+){0,4}"
    rf"(?:{GIVE}|(?:let['’]?s\s+)?(?:think|reason|work)\s+(?:about|through|step|carefully)|"
    r"let['’]?s\s+solve\s+(?:it|this)|"
    r"(?:your|the)\s+(?:final\s+|last\s+)?(?:answer|response|reply|output|line)\b|remember\s|"
    r"make\s+sure\s|show\s+your\s)"
)
FORM = r"####|</?answer>|\banswer:|[\"'“*`](?:the\s+)?(?:final\s+)?answer\s+is\b|\\boxed(?![a-zA-Z])(?!\s*\{[^}a-z]*\d)"
ORDER = re.compile(
    rf"(?:(?:\A|(?<=[.?!:\])}}$\n])\s{{0,9}}|\s(?=please|let['’]?s)){OPENING}|,?\sand\s(?:then\s)?{GIVE})"
    rf"(?:(?![.?!]\s|\n).){{0,300}}?(?:{FORM})(?:(?![.?!]['\")*]*(?:\s|\Z)|\n).){{0,300}}(?:[.?!]['\")*]*)?",
    re.IGNORECASE,
)
LISTED = re.compile(r"""\[\s*(["'])(.*)\1\s*\]""", re.DOTALL)  # Skywork-OR1's answers: ["5"], as text
NO_ANSWER = ("", "proof", "notfound", "not found", "n/a")  # NuminaMath's words where there is none
THOUSANDS = re.compile(r"(?<![\d,([])\d{1,3}(?:,\d{3})+(?![\d,)\]])")
# What tells no problem from another; kept is what stands between numbers (1,2 or 1:2) and entries: (a,b).
MARKUP = re.compile(
    r"((?<=\w)[,:;](?=\w)|(?<=\d)(?:\s+|\s*[,:;]\s*)(?=\d)|(?<=\w)\s*,\s*(?=(?:\d+|\w)\s*[,)\]]))"
    r"|[\s~,:;?]|\.(?!\d)|\\(?:left|right|displaystyle|[!,;: ])|(?<=\\)[dt](?=frac)"
)
HELD_OUT = 20  # one problem in so many, where a single file has no test file beside it
WHERE = "env.options.data"
LAYOUT = "one JSON object a line, with problem and answer"


@lru_cache(maxsize=8)
def open_problems(data: str, train: str) -> Mapping[str, tuple[Task, ...]]:
    """The splits of a folder, or of a file and the test files beside it; read once per process, told in a warning.

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
    told: Counter[str] = Counter()
    splits = {split: tuple(_tasks(file, split, told)) for split, file in tests.items() if file and file != path}
    test_marks = {_mark(task) for tasks in splits.values() for task in tasks}
    problems: dict[bytes, Task] = {}
    for file, integers in sources:
        for task in _tasks(file, "train", told, integers=integers):
            mark = _mark(task)
            told["problems that came twice left out"] += mark in problems
            told["training problems that are in a test file too left out"] += mark in test_marks
            if mark not in test_marks:
                problems.setdefault(mark, task)
    tell(f"math data: {len(problems) + sum(map(len, splits.values())):,} problems in {data}", told)
    if not (problems or splits):
        raise ConfigError(f"there are no problems in {data}", where=WHERE, hint=f"expected {LAYOUT}")
    if not splits:
        # where chance holds none of a small file out, one is
        held_out = {mark for mark in problems if mark[0] % HELD_OUT == 0} or {min(problems)}
        splits["val"] = tuple(
            Task(problems[mark].id, "val", problems[mark].data) for mark in problems if mark in held_out
        )
        problems = {mark: task for mark, task in problems.items() if mark not in held_out}
    return {"train": tuple(problems.values()), **splits}


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


def _tasks(file: Path, split: str, told: Counter[str], *, integers: bool = False) -> Iterator[Task]:
    """The problems of a file; `told` counts what was left out or changed on the way."""
    for number, (_, row) in enumerate(read_records(file, layout=LAYOUT)):
        where = f"{file}, row {number + 1}"
        question, answer = _value(row, PROBLEM_FIELDS, where), _value(row, ANSWER_FIELDS, where)
        if isinstance(question, list):
            question = _asked(question, where, told)
        problem, answer = _text(question, PROBLEM_FIELDS, where), _answer(answer, where, told)
        if not problem or answer is None or (integers and not answer.lstrip("-").isdecimal()):
            told["without a problem left out"] += not problem
            told["whose answer is no integer left out"] += bool(problem and answer is not None)
            continue
        solution = row.get("solution", _value(row, ANSWER_FIELDS, where))
        data: dict[str, Any] = {"problem": _bare(problem, told), "answer": answer}
        if isinstance(row.get("type"), str):
            data["stratum"] = row["type"]
        if isinstance(solution, str) and "####" in solution:
            data["steps"] = tuple(f"print( {_spaced(step)} )" for step in STEP.findall(solution))
        yield Task(f"{file.stem}-{number}", split, data)


def _value(row: Any, names: tuple[str, ...], where: str) -> Any:
    """The first of the fields that a row has, or verl's reward_model in it; None: they are null."""
    if not isinstance(row, Mapping):
        raise ConfigError("a row is no JSON object", where=where, hint=f"expected {LAYOUT}")
    nested = row.get("reward_model")
    fields = {**(nested if isinstance(nested, Mapping) else {}), **row}
    values = [fields[name] for name in names if name in fields]
    return next((value for value in values if value is not None), None) if values else ...


def _text(value: Any, names: tuple[str, ...], where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        reason = f"there is no text under any of {', '.join(names)}"
        raise ConfigError(reason, where=where, hint="rename the fields of the file")
    return "" if value is None or value != value else str(value).strip()  # NaN is a table's null


def _asked(chat: list[Any], where: str, told: Counter[str]) -> Any:
    """What a chat's user said last: the problem. What else stands in the chat is left out."""
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in chat]
    if "user" not in roles:
        raise ConfigError("a chat without a message of its user", where=where, hint=f"expected {LAYOUT}")
    last = len(roles) - 1 - roles[::-1].index("user")
    told["system messages left out"] += roles.count("system")
    told["prefilled replies left out"] += len(roles) - 1 - last
    told["earlier messages left out"] += last - roles[:last].count("system")
    return chat[last].get("content")


def _bare(problem: str, told: Counter[str]) -> str:
    r"""A problem without DAPO's wrapping and without orders to answer otherwise than in \boxed{}."""
    if wrapped := WRAPPED.match(problem):
        told["taken out of DAPO's instruction"] += 1
        problem = wrapped[1]
    bare = ORDER.sub(lambda match: match[0] if r"\boxed" in match[0] else "", problem).strip()
    told["with an order to answer in another form, left out"] += bool(bare) and bare != problem.strip()
    bare = bare or problem
    told["that ask for #### or <answer> in a way that is not understood"] += "####" in bare or "<answer>" in bare
    return bare


def _answer(value: Any, where: str, told: Counter[str]) -> str | None:
    """A reference answer as text, out of its solution, list or box. None: there is none, or more than one."""
    values = value if isinstance(value, list) else [value]
    text = _text(values[0], ANSWER_FIELDS, where).rpartition("####")[2].strip() if values else ""  # GSM8K's solutions
    if listed := LISTED.fullmatch(text):
        values = re.split(rf"{listed[1]}\s*,\s*{listed[1]}", listed[2])
        text = values[0] if re.search(r"(?<!\\)(?:\\\\)*\\(?!\\)", values[0]) else values[0].replace("\\\\", "\\")
    box = boxed(text)
    text = (text if box is None else box).strip()
    if len(values) > 1 or text.casefold() in NO_ANSWER:
        told["with several answers left out" if len(values) > 1 else "without an answer left out"] += 1
        return None
    told[r"answers taken out of a list or \boxed{}"] += listed is not None or box is not None or isinstance(value, list)
    return text


def _spaced(code: str) -> str:
    """Numbers and signs apart, so that a number is the same token everywhere."""
    return " ".join(re.findall(r"\d*\.?\d+|\d+\.?|\S", code))


def _mark(task: Task) -> bytes:
    """Equal for the same problem, in whatever case, spacing, markup and with whatever order how to answer."""
    text = (ORDER.sub("", task.data["problem"]).strip() or task.data["problem"]).lower().replace("$", "")
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = MARKUP.sub(lambda match: "" if match[1] is None else match[1].strip() or " ", text)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
