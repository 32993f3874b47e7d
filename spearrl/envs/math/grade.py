r"""Is an answer right? Texts and numbers are compared here, exactly; everything else is judged in a sandbox.

What a model writes is never evaluated in this process: math-verify's parser hands text to sympy, which may run it, or
work on it for ever.
"""

from __future__ import annotations

import re

from spearrl.envs.math.answers import LONGEST, as_tex, boxed, entries, number, plain, without_unit, words
from spearrl.envs.math.judge import Judges

TAIL, BOX_TAIL = 300, 100  # characters that the released rule looks at: for the reply, and for the box in it
IN_BASE = re.compile(r"(\d+)_\{?(\d+)\}?")  # 204_5 is 204 in base 5


def is_right_as_released(reply: str, answer: str) -> bool:
    r"""SPEAR's release for AIME and DAPO: the last \boxed{} in the last 100 characters is the answer's very text."""
    return boxed(reply[-TAIL:][-BOX_TAIL:]) == answer


def is_right(prediction: str | None, answer: str, judges: Judges | None) -> bool:
    """Whether a boxed answer equals the reference.

    `judges` decide where texts and numbers do not; without judges it then is wrong.

    Raises:
        EnvironmentFault: there is no judge to be had.
    """
    if prediction is None or len(prediction) > LONGEST:
        return False
    prediction, answer = plain(prediction), plain(answer)
    decided = _decided_by_text(prediction, answer)
    if decided is not None:
        return decided
    values = without_unit(prediction), without_unit(answer)
    numbers = number(values[0]), number(values[1])
    if None not in numbers:
        return numbers[0] == numbers[1]
    if re.search(r"\d\s*!*\?", prediction):  # "42?" is a guess
        return False
    return judges is not None and judges.equal(as_tex(values[0]), as_tex(values[1]))


def _decided_by_text(prediction: str, answer: str) -> bool | None:
    """Whether two plain answers are equal, where their texts decide; None: they do not."""
    texts = prediction.replace(" ", ""), answer.replace(" ", "")
    in_base = IN_BASE.fullmatch(texts[0]), IN_BASE.fullmatch(texts[1])
    if in_base[1]:  # a number without its base is read in the answer's
        return in_base[0].groups() == in_base[1].groups() if in_base[0] else texts[0] == in_base[1][1]
    if in_base[0]:
        return False
    if texts[0] == texts[1] or words(prediction) == words(answer) != "":
        return True
    lists = entries(prediction), entries(answer)
    if len(lists[0]) > 1 and len(lists[0]) == len(lists[1]):
        one_number = (
            number(answer) is not None
        )  # "100,200" may be one number too: its entries count as they are written
        values = [sorted(entry if one_number else str(number(entry)) for entry in parts) for parts in lists]
        if "None" not in values[0] and values[0] == values[1]:
            return True
    return None
