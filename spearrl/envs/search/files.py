"""Questions and documents in files: JSON and JSON lines, plain or compressed, in HotpotQA's, Search-R1's and simpler layouts."""

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
_DOCUMENTS = '{"title": …, "text": …}, or HotpotQA\'s records; questions without contexts need env.options.corpus or env.options.retriever_url'
_FORMAT = "JSON lines, or a JSON list (.gz and .xz too)"


class Document(NamedTuple):
    """A piece of text that can be found."""

    title: str
    text: str


def document(record: Any) -> Document:
    """{title, text} or Search-R1's {contents: '"Title"\\ntext'}. Raises ValueError."""
    text = record.get("text", record.get("contents")) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(
            "a question without context"
            if isinstance(record, dict) and "question" in record
            else "it has neither text nor contents"
        )
    title = record.get("title")
    if not isinstance(title, str):
        title, _, text = text.partition("\n")
    return Document(title.strip().strip('"'), text.strip())


def documents(files: Iterable[Path]) -> Iterator[Document]:
    """The documents of corpus files, and those in the contexts of HotpotQA's questions. Raises ConfigError."""
    for path in files:
        for number, record in read_records(path, layout=_FORMAT):
            try:
                yield from (
                    _context(record["context"])
                    if isinstance(record, dict) and "context" in record
                    else [document(record)]
                )
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise _misfit(path, number, f"no document: {error}", _DOCUMENTS) from error


def find(data: str) -> list[Path]:
    """The files `data` names: one, or those of a folder. Raises ConfigError."""
    place = Path(data)
    found = sorted(path for path in place.iterdir() if ".json" in path.name) if place.is_dir() else [place]
    if not found or not found[0].is_file():
        raise ConfigError(
            f"no .json or .jsonl files at {data}",
            where="env search",
            hint="name a file, or a folder with train and dev files",
        )
    return found


@lru_cache(maxsize=8)
def questions(data: str, split: str) -> tuple[Task, ...]:
    """The questions of a split: of the file in the folder whose name says so, or a fixed part of a single file. Raises ConfigError."""
    if Path(data).is_dir():
        matching = [[path for path in find(data) if word in path.name] for word in ALIASES.get(split, (split,))]
        paths = next((paths for paths in matching if paths), [])
        if len(paths) != 1:
            raise ConfigError(
                f"{len(paths)} files of the split {split!r} in {data}",
                where="env search",
                hint=f"one file needs {split!r} in its name",
            )
    elif split not in ("train", "val"):
        raise ConfigError(
            f"split {split!r} is not one of train, val",
            where="env search",
            hint="a single file is divided into train and val",
        )
    else:
        paths = find(data)
    found = [_question(paths[0], number, record) for number, record in read_records(paths[0], layout=_FORMAT)]
    if not Path(data).is_dir():
        found = [item for item in found if (derive(item["question"]) % HELD_OUT == 0) == (split == "val")]
    return tuple(Task(f"{split}-{number}", split, item) for number, item in enumerate(found))


def _question(path: Path, number: int, record: Any) -> dict[str, Any]:
    fields = record if isinstance(record, dict) else {}
    answers = next((fields[name] for name in ("golden_answers", "answers", "answer") if name in fields), None)
    answers = [answers] if isinstance(answers, str) else answers
    if (
        not isinstance(fields.get("question"), str)
        or not isinstance(answers, list)
        or not all(isinstance(answer, str) for answer in answers)
        or not answers
    ):
        raise _misfit(
            path, number, "no question with an answer", '{"question": …, "golden_answers": […]}, or HotpotQA\'s records'
        )
    stratum = next((str(fields[name]) for name in ("data_source", "type") if fields.get(name)), None)
    return {"question": fields["question"], "answers": answers} | ({"stratum": stratum} if stratum else {})


def _context(context: Any) -> list[Document]:
    """HotpotQA's paragraphs: [[title, [sentence, …]], …], or {"title": […], "sentences": [[…], …]}."""
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    return [Document(title.strip(), "".join(sentences).strip()) for title, sentences in pairs]


def _misfit(path: Path, number: int, reason: str, layout: str) -> ConfigError:
    return ConfigError(reason, where=f"{path}:{number}", hint=f"expected {layout}")
