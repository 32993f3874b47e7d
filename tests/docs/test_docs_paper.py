"""The pages about the mathematics: every name in them exists, every example is run as it stands."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from spearrl.config import check, load_config
from spearrl.config.fidelity import FIELDS
from spearrl.config.fields import dotted, leaves, sections
from spearrl.config.grammar import BASES, CONFLICTS, MODULES, GrammarError, algo_settings
from spearrl.config.plugins import load_function
from spearrl.errors import ConfigError
from spearrl.trainer import Trainer
from tests.support.small_run import small_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = {name: (ROOT / "docs" / name).read_text() for name in ("paper.md", "algorithms.md", "your-loss.md")}
SETTINGS = re.compile(rf"(?<![\w./])((?:{'|'.join({key[0] for key in leaves()})})(?:\.[a-z_]+)+)(?!\w*[(/:])")


@cache
def names_in(path: str) -> frozenset[str]:
    """Functions, classes, methods ("Class.method"), class fields and constants of a file."""
    names = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        names |= _named(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for part in node.body for name in _named(part)}
    return frozenset(names)


def _named(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def code_names(page: str) -> list[tuple[str, str]]:
    """(path, name) of every `path::name`."""
    return re.findall(r"([\w./-]+\.py)::([\w.]+)", PAGES[page])


def blocks(page: str) -> dict[str, str]:
    """The files of a page: fenced Python whose first line is a comment with the file's name."""
    return {
        name: f"# {name}\n{text}"
        for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGES[page], re.DOTALL)
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_code_and_every_test_exists(page: str):
    for path, name in code_names(page):
        assert (ROOT / path).exists(), f"{page}: {path}"
        assert name in names_in(path), f"{page}: {path}::{name}"
    for path in re.findall(r"(?<![\w/.-])((?:spearrl|tests)/[\w/]+\.py)", PAGES[page]):
        assert (ROOT / path).exists(), f"{page}: {path}"


def test_there_are_names_to_check():
    names = code_names("paper.md")
    assert (
        sum(path.startswith("spearrl/") for path, _ in names) > 30
        and sum(path.startswith("tests/") for path, _ in names) > 30
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_exists(page: str):
    known = {dotted(key) for key in (*leaves(), *sections()) if key}
    named = set(SETTINGS.findall(PAGES[page]))
    assert len(named) > 5 and not named - known, f"{page}: {sorted(named - known)}"


def test_every_switch_of_the_fidelity_table_is_explained():
    missing = {key for key in FIELDS if key not in PAGES["paper.md"]}
    assert not missing, sorted(missing)


NAME = r"`((?:[a-z_]+|\+)+)`"


def refused_names() -> set[str]:
    """Names that stand before the colon of each refusal."""
    page = PAGES["algorithms.md"]
    rows = page[page.index("## Refused") : page.index("Allowed, but")].splitlines()
    return {name for row in rows if row.startswith("- ") for name in re.findall(NAME, row.split(": ")[0])}


def test_every_word_of_the_grammar_has_its_row_and_every_refusal_is_there():
    assert set(re.findall(r"^- " + NAME + r" \(", PAGES["algorithms.md"], re.MULTILINE)) >= {*BASES, *MODULES}
    told = [set(name.split("+")) for name in refused_names()]
    missing = [
        (c.one, other) for c in CONFLICTS for other in c.others if not any({c.one, other} <= words for words in told)
    ]
    assert not missing


def test_names_said_to_be_refused_are_refused_and_all_others_run():
    bad = refused_names()
    good = {name for page in PAGES.values() for name in re.findall(NAME, page) if "+" in name.strip("+")} - bad
    assert len(bad) > 8 and len(good) > 5
    for name in bad:
        with pytest.raises(GrammarError):
            algo_settings(name)
    for name in good:
        check(load_config(None, [], algo=name, preset="tiny"))


@pytest.mark.parametrize("page", PAGES)
def test_links_to_a_heading_find_it(page: str):
    for target, heading in re.findall(r"\]\(([\w.]*)#([^)]+)\)", PAGES[page]):
        text = (ROOT / "docs" / (target or page)).read_text()
        slugs = {
            re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
            for line in text.splitlines()
            if line.startswith("#")
        }
        assert heading in slugs, f"{page}: {target}#{heading}"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The page's files in an empty folder that can be imported from; gone afterwards."""
    files = blocks("your-loss.md")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)
    load_function.cache_clear()


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_the_examples_pass_their_own_tests(written):
    tests = [value for name, value in vars(module("test_my_loss")).items() if name.startswith("test_")]
    assert len(tests) == 5
    for test in tests:
        test()


def test_the_examples_train(written):
    own = (
        "algo.loss=my_loss:soft_trust",
        "algo.advantage=my_advantage:over_median",
        "run.steps=2",
        "eval.every=0",
        "learner.mini_batches=2",
    )
    trainer = Trainer(small_config(written, *own, "algo.sil.capacity=1", "algo.sil.fill_factor=0.5"))
    remembered, remember = [], trainer.memory.remember

    def spy(step, groups, shaped, credit, old_logprobs):
        remembered.append((shaped, credit))
        return remember(step, groups, shaped, credit, old_logprobs)

    trainer.memory.remember = spy
    trainer.train()
    trainer.close()
    for shaped, credit in remembered:
        turns = shaped.rows.turns
        expected = module("my_advantage").over_median(
            shaped.rewards, turns.group_ids, trajectory_ids=turns.trajectory_ids
        )
        assert torch.equal(credit.turns, expected)
        assert torch.equal(credit.tokens, shaped.rows.scatter(expected).float())
    lines = [json.loads(line) for line in (trainer.run.path / "events.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert len(remembered) == 2 and any(line["policy/distance"] > 0 for line in steps)
    assert any(line["replay/rows"] > 0 and line["sil/distance"] > 0 for line in steps), (
        "nothing was replayed: half of the page is not tested"
    )


def test_a_wrong_signature_is_refused_in_the_words_of_the_page_before_there_is_a_run(written):
    (written / "my_loss.py").write_text(
        blocks("your-loss.md")["my_loss.py"]
        .replace("denominator, drop, ", "denominator, ")
        .replace("soft_trust", "wrong")
    )
    with pytest.raises(ConfigError) as error:
        Trainer(small_config(written, "algo.loss=my_loss:wrong"))
    assert str(error.value) in PAGES["your-loss.md"]
    assert not (written / "small").exists()
