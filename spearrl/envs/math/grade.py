r"""Is an answer right? Numbers are compared here, exactly; everything else is judged in a sandbox, under a deadline.

What a model writes is never evaluated in this process: math-verify's parser hands text to sympy, which may run it, or
work on it for ever.
"""

from __future__ import annotations

import re
from fractions import Fraction

from spearrl.envs.math.judge import Judges

BOX = "\\boxed{"
TAIL, BOX_TAIL = 300, 100  # characters that the released rule looks at: for the reply, and for the box in it
LONGEST = 1000  # characters of an answer that is judged; a longer one is wrong
NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d{1,40})?(\.\d{1,40})?\.?", re.ASCII)
SIGNS = re.compile(r"\\[$!,;%]|[$%]")  # dollars, per cent and thin spaces, which say nothing
DROPPED = re.compile(SIGNS.pattern + r"|\s|\\(?:left|right)(?![a-zA-Z])")


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{…} of a text; none where there is no box, or it is not closed."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    depth, begin = 1, start + len(BOX)
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def is_right_as_released(reply: str, answer: str) -> bool:
    r"""SPEAR's release for AIME and DAPO: the last \boxed{} in the last 100 characters is the answer's very text."""
    return boxed(reply[-TAIL:][-BOX_TAIL:]) == answer


def plain_number(text: str) -> Fraction | None:
    """A decimal number, exactly; $, % and thousands separators do not count. Example: 042 and 42.0 are 42."""
    match = NUMBER.fullmatch(SIGNS.sub("", text).strip()) if len(text) <= LONGEST else None
    if match is None or not (match[2] or match[3]):
        return None
    return Fraction(f"{match[1]}{(match[2] or '0').replace(',', '')}{match[3] or ''}")


def is_right(prediction: str | None, answer: str, judges: Judges | None) -> bool:
    """Whether a boxed answer equals the reference.

    `judges` decide where one of them is no plain number; without judges it then is wrong, unless the texts agree.
    """
    if prediction is None or len(prediction) > LONGEST:
        return False
    numbers = plain_number(prediction), plain_number(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if DROPPED.sub("", prediction) == DROPPED.sub("", answer):
        return True
    return judges is not None and judges.equal(prediction, answer)
