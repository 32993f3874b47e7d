"""The table of benchmarks/mutants.py must fit the code: a text that is gone would leave its bug untested in silence."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from benchmarks.mutants import MUTANTS, ROOT, Mutant, occurrences


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.kind}: {m.meaning}")
def test_each_text_occurs_once_and_the_mutant_is_python(mutant: Mutant):
    assert occurrences(mutant) == 1
    source = (ROOT / "spearrl" / mutant.file).read_text()
    changed = source.replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))


def test_every_class_has_four_and_each_its_own_meaning():
    counts = Counter(mutant.kind for mutant in MUTANTS)
    assert set(counts) == {"mask", "group ids", "old_logprobs", "filter", "gamma", "recalibration"}
    assert min(counts.values()) >= 4
    assert len({(mutant.kind, mutant.meaning) for mutant in MUTANTS}) == len(MUTANTS)
