"""Text to index terms as Lucene's English analyser makes them: words by UAX #29, possessive filter, stop words, Porter stemmer."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_TOKEN = 255  # Lucene cuts longer words into pieces of this many characters
_STOP_WORDS = "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was will with"
STOP_WORDS = frozenset(_STOP_WORDS.split())

# One letter per word-break class. Letters of the classes: A letter, B Hebrew letter, N digit, K katakana, _ connector,
# : letter joiner, ',' digit joiner, . joiner of both, ' single quote, " double quote, X extending mark, Z zero-width joiner,
# H Han, I hiragana, T South-East Asian, E pictograph, M skin tone, F emoji presentation selector, R regional indicator, C keycap, # its sign, G tag.
_SINGLE = {
    ":": ":·\u0387\u055f\u05f4\u2027\ufe13\ufe55\uff1a",
    ",": ",;\u037e\u0589\u060c\u060d\u066c\u07f8\u2044\ufe10\ufe14\ufe50\ufe54\uff0c\uff1b",
    ".": ".\u2018\u2019\u2024\ufe52\uff07\uff0e",
    "_": "_\u203f\u2040\u2054\ufe33\ufe34\ufe4d\ufe4e\ufe4f\uff3f",
    "'": "'",
    '"': '"',
    "Z": "\u200d",
    "F": "\ufe0f",
    "C": "\u20e3",
    "#": "#*",
    "N": "\u066b",
    "X": "\u200c\uff9e\uff9f",
    " ": "\u200b",
}
_JOINERS = {ord(char): kind for kind, chars in _SINGLE.items() for char in chars}
_RANGES = {
    "R": "1F1E6-1F1FF",
    "M": "1F3FB-1F3FF",
    "G": "E0020-E007F",
    "K": "3031-3035 309B-309C 30A0-30FA 30FC-30FF 31F0-31FF 32D0-32FE 3300-3357 FF66-FF9D 1B000",
    "I": "3041-3096 309D-309F 1B001-1B11E 1F200",
    "H": "2E80-2E99 2E9B-2EF3 2F00-2FD5 3005 3007 3021-3029 3038-303B 3400-4DBF 4E00-9FFF F900-FAD9 20000-323AF",
    "B": "05D0-05EA 05EF-05F2 FB1D FB1F-FB28 FB2A-FB36 FB38-FB4F",
    # Extended_Pictographic (Unicode 11); the letters ©, ®, ™ are in it
    "E": "A9 AE 203C 2049 2122 2139 2194-2199 21A9-21AA 231A-231B 2328 2388 23CF 23E9-23F3 23F8-23FA 24C2 25AA-25AB 25B6 25C0 25FB-25FE"
    " 2600-2605 2607-2612 2614-2685 2690-2705 2708-2712 2714 2716 271D 2721 2728 2733-2734 2744 2747 274C 274E 2753-2755 2757 2763-2767"
    " 2795-2797 27A1 27B0 27BF 2934-2935 2B05-2B07 2B1B-2B1C 2B50 2B55 3030 303D 3297 3299 1F000-1F0FF 1F10D-1F10F 1F12F 1F16C-1F171"
    " 1F17E-1F17F 1F18E 1F191-1F19A 1F1AD-1F1E5 1F201-1F20F 1F21A 1F22F 1F232-1F23A 1F23C-1F23F 1F249-1F3FA 1F400-1F53D 1F546-1F64F"
    " 1F680-1F6FF 1F774-1F77F 1F7D5-1F7FF 1F80C-1F80F 1F848-1F84F 1F85A-1F85F 1F888-1F88F 1F8AE-1F8FF 1F90C-1F93A 1F93C-1F945"
    " 1F947-1FAFF 1FC00-1FFFD",
}
_SOUTH_EAST_ASIAN = "0E01-0E3A 0E40-0E4E 0E81-0ECD 0EDC-0EDF 1000-103F 1050-108F 109A-109F 1780-17D3 17D7 17DC-17DD 1950-19DF 1A20-1A7C AA60-AADF"
_EXTEND = "[XZFGC]*"  # marks belong to the character before them (rule WB4)


def _spans(ranges: str) -> list[tuple[int, int]]:
    pairs = (item.split("-") for item in ranges.split())
    return [(int(pair[0], 16), int(pair[-1], 16)) for pair in pairs]


_TABLE = [(low, high, kind) for kind, ranges in {**_RANGES, "T": _SOUTH_EAST_ASIAN}.items() for low, high in _spans(ranges)]
_BY_CATEGORY = {"Nd": "N", "Nl": "A", "Mn": "X", "Mc": "X", "Me": "X", "Cf": "X"} | dict.fromkeys(("Lu", "Ll", "Lt", "Lm", "Lo"), "A")


class _Classes(dict[int, str]):
    """Code point to the letter of its word-break class, filled as characters are met (for str.translate)."""

    def __missing__(self, code: int) -> str:
        kind = _JOINERS.get(code) or next((kind for low, high, kind in _TABLE if low <= code <= high), None)
        if kind is None:
            circled = 0x24B6 <= code <= 0x24E9
            kind = "A" if circled else _BY_CATEGORY.get(unicodedata.category(chr(code)), " ")
        self[code] = kind
        return kind


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


def words(text: str) -> list[str]:
    """The words of a text by Unicode's word-break rules, as Lucene's StandardTokenizer finds them; punctuation is dropped."""
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
    lowered = (_without_possessive(word).lower() for word in words(chunk))
    return tuple(stem(word) for word in lowered if word not in STOP_WORDS)


def _without_possessive(word: str) -> str:
    return word[:-2] if len(word) >= 2 and word[-1] in "sS" and word[-2] in "'\u2019\uff07" else word


# Porter's stemmer (M. F. Porter, An algorithm for suffix stripping, Program 14(3), 1980), with his later changes: bli and logi in step 2,
# and words of one or two letters left alone. In each table the first suffix that fits decides, so longer ones come first.
_STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble", "alli": "al", "entli": "ent", "eli": "e",
    "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous",
    "aliti": "al", "iviti": "ive", "biliti": "ble", "logi": "log",
}  # fmt: skip
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_DROPPED_4 = "al ance ence er ic able ible ant ement ment ent sion tion ou ism ate iti ous ive ize"
_STEP_4 = {suffix: suffix[0] if suffix.endswith("ion") else "" for suffix in _DROPPED_4.split()}  # -ion goes after s or t only


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


def _double_end(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _shape(word)[-1] == "c"


def _replace(word: str, table: dict[str, str], least: int) -> str:
    for suffix, replacement in table.items():
        if word.endswith(suffix):
            kept = word[: -len(suffix)] + (replacement if table is _STEP_4 else "")
            return word[: -len(suffix)] + replacement if _measure(kept) > least else word
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
    if word.endswith("y") and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    return word


def _mended(base: str) -> str:
    """A stem that lost -ed or -ing gets back the e it needs, or loses a doubled letter."""
    if base.endswith(("at", "bl", "iz")):
        return base + "e"
    if _double_end(base):
        return base if base[-1] in "lsz" else base[:-1]
    return base + "e" if _measure(base) == 1 and _short_end(base) else base


def stem(word: str) -> str:
    """Porter's stem of a lower-case word."""
    if len(word) <= 2:
        return word
    word = _step_1(word)
    for table, least in ((_STEP_2, 0), (_STEP_3, 0), (_STEP_4, 1)):
        word = _replace(word, table, least)
    if word.endswith("e"):
        size = _measure(word)
        if size > 1 or (size == 1 and not _short_end(word[:-1])):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word
