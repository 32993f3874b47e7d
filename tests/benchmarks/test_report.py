"""`make bench`: accepted ratios by kind of machine, what is worse is named, and so is a benchmark that fails."""

from __future__ import annotations

import json

import pytest

from benchmarks import report
from benchmarks.report import Result, accept, table, worse

MACHINE = {"kind": "avx2-2", "commit": "abc", "torch": "2", "cores": 2, "instructions": [], "gib": 8, "python": "3"}


@pytest.fixture
def baselines(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "BASELINES", tmp_path / "baselines")
    monkeypatch.setattr(report, "facts", lambda: MACHINE)
    return tmp_path / "baselines"


def test_accepted_ratios_are_those_of_this_kind_of_machine(baselines):
    accept(Result("step", ratios={"a": 2.000049}), MACHINE)
    accept(Result("step", ratios={"a": 5.0}), {**MACHINE, "kind": "amx-8"})
    assert report.accepted("step", "avx2-2") == {"a": 2.0} and report.accepted("step", "amx-8") == {"a": 5.0}
    assert report.accepted("step", "arm-1") == report.accepted("pure", "avx2-2") == {}
    assert json.loads((baselines / "step.json").read_text())["avx2-2"]["commit"] == "abc"


def test_fifteen_percent_less_is_worse_and_so_is_a_ratio_that_is_gone():
    known = {"a": 2.0, "b": 2.0, "c": 2.0}
    assert worse(Result("step", ratios={"a": 1.71, "b": 1.69, "new": 0.1}), known) == ["c", "b"]
    left_out = Result("step", ratios={"a": 1.71}, missing=["TRL: no .venv-peers"])
    assert worse(left_out, known) == []


def test_the_exit_code_and_the_names(baselines, monkeypatch, capsys):
    accept(Result("step", ratios={"trl / spearrl": 6.0}), MACHINE)
    results = {"step": Result("step", ratios={"trl / spearrl": 5.2}), "pure": Result("pure", ratios={"x": 1.0})}
    monkeypatch.setattr(report, "run", lambda name: results[name])
    assert report.main(["--only", "step", "pure"]) == 0
    assert "| step | trl / spearrl | 5.2 | 6 |  |" in capsys.readouterr().out
    results["step"].ratios["trl / spearrl"] = 5.0
    assert report.main(["--only", "step", "pure"]) == 1
    printed = capsys.readouterr()
    assert "more than 15 % worse: step: trl / spearrl" in printed.err and "WORSE" in printed.out
    assert report.main(["--only", "step", "--accept"]) == 0 and report.accepted("step", "avx2-2")["trl / spearrl"] == 5
    results["pure"].error = "ended with code 1"
    assert report.main(["--only", "pure"]) == 1 and "pure failed" in capsys.readouterr().err


def test_a_benchmark_that_is_not_there_or_leaves_no_result(monkeypatch):
    monkeypatch.setitem(report.BENCHMARKS, "nothing", report.Benchmark())
    assert report.run("nothing").missing == ["benchmarks/nothing.py is not there"]
    monkeypatch.setitem(report.BENCHMARKS, "pure", report.Benchmark(("--help",)))  # ends well, and writes no file
    result = report.run("pure")
    assert result.error == "ended with code 0 and no result"
    assert "| pure | FAILED | ended with code 0 and no result |" in table([result], MACHINE)


def test_files_that_are_a_benchmarks_own_are_read(monkeypatch):
    engine = {"dtype": "bf16", "tokens_per_s": {"spearrl": 300.0, "generate": 100.0, "vllm": 400.0}}
    assert report.of_engine(engine) == {
        "spearrl / generate: tokens/s, bf16": 3.0,
        "spearrl / vllm: tokens/s, bf16": 0.75,
    }
    ways = {"spearrl": {"cpu_ratio": 0.8, "memory_share": 0.04}, "plain": {"cpu_ratio": 1.0, "memory_share": 2.0}}
    case = {"vocabulary": 152_000, "dtype": "fp32", "head": "frozen", "ways": ways}
    assert report.of_logprobs({"cases": [case]}) == {
        "plain / spearrl: processor time, V=152000, fp32, frozen head": 1.25,
        "logits / spearrl: memory, V=152000, fp32, frozen head": 25.0,
    }
    monkeypatch.setattr(report, "engine_missing", lambda: "no model smollm2-135m: make model")
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: True)
    assert report.run("engine") == Result("engine", missing=["no model smollm2-135m: make model"])
