"""The nouns of a product title, for the reward: by spaCy where it is installed with a model, else by word lists."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

from spearrl.config.tables import table

MODELS = ("en_core_web_lg", "en_core_web_sm")  # best first
NOUN_TAGS = ("NOUN", "PROPN")

_TOKEN = re.compile(r"[^\W_]+(?:[.’'][^\W_]+)*")
_POSSESSIVE = re.compile(r"[’']s$")
_WORDS = {name: tuple(words.split()) for name, words in table(__file__, "words.toml").items()}
_NOT_NOUNS = frozenset((*_WORDS["function_words"], *_WORDS["adjectives"]))
_ADJECTIVE_ENDINGS, _ALWAYS_NOUNS = _WORDS["adjective_endings"], frozenset(_WORDS["always_nouns"])


class NounTagger(NamedTuple):
    """Finds the nouns of a title: in lower case, in order, repeats kept. `name` says in every result which one did."""

    name: str
    nouns: Callable[[str], tuple[str, ...]]


@cache
def _pipeline(model: str) -> Any:
    return importlib.import_module("spacy").load(model)


def _tagged_nouns(model: str, title: str) -> tuple[str, ...]:
    """Words that spaCy tags NOUN or PROPN, as the original has it. The model is loaded when first used."""
    return tuple(token.text.lower() for token in _pipeline(model)(title) if token.pos_ in NOUN_TAGS)


def _listed_nouns(title: str) -> tuple[str, ...]:
    """Every word of a title that is no function word, adjective, participle, adverb or measure, by words.toml."""
    tokens = (_POSSESSIVE.sub("", token) for token in _TOKEN.findall(title))
    return tuple(token.lower() for token in tokens if _is_noun(token))


def _is_noun(token: str) -> bool:
    word = token.lower()
    if word in _ALWAYS_NOUNS:
        return True
    if word in _NOT_NOUNS or len(word) < 2 or word.isdigit():
        return False
    if word[0].isdigit():
        return any(char.isupper() for char in token)  # a model number (921ORB, 4K), not a measure (18x18, 2pcs)
    participle = len(word) > 4 and word.endswith("ed") and not word.endswith("eed")
    adverb = len(word) > 4 and word.endswith("ly")
    return not (participle or adverb or (len(word) > 5 and word.endswith(_ADJECTIVE_ENDINGS)))


LEXICON = NounTagger("lexicon", lru_cache(maxsize=1 << 16)(_listed_nouns))


@cache
def default_tagger() -> NounTagger:
    """spaCy with the best model installed, else the word list."""
    installed = [model for model in MODELS if importlib.util.find_spec("spacy") and importlib.util.find_spec(model)]
    if not installed:
        return LEXICON
    return NounTagger(f"spacy:{installed[0]}", lru_cache(maxsize=1 << 16)(partial(_tagged_nouns, installed[0])))
