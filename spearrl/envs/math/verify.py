r"""Are two answers the same in mathematics? The program of a judge: it runs in the sandbox, and is never imported.

math-verify reads both and compares them with a tolerance. Where both are exact numbers they are compared exactly, or
to 50 digits, since a tolerance takes 2^{-98} for 10^{-20} and 0 for 10^{-7}.
"""

from typing import Any

import sympy
from math_verify import parse, verify

DIGITS, AGREE = 60, sympy.Float("1e-50")
IMAGINARY = sympy.Symbol("i", real=False)  # what math-verify makes of an i


def equal(prediction: str, answer: str) -> bool:
    """Whether two texts of TeX are the same; false where one of them cannot be read."""
    sides = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (prediction, answer)]
    if not all(sides):
        return False
    exactly = agree(sides[0][0], sides[1][0])
    return bool(verify(sides[1], sides[0], timeout_seconds=None)) if exactly is None else exactly


def agree(first: Any, second: Any) -> bool | None:
    """Whether two values are exactly equal; None where that is not for this function to say."""
    if isinstance(first, sympy.Basic) and isinstance(second, sympy.Basic):
        first, second = (
            side.subs(IMAGINARY, sympy.I) if side.free_symbols == {IMAGINARY} else side for side in (first, second)
        )
        if all(side.is_number and not side.has(sympy.Float) for side in (first, second)):
            return same_number(first.doit(), second.doit())
    if type(first) is not type(second):
        return None
    if isinstance(first, sympy.FiniteSet) and len(first) == len(second):
        table = [[agree(one, other) for other in second] for one in first]
        if all(True in row for row in table):
            return True
        return False if any(set(row) == {False} for row in table) else None
    parts = [list(side.flat()) if isinstance(side, sympy.MatrixBase) else side for side in (first, second)]
    if isinstance(parts[0], list | tuple | sympy.Tuple) and len(parts[0]) == len(parts[1]):
        verdicts = [agree(one, other) for one, other in zip(*parts, strict=True)]
        return False if False in verdicts else True if None not in verdicts else None
    return None


def same_number(first: sympy.Expr, second: sympy.Expr) -> bool | None:
    """Whether two numbers without decimals are equal: rationals exactly, others to 50 digits."""
    if not (first.is_finite and second.is_finite):
        return first == second and first not in (sympy.zoo, sympy.nan)
    difference = first - second
    if first.is_Rational and second.is_Rational:
        return bool(difference == 0)
    gap, *sizes = (abs(sympy.N(value, DIGITS, maxn=4000)) for value in (difference, first, second))
    return bool(gap == 0 or gap <= AGREE * max(sizes)) if gap.is_real else None
