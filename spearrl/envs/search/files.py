"""Questions and documents in files (`spearrl.envs.text.records`), in HotpotQA's, Search-R1's and simpler layouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from spearrl.envs.base import check_split
from spearrl.envs.text.records import read_records, tell
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Task

ALIASES = {"val": ("val", "dev", "test")}
HELD_OUT = 10  # one in so many questions of a single file is the split val
_FORMAT = "JSON lines, or a JSON list (.gz and .xz too), or parquet"
_QUESTIONS = '{"question": …, "golden_answers": […]}, or records of HotpotQA, MuSiQue, TriviaQA, SQuAD or verl'
_DOCUMENTS = (
    '{"title": …, "text": …}, or HotpotQA\'s records; '
    "questions without contexts need env.options.corpus or env.options.retriever_url"
)


class Document(NamedTuple):
    """A piece of text that can be found."""

    title: str
    text: str


def as_document(record: Any) -> Document:
    """{title, text} or Search-R1's {contents: '"Title"\\ntext'}. Raises ValueError."""
    fields = record if isinstance(record, dict) else {}
    text = fields.get("text") or fields.get("contents") or fields.get("text")
    if not isinstance(text, str):
        raise ValueError("a question without context" if "question" in fields else "it has neither text nor contents")
    title = fields.get("title")
    if not isinstance(title, str):
        title, _, text = text.partition("\n")
    return Document(title.strip().strip('"'), text.strip())


def read_documents(files: Iterable[Path]) -> Iterator[Document]:
    """The documents of corpus files, and those in the contexts of HotpotQA's questions. Raises ConfigError."""
    for path in files:
        for number, record in read_records(path, layout=_FORMAT):
            try:
                if isinstance(record, dict) and "context" in record:
                    yield from _context_documents(record["context"])
                else:
                    yield as_document(record)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise _misfit(path, number, f"no document: {error}", _DOCUMENTS) from error


def data_files(data: str) -> list[Path]:
    """The files `data` names: one, or those of a folder. Raises ConfigError."""
    path = Path(data)
    files = (
        sorted(file for file in path.iterdir() if ".json" in file.name or file.suffix == ".parquet")
        if path.is_dir()
        else [path]
    )
    if not files or not files[0].is_file():
        hint = "name a file, or a folder with train and dev files"
        raise ConfigError(f"no .json, .jsonl or .parquet files at {data}", where="env search", hint=hint)
    return files


@lru_cache(maxsize=8)
def read_questions(data: str, split: str) -> tuple[Task, ...]:
    """The questions of a split: of the folder's file that is named so, or a fixed part of a single file.

    Raises:
        ConfigError: no such split or file, or a record that is no question.
    """
    single = not Path(data).is_dir()
    files = data_files(data)
    if single:
        check_split(split, ("train", "val"), "env search", "a single file is divided into train and val")
    else:
        matching = [[file for file in files if word in file.name] for word in ALIASES.get(split, (split,))]
        files = next((named for named in matching if named), [])
        if len(files) != 1:
            reason, hint = (
                f"{len(files)} files of the split {split!r} in {data}",
                f"one file needs {split!r} in its name",
            )
            raise ConfigError(reason, where="env search", hint=hint)
    read = [_question(files[0], number, record) for number, record in read_records(files[0], layout=_FORMAT)]
    questions = [item for item in read if item["answers"]]
    tell(
        f"search data: {len(questions):,} questions in {files[0]}",
        {"without an answer left out": len(read) - len(questions)},
    )
    if single:
        marks = {derive(item["question"]) for item in questions}
        held_out = {mark for mark in marks if mark % HELD_OUT == 0} or {min(marks, default=0)}
        questions = [item for item in questions if (derive(item["question"]) in held_out) == (split == "val")]
    return tuple(Task(f"{split}-{number}", split, item) for number, item in enumerate(questions))


def _question(path: Path, number: int, record: Any) -> dict[str, Any]:
    """A question with all answers that are right: aliases too. None, or null, is a question that cannot be answered."""
    fields = record if isinstance(record, dict) else {}
    extra, rewarded = fields.get("extra_info"), fields.get("reward_model")
    question = fields.get("question", extra.get("question") if isinstance(extra, dict) else None)
    if isinstance(rewarded, dict):  # verl's rows
        fields = {"golden_answers": rewarded.get("ground_truth"), **fields}
    present = [fields[name] for name in ("golden_answers", "answers", "answer") if name in fields]
    try:
        answers = _answers(next((value for value in present if value is not None), None))
        answers += _answers(fields.get("answer_aliases")) if answers else []  # MuSiQue's
    except ValueError:
        present = []
    if not isinstance(question, str) or not present:
        raise _misfit(path, number, "no question with an answer", _QUESTIONS)
    stratum = next((str(fields[name]) for name in ("data_source", "type") if fields.get(name)), None)
    answered = fields.get("answerable", True)  # MuSiQue has questions that are not
    item = {"question": question, "answers": list(dict.fromkeys(answers)) if answered else []}
    return item | ({"stratum": stratum} if stratum else {})


def _answers(value: Any) -> list[str]:
    """The texts of an answer: a text, a number, a list of them, SQuAD's {text}, TriviaQA's {value, aliases}, {target}.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, dict):
        parts = [value[name] for name in ("value", "aliases", "text", "target") if name in value]
        if not parts:
            raise ValueError("no answer")
        return [text for part in parts for text in _answers(part)]
    if isinstance(value, list):
        return [text for part in value for text in _answers(part)]
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise ValueError("no answer")
    return [str(value)] if value is not None and str(value).strip() else []


def _context_documents(context: Any) -> list[Document]:
    """HotpotQA's paragraphs: [[title, [sentence, …]], …], or {"title": […], "sentences": [[…], …]}."""
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    return [Document(title.strip(), "".join(sentences).strip()) for title, sentences in pairs]


def _misfit(path: Path, number: int, reason: str, layout: str) -> ConfigError:
    return ConfigError(reason, where=f"{path}:{number}", hint=f"expected {layout}")
