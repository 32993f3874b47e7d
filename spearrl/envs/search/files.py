"""Questions and documents in files (`spearrl.envs.text.records`), in HotpotQA's, Search-R1's and simpler layouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from spearrl.envs.text.records import read_records
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Task

ALIASES = {"val": ("val", "dev", "test")}
HELD_OUT = 10  # one in so many questions of a single file is the split val
_FORMAT = "JSON lines, or a JSON list (.gz and .xz too)"
_QUESTIONS = '{"question": …, "golden_answers": […]}, or HotpotQA\'s records'
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
    text = record.get("text", record.get("contents")) if isinstance(record, dict) else None
    if not isinstance(text, str):
        is_question = isinstance(record, dict) and "question" in record
        raise ValueError("a question without context" if is_question else "it has neither text nor contents")
    title = record.get("title")
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
    files = sorted(file for file in path.iterdir() if ".json" in file.name) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        hint = "name a file, or a folder with train and dev files"
        raise ConfigError(f"no .json or .jsonl files at {data}", where="env search", hint=hint)
    return files


@lru_cache(maxsize=8)
def read_questions(data: str, split: str) -> tuple[Task, ...]:
    """The questions of a split: of the folder's file that is named so, or a fixed part of a single file.

    Raises:
        ConfigError: no such split or file, or a record that is no question.
    """
    single = not Path(data).is_dir()
    if single and split not in ("train", "val"):
        reason, hint = f"split {split!r} is not one of train, val", "a single file is divided into train and val"
        raise ConfigError(reason, where="env search", hint=hint)
    files = data_files(data)
    if not single:
        matching = [[file for file in files if word in file.name] for word in ALIASES.get(split, (split,))]
        files = next((named for named in matching if named), [])
        if len(files) != 1:
            reason, hint = (
                f"{len(files)} files of the split {split!r} in {data}",
                f"one file needs {split!r} in its name",
            )
            raise ConfigError(reason, where="env search", hint=hint)
    questions = [_question(files[0], number, record) for number, record in read_records(files[0], layout=_FORMAT)]
    if single:
        questions = [item for item in questions if (derive(item["question"]) % HELD_OUT == 0) == (split == "val")]
    return tuple(Task(f"{split}-{number}", split, item) for number, item in enumerate(questions))


def _question(path: Path, number: int, record: Any) -> dict[str, Any]:
    fields = record if isinstance(record, dict) else {}
    question = fields.get("question")
    answers = next((fields[name] for name in ("golden_answers", "answers", "answer") if name in fields), None)
    answers = [answers] if isinstance(answers, str) else answers
    texts = isinstance(question, str) and isinstance(answers, list) and all(isinstance(text, str) for text in answers)
    if not texts or not answers:
        raise _misfit(path, number, "no question with an answer", _QUESTIONS)
    stratum = next((str(fields[name]) for name in ("data_source", "type") if fields.get(name)), None)
    return {"question": question, "answers": answers} | ({"stratum": stratum} if stratum else {})


def _context_documents(context: Any) -> list[Document]:
    """HotpotQA's paragraphs: [[title, [sentence, …]], …], or {"title": […], "sentences": [[…], …]}."""
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    return [Document(title.strip(), "".join(sentences).strip()) for title, sentences in pairs]


def _misfit(path: Path, number: int, reason: str, layout: str) -> ConfigError:
    return ConfigError(reason, where=f"{path}:{number}", hint=f"expected {layout}")
