"""Whether an answer is right: SQuAD's normalisation (arXiv 1606.05250, as Search-R1 uses it), exact match and F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and articles (but for a text of nothing else), single spaces."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join((_ARTICLES.sub(" ", bare).strip() or bare.strip() or text.lower()).split())


def exact(text: str, gold: Sequence[str]) -> bool:
    """Does the answer equal one of the gold ones?"""
    return normalise(text) in {normalise(answer) for answer in gold}


def f1(text: str, gold: Sequence[str]) -> float:
    """The best F1 over words against one of the gold answers, 0 to 1."""
    return max((_f1(normalise(text).split(), normalise(answer).split()) for answer in gold), default=0.0)


def _f1(words: list[str], gold: list[str]) -> float:
    common = (Counter(words) & Counter(gold)).total()
    return 2 * common / (len(words) + len(gold)) if common else float(words == gold)
