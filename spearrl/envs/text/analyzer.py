"""Text to index terms, as Lucene's English analyzer: words by UAX #29, possessives, stop words, Porter stemmer."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from spearrl.config.tables import table

MAX_TOKEN = 255  # Lucene cuts longer words into pieces of this many characters
_TABLES = table(__file__, "analyzer.toml")
STOP_WORDS = frozenset(_TABLES["stop_words"].split())
_SINGLE = {ord(char): kind for kind, chars in _TABLES["single"].items() for char in chars}
_EXTEND = "[XZFGC]*"  # marks belong to the character before them (rule WB4)


_RANGES = [
    (int(item.split("-")[0], 16), int(item.split("-")[-1], 16), kind)
    for kind, items in _TABLES["ranges"].items()
    for item in items.split()
]
_CATEGORIES = {"Nd": "N", **dict.fromkeys(("Nl", "Lu", "Ll", "Lt", "Lm", "Lo"), "A")}
_CATEGORIES |= dict.fromkeys(("Mn", "Mc", "Me", "Cf"), "X")


class _Classes(dict[int, str]):
    """Code point to the letter of its word-break class, filled as characters are met (for str.translate)."""

    def __missing__(self, code: int) -> str:
        kind = _SINGLE.get(code) or next((kind for low, high, kind in _RANGES if low <= code <= high), None)
        self[code] = kind or _CATEGORIES.get(unicodedata.category(chr(code)), " ")
        return self[code]


_CLASSES = _Classes()


def _grammar() -> re.Pattern[str]:
    """UAX #29's rules WB5 to WB13, and tr51's emoji sequences, over a string of class letters."""
    x = _EXTEND
    letter, digit, connector = f"[AB]{x}", f"N{x}", f"_{x}"
    word = (
        f"(?:{digit}(?:(?:(?:{connector})*|[,.']{x}){digit})*"
        # after a Hebrew letter a double quote joins another, and a single quote may end the word
        f"|{letter}(?:(?:(?:{connector})*|[:.']{x}|(?<=B)\"{x}(?=B)){letter})*(?:(?<=B)'{x})?)+"
    )
    katakana = f"K{x}(?:(?:{connector})*K{x})*"
    run = f"(?:{katakana}|{word})"
    joined = f"(?:{connector})*{run}(?:(?:{connector})+{run})*(?:{connector})*"
    pictograph = "(?:E[XG]*M|E|M)[XG]*F?"
    emoji = f"Z*{pictograph}(?:Z+{pictograph})*Z*|#X*F?C"
    # taking a run of nothing but connectors or joiners as a whole keeps the search linear
    return re.compile(f"(?:{emoji})|{joined}|(?:T{x})+|[HI]{x}|R{x}R{x}|(?P<nothing>(?:{connector})+|Z+)")


_WORD = _grammar()


def split_words(text: str) -> list[str]:
    """The words of a text by Unicode's word-break rules, like Lucene's StandardTokenizer; punctuation is dropped."""
    spans = (match.span() for match in _WORD.finditer(text.translate(_CLASSES)) if not match.lastgroup)
    return [text[at : min(at + MAX_TOKEN, end)] for begin, end in spans for at in range(begin, end, MAX_TOKEN)]


def analyze(text: str) -> list[str]:
    """Index terms of a text, in order: Lucene's EnglishAnalyzer."""
    terms: list[str] = []
    for chunk in text.split(" "):  # no word holds a space, and most chunks have been seen before
        terms += _terms(chunk)
    return terms


@lru_cache(maxsize=1 << 18)
def _terms(chunk: str) -> tuple[str, ...]:
    lowered = (_without_possessive(word).lower() for word in split_words(chunk))
    return tuple(stem(word) for word in lowered if word not in STOP_WORDS)


def _without_possessive(word: str) -> str:
    return word[:-2] if len(word) >= 2 and word[-1] in "sS" and word[-2] in "'\u2019\uff07" else word


# Porter's stemmer (M. F. Porter, An algorithm for suffix stripping, Program 14(3), 1980) as Lucene has it, with his
# later changes: bli and logi in step 2, and words of one or two letters left alone. The package snowballstemmer lacks
# them (it makes technologi of technology) and takes four times as long. The first suffix of a table that fits decides.
_STEP_2, _STEP_3 = (dict(pair.split("=") for pair in _TABLES[step].split()) for step in ("step_2", "step_3"))
_STEP_4 = {
    suffix: suffix[0] if suffix.endswith("ion") else "" for suffix in _TABLES["step_4"].split()
}  # -ion after s or t


def _shape(word: str) -> str:
    """v for a vowel and c for anything else; y is a vowel after a consonant."""
    shape = ""
    for char in word:
        vowel = char in "aeiou" or (char == "y" and shape.endswith("c"))
        shape += "v" if vowel else "c"
    return shape


def _measure(word: str) -> int:
    return _shape(word).count("vc")


def _short_end(word: str) -> bool:
    """Consonant, vowel, consonant at the end, the last not w, x or y."""
    return _shape(word).endswith("cvc") and word[-1] not in "wxy"


def _replace(word: str, suffixes: dict[str, str], least: int) -> str:
    for suffix, replacement in suffixes.items():
        if word.endswith(suffix):
            base = word[: -len(suffix)]
            measured = base + replacement if suffixes is _STEP_4 else base
            return base + replacement if _measure(measured) > least else word
    return word


def _step_1(word: str) -> str:
    if word.endswith(("sses", "ies")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    if word.endswith("eed"):
        word = word[:-1] if _measure(word[:-3]) > 0 else word
    elif word.endswith(("ed", "ing")):
        base = word[: -2 if word.endswith("ed") else -3]
        word = _mended(base) if "v" in _shape(base) else word
    return word[:-1] + "i" if word.endswith("y") and "v" in _shape(word[:-1]) else word


def _mended(base: str) -> str:
    """A stem that lost -ed or -ing gets back the e it needs, or loses a doubled letter."""
    if base.endswith(("at", "bl", "iz")):
        return base + "e"
    if len(base) > 1 and base[-1] == base[-2] and _shape(base)[-1] == "c":
        return base if base[-1] in "lsz" else base[:-1]
    return base + "e" if _measure(base) == 1 and _short_end(base) else base


def stem(word: str) -> str:
    """Porter's stem of a lower-case word."""
    if len(word) <= 2:
        return word
    word = _step_1(word)
    for suffixes, least in ((_STEP_2, 0), (_STEP_3, 0), (_STEP_4, 1)):
        word = _replace(word, suffixes, least)
    if word.endswith("e"):
        size = _measure(word)
        if size > 1 or (size == 1 and not _short_end(word[:-1])):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word
