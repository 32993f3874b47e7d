"""benchmarks/logprobs.py on a small head: what it writes, and what it calls a failure."""

from __future__ import annotations

import json

import pytest

from benchmarks import logprobs


def test_it_measures_the_ways_that_are_there(tmp_path, monkeypatch, capsys):
    file = tmp_path / "logprobs.json"
    shape = ["--vocabulary", "9000", "--width", "8", "--positions", "40", "--repeats", "1", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["logprobs", *shape, "--no-memory", "--check", "--json", str(file)])
    assert logprobs.main() == 0
    report = json.loads(file.read_text())
    assert [case["head"] for case in report["cases"]] == ["trained", "frozen"]
    for case in report["cases"]:
        own = case["ways"]["spearrl"]
        assert case["ways"]["plain"]["time_ratio"] == 1 and own["time_ratio"] > 0 and own["logprobs"] < 1e-5
        assert own["grad_hidden"] < 1e-5 and ("grad_head" in own) == (case["head"] == "trained")
    assert "of plain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("own", "missed"),
    [
        ({"logprobs": 1e-6, "memory_share": 0.04, "time_ratio": 0.9}, []),
        ({"logprobs": 2e-5, "memory_share": 0.04, "time_ratio": 0.9}, ["error"]),
        ({"logprobs": 1e-6, "memory_share": 0.06, "time_ratio": 1.1}, ["memory_share", "time_ratio"]),
    ],
)
def test_the_bars(own, missed):
    case = {"vocabulary": 152_000, "positions": 1024, "dtype": "fp32", "head": "trained", "ways": {"spearrl": own}}
    found = logprobs.failures([case])
    assert len(found) == len(missed) and all(name in line for name, line in zip(missed, found, strict=True))
