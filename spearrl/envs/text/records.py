"""The one reader of data files: JSON lines, JSON arrays and parquet, record by record, however large they are."""

from __future__ import annotations

import gzip
import json
import lzma
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from spearrl.errors import ConfigError

CHUNK = 1 << 20  # characters of a JSON array read at a time
LONGEST_RECORD = 1 << 24  # characters of one object in a JSON array
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
_DECODER = json.JSONDecoder()


def read_records(
    path: Path, *, layout: str, where: str | None = None, on_broken_line: Callable[[str], None] | None = None
) -> Iterator[tuple[int, Any]]:
    """(number, record) of a file, from 1: a parquet file's rows, a JSON array's objects, else its lines but empty ones.

    Args:
        path: JSON or JSON lines, plain or compressed (.gz, .xz), or .parquet. Text that begins with "[" is an array.
        layout: what the file should hold, for the hint of an error.
        where: what errors call the file; default: its path.
        on_broken_line: takes the complaint about a line that is no JSON, and is skipped; default: it is an error.

    Raises:
        ConfigError: the file cannot be read (it names the line), or it is parquet and pyarrow is missing.
    """
    name = where or str(path)

    def unreadable(error: Exception, location: str) -> ConfigError:
        return ConfigError(f"cannot be read: {error}", where=location, hint=f"expected {layout}")

    try:
        if path.suffix == ".parquet":
            yield from enumerate(_parquet(path), 1)
            return
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as stream:
            first = next((char for char in iter(lambda: stream.read(1), "") if not char.isspace()), "")
            stream.seek(0)
            if first == "[":
                yield from enumerate(_array(stream), 1)
                return
            for number, line in enumerate(stream, 1):
                try:
                    if line.strip():
                        yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    if on_broken_line is None:
                        raise unreadable(error, f"{name}:{number}") from error
                    on_broken_line(f"{path}:{number}: {error}")
    except (OSError, ValueError, EOFError, RecursionError, lzma.LZMAError) as error:  # pyarrow's are ValueErrors
        raise unreadable(error, name) from error


def tell(read: str, counts: Mapping[str, int]) -> None:
    """Warn, in one line, of what a reader left out or changed: what was read, then each count with its words."""
    if parts := [f"{count:,} {words}" for words, count in counts.items() if count]:
        warnings.warn("; ".join([read, *parts]), stacklevel=3)


def _array(stream: TextIO) -> Iterator[Any]:
    """The objects of a JSON array, as soon as each is complete. Raises ValueError."""
    rest, end, count = "", "", 0
    while (more := stream.read(CHUNK)) and len(rest) <= LONGEST_RECORD:
        text, end = rest + more, more.rstrip()[-1:] or end
        position = 0
        while (position := _next_value(text, position)) < len(text):
            try:
                record, position = _DECODER.raw_decode(text, position)
            except json.JSONDecodeError:
                break
            yield record
            count += 1
        rest = text[position:]
    if rest or end != "]":
        raise ValueError(f"it is no whole JSON array: what follows object {count} is broken or cut off")


def _next_value(text: str, position: int) -> int:
    """Where the next value begins: brackets, commas and spaces are passed over."""
    while position < len(text) and text[position] in "[], \r\n\t":
        position += 1
    return position


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            "parquet files need pyarrow, which is not installed",
            where=str(path),
            hint='pip install "spearrl[envs]", or write .jsonl',
        ) from error
    for batch in parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()
