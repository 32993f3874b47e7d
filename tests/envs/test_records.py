"""The one reader of data files."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest

from spearrl.envs.text import records
from spearrl.envs.text.records import read_records
from spearrl.errors import ConfigError

ROWS = [{"a": 1, "text": 'brackets ] [ and "quotes", é'}, {"b": [{}, []]}, {}]


@pytest.mark.parametrize("layout", ["lines", "array", "indented array"])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.jsonl.gz", "x.json.xz"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_every_layout_reads_the_same(tmp_path, monkeypatch, layout, name, chunk):
    monkeypatch.setattr(records, "CHUNK", chunk)
    text = (
        "\n".join(map(json.dumps, ROWS)) if layout == "lines" else json.dumps(ROWS, indent=2 if " " in layout else None)
    )
    opener = {".gz": gzip.open, ".xz": lzma.open}.get((tmp_path / name).suffix, open)
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(f"\n {text}")
    records_read = list(read_records(tmp_path / name, layout="rows"))
    assert [row for _, row in records_read] == ROWS
    assert [number for number, _ in records_read] == ([2, 3, 4] if layout == "lines" else [1, 2, 3])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1}\n\n{"b":\n', "x.jsonl:3: cannot be read: Expecting value"),
        ('[{"a": ' + "[" * 100_000, "cannot be read: .*recursion"),
        ('{"a": ' + "[" * 100_000, "x.jsonl:1: cannot be read: .*recursion"),
        ('[{"a": 1}, {"b": 2', "cannot be read: .*what follows object 1 is broken"),
        ('[{"a": 1},', "cannot be read: .*what follows object 1 is broken"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, text, words):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words) as told:
        list(read_records(tmp_path / "x.jsonl", layout="rows"))
    assert told.value.hint == "expected rows"


@pytest.mark.parametrize("name", ["none.jsonl", "bad.jsonl.gz", "bad.jsonl.xz"])
def test_files_that_cannot_be_opened(tmp_path, name):
    if name.startswith("bad"):
        (tmp_path / name).write_bytes(b"neither of them")
    with pytest.raises(ConfigError, match="^the data: cannot be read"):
        list(read_records(tmp_path / name, layout="rows", where="the data"))


def test_broken_lines_can_be_collected(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\noops\n{"b": 2}')
    complaints: list[str] = []
    records_read = list(read_records(tmp_path / "x.jsonl", layout="rows", on_broken_line=complaints.append))
    assert records_read == [(1, {"a": 1}), (3, {"b": 2})]
    assert len(complaints) == 1 and complaints[0].startswith(f"{tmp_path / 'x.jsonl'}:2: ")
