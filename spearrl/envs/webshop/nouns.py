"""The nouns of a product title, for the reward's title score: by spaCy where it is installed with a model, else by a word list."""

from __future__ import annotations

import importlib.util
import re
from functools import cache, lru_cache
from typing import Any, Protocol

MODELS = ("en_core_web_lg", "en_core_web_sm")  # best first
NOUN_TAGS = ("NOUN", "PROPN")

_TOKEN = re.compile(r"[^\W_]+(?:[.’'][^\W_]+)*")
_POSSESSIVE = re.compile(r"[’']s$")
_FUNCTION_WORDS = """
    a about above across after again against all also an and any are around as at be been before below between both but by can do does down
    during each either etc even ever every for from had has have he her hers his how i if in inside into is it its just may more most my near
    no nor not of on once one only onto or other our out outside over own per she so some such than that the their them then there these they
    this those through to too two under until up upon us very via was we were what when where which while who why will with within without
    you your
"""
_ADJECTIVES = """
    additional american ancient asian automatic available basic beautiful big bold brief bright broad cheap chic clean clear
    cold comfy compact complete cool cozy creamy crisp cute daily damp dark deep delicate delicious different dry dual durable easy elastic electric
    electronic elegant empty essential european excellent exquisite extra fancy fast fat favorite few final fine firm flat flexible formal free
    fresh full fun fuzzy gentle genuine glossy good gorgeous great half handmade handy happy hard healthy heavy hidden high hot huge human
    hypoallergenic ideal individual indoor large late latest lean left lightweight little long loose loud low lower luxury main many matte medical
    mens metallic mini modern multi mutual narrow native natural neat new nice non old optical organic original other outdoor own perfect personal
    physical plain plush polite popular premium pretty previous prime proper pure quick quiet rapid rare raw ready real regular reliable rich
    right rough round royal rustic safe same scenic seasonal secure sensitive separate several shallow sharp sheer shiny short silent silky
    similar simple single sleek slight slim slow small smooth soft solid special stable standard steady sticky stiff straight strong sturdy sweet
    tall tender thick thin tidy tight tiny total tough traditional tropical true unique universal upper usual vertical vintage
    visible visual vivid warm waterproof wet whole wide wild wireless womens wooden young
"""
_NOT_NOUNS = frozenset((_FUNCTION_WORDS + _ADJECTIVES).split())
_ADJECTIVE_ENDINGS = ("able", "ible", "ful", "less", "ous", "proof")
_ALWAYS_NOUNS = frozenset(("assembly", "belly", "family", "jelly", "poly", "supply", "table", "cable", "vegetable"))


class NounTagger(Protocol):
    """Finds nouns; `name` says in every result which one did."""

    name: str

    def nouns(self, title: str) -> list[str]:
        """The title's nouns in lower case, in order, repeats kept."""
        ...


class SpacyTagger:
    """The original's tagger. Loads the model when first used."""

    def __init__(self, model: str):
        self.name = f"spacy:{model}"
        self._model = model
        self._pipeline: Any = None
        self._cached = lru_cache(maxsize=1 << 16)(self._tag)

    def nouns(self, title: str) -> list[str]:
        """Words that spaCy tags NOUN or PROPN."""
        return list(self._cached(title))

    def _tag(self, title: str) -> tuple[str, ...]:
        if self._pipeline is None:
            self._pipeline = importlib.import_module("spacy").load(self._model)
        return tuple(token.text.lower() for token in self._pipeline(title) if token.pos_ in NOUN_TAGS)


class LexiconTagger:
    """The fallback: in a product title every word counts as a noun that is no function word, adjective, participle, adverb or measure."""

    name = "lexicon"

    def nouns(self, title: str) -> list[str]:
        """Words that are nouns by the lists and endings of this module."""
        return list(_by_lexicon(title))


@lru_cache(maxsize=1 << 16)
def _by_lexicon(title: str) -> tuple[str, ...]:
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


@cache
def default_tagger() -> NounTagger:
    """spaCy with the best model installed, else the word list."""
    if importlib.util.find_spec("spacy"):
        for model in MODELS:
            if importlib.util.find_spec(model):
                return SpacyTagger(model)
    return LexiconTagger()
