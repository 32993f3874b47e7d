r"""What an answer says, as text: where it stands in a reply, and its plain form without dress, units and spelling.

Nothing here evaluates what a model wrote.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 1000  # characters of an answer that is judged; a longer one is wrong
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
UNBRACED = re.compile(r"\\[a-zA-Z]+(?:\s*\{[^{}]*\})*|-?[\d.,]*\d|\S")  # what \boxed takes where no brace follows
SYMBOLS = str.maketrans(
    dict(zip("−–—÷’“”，．\u00a0\u2009\u202f", '---/\'"",.   ', strict=True))
    | {"×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "}
    | {"≈": r"\approx ", "∼": r"\sim ", "±": r"\pm ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "}
    | {"∅": r"\emptyset ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "²": "^2", "³": "^3"}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
ROOT = re.compile(r"√\s*(\d+|[a-zA-Z]|\([^()]*\))")
SAME_COMMAND = {"degree": r"^\circ", "degrees": r"^\circ", "neq": r"\ne", "varnothing": r"\emptyset"}
COMMAND = re.compile(r"\\(degrees?|neq|varnothing)(?![a-zA-Z])")
# Commands that change how their argument looks, not what it is.
STYLES = (
    r"\\(?:text|mbox|textbf|textit|textrm|textnormal|texttt|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|underline|"
    r"overline|boxed|fbox|emph|ensuremath|bold)\s*"
)
STYLE, STYLED = re.compile(STYLES), re.compile(rf"{STYLES}\{{([^{{}}]*)\}}")
COLOUR = re.compile(r"\\(?:color|textcolor)\s*\{[^{}]*\}\s*|\\(?:bf|it|rm|tt|large|Large|huge|small)(?![a-zA-Z])\s*")
SPACES = re.compile(r"\\[,;:!]|\\ |~|\\(?:quad|qquad|thinspace|displaystyle|textstyle|limits)(?![a-zA-Z])")
DELIMITERS = ((r"\(", r"\)"), (r"\[", r"\]"), *((mark, mark) for mark in ("$$", "$", "**", "'", '"', "`")))
BEFORE = re.compile(r"(?:\\(?:displaystyle|approx|sim)(?![a-zA-Z])|\\[,;!: ]|~)")
BEHIND = re.compile(r"(?:\\[,;!: ]|~|(?<!\\)\\|[,;]|(?<!\\right)(?<!\.)(?<![ap]\.m)\.)\Z")

NUMBER = re.compile(r"([+-]?)\s*(\d{1,3}(?:,\d{3})+|\d{1,40})?(\.\d{1,40})?(?:[eE]([+-]?\d{1,3}))?", re.ASCII)
MONEY = re.compile(r"\\\$|[$€£]|\\(?:euro|pounds)(?![a-zA-Z])|\b(?:USD|EUR|GBP|dollars?|euros?|cents?|pounds?)\b")
PER_CENT = re.compile(r"\\?%|\bper ?cent\b")
DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\b(?:degrees?|deg)\b")
NO_MEASURE = re.compile(f"{MONEY.pattern}|{PER_CENT.pattern}|{DEGREES.pattern}")
REMARK = re.compile(r"\(\s*(?:approximately|approx\.?|exactly)\s*\)")
HEDGE = re.compile(r"\b(?:or|and|not|is|if|to|mod|either|between|at|least|most|maybe|about|when|where|for)\b|[?!=<>]")
EXPONENT = re.compile(r"\^\s*\{?-?\d\}?")
# A value, and the words behind it. Possessive quantifiers (++): no text is tried in exponentially many ways.
UNIT = re.compile(
    r"(.*?[\d})\]!])(?:\s|\\[,;:! ]|~)*+((?:[a-zA-Z]++(?:\s*\^\s*\{?-?\d\}?)?+(?:\s*(?:/|per\b)\s*)?+[\s.()-]*+)++)",
    re.S,
)
LETTER_UNITS = frozenset("mgslhLJNWVKFC")
FUNCTIONS = frozenset(("pi", "sqrt", "exp", "sin", "cos", "tan", "log", "ln", "infty"))


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{…} or \fbox{…} (\boxed 5 too); None: there is none, or it is not closed."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    begin = boxes[-1].end()
    if text[begin : begin + 1] != "{":
        token = UNBRACED.match(text, begin)
        return token[0] if token else None
    end = _closing(text, begin)
    if end is None:  # a backslash that is no TeX may stand before the brace
        end = _closing(text, begin, escapes=False)
    return None if end is None else text[begin + 1 : end]


def plain(answer: str) -> str:
    """An answer without what only dresses it: math delimiters, quotes, fonts, colours, a final stop, a leading ≈."""
    text = ROOT.sub(lambda match: rf"\sqrt{{{match[1].strip('()')}}}", answer.translate(SYMBOLS))
    text = COLOUR.sub("", COMMAND.sub(lambda match: SAME_COMMAND[match[1]], text)).strip()
    while (inner := _undressed(text).strip()) != text:
        text = inner
    return text


def number(text: str) -> Fraction | None:
    """A decimal number, exactly; money, %, degrees and thousands separators do not count. None: it is something else.

    Example: 042, 1,000, 1 000, 42.0 and 4.2e1 are 42, 1000, 1000, 42 and 42.
    """
    if len(text) > LONGEST:
        return None
    digits = NO_MEASURE.sub("", text).replace("{,}", ",")
    digits = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", SPACES.sub("", digits).strip()).rstrip(".")
    match = NUMBER.fullmatch(digits)
    if match is None or not (match[2] or match[3]):
        return None
    return Fraction(f"{match[1]}{(match[2] or '0').replace(',', '')}{match[3] or ''}") * Fraction(10) ** int(
        match[4] or 0
    )


def without_unit(text: str) -> str:
    r"""A value without the unit or noun behind it: 42 km/h, 15\mbox{ cm}^2, 6 apples. "42 or 41" stays as it is."""
    bare = REMARK.sub(" ", NO_MEASURE.sub(" ", STYLED.sub(r" \1 ", text))).strip()
    match = UNIT.fullmatch(bare)
    if match is None:
        words = re.sub(r"\\[a-zA-Z]+|[=<>!]", " ", bare)
        return bare if re.search(r"\d", bare) and not HEDGE.search(words) else text
    value, unit = match[1].strip(), match[2].strip(" .()-")
    names = re.findall(r"[a-zA-Z]+", unit)
    unbalanced = any(value.count(left) != value.count(right) for left, right in ("{}", "()"))
    if r"\int" in text or re.search(r"\\[a-zA-Z]*\Z", value) or unbalanced or HEDGE.search(EXPONENT.sub("", unit)):
        return text
    letters = [name for name in names if len(name) == 1]
    if not LETTER_UNITS.issuperset(letters) or (len(letters) == len(names) and number(value) is None):
        return text
    return text if len(names) == 1 and names[0] in FUNCTIONS else value


def words(text: str) -> str:
    """A text answer as it compares: without case, unless it is one letter; (C) is C."""
    bare = SPACES.sub(" ", STYLED.sub(r"\1", text)).replace("{", "").replace("}", "")
    bare = " ".join(bare.split()).strip(" .,;")
    if re.fullmatch(r"\([A-Za-z]\)", bare):
        bare = bare[1]
    return bare if len(bare) == 1 else bare.casefold()


def as_tex(text: str) -> str:
    """Python's spelling of mathematics as TeX's: pi/2, x**2, sqrt(3), exp(2), 3*x, 3e8, Fraction(3, 4)."""
    text = re.sub(r"\bFraction\(\s*(-?\d+)\s*,\s*(\d+)\s*\)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\a-zA-Z])exp\s*\(([^()]*)\)", r"e^{\1}", text)
    text = re.sub(r"(?<![\\a-zA-Z])(pi|infty|sin|cos|tan|ln|log)(?![a-zA-Z])", r"\\\1 ", text)
    text = re.sub(r"\*\*\s*(-?\w+|\([^()]*\))", lambda match: "^{" + match[1].strip("()") + "}", text)
    text = re.sub(r"(?<![\\^*])\*(?!\*)", r" \\cdot ", text)
    return re.sub(r"(?<![a-zA-Z\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])", r"\1 \\cdot 10^{\2}", text)


def entries(text: str) -> list[str]:
    """The entries of a list "a, b", cut at commas outside brackets; one entry where there is no comma."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _undressed(text: str) -> str:
    """One layer of dress less; the same text where there is none."""
    for begin, end in DELIMITERS:
        inner = text[len(begin) : len(text) - len(end)]
        framed = len(text) > len(begin + end) and text.startswith(begin) and text.endswith(end)
        if framed and begin not in inner and not (begin == "$" and text.endswith(r"\$")):
            return inner
    match = STYLE.match(text)
    brace = match.end() if match else 0
    if text[brace : brace + 1] == "{" and _closing(text, brace) == len(text) - 1:
        return text[brace + 1 : -1]
    return BEHIND.sub("", BEFORE.sub("", text, count=1) if BEFORE.match(text) else text)


def _closing(text: str, begin: int, *, escapes: bool = True) -> int | None:
    r"""Where the brace closes that opens at `begin`; \{ and \} are characters, with `escapes`. None: it does not."""
    depth, position = 0, begin
    while position < len(text):
        if escapes and text[position] == "\\":
            position += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
        position += 1
    return None
